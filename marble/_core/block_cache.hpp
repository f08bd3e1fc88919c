// Blocks that were read before, up to a number of bytes.
//
// Layout: each file has a slot for each of its blocks, so that a block that is there is found without a search. The
// slots that are taken lie in a ring in which a hand goes round: a block that was asked for since the hand last came by
// is passed over once, another one goes.
// Ownership: slots share blocks; who has one keeps it, whatever the cache lets go. A file empties its slots when it is
// closed, so that a mapping does not outlive its readers.
// Thread safety: every function may be called from any thread at any time; `Drop` when nobody uses those slots any more.
// Invariants:
//   1. No block is let go under a lock: the memory behind it may belong to Python, and freeing it may wait for the GIL.
//   2. The charge of all blocks never passes `bytes_max`; a block that alone would is not kept.
//   3. A slot is filled and emptied under `mutex_`, which is taken before the slot's own lock, never after it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace marble {

struct Block;

// A place for one block of a file.
class BlockSlot {
 public:
  // The block, or null. It counts as asked for.
  std::shared_ptr<const Block> Get() noexcept {
    Lock();
    std::shared_ptr<const Block> block = block_;
    Unlock();
    // Written only where it changes something: readers in other threads have this line too.
    if (block != nullptr && !asked_.load(std::memory_order_relaxed)) asked_.store(true, std::memory_order_relaxed);
    return block;
  }

 private:
  friend class BlockCache;
  // Held for the copy of one pointer.
  void Lock() noexcept {
    while (locked_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  void Unlock() noexcept { locked_.clear(std::memory_order_release); }
  std::shared_ptr<const Block> Exchange(std::shared_ptr<const Block> block) noexcept {
    Lock();
    std::swap(block_, block);
    Unlock();
    return block;
  }

  std::atomic_flag locked_;
  std::atomic<bool> asked_{false};  // Since the hand last came by.
  std::shared_ptr<const Block> block_;
  // Of the cache:
  uint64_t bytes_ = 0;
  size_t place_ = 0;  // In the ring, while there is a block.
};

class BlockCache {
 public:
  struct Stats {
    uint64_t bytes = 0, blocks = 0, hits = 0, misses = 0;
  };

  explicit BlockCache(uint64_t bytes_max) : bytes_max_(bytes_max) {}

  uint64_t bytes_max() const noexcept { return bytes_max_; }

  // The block in `slot`, or null.
  std::shared_ptr<const Block> Get(BlockSlot* slot) noexcept {
    auto block = slot->Get();
    (block != nullptr ? hits_ : misses_).fetch_add(1, std::memory_order_relaxed);
    return block;
  }

  // Keeps `block` in `slot`, and gives the one that is to be used: that of another thread, if it was faster.
  std::shared_ptr<const Block> Put(BlockSlot* slot, std::shared_ptr<const Block> block, uint64_t bytes) {
    if (bytes > bytes_max_) return block;
    std::vector<std::shared_ptr<const Block>> gone;
    const std::lock_guard<std::mutex> guard(mutex_);
    // `gone` was made first, and so is destroyed after the lock is given back.
    if (auto other = slot->Get()) return other;
    // Room first: no allocation may fail half-way.
    if (ring_.size() == ring_.capacity()) ring_.reserve(ring_.size() * 2 + 16);
    while (bytes_ + bytes > bytes_max_) Evict(&gone);
    slot->bytes_ = bytes;
    slot->place_ = ring_.size();
    slot->asked_.store(false, std::memory_order_relaxed);
    slot->Exchange(block);
    ring_.push_back(slot);
    bytes_ += bytes;
    return block;
  }

  // Empties the slots of a file.
  void Drop(BlockSlot* slots, size_t count) noexcept {
    for (size_t i = 0; i < count; ++i) {
      std::shared_ptr<const Block> gone;
      const std::lock_guard<std::mutex> guard(mutex_);
      gone = Remove(&slots[i]);
    }
  }

  Stats Count() noexcept {
    const std::lock_guard<std::mutex> guard(mutex_);
    return {bytes_, ring_.size(), hits_.load(std::memory_order_relaxed), misses_.load(std::memory_order_relaxed)};
  }

 private:
  std::shared_ptr<const Block> Remove(BlockSlot* slot) noexcept {
    std::shared_ptr<const Block> block = slot->Exchange(nullptr);
    if (block == nullptr) return block;
    bytes_ -= slot->bytes_;
    ring_[slot->place_] = ring_.back();
    ring_[slot->place_]->place_ = slot->place_;
    ring_.pop_back();
    return block;
  }
  void Evict(std::vector<std::shared_ptr<const Block>>* gone) {
    gone->reserve(gone->size() + 1);
    for (;; ++hand_) {
      if (hand_ >= ring_.size()) hand_ = 0;
      if (!ring_[hand_]->asked_.exchange(false, std::memory_order_relaxed)) break;
    }
    gone->push_back(Remove(ring_[hand_]));
  }

  const uint64_t bytes_max_;
  std::atomic<uint64_t> hits_{0};
  std::atomic<uint64_t> misses_{0};
  std::mutex mutex_;
  std::vector<BlockSlot*> ring_;
  size_t hand_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace marble
