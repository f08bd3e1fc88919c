// Bytes as the one column of a record batch, and back. See packing.pyx.
#pragma once

#include <memory>
#include <utility>

#include "arrow/api.h"

namespace marble {

// The schema of every batch of messages: `bytes`, uint8, without nulls.
inline const std::shared_ptr<arrow::Schema>& BytesSchema() {
  static const std::shared_ptr<arrow::Schema> schema =
      arrow::schema({arrow::field("bytes", arrow::uint8(), /*nullable=*/false)});
  return schema;
}

inline std::shared_ptr<arrow::RecordBatch> BatchOfBytes(std::shared_ptr<arrow::Buffer> bytes) {
  const int64_t size = bytes->size();
  auto column = arrow::ArrayData::Make(arrow::uint8(), size, {nullptr, std::move(bytes)}, /*null_count=*/0);
  return arrow::RecordBatch::Make(BytesSchema(), size, {std::move(column)});
}

// The bytes of a batch of which nothing has been checked; null if it is not of that schema, or lacks some of its bytes.
inline std::shared_ptr<arrow::Buffer> BytesOfBatch(const arrow::RecordBatch& batch) {
  if (!batch.schema()->Equals(*BytesSchema(), /*check_metadata=*/false)) return nullptr;
  const auto& column = batch.column_data(0);
  if (column->buffers.size() != 2 || column->buffers[0] != nullptr || column->buffers[1] == nullptr) return nullptr;
  const auto& values = column->buffers[1];
  if (!values->is_cpu() || column->offset < 0 || column->length < 0 || column->length > values->size() ||
      column->offset > values->size() - column->length) {
    return nullptr;
  }
  return arrow::SliceBuffer(values, column->offset, column->length);
}

}  // namespace marble
