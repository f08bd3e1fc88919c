// Single rows of many blocks, copied behind one another: one source for all of them.
//
// Ownership: owns its bytes; its views point to them from Finish on.
// Thread safety: for one thread at a time until Finish; immutable from then on.
// Invariants:
//   1. Row i is the one that the i-th Add copied. Only the columns that it was made for are there.
#pragma once

#include "block_parts.hpp"

#include <arrow/status.h>
#include <arrow/util/bit_util.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace marble {

// Bytes that are put behind one another, in memory of Arrow's pool, which keeps at hand what was freed: fresh pages would cost
// more than the copying.
class GrowingBytes {
 public:
  uint64_t size() const noexcept { return size_; }
  const uint8_t* data() const noexcept { return size_ == 0 ? kNothing : bytes_.get(); }
  uint8_t& back() noexcept { return bytes_[size_ - 1]; }

  // Room for so many more bytes.
  void Reserve(uint64_t more) {
    if (size_ + more <= room_) return;
    const uint64_t room = std::max(size_ + more, 2 * room_);
    auto bytes = MakePoolArray<uint8_t>(room);
    if (size_ > 0) std::memcpy(bytes.get(), bytes_.get(), size_);
    bytes_ = std::move(bytes);
    room_ = room;
  }
  void AddZeros(uint64_t size) {
    Reserve(size);
    std::memset(bytes_.get() + size_, 0, size);
    size_ += size;
  }
  void Add(const uint8_t* from, uint64_t size) {
    Reserve(size);
    CopyStretch(bytes_.get() + size_, from, size);
    size_ += size;
  }

 private:
  PoolArray<uint8_t> bytes_;
  uint64_t size_ = 0;
  uint64_t room_ = 0;
};

class CopiedRows {
 public:
  static constexpr uint64_t kReservedBytesMax = 1 << 20;  // Of a column, for rows that may never come.

  // `rows_about`: how many are to come, and as long as those of `like`.
  CopiedRows(const PartialBlock& like, const std::vector<FlatColumn>& flat, const std::vector<int>& columns,
             uint64_t rows_about) {
    source_.rows = kNeverMost;
    source_.views.resize(flat.size());
    for (const int column : columns) {
      const FlatColumn& how = flat[static_cast<size_t>(column)];
      if (how.in_key) continue;  // Nobody asks for them: the caller has the keys.
      columns_.push_back({static_cast<size_t>(column), how, {}, {}, {}, false});
      columns_.back().validity.Reserve(rows_about / 8 + 1);
      columns_.back().values.Reserve(how.BytesFor(rows_about));
      if (how.buffers < 3) continue;
      columns_.back().values.AddZeros(static_cast<uint64_t>(how.width));  // The first offset.
      const uint64_t bytes = like.TextBytes(static_cast<size_t>(column), rows_about);
      columns_.back().data.Reserve(std::min(bytes, kReservedBytesMax));
    }
  }

  const Source& source() const noexcept { return source_; }

  // Copies a row of `from` whose values were checked. Returns which one it is here.
  uint32_t Add(const PartialBlock& from, int64_t row) {
    for (Column& column : columns_) {
      const ColumnView view = from.View(column.number);
      const bool valid = view.validity == nullptr || arrow::bit_util::GetBit(view.validity, row);
      column.nulls = column.nulls || !valid;
      AddBit(&column.validity, valid);
      const auto width = column.how.width;
      switch (column.how.kind) {
        case FlatColumn::Kind::kBits:
          AddBit(&column.values, arrow::bit_util::GetBit(view.values, row));
          break;
        case FlatColumn::Kind::kFixed:
          column.values.Add(view.values + row * width, static_cast<uint64_t>(width));
          break;
        case FlatColumn::Kind::kNarrow:
          AddBytes<int32_t>(view, row, &column);
          break;
        case FlatColumn::Kind::kLarge:
          AddBytes<int64_t>(view, row, &column);
      }
    }
    return count_++;
  }

  // No more rows come.
  arrow::Status Finish() {
    for (const Column& column : columns_) {
      if (column.how.kind == FlatColumn::Kind::kNarrow && column.data.size() > uint64_t{std::numeric_limits<int32_t>::max()}) {
        return arrow::Status::CapacityError("more bytes than offsets reach");
      }
      source_.views[column.number] = {column.nulls ? column.validity.data() : nullptr, column.values.data(),
                                      column.data.data(), 0};
    }
    return arrow::Status::OK();
  }

 private:
  struct Column {
    size_t number;
    FlatColumn how;
    GrowingBytes validity, values, data;
    bool nulls;  // Whether a row is null.
  };

  void AddBit(GrowingBytes* bits, bool bit) {
    if (count_ % 8 == 0) bits->AddZeros(1);
    bits->back() = static_cast<uint8_t>(bits->back() | (bit ? 1 : 0) << count_ % 8);
  }
  template <typename Offset>
  static void AddBytes(const ColumnView& view, int64_t row, Column* column) {
    Offset ends[2];
    std::memcpy(ends, view.values + row * static_cast<int64_t>(sizeof(Offset)), sizeof(ends));
    column->data.Add(view.data + ends[0], static_cast<uint64_t>(ends[1] - ends[0]));
    const auto end = static_cast<Offset>(column->data.size());
    column->values.Add(reinterpret_cast<const uint8_t*>(&end), sizeof(end));
  }

  Source source_;
  std::vector<Column> columns_;
  uint32_t count_ = 0;
};

}  // namespace marble
