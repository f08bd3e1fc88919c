// A block of a file in memory, and finding keys in it.
//
// Ownership: a block shares its columns, which may lie in the file's mapping, and owns its encoded keys.
// Thread safety: immutable once others can see it.
// Invariants:
//   1. Keys ascend strictly. Row i of `rows`, `source`, `keys`, `words`, `indexes` and `deleted` is the same row.
#pragma once

#include "bloom.hpp"
#include "memtable_run.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/record_batch.h>
#include <arrow/util/bit_util.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string_view>

namespace marble {

inline uint64_t WordOf(std::string_view key, uint64_t depth) noexcept {
  return WordOf(reinterpret_cast<const uint8_t*>(key.data()), key.size(), depth);
}

// Rows of a file, in key order, checked.
struct Block {
  std::shared_ptr<arrow::RecordBatch> rows;      // Of TableFile's layout().get_schema. Tombstones are null but for the key.
  Source source;                                 // The same columns, for RowPlans. `source.keys` is `keys`.
  std::shared_ptr<const KeyColumn> keys;         // Never null, also where keys are whole.
  uint64_t skip = 0;                             // So many bytes all keys of the block begin with,
  PoolArray<uint64_t> words;                     // and these are the eight behind them (KeyColumn::Word).
  const uint8_t* deleted = nullptr;              // A bit for each row; null where no row is a tombstone.
  std::shared_ptr<arrow::UInt64Array> indexes;   // Raft index of each row's write.
  std::shared_ptr<arrow::ArrayData> deletions;   // The column that `deleted` points into.
  int64_t nbytes = 0;                            // Of memory that it holds besides the file's mapping.

  int64_t size() const noexcept { return keys->rows; }
  std::string_view key(int64_t row) const noexcept { return KeyBytes(*keys, row); }
  uint64_t index(int64_t row) const noexcept { return indexes->Value(row); }
  bool is_deleted(int64_t row) const noexcept { return deleted != nullptr && arrow::bit_util::GetBit(deleted, row); }

  // First row in [first, size()) whose key is not below `key`.
  int64_t LowerBound(std::string_view key, int64_t first = 0) const noexcept {
    const int order = key.substr(0, skip).compare(this->key(0).substr(0, skip));
    if (order != 0) return order < 0 ? first : size();
    const uint64_t word = WordOf(key, skip);
    auto at = static_cast<int64_t>(
        LowerBoundWord(words.get(), static_cast<size_t>(first), static_cast<size_t>(size()), word));
    if (at == size() || words[static_cast<size_t>(at)] != word || this->key(at) >= key) return at;
    // Others may have the same word.
    int64_t end = size();
    for (++at; at < end;) {
      const int64_t middle = at + (end - at) / 2;
      if (this->key(middle) < key) {
        at = middle + 1;
      } else {
        end = middle;
      }
    }
    return at;
  }
  // The row that has `key`, or -1.
  int64_t Find(std::string_view key) const noexcept {
    const int64_t row = LowerBound(key);
    return row < size() && this->key(row) == key ? row : -1;
  }
  // As Find, with less to fetch from memory: whether the key begins as all of the block do is seen at the end, with the rest.
  int64_t FindExact(std::string_view key) const noexcept {
    const uint64_t word = WordOf(key, skip);
    for (const ColumnView& view : source.views) __builtin_prefetch(&view);
    const auto at = static_cast<int64_t>(LowerBoundWordAlone(words.get(), static_cast<size_t>(size()), word));
    for (const ColumnView& view : source.views) __builtin_prefetch(view.values + at * 4);  // Mostly offsets.
    if (at == size() || words[static_cast<size_t>(at)] != word) return -1;
    return this->key(at) == key ? at : Find(key);  // Others may have the same word.
  }
};

}  // namespace marble
