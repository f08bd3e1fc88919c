// Runs: immutable sorted indexes over batches that stay where they are.
//
// Layout: a run is two parallel arrays, ascending by key: `words` (eight bytes of the encoded key, big-endian, padded
// with zeros, after the `skip` bytes that all keys of the state begin with) and `refs` (bit 63: tombstone; bits 32-62:
// slot; bits 0-31: row in that slot's source). Slots name the sources: a batch's columns and, for keys longer than
// eight bytes, their encoded bytes.
// Ownership: runs own their arrays and share sources; a source shares the batch's buffers. All by shared_ptr<const>.
// Thread safety: a run and a source never change once others can see them, except `Run::delta`, an atomic memo.
// Invariants:
//   1. Keys of a run ascend strictly: each key at most once.
//   2. Keys of at most eight fixed bytes ("whole" keys) are their word; their sources have no key bytes.
//   3. `Slot::live` is the number of refs of the run into that slot; where it is 0 the source has been let go.
//   4. Every ref, a tombstone's too, names a slot of its run. Slots and rows are fewer than 2^31, so that the base of a
//      merge may be added to a ref without touching other bits.
#pragma once

#include "key_codec.hpp"
#include "key_sort.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace marble {

// How to reach a column of fixed width, bits or bytes: pointers that already count in the array's own offset.
struct ColumnView {
  const uint8_t* validity;  // Null where no row is null.
  const uint8_t* values;    // Fixed width: values; bool: bits; binary: offsets.
  const uint8_t* data;      // Binary only.
  int64_t offset;           // Of row 0 in `validity`, and in `values` of a bool.
  const uint8_t* even = nullptr;  // Binary whose rows all have `width` bytes, which is not 0: those of row 0. Then nobody
  int64_t width = 0;              // needs to fetch offsets.
};

// Rows of one batch (columns in the table's order), or the keys of one delete (no columns).
struct Source {
  int64_t rows = 0;
  int64_t bytes = 0;  // About as many as its rows have, for cutting scans into batches.
  std::vector<std::shared_ptr<arrow::ArrayData>> columns;
  std::vector<ColumnView> views;  // One per column, side by side: reading a row misses the cache for its own sake only.
  std::shared_ptr<const KeyColumn> keys;  // Null when keys are whole.
  uint64_t index = 0;                     // Log index of the write that all rows are from, unless `indexes` is there:
  std::shared_ptr<const uint64_t[]> indexes;  // that of each row.

  // About how many bytes a row has, at most what fits.
  uint32_t RowBytes() const noexcept {
    return rows == 0 ? 0 : static_cast<uint32_t>(std::min<int64_t>(bytes / rows, std::numeric_limits<uint32_t>::max()));
  }
  uint64_t IndexOf(uint32_t row) const noexcept { return indexes == nullptr ? index : indexes[row]; }
};

constexpr uint64_t kTombstone = uint64_t{1} << 63;
constexpr uint32_t kSlotMax = std::numeric_limits<int32_t>::max();
inline uint32_t SlotOf(uint64_t ref) noexcept { return static_cast<uint32_t>((ref & ~kTombstone) >> 32); }
inline uint32_t RowOf(uint64_t ref) noexcept { return static_cast<uint32_t>(ref); }
inline uint64_t MakeRef(uint32_t slot, uint32_t row) noexcept { return uint64_t{slot} << 32 | row; }

// What is true of all keys of a state: they are their word, or they begin with the same `skip` bytes.
struct KeyShape {
  bool whole = false;
  uint64_t skip = 0;  // 0 when whole.
};

// A key as it is compared: its word and, unless keys are whole, all its bytes.
struct KeyView {
  uint64_t word;
  const uint8_t* data;
  uint64_t size;
};

// An array of uint64_t that starts out without values; shrinking gives memory back.
class Words {
 public:
  Words() = default;
  explicit Words(size_t size) {
    if (size == 0) return;
    data_.reset(static_cast<uint64_t*>(std::malloc(size * sizeof(uint64_t))));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  uint64_t* get() noexcept { return data_.get(); }
  const uint64_t* get() const noexcept { return data_.get(); }
  uint64_t& operator[](size_t i) noexcept { return data_.get()[i]; }
  uint64_t operator[](size_t i) const noexcept { return data_.get()[i]; }
  void Shrink(size_t size) noexcept {
    if (size == 0) return data_.reset();
    if (void* smaller = std::realloc(data_.get(), size * sizeof(uint64_t))) {
      (void)data_.release();
      data_.reset(static_cast<uint64_t*>(smaller));
    }
  }

 private:
  struct Free {
    void operator()(uint64_t* data) const noexcept { std::free(data); }
  };
  std::unique_ptr<uint64_t, Free> data_;
};

struct Slot {
  Slot(std::shared_ptr<const Source> source_of, uint32_t live_refs) noexcept
      : source(std::move(source_of)), live(live_refs), row_bytes(source->RowBytes()) {}

  std::shared_ptr<const Source> source;
  uint32_t live;
  uint32_t row_bytes;  // RowBytes of the source: a scan asks every slot, and would fetch each source for that alone.
};

struct Run {
  static constexpr int64_t kUnknown = std::numeric_limits<int64_t>::min();

  Words words;
  Words refs;
  size_t size = 0;
  size_t tombstones = 0;
  std::vector<Slot> slots;
  // Rows that the table gained (or, below zero, lost) by the writes in this run, given all older runs; kUnknown until
  // counted. It depends on what was written before and in this run only, so merging older runs does not change it.
  mutable std::atomic<int64_t> delta{kUnknown};

  KeyView Key(size_t i, const KeyShape& shape) const noexcept {
    if (shape.whole) return {words[i], nullptr, 0};
    const KeyColumn& keys = *slots[SlotOf(refs[i])].source->keys;
    return {words[i], keys.data(RowOf(refs[i])), keys.size(RowOf(refs[i]))};
  }
};

inline int Compare(const KeyView& a, const KeyView& b, const KeyShape& shape) noexcept {
  if (a.word != b.word) return a.word < b.word ? -1 : 1;
  return shape.whole ? 0 : CompareKeys(a.data, a.size, b.data, b.size, shape.skip + 8);
}

// First position in [first, end) of `words` that is not below `word`. Without branches, so that searches may overlap.
inline size_t LowerBoundWord(const uint64_t* words, size_t first, size_t end, uint64_t word) noexcept {
  const uint64_t* base = words + first;
  size_t size = end - first;
  if (size == 0) return first;
  while (size > 1) {
    const size_t half = size / 2;
    base += half & (size_t{0} - (base[half - 1] < word ? size_t{1} : size_t{0}));
    size -= half;
  }
  return static_cast<size_t>(base - words) + (*base < word ? 1 : 0);
}

// As LowerBoundWord from 0 on, for one search alone in words that are not in the processor's caches: the places that three
// halvings may look at are fetched together.
inline size_t LowerBoundWordAlone(const uint64_t* words, size_t size, uint64_t word) noexcept {
  constexpr size_t kLine = 8;
  const uint64_t* base = words;
  while (size > 8 * kLine) {
    const size_t eighth = size / 8;
    for (size_t i = 1; i < 8; ++i) __builtin_prefetch(base + i * eighth - 1);
    size_t below = 0;
    for (size_t step = 4; step > 0; step /= 2) below += base[(below + step) * eighth - 1] < word ? step : 0;
    base += below * eighth;
    size = below == 7 ? size - 7 * eighth : eighth;
  }
  for (size_t at = 0; at < size; at += kLine) __builtin_prefetch(base + at);
  return static_cast<size_t>(base - words) + LowerBoundWord(base, 0, size, word);
}

// First position in [first, end) whose word is above `word`, if none from `first` on is below it. Equal words are mostly few: the steps
// are small at first.
inline size_t EndOfTies(const uint64_t* words, size_t first, size_t end, uint64_t word) noexcept {
  size_t step = 1;
  for (; step <= end - first && words[first + step - 1] == word; step *= 2) first += step;
  size_t stop = std::min(end, first + step - 1);
  while (first < stop) {
    const size_t middle = first + (stop - first) / 2;
    if (words[middle] == word) {
      first = middle + 1;
    } else {
      stop = middle;
    }
  }
  return first;
}

// First position in [first, run.size) whose key is not below `key`; `at` is the first there whose word is not below the
// key's.
inline size_t LowerBoundTail(const Run& run, size_t at, const KeyView& key, const KeyShape& shape) noexcept {
  size_t end = at;
  // Ties are mostly few: step wider and wider, then halve.
  for (size_t step = 1; end < run.size && run.words[end] == key.word; step *= 2) {
    if (Compare(run.Key(end, shape), key, shape) >= 0) break;
    at = end + 1;
    end = std::min(run.size, end + step);
  }
  end = std::min(end, run.size);
  while (at < end) {
    const size_t middle = at + (end - at) / 2;
    const bool below = run.words[middle] < key.word ||
                       (run.words[middle] == key.word && Compare(run.Key(middle, shape), key, shape) < 0);
    if (below) {
      at = middle + 1;
    } else {
      end = middle;
    }
  }
  return at;
}

inline size_t LowerBound(const Run& run, size_t first, const KeyView& key, const KeyShape& shape) noexcept {
  const size_t at = LowerBoundWord(run.words.get(), first, run.size, key.word);
  return shape.whole ? at : LowerBoundTail(run, at, key, shape);
}

constexpr size_t kSearchLanes = 16;  // Searches that wait for memory at the same time.

// For each of `count` keys: `positions[i]` becomes the position of the key in `run`, or run.size where it is not in it.
inline void FindKeys(const Run& run, const KeyView* keys, size_t count, const KeyShape& shape,
                     size_t* positions) noexcept {
  const uint64_t* words = run.words.get();
  for (size_t first = 0; first < count; first += kSearchLanes) {
    const size_t lanes = std::min(kSearchLanes, count - first);
    uint64_t wanted[kSearchLanes];
    size_t at[kSearchLanes] = {};
    for (size_t lane = 0; lane < kSearchLanes; ++lane) wanted[lane] = keys[first + (lane < lanes ? lane : 0)].word;
    for (size_t size = run.size; size > 1;) {
      const size_t half = size / 2;
      size -= half;
      // The step is masked, not chosen: a compiler that branches here mispredicts every other time.
      for (size_t lane = 0; lane < kSearchLanes; ++lane) {
        const size_t below = words[at[lane] + half - 1] < wanted[lane] ? 1 : 0;
        at[lane] += half & (size_t{0} - below);
      }
      for (size_t lane = 0; lane < kSearchLanes; ++lane) __builtin_prefetch(words + at[lane] + size / 2);
    }
    for (size_t lane = 0; lane < lanes; ++lane) {
      const KeyView& key = keys[first + lane];
      size_t position = at[lane] + (words[at[lane]] < key.word ? 1 : 0);
      if (position == run.size || words[position] != key.word) {
        position = run.size;
      } else if (!shape.whole) {
        position = LowerBoundTail(run, position, key, shape);
        if (position < run.size && Compare(run.Key(position, shape), key, shape) != 0) position = run.size;
      }
      positions[first + lane] = position;
    }
  }
}

// A run of one batch's rows, or of one delete's keys: `items` as SortDistinct left them.
inline std::shared_ptr<Run> MakeRun(std::shared_ptr<const Source> source, const SortItem* items, size_t count,
                                    bool tombstones) {
  auto run = std::make_shared<Run>();
  run->words = Words(count);
  run->refs = Words(count);
  run->size = count;
  run->tombstones = tombstones ? count : 0;
  for (size_t i = 0; i < count; ++i) {
    run->words[i] = items[i].word;
    run->refs[i] = (tombstones ? kTombstone : 0) | items[i].row;
  }
  run->slots.emplace_back(std::move(source), static_cast<uint32_t>(count));
  return run;
}

// The same run for keys of which fewer bytes are skipped.
inline std::shared_ptr<Run> RewordRun(const Run& run, uint64_t skip) {
  auto reworded = std::make_shared<Run>();
  reworded->words = Words(run.size);
  reworded->refs = Words(run.size);
  for (size_t i = 0; i < run.size; ++i) {
    reworded->refs[i] = run.refs[i];
    reworded->words[i] = run.slots[SlotOf(run.refs[i])].source->keys->Word(RowOf(run.refs[i]), skip);
  }
  reworded->size = run.size;
  reworded->tombstones = run.tombstones;
  reworded->slots = run.slots;
  reworded->delta.store(run.delta.load(std::memory_order_relaxed), std::memory_order_relaxed);
  return reworded;
}

}  // namespace marble
