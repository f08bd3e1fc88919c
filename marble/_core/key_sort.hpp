// Sorting the rows of one batch by encoded key.
//
// Layout: an item is eight bytes of a key, from the first byte in which keys may differ (big-endian, padded with
// zeros), and its row; longer keys are looked up in the KeyColumn only where these tie.
// Ownership: borrows everything for the length of a call. Thread safety: pure functions over the caller's arrays.
// Invariants:
//   1. The sort is stable: rows with equal keys stay in row order, so "the last row wins" is "keep the last of equals".
//   2. Recursion is bounded (`kSortLevels`), however long the keys are.
#pragma once

#include "key_codec.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>

namespace marble {

struct SortItem {
  uint64_t word;
  uint32_t row;
};

constexpr size_t kInsertionSortMax = 40;  // Below this many, counting digits costs more than moving items.
constexpr int kSortLevels = 8;            // Beyond so many equal words, plain comparison does.

// A negative, zero or positive number as key a's bytes from `depth` on sort before, with or after those of key b.
inline int CompareKeys(const uint8_t* a, uint64_t a_size, const uint8_t* b, uint64_t b_size, uint64_t depth) noexcept {
  const uint64_t a_left = a_size > depth ? a_size - depth : 0;
  const uint64_t b_left = b_size > depth ? b_size - depth : 0;
  const uint64_t common = std::min(a_left, b_left);
  const int order = common == 0 ? 0 : std::memcmp(a + depth, b + depth, common);
  if (order != 0) return order;
  return a_left == b_left ? 0 : (a_left < b_left ? -1 : 1);
}

// How many bytes two keys have in common at their beginnings.
inline size_t CommonBytes(std::string_view a, std::string_view b) noexcept {
  const size_t most = std::min(a.size(), b.size());
  size_t same = 0;
  for (; same + 8 <= most; same += 8) {
    uint64_t left;
    uint64_t right;
    std::memcpy(&left, a.data() + same, 8);
    std::memcpy(&right, b.data() + same, 8);
    if (left != right) return same + static_cast<size_t>(std::countr_zero(left ^ right)) / 8;
  }
  while (same < most && a[same] == b[same]) ++same;
  return same;
}

// Sorts by word, stably; `scratch` has room for `size` items.
inline void SortWords(SortItem* items, SortItem* scratch, size_t size) noexcept {
  uint64_t differ = 0;
  bool ascending = true;
  for (size_t i = 1; i < size; ++i) {
    differ |= items[i].word ^ items[0].word;
    ascending = ascending && items[i - 1].word <= items[i].word;
  }
  if (ascending) return;
  if (size <= kInsertionSortMax) {
    for (size_t i = 1; i < size; ++i) {
      const SortItem item = items[i];
      size_t at = i;
      for (; at > 0 && item.word < items[at - 1].word; --at) items[at] = items[at - 1];
      items[at] = item;
    }
    return;
  }
  // Least significant digit first, over the bytes that differ at all.
  SortItem* from = items;
  SortItem* to = scratch;
  for (int shift = 0; shift < 64; shift += 8) {
    if (((differ >> shift) & 0xFF) == 0) continue;
    std::array<uint32_t, 256> starts{};
    for (size_t i = 0; i < size; ++i) ++starts[(from[i].word >> shift) & 0xFF];
    uint32_t total = 0;
    for (uint32_t& start : starts) total += std::exchange(start, total);
    for (size_t i = 0; i < size; ++i) to[starts[(from[i].word >> shift) & 0xFF]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::memcpy(static_cast<void*>(items), from, size * sizeof(SortItem));
}

// Sorts items whose keys are equal in their first `depth` bytes and whose words are the eight bytes from there on.
inline void SortKeys(const KeyColumn& keys, SortItem* items, SortItem* scratch, size_t size, uint64_t depth,
                     int levels = kSortLevels) {
  SortWords(items, scratch, size);
  for (size_t first = 0; first < size;) {
    size_t end = first + 1;
    while (end < size && items[end].word == items[first].word) ++end;
    // By invariant 1 of the codec, keys that tie and have ended are equal, and already in row order.
    if (end - first > 1 && keys.size(items[first].row) > depth + 8) {
      SortItem* group = items + first;
      const size_t count = end - first;
      if (count <= kInsertionSortMax || levels == 0) {
        std::sort(group, group + count, [&keys, depth](const SortItem& a, const SortItem& b) {
          const int order =
              CompareKeys(keys.data(a.row), keys.size(a.row), keys.data(b.row), keys.size(b.row), depth + 8);
          return order != 0 ? order < 0 : a.row < b.row;
        });
      } else {
        const uint64_t word = group[0].word;
        for (size_t i = 0; i < count; ++i) group[i].word = keys.Word(group[i].row, depth + 8);
        SortKeys(keys, group, scratch, count, depth + 8, levels - 1);
        for (size_t i = 0; i < count; ++i) group[i].word = word;
      }
    }
    first = end;
  }
}

// Fills `items` with one item per distinct key, ascending, naming the last row that has it; returns how many. The keys
// are equal in their first `skip` bytes, and the words are the eight bytes from there on.
inline size_t SortDistinct(const KeyColumn& keys, SortItem* items, SortItem* scratch, uint64_t skip) {
  const size_t size = static_cast<size_t>(keys.rows);
  for (size_t row = 0; row < size; ++row) {
    items[row] = {keys.Word(static_cast<int64_t>(row), skip), static_cast<uint32_t>(row)};
  }
  const bool whole = keys.width > 0 && keys.width <= 8;
  if (whole) {
    SortWords(items, scratch, size);
  } else {
    SortKeys(keys, items, scratch, size, skip);
  }
  size_t count = 0;
  for (size_t i = 0; i < size; ++i) {
    const bool same_as_next =
        i + 1 < size && items[i].word == items[i + 1].word &&
        (whole || CompareKeys(keys.data(items[i].row), keys.size(items[i].row), keys.data(items[i + 1].row),
                              keys.size(items[i + 1].row), skip + 8) == 0);
    if (!same_as_next) items[count++] = items[i];
  }
  return count;
}

}  // namespace marble
