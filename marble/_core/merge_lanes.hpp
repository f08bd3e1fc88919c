// Sorted sources of a merge, newest first, each behind a window that is in memory.
//
// Layout: a lane is one sorted source: a run of a memtable, or blocks that a stream reads. Its window is a stretch of
// words and refs as a Run has them; slots are numbered over all sources of the merge. A run whose words stand behind
// the merge's `skip` bytes is its own window; of other runs the words are made anew, a window at a time. A stream's
// window has the rows of one or more blocks.
// Ownership: a lane borrows runs, whose state the cursor shares; it owns the arrays of windows that it made.
// Thread safety: for one thread at a time.
// Invariants:
//   1. Keys of a lane ascend strictly, within and across windows (descend across them in a scan in reverse).
//   2. [first, end) of a window is what no merge has taken yet; where it is empty and `more` is false, the lane has
//      ended.
#pragma once

#include "memtable_state.hpp"
#include "merge_pieces.hpp"

#include <arrow/result.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

constexpr size_t kRewordRows = 8192;  // Rows of a window whose words are made anew.

// Which rows a scan is to give, and how.
struct ScanOptions {
  std::vector<int> columns;       // By position in the table's schema.
  uint64_t batch_rows_max = 65536;
  uint64_t batch_bytes_max = std::numeric_limits<uint64_t>::max();  // About so many, taken as evenly spread in each source.
  std::string lower;              // Keys are not below it; empty: from the first.
  bool has_upper = false;
  std::string upper;              // Keys are below it.
  bool reverse = false;
  uint64_t limit = std::numeric_limits<uint64_t>::max();
  bool versions = false;          // Tombstones as well, and the indexes of rows.
  bool drop_tombstones = false;   // But no tombstones after all: nothing older is left that they could hide.
};

// A block of a source that is read bit by bit: row i has the i-th key, by `source->keys`, which is never null here.
struct StreamBlock {
  std::shared_ptr<const Source> source;
  const uint8_t* deleted = nullptr;   // A bit for each row; null where no row is a tombstone.
  const uint64_t* indexes = nullptr;  // Log index of each row.
};

// Blocks of one sorted source in the order of a scan, those without rows in its bounds left out.
class BlockStream {
 public:
  virtual ~BlockStream() = default;
  // Sets `out` to the next block, with a null source after the last. After an error it stands where it stood.
  virtual arrow::Status Next(StreamBlock* out) = 0;
  // What all keys of the source begin with.
  virtual std::string Start() const = 0;
};

inline std::string_view ViewOf(const KeyColumn& keys, int64_t row) noexcept {
  return {reinterpret_cast<const char*>(keys.data(row)), keys.size(row)};
}

inline int CompareBytes(std::string_view a, std::string_view b) noexcept {
  return CompareKeys(reinterpret_cast<const uint8_t*>(a.data()), a.size(), reinterpret_cast<const uint8_t*>(b.data()),
                     b.size(), 0);
}

// First row of `keys` that is not below `bytes`, which may be any bytes.
inline size_t LowerBoundBytes(const KeyColumn& keys, std::string_view bytes) noexcept {
  size_t first = 0;
  for (size_t end = static_cast<size_t>(keys.rows); first < end;) {
    const size_t middle = first + (end - first) / 2;
    if (CompareBytes(ViewOf(keys, static_cast<int64_t>(middle)), bytes) < 0) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  return first;
}

// First position of `run` whose key is not below `bytes`, which may be any bytes.
inline size_t LowerBoundBytes(const State& state, const Run& run, std::string_view bytes) noexcept {
  const uint64_t skip = state.shape.skip;
  const int order = skip == 0 ? 0 : std::memcmp(bytes.data(), state.start->data(), std::min<size_t>(bytes.size(), skip));
  if (order < 0 || (order == 0 && bytes.size() <= skip)) return 0;
  if (order > 0) return run.size;
  uint8_t padded[8] = {};
  std::memcpy(padded, bytes.data() + skip, std::min<size_t>(8, bytes.size() - skip));
  const uint64_t word = LoadBigEndian64(padded);
  size_t first = LowerBoundWordAlone(run.words.get(), run.size, word);
  size_t end = EndOfTies(run.words.get(), first, run.size, word);
  // What is left has the same word: a whole key is below if the bytes go on behind it.
  while (first < end) {
    const size_t middle = first + (end - first) / 2;
    bool below;
    if (state.shape.whole) {
      below = static_cast<size_t>(state.layout->codec->width()) < bytes.size();
    } else {
      const KeyView key = run.Key(middle, state.shape);
      below = CompareBytes({reinterpret_cast<const char*>(key.data), key.size}, bytes) < 0;
    }
    if (below) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  return first;
}

struct Lane {
  // The window: entries [first, end) of these arrays, ascending. `base` is still to be added to refs.
  const uint64_t* words = nullptr;
  const uint64_t* refs = nullptr;
  size_t first = 0;
  size_t end = 0;
  uint64_t base = 0;
  bool more = false;     // Whether a window may follow.
  bool stalled = false;  // Whether reading ahead met an error, which is told when the window is empty.
  // Where further windows come from: blocks, or entries [run_first, run_end) of a run.
  std::unique_ptr<BlockStream> stream;
  const Run* run = nullptr;
  size_t run_first = 0;
  size_t run_end = 0;
  std::vector<uint64_t> own_words;
  std::vector<uint64_t> own_refs;

  size_t size() const noexcept { return end - first; }

  // A run of `state` between the bounds; its slots are numbered from `slots` on.
  static Lane OfRun(const State& state, const Run& run, const ScanOptions& options, uint64_t skip, size_t slots) {
    Lane lane;
    lane.run = &run;
    lane.base = uint64_t{slots} << 32;
    lane.run_first = options.lower.empty() ? 0 : LowerBoundBytes(state, run, options.lower);
    lane.run_end = options.has_upper ? LowerBoundBytes(state, run, options.upper) : run.size;
    lane.run_end = std::max(lane.run_first, lane.run_end);
    if (state.shape.skip == skip) {
      lane.words = run.words.get();
      lane.refs = run.refs.get();
      lane.first = lane.run_first;
      lane.end = lane.run_end;
      lane.run_end = lane.run_first;
    }
    lane.more = lane.run_first < lane.run_end;
    return lane;
  }

  static Lane OfStream(std::unique_ptr<BlockStream> stream) {
    Lane lane;
    lane.stream = std::move(stream);
    lane.more = true;
    return lane;
  }

  // The next window of a run whose words are of another `skip`.
  void Reword(uint64_t skip, bool reverse) {
    const size_t rows = std::min(kRewordRows, run_end - run_first);
    const size_t from = reverse ? run_end - rows : run_first;
    own_words.resize(rows);
    for (size_t i = 0; i < rows; ++i) {
      const uint64_t ref = run->refs[from + i];
      own_words[i] = run->slots[SlotOf(ref)].source->keys->Word(RowOf(ref), skip);
    }
    words = own_words.data();
    refs = run->refs.get() + from;
    first = 0;
    end = rows;
    (reverse ? run_end : run_first) = reverse ? from : from + rows;
    more = run_first < run_end;
  }

  // Adds a block's rows within the bounds to the window, on the side that a scan comes to last. `slot` is its source's
  // number.
  void Adopt(const StreamBlock& block, const ScanOptions& options, uint64_t skip, uint32_t slot) {
    const KeyColumn& keys = *block.source->keys;
    // Most blocks lie wholly within: a look at their ends costs less than a search.
    const bool cut_below = !options.lower.empty() && ViewOf(keys, 0) < std::string_view(options.lower);
    const bool cut_above = options.has_upper && ViewOf(keys, keys.rows - 1) >= std::string_view(options.upper);
    const size_t from = cut_below ? LowerBoundBytes(keys, options.lower) : 0;
    const size_t to =
        std::max(from, cut_above ? LowerBoundBytes(keys, options.upper) : static_cast<size_t>(keys.rows));
    const size_t rows = to - from;
    const size_t at = options.reverse ? 0 : size();
    for (std::vector<uint64_t>* own : {&own_words, &own_refs}) {
      own->resize(end);
      own->erase(own->begin(), own->begin() + static_cast<std::ptrdiff_t>(first));
      own->insert(own->begin() + static_cast<std::ptrdiff_t>(at), rows, 0);
    }
    keys.Words(from, to, skip, own_words.data() + at);
    uint64_t* own = own_refs.data() + at;
    for (size_t i = 0; i < rows; ++i) own[i] = MakeRef(slot, static_cast<uint32_t>(from + i));
    for (size_t i = 0; block.deleted != nullptr && i < rows; ++i) {
      if (arrow::bit_util::GetBit(block.deleted, static_cast<int64_t>(from + i))) own[i] |= kTombstone;
    }
    words = own_words.data();
    refs = own_refs.data();
    end = own_words.size();
    first = 0;
  }

  // The key of an entry of the window. `sources` has the sources by number.
  KeyView Key(size_t i, const KeyShape& shape, const Source* const* sources) const noexcept {
    if (shape.whole) return {words[i], nullptr, 0};
    const uint64_t ref = refs[i] + base;
    const KeyColumn& keys = *sources[SlotOf(ref)]->keys;
    return {words[i], keys.data(RowOf(ref)), keys.size(RowOf(ref))};
  }

  // First entry of the window whose key is not below `key`, or, with `after`, is above it.
  size_t Bound(const KeyView& key, bool after, const KeyShape& shape, const Source* const* sources) const noexcept {
    size_t at = LowerBoundWord(words, first, end, key.word);
    size_t stop = EndOfTies(words, at, end, key.word);
    while (at < stop) {
      const size_t middle = at + (stop - at) / 2;
      const int order = Compare(Key(middle, shape, sources), key, shape);
      if (order < 0 || (after && order == 0)) {
        at = middle + 1;
      } else {
        stop = middle;
      }
    }
    return at;
  }
};

}  // namespace marble
