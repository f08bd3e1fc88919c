// Blocks that were read before, up to a number of bytes.
//
// Layout: shards by hash, each a map and a ring in which a hand goes round: a block that was asked for since the hand
// last came by is passed over once, another one goes.
// Ownership: the cache shares blocks; who has one keeps it, whatever the cache lets go. A file takes its blocks out when
// it is closed, so that a mapping does not outlive its readers.
// Thread safety: every function may be called from any thread at any time.
// Invariants:
//   1. No block is let go under a lock: the memory behind it may belong to Python, and freeing it may wait for the GIL.
//   2. The charge of a shard's blocks never passes its share of `bytes_max`; a block that alone would is not kept.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace marble {

struct Block;

class BlockCache {
 public:
  struct Stats {
    uint64_t bytes = 0, blocks = 0, hits = 0, misses = 0;
  };

  explicit BlockCache(uint64_t bytes_max) : bytes_max_(bytes_max) {
    // Small caches are not divided: a shard should hold some blocks at least.
    size_t shards = 1;
    while (shards < kShardsMax && bytes_max / (shards * 2) >= kShardBytesMin) shards *= 2;
    shards_ = std::vector<Shard>(shards);
  }

  uint64_t bytes_max() const noexcept { return bytes_max_; }
  // A number for a file that no other file of this cache has or had.
  uint64_t NewFile() noexcept { return next_file_.fetch_add(1, std::memory_order_relaxed); }

  std::shared_ptr<const Block> Get(uint64_t file, uint64_t block) noexcept {
    Shard& shard = ShardOf(file, block);
    const std::lock_guard<std::mutex> guard(shard.mutex);
    const auto found = shard.places.find({file, block});
    if (found == shard.places.end()) {
      ++shard.misses;
      return nullptr;
    }
    ++shard.hits;
    Held& held = shard.ring[found->second];
    held.asked = true;
    return held.block;
  }

  // Keeps `block`, and gives the one that is to be used: that of another thread, if it was faster.
  std::shared_ptr<const Block> Put(uint64_t file, uint64_t number, std::shared_ptr<const Block> block, uint64_t bytes) {
    Shard& shard = ShardOf(file, number);
    const uint64_t most = bytes_max_ / shards_.size();
    if (bytes > most) return block;
    std::vector<std::shared_ptr<const Block>> gone;
    const std::lock_guard<std::mutex> guard(shard.mutex);
    // `gone` was made first, and so is destroyed after the lock is given back.
    const auto found = shard.places.find({file, number});
    if (found != shard.places.end()) return shard.ring[found->second].block;
    while (shard.bytes + bytes > most) shard.Evict(&gone);
    // Room first: no allocation may fail between the two.
    if (shard.ring.size() == shard.ring.capacity()) shard.ring.reserve(shard.ring.size() * 2 + 16);
    shard.places.emplace(std::pair{file, number}, shard.ring.size());
    shard.ring.push_back({file, number, block, bytes, false});
    shard.bytes += bytes;
    return block;
  }

  // Lets go of the blocks [0, blocks) of a file.
  void Drop(uint64_t file, uint64_t blocks) noexcept {
    for (uint64_t number = 0; number < blocks; ++number) {
      Shard& shard = ShardOf(file, number);
      std::shared_ptr<const Block> gone;
      const std::lock_guard<std::mutex> guard(shard.mutex);
      const auto found = shard.places.find({file, number});
      if (found != shard.places.end()) gone = shard.Remove(found->second);
    }
  }

  Stats Count() noexcept {
    Stats stats;
    for (Shard& shard : shards_) {
      const std::lock_guard<std::mutex> guard(shard.mutex);
      stats.bytes += shard.bytes;
      stats.blocks += shard.ring.size();
      stats.hits += shard.hits;
      stats.misses += shard.misses;
    }
    return stats;
  }

 private:
  static constexpr size_t kShardsMax = 16;
  static constexpr uint64_t kShardBytesMin = 4 << 20;
  using Name = std::pair<uint64_t, uint64_t>;

  static uint64_t Mix(uint64_t file, uint64_t block) noexcept {
    return (file * 0x9e3779b97f4a7c15ULL + block) * 0xff51afd7ed558ccdULL;
  }
  struct HashName {
    size_t operator()(const Name& name) const noexcept { return Mix(name.first, name.second) >> 16; }
  };
  struct Held {
    uint64_t file = 0, number = 0;
    std::shared_ptr<const Block> block;
    uint64_t bytes = 0;
    bool asked = false;  // Since the hand last came by.
  };
  struct Shard {
    std::mutex mutex;
    std::unordered_map<Name, size_t, HashName> places;  // In `ring`.
    std::vector<Held> ring;
    size_t hand = 0;
    uint64_t bytes = 0, hits = 0, misses = 0;

    std::shared_ptr<const Block> Remove(size_t place) noexcept {
      Held& held = ring[place];
      std::shared_ptr<const Block> block = std::move(held.block);
      bytes -= held.bytes;
      places.erase({held.file, held.number});
      if (place + 1 < ring.size()) {
        held = std::move(ring.back());
        places.find({held.file, held.number})->second = place;
      }
      ring.pop_back();
      return block;
    }
    void Evict(std::vector<std::shared_ptr<const Block>>* gone) {
      gone->reserve(gone->size() + 1);
      for (;; ++hand) {
        if (hand >= ring.size()) hand = 0;
        if (!std::exchange(ring[hand].asked, false)) break;
      }
      gone->push_back(Remove(hand));
    }
  };

  Shard& ShardOf(uint64_t file, uint64_t block) noexcept {
    return shards_[(Mix(file, block) >> 56) & (shards_.size() - 1)];
  }

  const uint64_t bytes_max_;
  std::atomic<uint64_t> next_file_{1};
  std::vector<Shard> shards_;
};

}  // namespace marble
