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
  std::shared_ptr<const Source> source;
  uint32_t live = 0;
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

// A stretch of sorted refs on its way through a merge. `base` is added to every ref: its first slot in the merged
// slots, << 32.
struct Piece {
  const uint64_t* words;
  const uint64_t* refs;
  size_t size;
  uint64_t base;
};

// Where merged refs go. `dropped` may be null; else it has room for one more than the smaller piece's size.
struct MergeOutput {
  uint64_t* words;
  uint64_t* refs;
  uint64_t* dropped;
  size_t size = 0;
  size_t dropped_size = 0;
};

inline void AppendPiece(const Piece& piece, size_t first, size_t end, MergeOutput* out) noexcept {
  if (first >= end) return;
  std::memcpy(out->words + out->size, piece.words + first, (end - first) * sizeof(uint64_t));
  for (size_t i = first; i < end; ++i) out->refs[out->size++] = piece.refs[i] + piece.base;
}

// Merges two pieces; where both have a key, the newer's ref stays and the older's goes to `dropped`.
// `sources` has, for each merged slot, its source; it is only looked into where keys are not whole.
template <bool kWhole>
void MergePieces(const Piece& newer, const Piece& older, const Source* const* sources, uint64_t skip,
                 MergeOutput* out) noexcept {
  if (newer.size == 0 || older.size == 0) {
    AppendPiece(newer, 0, newer.size, out);
    AppendPiece(older, 0, older.size, out);
    return;
  }
  // What lies wholly before the other piece is copied; data that arrives in key order merges at the speed of memory.
  size_t i = LowerBoundWord(newer.words, 0, newer.size, older.words[0]);
  size_t j = LowerBoundWord(older.words, 0, older.size, newer.words[0]);
  AppendPiece(newer, 0, i, out);
  AppendPiece(older, 0, j, out);
  uint64_t spare[1];
  uint64_t* const dropped = out->dropped == nullptr ? spare : out->dropped;
  const size_t drop_step = out->dropped == nullptr ? 0 : 1;
  uint64_t* const out_words = out->words;
  uint64_t* const out_refs = out->refs;
  size_t k = out->size;
  size_t d = 0;
  while (i < newer.size && j < older.size) {
    const uint64_t a = newer.words[i];
    const uint64_t b = older.words[j];
    const uint64_t a_ref = newer.refs[i] + newer.base;
    const uint64_t b_ref = older.refs[j] + older.base;
    uint64_t newer_first = a <= b ? 1 : 0;
    uint64_t same = a == b ? 1 : 0;
    if constexpr (!kWhole) {
      if (same != 0) {
        const KeyColumn& a_keys = *sources[SlotOf(a_ref)]->keys;
        const KeyColumn& b_keys = *sources[SlotOf(b_ref)]->keys;
        const int order = CompareKeys(a_keys.data(RowOf(a_ref)), a_keys.size(RowOf(a_ref)), b_keys.data(RowOf(b_ref)),
                                      b_keys.size(RowOf(b_ref)), skip + 8);
        newer_first = order <= 0 ? 1 : 0;
        same = order == 0 ? 1 : 0;
      }
    }
    // Masks and sums, no choice: which side comes next cannot be predicted.
    const uint64_t newer_mask = uint64_t{0} - newer_first;
    out_words[k] = b ^ ((a ^ b) & newer_mask);
    out_refs[k] = b_ref ^ ((a_ref ^ b_ref) & newer_mask);
    dropped[d] = b_ref;
    ++k;
    d += same & drop_step;
    i += newer_first;
    j += 1 - newer_first + same;
  }
  out->size = k;
  out->dropped_size = d;
  AppendPiece(newer, i, newer.size, out);
  AppendPiece(older, j, older.size, out);
}

inline void MergePieces(const KeyShape& shape, const Piece& newer, const Piece& older, const Source* const* sources,
                        MergeOutput* out) noexcept {
  if (shape.whole) return MergePieces<true>(newer, older, sources, shape.skip, out);
  return MergePieces<false>(newer, older, sources, shape.skip, out);
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
  run->slots.push_back({std::move(source), static_cast<uint32_t>(count)});
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

// Drops slots without refs from the table of slots and renumbers the refs, once they are a quarter of it.
inline void TidySlots(Run* run) {
  size_t dead = 0;
  for (const Slot& slot : run->slots) dead += slot.live == 0 ? 1 : 0;
  if (dead * 4 <= run->slots.size()) return;
  std::vector<uint32_t> renumbered(run->slots.size(), 0);
  std::vector<Slot> kept;
  kept.reserve(run->slots.size() - dead);
  for (size_t i = 0; i < run->slots.size(); ++i) {
    renumbered[i] = static_cast<uint32_t>(kept.size());
    if (run->slots[i].live > 0) kept.push_back(std::move(run->slots[i]));
  }
  for (size_t i = 0; i < run->size; ++i) {
    const uint64_t ref = run->refs[i];
    run->refs[i] = (ref & kTombstone) | MakeRef(renumbered[SlotOf(ref)], RowOf(ref));
  }
  run->slots = std::move(kept);
}

// Lets go of refs: counts them off their slots, and frees the sources that no ref needs any more.
inline void ReleaseRefs(Run* run, const uint64_t* refs, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    if ((refs[i] & kTombstone) != 0) --run->tombstones;
    Slot& slot = run->slots[SlotOf(refs[i])];
    if (--slot.live == 0) slot.source.reset();
  }
}

// Merges two neighbouring runs. In the oldest run of all (`bottom`) tombstones have nothing left to hide and are
// dropped, unless older rows lie outside of the memtable (`keep_tombstones`).
inline std::shared_ptr<Run> MergeRuns(const Run& newer, const Run& older, bool bottom, bool keep_tombstones,
                                      const KeyShape& shape) {
  auto run = std::make_shared<Run>();
  if (newer.slots.size() + older.slots.size() > kSlotMax) throw std::bad_alloc();
  run->slots.reserve(newer.slots.size() + older.slots.size());
  run->slots.insert(run->slots.end(), older.slots.begin(), older.slots.end());
  run->slots.insert(run->slots.end(), newer.slots.begin(), newer.slots.end());
  std::vector<const Source*> sources;
  if (!shape.whole) {
    sources.reserve(run->slots.size());
    for (const Slot& slot : run->slots) sources.push_back(slot.source.get());
  }
  run->words = Words(newer.size + older.size);
  run->refs = Words(newer.size + older.size);
  run->tombstones = newer.tombstones + older.tombstones;
  Words dropped(std::min(newer.size, older.size) + 1);
  const Piece newer_piece{newer.words.get(), newer.refs.get(), newer.size, uint64_t{older.slots.size()} << 32};
  const Piece older_piece{older.words.get(), older.refs.get(), older.size, 0};
  MergeOutput out{run->words.get(), run->refs.get(), dropped.get()};
  MergePieces(shape, newer_piece, older_piece, sources.data(), &out);
  run->size = out.size;
  ReleaseRefs(run.get(), dropped.get(), out.dropped_size);
  if (bottom && !keep_tombstones && run->tombstones > 0) {
    size_t kept = 0;
    for (size_t i = 0; i < run->size; ++i) {
      const uint64_t ref = run->refs[i];
      if ((ref & kTombstone) != 0) {
        ReleaseRefs(run.get(), &ref, 1);
      } else {
        run->words[kept] = run->words[i];
        run->refs[kept++] = ref;
      }
    }
    run->size = kept;
  }
  if (run->size * 4 < (newer.size + older.size) * 3) {
    run->words.Shrink(run->size);
    run->refs.Shrink(run->size);
  }
  TidySlots(run.get());
  const int64_t newer_delta = newer.delta.load(std::memory_order_relaxed);
  const int64_t older_delta = older.delta.load(std::memory_order_relaxed);
  if (bottom) {
    run->delta.store(static_cast<int64_t>(run->size - run->tombstones), std::memory_order_relaxed);
  } else if (newer_delta != Run::kUnknown && older_delta != Run::kUnknown) {
    run->delta.store(newer_delta + older_delta, std::memory_order_relaxed);
  }
  return run;
}

}  // namespace marble
