// Rows found for keys, gathered into the order of the keys.
//
// Ownership: a lookup borrows the sources that it is told of. Thread safety: for one thread at a time.
// Invariants:
//   1. A key that nothing was put for has its row missing: null but for the key.
#pragma once

#include "gather.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/record_batch.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace marble {

// Numbers for sources, as a plan lists them: a table of pointers, open addressing.
class SourceNumbers {
 public:
  explicit SourceNumbers(size_t sources_max) : places_(std::bit_ceil(2 * sources_max + 2), Place{nullptr, 0}) {}

  uint32_t Of(const Source* source, std::vector<const Source*>* sources) {
    const size_t mask = places_.size() - 1;
    size_t at = (reinterpret_cast<uintptr_t>(source) * 0x9e3779b97f4a7c15U >> 20) & mask;
    while (places_[at].source != source) {
      if (places_[at].source == nullptr) {
        places_[at] = {source, static_cast<uint32_t>(sources->size())};
        sources->push_back(source);
        break;
      }
      at = (at + 1) & mask;
    }
    return places_[at].number;
  }

 private:
  struct Place {
    const Source* source;
    uint32_t number;
  };
  std::vector<Place> places_;
};

class Lookup {
 public:
  explicit Lookup(size_t keys) : numbers_(keys) { plan_.rows.assign(keys, {kNone, 0}); }

  // Says where the row of key `i` is; at most once for each key.
  void Put(size_t i, const Source* source, uint32_t row) {
    plan_.rows[i] = {numbers_.Of(source, &plan_.sources), row};
  }

  // `columns` by position in `schema`; those of the key are taken from `keys`, which has them in the order of `key`.
  // Sets `found` to whether each key has a row. Once only.
  arrow::Status Gather(const arrow::Schema& schema, const std::vector<int>& key, const arrow::RecordBatch& keys,
                       const std::vector<int>& columns, std::shared_ptr<arrow::RecordBatch>* out,
                       std::shared_ptr<arrow::Array>* found) {
    const auto count = static_cast<int64_t>(plan_.rows.size());
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> bitmap, arrow::AllocateEmptyBitmap(count));
    const auto missing = static_cast<uint32_t>(plan_.sources.size());
    for (size_t i = 0; i < plan_.rows.size(); ++i) {
      if (plan_.rows[i].source != kNone) {
        arrow::bit_util::SetBit(bitmap->mutable_data(), static_cast<int64_t>(i));
      } else {
        plan_.rows[i] = {missing, 0};
        if (plan_.sources.size() == missing) plan_.sources.push_back(nullptr);
      }
    }
    plan_.FindSpans();
    arrow::FieldVector fields;
    std::vector<std::shared_ptr<arrow::ArrayData>> arrays;
    for (const int column : columns) {
      fields.push_back(schema.field(column));
      std::shared_ptr<arrow::ArrayData> data;
      for (size_t i = 0; i < key.size(); ++i) {
        if (key[i] == column) data = keys.column_data(static_cast<int>(i));
      }
      if (data == nullptr) {
        ARROW_ASSIGN_OR_RAISE(data, GatherColumn(plan_, column, fields.back()->type(), true));
      }
      arrays.push_back(std::move(data));
    }
    *out = arrow::RecordBatch::Make(arrow::schema(std::move(fields), schema.metadata()), count, std::move(arrays));
    *found = std::make_shared<arrow::BooleanArray>(count, std::move(bitmap));
    return arrow::Status::OK();
  }

 private:
  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
  RowPlan plan_;
  SourceNumbers numbers_;
};

}  // namespace marble
