// One sstable: its index, and its blocks, which are read, checked and kept when they are asked for.
//
// Layout of the bytes: sstable_format.hpp. A file's rows have the table's columns (all but the key nullable, since a
// tombstone has only a key) and two of our own, `_marble_index` and `_marble_deleted`.
// Ownership: a file shares the buffer that holds it, a mapping mostly; a block shares that too, unless it was
// decompressed. Arrays made of a block keep the mapping; a file may be closed while they are in use.
// Thread safety: immutable but for the cache and a memo of what was checked; every function may run in any number of
// threads at once, without the GIL.
// Invariants:
//   1. Keys of a file ascend strictly, in and across blocks.
//   2. Nothing of a block is interpreted before its checksum was found right; nothing of it is handed out before its
//      columns passed full validation and its keys were found to ascend from `first_key` to `last_key`.
//   3. What is wrong with the bytes is an IOError with a DamageDetail: the file and the offset of the damaged part.
#pragma once

#include "block_cache.hpp"
#include "bloom.hpp"
#include "gather.hpp"
#include "key_codec.hpp"
#include "memtable_state.hpp"
#include "sstable_format.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/buffer.h>
#include <arrow/io/memory.h>
#include <arrow/ipc/message.h>
#include <arrow/ipc/reader.h>
#include <arrow/record_batch.h>
#include <arrow/result.h>
#include <arrow/status.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

// Where stored bytes are not what was written.
class DamageDetail : public arrow::StatusDetail {
 public:
  static constexpr const char* kId = "marble::DamageDetail";
  DamageDetail(std::string file, uint64_t offset) : file_(std::move(file)), offset_(offset) {}
  const char* type_id() const override { return kId; }
  std::string ToString() const override { return file_ + ", offset " + std::to_string(offset_); }
  const std::string& file() const noexcept { return file_; }
  uint64_t offset() const noexcept { return offset_; }

 private:
  std::string file_;
  uint64_t offset_;
};

template <typename... Words>
arrow::Status Damaged(const std::string& file, uint64_t offset, Words&&... words) {
  return arrow::Status(arrow::StatusCode::IOError, arrow::internal::JoinToString(std::forward<Words>(words)...),
                       std::make_shared<DamageDetail>(file, offset));
}

// The detail of a status that Damaged made, else null.
inline const DamageDetail* DamageOf(const arrow::Status& status) noexcept {
  const auto* detail = status.detail().get();
  // By name: the class exists once in each of our modules.
  return detail != nullptr && std::string_view(detail->type_id()) == DamageDetail::kId
             ? static_cast<const DamageDetail*>(detail)
             : nullptr;
}

inline std::string_view KeyAt(const KeyColumn& keys, int64_t row) noexcept {
  return {reinterpret_cast<const char*>(keys.data(row)), keys.size(row)};
}

// Rows of a file, in key order, checked.
struct Block {
  std::shared_ptr<arrow::RecordBatch> rows;      // Of TableFile's layout().get_schema. Tombstones are null but for the key.
  Source source;                                 // The same columns, for RowPlans. `source.keys` is `keys`.
  std::shared_ptr<const KeyColumn> keys;         // Never null, also where keys are whole.
  const uint8_t* deleted = nullptr;              // A bit for each row; null where no row is a tombstone.
  std::shared_ptr<arrow::UInt64Array> indexes;   // Raft index of each row's write.
  std::shared_ptr<arrow::ArrayData> deletions;   // The column that `deleted` points into.
  int64_t nbytes = 0;                            // Of memory that it holds besides the file's mapping.

  int64_t size() const noexcept { return keys->rows; }
  std::string_view key(int64_t row) const noexcept { return KeyAt(*keys, row); }
  uint64_t index(int64_t row) const noexcept { return indexes->Value(row); }
  bool is_deleted(int64_t row) const noexcept { return deleted != nullptr && arrow::bit_util::GetBit(deleted, row); }

  // First row in [first, size()) whose key is not below `key`.
  int64_t LowerBound(std::string_view key, int64_t first = 0) const noexcept {
    int64_t end = size();
    while (first < end) {
      const int64_t middle = first + (end - first) / 2;
      if (this->key(middle) < key) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first;
  }
  // The row that has `key`, or -1.
  int64_t Find(std::string_view key) const noexcept {
    const int64_t row = LowerBound(key);
    return row < size() && this->key(row) == key ? row : -1;
  }
};

class TableFile {
 public:
  // Checks all but the blocks. `name` is for messages.
  static arrow::Status Open(std::shared_ptr<arrow::Buffer> bytes, std::string name,
                            std::shared_ptr<const Layout> layout, std::shared_ptr<BlockCache> cache,
                            std::shared_ptr<const TableFile>* out) noexcept;
  ~TableFile() { cache_->Drop(number_, blocks()); }

  const std::string& name() const noexcept { return name_; }
  const std::shared_ptr<const Layout>& layout() const noexcept { return layout_; }
  const FileSeal& seal() const noexcept { return seal_; }
  const IndexHead& head() const noexcept { return *head_; }

  size_t blocks() const noexcept { return words_.size(); }
  const BlockEntry& entry(size_t i) const noexcept { return entries_[i]; }
  std::string_view first_key(size_t i) const noexcept {
    return {keys_ + entries_[i].key_offset, entries_[i].first_key_bytes};
  }
  std::string_view last_key(size_t i) const noexcept {
    return {keys_ + entries_[i].key_offset + entries_[i].first_key_bytes, entries_[i].last_key_bytes};
  }
  // Of the whole file; a file has at least one row.
  std::string_view first_key() const noexcept { return first_key(0); }
  std::string_view last_key() const noexcept { return last_key(blocks() - 1); }

  // False if no row has the key of this hash (HashKey).
  bool MayContain(uint64_t hash) const noexcept { return bloom_.MayContain(hash); }
  const BloomFilter& bloom() const noexcept { return bloom_; }

  // First block whose last key is not below `key`: the only one that may have it. blocks() if there is none.
  size_t FindBlock(std::string_view key) const noexcept;

  // Block `i`, checked and decompressed, from the cache if it is there. May throw std::bad_alloc.
  arrow::Result<std::shared_ptr<const Block>> Load(size_t i) const;

  // Smallest and largest values and number of nulls of columns: see sstable_zones.hpp. A row for each block.
  arrow::Status ReadZones(std::shared_ptr<arrow::RecordBatch>* out) const noexcept;

  // Reads every block and checks what can be checked. Goes past the cache.
  arrow::Status Verify() const noexcept;

 private:
  std::shared_ptr<arrow::Buffer> bytes_;
  std::string name_;
  std::shared_ptr<const Layout> layout_;
  std::shared_ptr<arrow::Schema> file_schema_;
  std::shared_ptr<BlockCache> cache_;
  uint64_t number_ = 0;  // In the cache.
  FileSeal seal_;
  // Into the mapping:
  const IndexHead* head_ = nullptr;
  const BlockEntry* entries_ = nullptr;
  const char* keys_ = nullptr;
  BloomFilter bloom_;
  uint64_t skip_ = 0;            // Bytes that all keys of the file begin with.
  std::vector<uint64_t> words_;  // For each block the eight bytes of its last key after these.
  std::unique_ptr<std::atomic<uint8_t>[]> checked_;  // For each block whether it has been found sound.
};

}  // namespace marble
