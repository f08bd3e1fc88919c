// Reading from one sstable: keys that are asked for, and rows in order.
//
// Layout: none of its own. Ownership: hits and cursors share the blocks that they point into.
// Thread safety: FindInFile and GetFromFile are pure but for the file's cache; a FileScan takes a lock, so that callers
// in several threads take turns.
// Invariants:
//   1. A block is loaded once for all the keys of a call that lie in it.
//   2. An error leaves a cursor where it stood.
#pragma once

#include "gather.hpp"
#include "sstable.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/record_batch.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace marble {

// Where a key is: `block` is null where it is not.
struct BlockHit {
  const Block* block = nullptr;
  int32_t row = 0;
  bool live() const noexcept { return block != nullptr && !block->is_deleted(row); }
};

inline std::vector<uint64_t> HashKeys(const KeyColumn& keys) {
  std::vector<uint64_t> hashes(static_cast<size_t>(keys.rows));
  for (int64_t row = 0; row < keys.rows; ++row) hashes[static_cast<size_t>(row)] = HashKey(KeyBytes(keys, row));
  return hashes;
}

// Looks for the keys whose positions are in `open`; `hits[i]` is set for those that the file has, tombstones too.
// `held` keeps the blocks of hits alive. `hashes` are those of all keys (HashKeys).
inline arrow::Status FindInFile(const TableFile& file, const KeyColumn& keys, const std::vector<uint64_t>& hashes,
                                const std::vector<uint32_t>& open, std::vector<BlockHit>* hits,
                                std::vector<std::shared_ptr<const Block>>* held) {
  constexpr size_t kAhead = 16;  // Lines of the filter that are on their way from memory at a time.
  std::vector<uint64_t> asked;   // Block << 32 | position of the key: sorting puts the keys of a block together.
  const std::string_view first = file.first_key();
  const std::string_view last = file.last_key();
  for (size_t i = 0; i < std::min(kAhead, open.size()); ++i) file.bloom().Prefetch(hashes[open[i]]);
  for (size_t i = 0; i < open.size(); ++i) {
    if (i + kAhead < open.size()) file.bloom().Prefetch(hashes[open[i + kAhead]]);
    const std::string_view key = KeyBytes(keys, open[i]);
    if (!file.MayContain(hashes[open[i]]) || key < first || key > last) continue;
    asked.push_back(uint64_t{file.FindBlock(key)} << 32 | open[i]);
  }
  if (!std::is_sorted(asked.begin(), asked.end())) std::sort(asked.begin(), asked.end());
  std::shared_ptr<const Block> block;
  uint64_t loaded = std::numeric_limits<uint64_t>::max();
  bool kept = false;
  for (const uint64_t each : asked) {
    const auto i = static_cast<size_t>(static_cast<uint32_t>(each));
    const std::string_view key = KeyBytes(keys, static_cast<int64_t>(i));
    if (key < file.first_key(each >> 32)) continue;
    if (each >> 32 != loaded) {
      ARROW_ASSIGN_OR_RAISE(block, file.Load(each >> 32));
      loaded = each >> 32;
      kept = false;
    }
    const int64_t row = block->Find(key);
    if (row < 0) continue;
    if (!kept) held->push_back(block);
    kept = true;
    (*hits)[i] = {block.get(), static_cast<int32_t>(row)};
  }
  return arrow::Status::OK();
}

// Rows that hits name, numbered by source: what GatherColumn takes. Tombstones and keys without a hit are missing rows.
inline RowPlan PlanHits(const std::vector<BlockHit>& hits) {
  constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
  RowPlan plan;
  std::vector<std::pair<const Block*, uint32_t>> numbers;
  uint32_t missing = kNone;
  for (const BlockHit& hit : hits) {
    if (hit.live()) numbers.emplace_back(hit.block, 0);
  }
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  for (auto& [block, number] : numbers) {
    number = static_cast<uint32_t>(plan.sources.size());
    plan.sources.push_back(&block->source);
  }
  plan.rows.reserve(hits.size());
  for (const BlockHit& hit : hits) {
    if (hit.live()) {
      const auto at = std::lower_bound(numbers.begin(), numbers.end(), std::pair{hit.block, uint32_t{0}});
      plan.rows.push_back({at->second, static_cast<uint32_t>(hit.row)});
      continue;
    }
    if (missing == kNone) {
      missing = static_cast<uint32_t>(plan.sources.size());
      plan.sources.push_back(nullptr);
    }
    plan.rows.push_back({missing, 0});
  }
  plan.FindSpans();
  return plan;
}

// One row for each key: `rows` of the layout's get_schema, whether it is there and no tombstone, and its Raft index.
inline arrow::Status GetFromFile(const TableFile& file, const arrow::RecordBatch& keys,
                                 std::shared_ptr<arrow::RecordBatch>* rows, std::shared_ptr<arrow::Array>* found,
                                 std::shared_ptr<arrow::Array>* indexes) noexcept {
  return Guarded([&]() -> arrow::Status {
    const Layout& layout = *file.layout();
    std::shared_ptr<const KeyColumn> encoded;
    ARROW_RETURN_NOT_OK(layout.codec->Encode(keys, &encoded));
    std::vector<uint32_t> open(static_cast<size_t>(encoded->rows));
    for (size_t i = 0; i < open.size(); ++i) open[i] = static_cast<uint32_t>(i);
    std::vector<BlockHit> hits(open.size());
    std::vector<std::shared_ptr<const Block>> held;
    ARROW_RETURN_NOT_OK(FindInFile(file, *encoded, HashKeys(*encoded), open, &hits, &held));
    arrow::UInt64Builder index_builder;
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> bitmap, arrow::AllocateEmptyBitmap(encoded->rows));
    ARROW_RETURN_NOT_OK(index_builder.Reserve(encoded->rows));
    for (size_t i = 0; i < hits.size(); ++i) {
      if (hits[i].live()) arrow::bit_util::SetBit(bitmap->mutable_data(), static_cast<int64_t>(i));
      if (hits[i].block == nullptr) {
        index_builder.UnsafeAppendNull();
      } else {
        index_builder.UnsafeAppend(hits[i].block->index(hits[i].row));
      }
    }
    const RowPlan plan = PlanHits(hits);
    std::vector<std::shared_ptr<arrow::ArrayData>> columns(static_cast<size_t>(layout.schema->num_fields()));
    for (size_t i = 0; i < layout.key.size(); ++i) {
      columns[static_cast<size_t>(layout.key[i])] = keys.column_data(static_cast<int>(i));
    }
    for (size_t i = 0; i < columns.size(); ++i) {
      if (columns[i] != nullptr) continue;
      const auto& type = layout.schema->field(static_cast<int>(i))->type();
      ARROW_ASSIGN_OR_RAISE(columns[i], GatherColumn(plan, static_cast<int>(i), type, true));
    }
    *rows = arrow::RecordBatch::Make(layout.get_schema, encoded->rows, std::move(columns));
    *found = std::make_shared<arrow::BooleanArray>(encoded->rows, std::move(bitmap));
    return index_builder.Finish(indexes);
  });
}

// Whether the filter lets each key through.
inline arrow::Status AskFilter(const TableFile& file, const arrow::RecordBatch& keys,
                               std::shared_ptr<arrow::Array>* out) noexcept {
  return Guarded([&]() -> arrow::Status {
    std::shared_ptr<const KeyColumn> encoded;
    ARROW_RETURN_NOT_OK(file.layout()->codec->Encode(keys, &encoded));
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> bitmap, arrow::AllocateEmptyBitmap(encoded->rows));
    for (int64_t row = 0; row < encoded->rows; ++row) {
      if (file.MayContain(HashKey(KeyBytes(*encoded, row)))) arrow::bit_util::SetBit(bitmap->mutable_data(), row);
    }
    *out = std::make_shared<arrow::BooleanArray>(encoded->rows, std::move(bitmap));
    return arrow::Status::OK();
  });
}

struct FileScanOptions {
  std::vector<int> columns;   // Of the table, by position.
  bool has_lower = false;     // Rows from `lower` on; keys or beginnings of keys.
  bool has_upper = false;     // Rows below `upper`.
  std::string lower, upper;
  bool reverse = false;
  bool versions = false;      // Tombstones too, and the two columns of our own behind the others.
};

class FileScan {
 public:
  static arrow::Status Make(std::shared_ptr<const TableFile> file, const FileScanOptions& options,
                            std::shared_ptr<FileScan>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      *out = std::make_shared<FileScan>(std::move(file), options);
      return arrow::Status::OK();
    });
  }

  FileScan(std::shared_ptr<const TableFile> file, const FileScanOptions& options)
      : file_(std::move(file)), options_(options) {
    arrow::FieldVector fields;
    for (const int column : options_.columns) fields.push_back(file_->layout()->get_schema->field(column));
    if (options_.versions) {
      fields.push_back(arrow::field(std::string(kIndexColumn), arrow::uint64(), false));
      fields.push_back(arrow::field(std::string(kDeletedColumn), arrow::boolean(), false));
    }
    schema_ = arrow::schema(std::move(fields));
    first_ = options_.has_lower ? file_->FindBlock(options_.lower) : 0;
    end_ = file_->blocks();
    if (options_.has_upper) {
      const size_t last = file_->FindBlock(options_.upper);
      end_ = last < end_ && file_->first_key(last) < options_.upper ? last + 1 : last;
    }
    end_ = std::max(first_, end_);
  }

  const std::shared_ptr<arrow::Schema>& schema() const noexcept { return schema_; }

  // Sets `out` to the next batch, or to null after the last.
  arrow::Status Next(std::shared_ptr<arrow::RecordBatch>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      const std::lock_guard<std::mutex> guard(mutex_);
      out->reset();
      while (first_ < end_ && *out == nullptr) {
        ARROW_RETURN_NOT_OK(Read(options_.reverse ? end_ - 1 : first_, out));
        options_.reverse ? --end_ : ++first_;
      }
      return arrow::Status::OK();
    });
  }

 private:
  // The rows wanted of one block; leaves `out` null if there are none.
  arrow::Status Read(size_t i, std::shared_ptr<arrow::RecordBatch>* out) const {
    ARROW_ASSIGN_OR_RAISE(const auto block, file_->Load(i));
    const int64_t first = options_.has_lower ? block->LowerBound(options_.lower) : 0;
    const int64_t end = options_.has_upper ? block->LowerBound(options_.upper, first) : block->size();
    RowPlan plan;
    plan.sources.push_back(&block->source);
    for (int64_t row = first; row < end; ++row) {
      if (options_.versions || !block->is_deleted(row)) plan.rows.push_back({0, static_cast<uint32_t>(row)});
    }
    if (plan.rows.empty()) return arrow::Status::OK();
    if (options_.reverse) std::reverse(plan.rows.begin(), plan.rows.end());
    plan.FindSpans();
    std::vector<std::shared_ptr<arrow::ArrayData>> columns;
    for (const int column : options_.columns) {
      const auto& type = file_->layout()->schema->field(column)->type();
      ARROW_ASSIGN_OR_RAISE(auto data, GatherColumn(plan, column, type, true));
      columns.push_back(std::move(data));
    }
    if (options_.versions) {
      Source ours;
      ours.rows = block->size();
      AddColumn(&ours, block->indexes->data());
      AddColumn(&ours, block->deletions);
      plan.sources[0] = &ours;
      ARROW_ASSIGN_OR_RAISE(auto indexes, GatherColumn(plan, 0, arrow::uint64(), true));
      ARROW_ASSIGN_OR_RAISE(auto deletions, GatherColumn(plan, 1, arrow::boolean(), true));
      columns.push_back(std::move(indexes));
      columns.push_back(std::move(deletions));
    }
    *out = arrow::RecordBatch::Make(schema_, static_cast<int64_t>(plan.rows.size()), std::move(columns));
    return arrow::Status::OK();
  }

  const std::shared_ptr<const TableFile> file_;
  const FileScanOptions options_;
  std::shared_ptr<arrow::Schema> schema_;
  size_t first_ = 0;  // Blocks [first_, end_) are still to be read.
  size_t end_ = 0;
  std::mutex mutex_;
};

}  // namespace marble
