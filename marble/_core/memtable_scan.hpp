// Walking a state in key order, batch by batch.
//
// Layout: the runs are merged a block at a time: from each run a stretch that ends below one common key, so that a
// block needs only as much memory as it has rows, and no two blocks share a key.
// Ownership: a cursor shares the state, and so outlives memtable and snapshot.
// Thread safety: `Next` takes a lock; callers in several threads take turns. Nothing else changes after construction.
// Invariants:
//   1. positions_[r] is the first entry of run r that is in no block yet.
//   2. pending_[pending_at_...] are live refs in key order, with slots numbered over all runs (`sources_`).
#pragma once

#include "memtable_state.hpp"

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace marble {

constexpr size_t kScanBytesMax = 64 << 20;   // A batch is cut once its rows have about so many bytes.
constexpr size_t kScanBlockRows = 64 << 10;  // A block fits the cache together with its merge buffers.

class ScanCursor {
 public:
  static arrow::Status Make(std::shared_ptr<const State> state, std::vector<int> columns, int64_t batch_rows_max,
                            std::shared_ptr<ScanCursor>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      *out = std::make_shared<ScanCursor>(std::move(state), std::move(columns), static_cast<size_t>(batch_rows_max));
      return arrow::Status::OK();
    });
  }

  ScanCursor(std::shared_ptr<const State> state, std::vector<int> columns, size_t batch_rows_max)
      : state_(std::move(state)), columns_(std::move(columns)), batch_rows_max_(batch_rows_max) {
    arrow::FieldVector fields;
    for (const int column : columns_) fields.push_back(state_->layout->schema->field(column));
    schema_ = arrow::schema(std::move(fields), state_->layout->schema->metadata());
    size_t slots = 0;
    for (const auto& run : state_->runs) {
      bases_.push_back(uint64_t{slots} << 32);
      slots += run->slots.size();
      for (const Slot& slot : run->slots) sources_.push_back(slot.source.get());
    }
    if (slots > kSlotMax) throw std::bad_alloc();
    positions_.assign(state_->runs.size(), 0);
    numbers_.assign(slots, kNone);
  }

  const std::shared_ptr<arrow::Schema>& schema() const noexcept { return schema_; }

  // Sets `out` to the next batch, or to null after the last. After an error the cursor stands where it stood.
  arrow::Status Next(std::shared_ptr<arrow::RecordBatch>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      const std::lock_guard<std::mutex> guard(mutex_);
      const size_t wanted = std::min(batch_rows_max_, kScanBlockRows);
      while (pending_.size() - pending_at_ < wanted && FillBlock()) {
      }
      for (size_t rows = CutBatch(); rows > 0;) {
        const arrow::Status status = Gather(rows, out);
        // Rows far longer than the rest of their batch can pass the estimate: try fewer.
        if (status.IsCapacityError() && rows > 1) {
          rows /= 2;
          continue;
        }
        ARROW_RETURN_NOT_OK(status);
        pending_at_ += rows;
        return arrow::Status::OK();
      }
      out->reset();
      return arrow::Status::OK();
    });
  }

 private:
  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

  // Merges one more block into pending_; returns whether there was any.
  bool FillBlock() {
    const size_t count = state_->runs.size();
    const KeyShape& shape = state_->shape;
    size_t left = 0;
    for (size_t r = 0; r < count; ++r) left += state_->runs[r]->size - positions_[r];
    if (left == 0) return false;
    // The block ends below the smallest of the keys that stand a fair share further on in their runs: no run gives more
    // than its share, and the run with the smallest gives all of it, so every block moves on.
    const Run* bound_run = nullptr;
    KeyView bound{};
    std::vector<size_t> ends(count);
    for (size_t r = 0; r < count; ++r) {
      const Run& run = *state_->runs[r];
      const double part = static_cast<double>(run.size - positions_[r]) / static_cast<double>(left);
      const size_t share = static_cast<size_t>(part * kScanBlockRows) + 1;
      ends[r] = std::min(run.size, positions_[r] + share);
      if (ends[r] == run.size) continue;
      const KeyView key = run.Key(ends[r], shape);
      if (bound_run == nullptr || Compare(key, bound, shape) < 0) {
        bound_run = &run;
        bound = key;
      }
    }
    if (bound_run != nullptr) {
      for (size_t r = 0; r < count; ++r) {
        ends[r] = std::min(ends[r], LowerBound(*state_->runs[r], positions_[r], bound, shape));
      }
    }
    MergeBlock(ends);
    return true;
  }

  void MergeBlock(const std::vector<size_t>& ends) {
    size_t total = 0;
    for (size_t r = 0; r < ends.size(); ++r) total += ends[r] - positions_[r];
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(pending_at_));
    pending_at_ = 0;
    pending_.reserve(pending_.size() + total);
    Words words(total);
    Words refs(total);
    Words next_words(total);
    Words next_refs(total);
    size_t size = 0;
    for (size_t r = 0; r < ends.size(); ++r) {
      const Run& run = *state_->runs[r];
      const Piece newer{words.get(), refs.get(), size, 0};
      const size_t first = positions_[r];
      const Piece older{run.words.get() + first, run.refs.get() + first, ends[r] - first, bases_[r]};
      if (older.size == 0) continue;
      MergeOutput out{next_words.get(), next_refs.get(), nullptr};
      MergePieces(state_->shape, newer, older, sources_.data(), &out);
      size = out.size;
      std::swap(words, next_words);
      std::swap(refs, next_refs);
    }
    for (size_t i = 0; i < size; ++i) {
      if ((refs[i] & kTombstone) == 0) pending_.push_back(refs[i]);
    }
    positions_ = ends;
  }

  // How many of the pending rows make the next batch; 0 at the end.
  size_t CutBatch() const noexcept {
    const size_t most = std::min(batch_rows_max_, pending_.size() - pending_at_);
    uint64_t bytes = 0;
    for (size_t i = 0; i < most; ++i) {
      const Source& source = *sources_[SlotOf(pending_[pending_at_ + i])];
      bytes += static_cast<uint64_t>(source.bytes / source.rows);
      if (bytes > kScanBytesMax) return i + 1;
    }
    return most;
  }

  arrow::Status Gather(size_t rows, std::shared_ptr<arrow::RecordBatch>* out) {
    RowPlan plan;
    std::vector<uint32_t> touched;
    // No allocation may fail between the first mark in numbers_ and the last one wiped off.
    plan.rows.reserve(rows);
    plan.sources.reserve(std::min(rows, sources_.size()));
    touched.reserve(std::min(rows, sources_.size()));
    for (size_t i = 0; i < rows; ++i) {
      const uint64_t ref = pending_[pending_at_ + i];
      uint32_t& number = numbers_[SlotOf(ref)];
      if (number == kNone) {
        touched.push_back(SlotOf(ref));
        number = static_cast<uint32_t>(plan.sources.size());
        plan.sources.push_back(sources_[SlotOf(ref)]);
      }
      plan.rows.push_back({number, RowOf(ref)});
    }
    for (const uint32_t slot : touched) numbers_[slot] = kNone;
    plan.FindSpans();
    std::vector<std::shared_ptr<arrow::ArrayData>> columns;
    for (const int column : columns_) {
      const auto& type = state_->layout->schema->field(column)->type();
      ARROW_ASSIGN_OR_RAISE(auto data, GatherColumn(plan, column, type, true));
      columns.push_back(std::move(data));
    }
    *out = arrow::RecordBatch::Make(schema_, static_cast<int64_t>(rows), std::move(columns));
    return arrow::Status::OK();
  }

  const std::shared_ptr<const State> state_;
  const std::vector<int> columns_;
  const size_t batch_rows_max_;
  std::shared_ptr<arrow::Schema> schema_;
  std::vector<uint64_t> bases_;          // First slot of each run in sources_, << 32.
  std::vector<const Source*> sources_;   // Slots of all runs; null where a slot is no longer used.
  std::vector<uint32_t> numbers_;        // Scratch of Gather: kNone between calls.
  std::vector<size_t> positions_;
  std::vector<uint64_t> pending_;
  size_t pending_at_ = 0;
  std::mutex mutex_;
};

}  // namespace marble
