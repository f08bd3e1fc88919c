// Batches whose values may be loaded as what they are.
//
// Arrow asks for buffers at multiples of 8 bytes, and what arrives by Flight lies wherever its message has it: reading an int64
// there is undefined, whatever most processors make of it. Whoever takes a batch from Python takes it through here.
//
// Ownership: what is aligned is given back as it is, without a copy; else only the buffers that are not are copied.
// Threads: none of its own; any may call.
#pragma once

#include <arrow/record_batch.h>
#include <arrow/util/align_util.h>

#include <memory>
#include <utility>

namespace marble {

inline arrow::Result<std::shared_ptr<arrow::RecordBatch>> AlignedBatch(std::shared_ptr<arrow::RecordBatch> batch) {
  for (int i = 0; i < batch->num_columns(); ++i) {
    if (!arrow::util::CheckAlignment(*batch->column_data(i), arrow::util::kValueAlignment)) {
      return arrow::util::EnsureAlignment(std::move(batch), arrow::util::kValueAlignment, arrow::default_memory_pool());
    }
  }
  return batch;
}

}  // namespace marble
