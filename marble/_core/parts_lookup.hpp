// Looking single rows up in blocks that nobody has read (block_parts.hpp).
//
// Ownership: borrows files, keys and lookup; rows that are found are copied, so that blocks need not be kept for them.
// Thread safety: for one thread at a time.
#pragma once

#include "block_parts.hpp"
#include "copied_rows.hpp"
#include "lookup.hpp"
#include "point.hpp"

#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

using Held = std::vector<std::shared_ptr<const void>>;  // What a lookup refers to.

// As LsmReader::FindInFiles, in a block that nobody has read: only the parts that say something of the row. `known` becomes
// whether the block has the key, be it as a tombstone. The key lies in the block's range.
inline arrow::Status FindInParts(const TableFile& file, size_t number, std::string_view key, bool* known,
                                 PointHit* out) {
  Fetches fetches;
  PartialBlock::Prefetch(file, number, key, &fetches);
  fetches.Run();
  PartialBlock block;
  ARROW_RETURN_NOT_OK(block.Open(file, number, key));
  std::vector<int> columns(file.flat_columns().size() - 2);
  std::iota(columns.begin(), columns.end(), 0);
  block.PrefetchPlaces(columns, &fetches);
  fetches.Run();
  block.PrefetchKeys(&fetches);
  fetches.Run();
  int64_t row = -1;
  bool deleted = false;
  ARROW_RETURN_NOT_OK(block.Find(&row));
  if (row < 0) return arrow::Status::OK();
  *known = true;
  ARROW_RETURN_NOT_OK(block.IsDeleted(row, &deleted));
  if (deleted) return arrow::Status::OK();
  block.PrefetchRow(row, columns, &fetches);
  fetches.Run();
  ARROW_RETURN_NOT_OK(block.CheckRow(row, columns));
  auto source = std::make_shared<Source>(block.MakeSource());
  *out = {source.get(), static_cast<uint32_t>(row), source};
  return arrow::Status::OK();
}

// Looks for many keys at a time, each in one block: each step is done for all of them before the next one is.
class PartsLookup {
 public:
  PartsLookup(const std::vector<int>& columns, Lookup* lookup, std::vector<bool>* done)
      : columns_(columns), lookup_(lookup), done_(done) {}

  // So many keys more may be added.
  void Expect(size_t keys) noexcept { expected_ += keys; }

  // A key, which outlives the search, in the range of a block; `number` is the key's among those that are looked up.
  arrow::Status Add(const TableFile& file, size_t block, std::string_view key, uint32_t number) {
    PartialBlock::Prefetch(file, block, key, &fetches_);
    Lane& lane = lanes_[count_];
    lane.file = &file;
    lane.number = block;
    lane.key = key;
    lane.asked = number;
    return ++count_ == kLanes ? Search() : arrow::Status::OK();
  }

  // Looks for all that were added.
  arrow::Status Search() {
    const std::span<Lane> lanes(lanes_.data(), std::exchange(count_, 0));
    fetches_.Run();
    for (Lane& lane : lanes) {
      ARROW_RETURN_NOT_OK(lane.block.Open(*lane.file, lane.number, lane.key));
      lane.block.PrefetchPlaces(columns_, &fetches_);
    }
    fetches_.Run();
    for (Lane& lane : lanes) lane.block.PrefetchKeys(&fetches_);
    fetches_.Run();
    for (Lane& lane : lanes) {
      bool deleted = false;
      ARROW_RETURN_NOT_OK(lane.block.Find(&lane.row));
      if (lane.row < 0) continue;
      (*done_)[lane.asked] = true;
      ARROW_RETURN_NOT_OK(lane.block.IsDeleted(lane.row, &deleted));
      if (deleted) {
        lane.row = -1;
      } else {
        lane.block.PrefetchRow(lane.row, columns_, &fetches_);
      }
    }
    fetches_.Run();
    for (Lane& lane : lanes) {
      if (lane.row < 0) continue;
      ARROW_RETURN_NOT_OK(lane.block.CheckRow(lane.row, columns_));
      if (rows_ == nullptr) {
        rows_ = std::make_shared<CopiedRows>(lane.block, lane.file->flat_columns(), columns_, expected_);
      }
      lookup_->Put(lane.asked, &rows_->source(), rows_->Add(lane.block, lane.row));
    }
    return arrow::Status::OK();
  }

  // The end: `held` keeps what was found.
  arrow::Status Finish(Held* held) {
    ARROW_RETURN_NOT_OK(Search());
    if (rows_ == nullptr) return arrow::Status::OK();
    ARROW_RETURN_NOT_OK(rows_->Finish());
    held->push_back(rows_);
    return arrow::Status::OK();
  }

 private:
  static constexpr size_t kLanes = 32;
  struct Lane {
    const TableFile* file = nullptr;
    size_t number = 0;
    std::string_view key;
    uint32_t asked = 0;
    int64_t row = -1;
    PartialBlock block;
  };
  const std::vector<int>& columns_;
  Lookup* const lookup_;
  std::vector<bool>* const done_;
  std::vector<Lane> lanes_ = std::vector<Lane>(kLanes);
  size_t count_ = 0;
  size_t expected_ = 0;
  Fetches fetches_;
  std::shared_ptr<CopiedRows> rows_;
};

}  // namespace marble
