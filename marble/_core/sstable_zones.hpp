// Zone maps: what values a block's columns have, so that a scan may pass over blocks.
//
// Layout: an Arrow IPC stream of one batch with a row for each block. For column `x` there is `x.nulls` (uint64) and,
// where the type has an order, `x.min` and `x.max` of the column's own type; they are null where nothing is known.
// Strings and binary are cut to kZoneBytes, the largest upwards; text stays text.
// Ownership: values are copied. Thread safety: a ZoneColumn belongs to one thread at a time.
// Invariants:
//   1. Where min and max are there, every value of the block that is not null lies between them, both included. A NaN
//      lies nowhere: a block with one has neither.
//   2. Tombstones are not counted as nulls; the values in their keys count.
#pragma once

#include "gather.hpp"

#include <arrow/array/data.h>
#include <arrow/type.h>
#include <arrow/util/bit_util.h>
#include <arrow/util/decimal.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

constexpr size_t kZoneBytes = 32;

// The smallest text (`is_text`: UTF-8) or bytes of about kZoneBytes that is above all that begin with the first
// kZoneBytes of `value`; false if there is none.
inline bool RaiseCut(std::string_view value, bool is_text, std::string* out) {
  out->assign(value.substr(0, kZoneBytes));
  if (!is_text) {
    while (!out->empty() && static_cast<uint8_t>(out->back()) == 0xFF) out->pop_back();
    if (out->empty()) return false;
    out->back() = static_cast<char>(static_cast<uint8_t>(out->back()) + 1);
    return true;
  }
  // The character at the cut may be half there.
  while (!out->empty() && out->size() < value.size() && (static_cast<uint8_t>(value[out->size()]) & 0xC0) == 0x80) {
    out->pop_back();
  }
  while (!out->empty()) {
    size_t first = out->size() - 1;
    while (first > 0 && (static_cast<uint8_t>((*out)[first]) & 0xC0) == 0x80) --first;
    const auto head = static_cast<uint8_t>((*out)[first]);
    uint32_t point = head < 0x80 ? head : head < 0xE0 ? head & 0x1FU : head < 0xF0 ? head & 0x0FU : head & 0x07U;
    for (size_t i = first + 1; i < out->size(); ++i) point = point << 6 | (static_cast<uint8_t>((*out)[i]) & 0x3FU);
    out->resize(first);
    if (++point == 0xD800) point = 0xE000;  // Surrogates are no characters.
    if (point > 0x10FFFF) continue;
    const auto put = [out](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
    if (point < 0x80) {
      put(point);
    } else if (point < 0x800) {
      put(0xC0 | point >> 6);
      put(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
      put(0xE0 | point >> 12);
      put(0x80 | (point >> 6 & 0x3F));
      put(0x80 | (point & 0x3F));
    } else {
      put(0xF0 | point >> 18);
      put(0x80 | (point >> 12 & 0x3F));
      put(0x80 | (point >> 6 & 0x3F));
      put(0x80 | (point & 0x3F));
    }
    return true;
  }
  return false;
}

inline std::string_view LowerCut(std::string_view value, bool is_text) noexcept {
  size_t size = std::min(value.size(), kZoneBytes);
  while (is_text && size > 0 && size < value.size() && (static_cast<uint8_t>(value[size]) & 0xC0) == 0x80) --size;
  return value.substr(0, size);
}

// What is gathered of one column while blocks are made.
class ZoneColumn {
 public:
  explicit ZoneColumn(std::shared_ptr<arrow::DataType> type) : type_(std::move(type)) {}

  bool has_order() const noexcept {
    switch (type_->id()) {
      case arrow::Type::HALF_FLOAT:
      case arrow::Type::INTERVAL_MONTHS:
      case arrow::Type::INTERVAL_DAY_TIME:
      case arrow::Type::INTERVAL_MONTH_DAY_NANO:
      case arrow::Type::DECIMAL256:
        return false;
      case arrow::Type::FIXED_SIZE_BINARY:
        return type_->byte_width() > 0 && type_->byte_width() <= static_cast<int>(kZoneBytes);
      default:
        return FixedBits(*type_) > 0 || arrow::is_base_binary_like(type_->id());
    }
  }

  // One block's rows; `tombstones` of them are null because they are no rows.
  void Add(const arrow::ArrayData& column, int64_t tombstones) {
    nulls_.push_back(static_cast<uint64_t>(column.GetNullCount() - tombstones));
    bounds_.emplace_back();
    if (has_order() && column.GetNullCount() < column.length) AddBounds(column, &bounds_.back());
  }

  std::shared_ptr<arrow::ArrayData> Nulls() const {
    auto buffer = arrow::Buffer::FromVector(nulls_);
    return arrow::ArrayData::Make(arrow::uint64(), static_cast<int64_t>(nulls_.size()), {nullptr, std::move(buffer)}, 0);
  }
  arrow::Result<std::shared_ptr<arrow::ArrayData>> Bound(bool largest) const {
    const auto count = static_cast<int64_t>(bounds_.size());
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> known, arrow::AllocateEmptyBitmap(count));
    std::string bytes;
    std::vector<int32_t> ends = {0};
    std::vector<int64_t> large_ends = {0};
    const bool bits = type_->id() == arrow::Type::BOOL;
    if (bits) bytes.assign(static_cast<size_t>((count + 7) / 8), 0);
    for (int64_t i = 0; i < count; ++i) {
      const Bounds& bounds = bounds_[static_cast<size_t>(i)];
      if (bounds.known) arrow::bit_util::SetBit(known->mutable_data(), i);
      const std::string& value = largest ? bounds.max : bounds.min;
      if (bits) {
        arrow::bit_util::SetBitTo(reinterpret_cast<uint8_t*>(bytes.data()), i, bounds.known && value[0] != 0);
      } else if (!bounds.known && FixedBits(*type_) > 0) {
        bytes.append(static_cast<size_t>(FixedBits(*type_) / 8), 0);
      } else {
        bytes.append(value);
      }
      ends.push_back(static_cast<int32_t>(bytes.size()));
      large_ends.push_back(static_cast<int64_t>(bytes.size()));
    }
    auto data = arrow::Buffer::FromString(std::move(bytes));
    std::vector<std::shared_ptr<arrow::Buffer>> buffers = {std::move(known), std::move(data)};
    if (arrow::is_base_binary_like(type_->id())) {
      const bool narrow = arrow::is_binary_like(type_->id());
      buffers.insert(buffers.begin() + 1, narrow ? arrow::Buffer::FromVector(std::move(ends))
                                                 : arrow::Buffer::FromVector(std::move(large_ends)));
    }
    return arrow::ArrayData::Make(type_, count, std::move(buffers));
  }

 private:
  struct Bounds {
    bool known = false;
    std::string min, max;
  };

  // Calls `take(row)` for each row that is not null.
  template <typename Take>
  static void EachRow(const arrow::ArrayData& column, Take take) {
    const uint8_t* validity = column.GetNullCount() > 0 ? column.buffers[0]->data() : nullptr;
    for (int64_t row = 0; row < column.length; ++row) {
      if (validity == nullptr || arrow::bit_util::GetBit(validity, column.offset + row)) take(row);
    }
  }

  template <typename Value>
  static void Numbers(const arrow::ArrayData& column, Bounds* bounds) {
    const Value* values = column.GetValues<Value>(1);
    Value min{};
    Value max{};
    bool any = false;
    bool all = true;
    if (column.GetNullCount() == 0) {
      // Without a choice in it, this loop is done many rows at a time.
      min = max = values[0];
      int nans = 0;
      for (int64_t row = 0; row < column.length; ++row) {
        min = values[row] < min ? values[row] : min;
        max = max < values[row] ? values[row] : max;
        nans |= values[row] != values[row] ? 1 : 0;
      }
      any = true;
      all = nans == 0;
    } else {
      EachRow(column, [&](int64_t row) {
        const Value value = values[row];
        all = all && value == value;
        if (!any || value < min) min = value;
        if (!any || max < value) max = value;
        any = true;
      });
    }
    bounds->known = any && all;
    bounds->min.assign(reinterpret_cast<const char*>(&min), sizeof(Value));
    bounds->max.assign(reinterpret_cast<const char*>(&max), sizeof(Value));
  }

  // `at(row)` gives a value's bytes; smaller bytes are smaller values.
  template <typename At>
  void Strings(const arrow::ArrayData& column, At at, Bounds* bounds) {
    std::string_view min;
    std::string_view max;
    bool any = false;
    EachRow(column, [&](int64_t row) {
      const std::string_view value = at(row);
      if (!any || value < min) min = value;
      if (!any || max < value) max = value;
      any = true;
    });
    const bool is_text = type_->id() == arrow::Type::STRING || type_->id() == arrow::Type::LARGE_STRING;
    bounds->min = LowerCut(min, is_text);
    bounds->known = true;
    if (max.size() <= kZoneBytes) {
      bounds->max = max;
    } else {
      bounds->known = RaiseCut(max, is_text, &bounds->max);
    }
    if (!bounds->known) bounds->min.clear(), bounds->max.clear();
  }

  void Decimals(const arrow::ArrayData& column, Bounds* bounds) {
    const uint8_t* values = column.GetValues<uint8_t>(1, column.offset * 16);
    arrow::Decimal128 min;
    arrow::Decimal128 max;
    EachRow(column, [&](int64_t row) {
      const arrow::Decimal128 value(values + row * 16);
      if (!bounds->known || value < min) min = value;
      if (!bounds->known || max < value) max = value;
      bounds->known = true;
    });
    bounds->min.resize(16);
    bounds->max.resize(16);
    min.ToBytes(reinterpret_cast<uint8_t*>(bounds->min.data()));
    max.ToBytes(reinterpret_cast<uint8_t*>(bounds->max.data()));
  }

  template <typename Offset>
  void Binaries(const arrow::ArrayData& column, Bounds* bounds) {
    const Offset* offsets = column.GetValues<Offset>(1);
    const char* data = column.buffers[2] == nullptr ? "" : reinterpret_cast<const char*>(column.buffers[2]->data());
    Strings(column, [&](int64_t row) {
      return std::string_view(data + offsets[row], static_cast<size_t>(offsets[row + 1] - offsets[row]));
    }, bounds);
  }

  void AddBounds(const arrow::ArrayData& column, Bounds* bounds) {
    switch (type_->id()) {
      case arrow::Type::BOOL: {
        const uint8_t* bits = column.buffers[1]->data();
        bool seen[2] = {false, false};
        EachRow(column, [&](int64_t row) { seen[arrow::bit_util::GetBit(bits, column.offset + row) ? 1 : 0] = true; });
        bounds->known = true;
        bounds->min.assign(1, seen[0] ? 0 : 1);
        bounds->max.assign(1, seen[1] ? 1 : 0);
        return;
      }
      case arrow::Type::UINT8:
        return Numbers<uint8_t>(column, bounds);
      case arrow::Type::UINT16:
        return Numbers<uint16_t>(column, bounds);
      case arrow::Type::UINT32:
        return Numbers<uint32_t>(column, bounds);
      case arrow::Type::UINT64:
        return Numbers<uint64_t>(column, bounds);
      case arrow::Type::INT8:
        return Numbers<int8_t>(column, bounds);
      case arrow::Type::INT16:
        return Numbers<int16_t>(column, bounds);
      case arrow::Type::INT32:
      case arrow::Type::DATE32:
      case arrow::Type::TIME32:
      case arrow::Type::DECIMAL32:
        return Numbers<int32_t>(column, bounds);
      case arrow::Type::INT64:
      case arrow::Type::DATE64:
      case arrow::Type::TIME64:
      case arrow::Type::TIMESTAMP:
      case arrow::Type::DURATION:
      case arrow::Type::DECIMAL64:
        return Numbers<int64_t>(column, bounds);
      case arrow::Type::FLOAT:
        return Numbers<float>(column, bounds);
      case arrow::Type::DOUBLE:
        return Numbers<double>(column, bounds);
      case arrow::Type::DECIMAL128:
        return Decimals(column, bounds);
      case arrow::Type::FIXED_SIZE_BINARY: {
        const auto width = static_cast<size_t>(type_->byte_width());
        const char* values = reinterpret_cast<const char*>(column.buffers[1]->data());
        return Strings(column, [&](int64_t row) {
          return std::string_view(values + static_cast<size_t>(column.offset + row) * width, width);
        }, bounds);
      }
      case arrow::Type::STRING:
      case arrow::Type::BINARY:
        return Binaries<int32_t>(column, bounds);
      case arrow::Type::LARGE_STRING:
      case arrow::Type::LARGE_BINARY:
        return Binaries<int64_t>(column, bounds);
      default:
        return;
    }
  }

  const std::shared_ptr<arrow::DataType> type_;
  std::vector<uint64_t> nulls_;
  std::vector<Bounds> bounds_;
};

}  // namespace marble
