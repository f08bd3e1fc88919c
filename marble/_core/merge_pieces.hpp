// Merging two sorted stretches of words and refs (memtable_run.hpp) into one.
//
// Ownership: borrows everything for the length of a call. Thread safety: pure functions over the caller's arrays.
// Invariants:
//   1. Keys of a piece ascend strictly, and so do those of the output.
//   2. Of a key that both pieces have, the newer piece's ref stays.
//   3. Which side comes next is added up, never branched on: nobody can predict it.
#pragma once

#include "memtable_run.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace marble {

// A stretch of sorted refs on its way through a merge. `base` is added to every ref: its first slot in the merged
// slots, << 32.
struct Piece {
  const uint64_t* words;
  const uint64_t* refs;
  size_t size;
  uint64_t base;
};

// Where merged refs go, with room for both pieces. `dropped` may be null; else it has room for one more than the smaller
// piece's size, and takes the older refs of keys that both pieces have, in any order.
struct MergeOutput {
  uint64_t* words;
  uint64_t* refs;
  uint64_t* dropped;
  size_t size = 0;
  size_t dropped_size = 0;
};

// What is needed to compare keys whose words are equal: the source of each merged slot.
struct MergeKeys {
  const Source* const* sources;
  uint64_t skip;

  // Out of the merge's loop, so that this is the rare branch in it.
  [[gnu::noinline]] int Compare(uint64_t a, uint64_t b) const noexcept {
    const KeyColumn& a_keys = *sources[SlotOf(a)]->keys;
    const KeyColumn& b_keys = *sources[SlotOf(b)]->keys;
    return CompareKeys(a_keys.data(RowOf(a)), a_keys.size(RowOf(a)), b_keys.data(RowOf(b)), b_keys.size(RowOf(b)),
                       skip + 8);
  }
};

// Copies entries [first, end) of `piece`; returns how many.
inline size_t CopyEntries(const Piece& piece, size_t first, size_t end, uint64_t* words, uint64_t* refs) noexcept {
  if (first == end) return 0;
  std::memcpy(words, piece.words + first, (end - first) * sizeof(uint64_t));
  for (size_t i = first; i < end; ++i) *refs++ = piece.refs[i] + piece.base;
  return end - first;
}

// First place of `piece` whose key is not below entry `at` of `other`.
template <bool kWhole>
size_t FindPlace(const Piece& piece, const Piece& other, size_t at, const MergeKeys& keys) noexcept {
  const uint64_t word = other.words[at];
  size_t first = LowerBoundWord(piece.words, 0, piece.size, word);
  if constexpr (!kWhole) {
    size_t end = EndOfTies(piece.words, first, piece.size, word);
    while (first < end) {
      const size_t middle = first + (end - first) / 2;
      if (keys.Compare(piece.refs[middle] + piece.base, other.refs[at] + other.base) < 0) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
  }
  return first;
}

// `number`, of which the compiler knows nothing: it would make branches of 0 and 1.
inline uint64_t Opaque(uint64_t number) noexcept {
  asm("" : "+r"(number));
  return number;
}

// A merge of entries [newer, newer_end) and [older, older_end) on its way.
struct MergePlace {
  size_t newer, newer_end;
  size_t older, older_end;
  size_t out;
  size_t dropped;

  // Steps that surely end on neither side.
  size_t room() const noexcept { return std::min(newer_end - newer, older_end - older); }
};

// Merges two pieces. What a step works on is held in values of its own, not behind pointers: else the compiler must expect
// every number that is stored to change them.
template <bool kWhole, bool kDrops>
struct PieceMerger {
  Piece newer;
  Piece older;
  MergeKeys keys;
  uint64_t* words;
  uint64_t* refs;
  uint64_t* dropped;

  [[gnu::always_inline]] MergePlace Step(MergePlace at) const noexcept {
    const uint64_t a = newer.words[at.newer];
    const uint64_t b = older.words[at.older];
    const uint64_t a_ref = newer.refs[at.newer] + newer.base;
    const uint64_t b_ref = older.refs[at.older] + older.base;
    uint64_t newer_first = Opaque(a <= b ? 1 : 0);
    uint64_t same = Opaque(Opaque(a) == b ? 1 : 0);
    if (!kWhole && __builtin_expect(same != 0, false)) {
      const int order = keys.Compare(a_ref, b_ref);
      newer_first = order <= 0 ? 1 : 0;
      same = order == 0 ? 1 : 0;
    }
    const uint64_t newer_mask = uint64_t{0} - newer_first;
    words[at.out] = b ^ ((a ^ b) & newer_mask);
    refs[at.out] = b_ref ^ ((a_ref ^ b_ref) & newer_mask);
    ++at.out;
    if constexpr (kDrops) {
      dropped[at.dropped] = b_ref;
      at.dropped += same;
    }
    at.newer += newer_first;
    at.older += 1 - newer_first + same;
    return at;
  }

  [[gnu::noinline]] MergePlace Finish(MergePlace at) const noexcept {
    const PieceMerger self = *this;
    while (size_t steps = at.room()) {
      for (; steps > 0; --steps) at = self.Step(at);
    }
    at.out += CopyEntries(newer, at.newer, at.newer_end, words + at.out, refs + at.out);
    at.out += CopyEntries(older, at.older, at.older_end, words + at.out, refs + at.out);
    return at;
  }

  // A step waits for the one before it, from load to load. So the pieces are cut in two at one key, and the halves are
  // merged side by side: while one waits, the other one steps.
  void Merge(MergeOutput* out) const noexcept {
    size_t newer_middle = newer.size / 2;
    size_t older_middle = older.size / 2;
    if (newer.size > older.size) {
      older_middle = FindPlace<kWhole>(older, newer, newer_middle, keys);
    } else {
      newer_middle = FindPlace<kWhole>(newer, older, older_middle, keys);
    }
    const size_t middle = newer_middle + older_middle;
    const size_t middle_dropped = std::min(newer_middle, older_middle);
    MergePlace low{0, newer_middle, 0, older_middle, 0, 0};
    MergePlace high{newer_middle, newer.size, older_middle, older.size, middle, middle_dropped};
    const PieceMerger self = *this;
    while (size_t steps = std::min(low.room(), high.room())) {
      for (; steps > 0; --steps) {
        low = self.Step(low);
        high = self.Step(high);
      }
    }
    low = Finish(low);
    high = Finish(high);
    // Keys that both pieces had leave a gap.
    const size_t high_size = high.out - middle;
    const size_t high_dropped = high.dropped - middle_dropped;
    if (low.out < middle) {
      std::memmove(words + low.out, words + middle, high_size * sizeof(uint64_t));
      std::memmove(refs + low.out, refs + middle, high_size * sizeof(uint64_t));
    }
    if (kDrops && low.dropped < middle_dropped) {
      std::memmove(dropped + low.dropped, dropped + middle_dropped, high_dropped * sizeof(uint64_t));
    }
    out->size += low.out + high_size;
    out->dropped_size = low.dropped + high_dropped;
  }
};

template <bool kWhole, bool kDrops>
void MergePieces(Piece newer, Piece older, const MergeKeys& keys, MergeOutput* out) noexcept {
  // What lies wholly before the other piece is copied; data that arrives in key order merges at the speed of memory.
  const size_t newer_head = older.size == 0 ? newer.size : LowerBoundWord(newer.words, 0, newer.size, older.words[0]);
  const size_t older_head = newer.size == 0 ? older.size : LowerBoundWord(older.words, 0, older.size, newer.words[0]);
  out->size = CopyEntries(newer, 0, newer_head, out->words, out->refs);
  out->size += CopyEntries(older, 0, older_head, out->words + out->size, out->refs + out->size);
  newer = {newer.words + newer_head, newer.refs + newer_head, newer.size - newer_head, newer.base};
  older = {older.words + older_head, older.refs + older_head, older.size - older_head, older.base};
  if (newer.size == 0 || older.size == 0) {
    out->size += CopyEntries(newer, 0, newer.size, out->words + out->size, out->refs + out->size);
    out->size += CopyEntries(older, 0, older.size, out->words + out->size, out->refs + out->size);
    return;
  }
  PieceMerger<kWhole, kDrops>{newer, older, keys, out->words + out->size, out->refs + out->size, out->dropped}.Merge(out);
}

// Merges two pieces into `out`, which is empty. `sources` has, for each merged slot, its source; it is only looked into
// where keys are not whole.
inline void MergePieces(const KeyShape& shape, const Piece& newer, const Piece& older, const Source* const* sources,
                        MergeOutput* out) noexcept {
  const MergeKeys keys{sources, shape.skip};
  const bool drops = out->dropped != nullptr;
  if (shape.whole && drops) return MergePieces<true, true>(newer, older, keys, out);
  if (shape.whole) return MergePieces<true, false>(newer, older, keys, out);
  if (drops) return MergePieces<false, true>(newer, older, keys, out);
  return MergePieces<false, false>(newer, older, keys, out);
}

// Merges any number of pieces, in memory that it keeps for the next time.
class PieceFolder {
 public:
  // `pieces`, at least one, come newest first, and only one is left. It is valid until the next call.
  Piece Fold(std::vector<Piece>* pieces, const KeyShape& shape, const Source* const* sources) {
    used_.assign(pieces->size(), kNone);
    // The two neighbours that are smallest together go first: each row is copied about as often as it must.
    while (pieces->size() > 1) {
      size_t least = 0;
      for (size_t i = 1; i + 1 < pieces->size(); ++i) {
        if (Rows(*pieces, i) < Rows(*pieces, least)) least = i;
      }
      Piece& newer = (*pieces)[least];
      const Piece& older = (*pieces)[least + 1];
      const size_t stretch = FindStretch(newer.size + older.size);
      MergeOutput out{stretches_[stretch].words.get(), stretches_[stretch].refs.get(), nullptr};
      MergePieces(shape, newer, older, sources, &out);
      newer = {out.words, out.refs, out.size, 0};
      used_[least] = stretch;
      pieces->erase(pieces->begin() + static_cast<std::ptrdiff_t>(least) + 1);
      used_.erase(used_.begin() + static_cast<std::ptrdiff_t>(least) + 1);
    }
    return pieces->front();
  }

 private:
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  struct Stretch {
    Words words;
    Words refs;
    size_t room = 0;
  };

  // Of piece `i` and its neighbour.
  static size_t Rows(const std::vector<Piece>& pieces, size_t i) noexcept { return pieces[i].size + pieces[i + 1].size; }

  // A stretch with room for `rows` that no piece lies in.
  size_t FindStretch(size_t rows) {
    size_t found = 0;
    while (std::find(used_.begin(), used_.end(), found) != used_.end()) ++found;
    if (found == stretches_.size()) stretches_.emplace_back();
    Stretch& stretch = stretches_[found];
    if (stretch.room < rows) {
      stretch = {};
      stretch.words = Words(rows);
      stretch.refs = Words(rows);
      stretch.room = rows;
    }
    return found;
  }

  std::vector<Stretch> stretches_;
  std::vector<size_t> used_;  // Which of them a piece lies in.
};

}  // namespace marble
