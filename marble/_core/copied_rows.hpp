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

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace marble {

class CopiedRows {
 public:
  CopiedRows(const std::vector<FlatColumn>& flat, const std::vector<int>& columns) {
    source_.rows = kNeverMost;
    source_.views.resize(flat.size());
    for (const int column : columns) {
      const FlatColumn& how = flat[static_cast<size_t>(column)];
      if (how.in_key) continue;  // Nobody asks for them: the caller has the keys.
      columns_.push_back({static_cast<size_t>(column), how, {}, {}, {}, false});
      if (how.buffers == 3) columns_.back().values.assign(static_cast<size_t>(how.width), 0);  // The first offset.
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
          column.values.insert(column.values.end(), view.values + row * width, view.values + (row + 1) * width);
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
      if (column.how.kind == FlatColumn::Kind::kNarrow && column.data.size() > std::numeric_limits<int32_t>::max()) {
        return arrow::Status::CapacityError("more bytes than offsets reach");
      }
      source_.views[column.number] = {column.nulls ? column.validity.data() : nullptr,
                                      column.values.empty() ? kNothing : column.values.data(),
                                      column.data.empty() ? kNothing : column.data.data(), 0};
    }
    return arrow::Status::OK();
  }

 private:
  using Bytes = std::vector<uint8_t>;
  struct Column {
    size_t number;
    FlatColumn how;
    Bytes validity, values, data;
    bool nulls;  // Whether a row is null.
  };

  void AddBit(Bytes* bits, bool bit) {
    if (count_ % 8 == 0) bits->push_back(0);
    bits->back() = static_cast<uint8_t>(bits->back() | (bit ? 1 : 0) << count_ % 8);
  }
  template <typename Offset>
  static void AddBytes(const ColumnView& view, int64_t row, Column* column) {
    Offset ends[2];
    std::memcpy(ends, view.values + row * static_cast<int64_t>(sizeof(Offset)), sizeof(ends));
    column->data.insert(column->data.end(), view.data + ends[0], view.data + ends[1]);
    const auto end = static_cast<Offset>(column->data.size());
    const auto* bytes = reinterpret_cast<const uint8_t*>(&end);
    column->values.insert(column->values.end(), bytes, bytes + sizeof(end));
  }

  Source source_;
  std::vector<Column> columns_;
  uint32_t count_ = 0;
};

}  // namespace marble
