// The rows of one table in memory: an ordered index over batches that are kept, not copied.
//
// Layout: each write becomes a sorted run; runs of similar size are merged at once, so that a table of n rows in
// batches of b has about log2(n / b) runs at most and each row is merged about that often. The list of runs is
// published whole (`State`).
// Ownership: states, runs and sources are shared by shared_ptr; readers keep what they read from, whatever the memtable
// does.
// Thread safety: `Take` may be called at any time from any thread; it holds a lock for the copy of one pointer.
// `Upsert` and `Delete` take turns. No function here needs the GIL; releasing a batch may take it, and no lock that a
// reader takes is held then.
// Invariants:
//   1. A failed write publishes nothing.
//   2. In the list of runs each is at least twice as large as the next newer one, unless that was made by dropping
//      refs.
//   3. A batch without live rows is let go; one with few is copied and let go, at a cost that its dead rows have paid
//      for.
#pragma once

#include "merge_cursor.hpp"
#include "merge_runs.hpp"
#include "memtable_state.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace marble {

constexpr int64_t kSmallRows = 256;          // A batch of fewer rows costs more as an object than as bytes.
constexpr size_t kSmallCount = 32;           // Small batches that are put into one together.
constexpr int64_t kSmallBytes = 1 << 20;     // But a batch of so many bytes is not small.
constexpr size_t kSparseCount = 8;           // Batches of more dead than live rows that are rewritten together,
constexpr int64_t kSparseRows = 4096;        // or so many dead rows in any number of them.
constexpr uint64_t kSkipMax = 1024;          // Most bytes that keys have in common and are compared without.
constexpr size_t kReshapeRows = 64 << 10;    // In a table of so many rows a change of those bytes is dear,
constexpr int kReshapesMax = 16;             // and after so many they are skipped no more.
constexpr int64_t kCopyBytes = 64 << 10;     // A batch of fewer than kSmallRows, or of at most so many bytes, is copied
constexpr int64_t kCopyShare = 8;            // if it is less than one part in so many of the memory that it keeps alive,
constexpr int64_t kCopyKept = 256 << 10;     // and that is more than this.
constexpr size_t kRewriteRows = 64 << 10;    // A rewritten batch has at most so many rows,
constexpr int64_t kRewriteBytes = 64 << 20;  // and about so many bytes.

// Copies the key bytes of planned rows.
inline std::shared_ptr<const KeyColumn> GatherKeys(const RowPlan& plan, int64_t width) {
  auto keys = std::make_shared<KeyColumn>();
  keys->rows = static_cast<int64_t>(plan.rows.size());
  keys->width = width;
  if (width == 0) keys->offsets = MakePoolArray<uint64_t>(plan.rows.size() + 1);
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    if (width == 0) keys->offsets[i] = keys->total;
    keys->total += plan.sources[plan.rows[i].source]->keys->size(plan.rows[i].row);
  }
  if (width == 0) keys->offsets[plan.rows.size()] = keys->total;
  AllocateKeyBytes(keys.get());
  uint8_t* to = keys->bytes.get();
  for (const RowRef& ref : plan.rows) {
    const KeyColumn& from = *plan.sources[ref.source]->keys;
    std::memcpy(to, from.data(ref.row), from.size(ref.row));
    to += from.size(ref.row);
  }
  return keys;
}

// Which sources of a run are to be rewritten, of batches or (`tombstones`) of deletes: many small ones, or such as are
// mostly dead.
inline std::vector<bool> ChooseRewritten(const Run& run, bool tombstones) {
  size_t small = 0;
  size_t sparse = 0;
  int64_t sparse_dead = 0;
  const auto is_small = [](const Slot& slot) {
    return slot.source->rows < kSmallRows && slot.source->bytes < kSmallBytes;
  };
  const auto is_sparse = [](const Slot& slot) { return int64_t{slot.live} * 2 < slot.source->rows; };
  const auto is_asked = [tombstones](const Slot& slot) {
    return slot.live > 0 && slot.source->columns.empty() == tombstones;
  };
  for (const Slot& slot : run.slots) {
    if (!is_asked(slot)) continue;
    small += is_small(slot) ? 1 : 0;
    if (is_sparse(slot)) {
      ++sparse;
      sparse_dead += slot.source->rows - int64_t{slot.live};
    }
  }
  const bool take_small = small >= kSmallCount;
  const bool take_sparse = sparse >= kSparseCount || sparse_dead >= kSparseRows;
  std::vector<bool> chosen;
  if (!take_small && !take_sparse) return chosen;
  for (const Slot& slot : run.slots) {
    chosen.push_back(is_asked(slot) && ((take_small && is_small(slot)) || (take_sparse && is_sparse(slot))));
  }
  return chosen;
}

// Copies the rows (or deleted keys) that `plan` lists, which are the refs of `run` at `positions`, into a source of
// their own.
inline arrow::Status RewriteRows(const Layout& layout, const RowPlan& plan, const std::vector<size_t>& positions,
                                 bool tombstones, Run* run) {
  auto source = std::make_shared<Source>();
  source->rows = static_cast<int64_t>(plan.rows.size());
  for (int i = 0; !tombstones && i < layout.schema->num_fields(); ++i) {
    ARROW_ASSIGN_OR_RAISE(auto column, GatherColumn(plan, i, layout.schema->field(i)->type(), false));
    AddColumn(source.get(), std::move(column));
  }
  if (!layout.whole) source->keys = GatherKeys(plan, layout.codec->width());
  std::shared_ptr<uint64_t[]> indexes(new uint64_t[plan.rows.size()]);
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    indexes[i] = plan.sources[plan.rows[i].source]->IndexOf(plan.rows[i].row);
  }
  source->indexes = std::move(indexes);
  const auto slot = static_cast<uint32_t>(run->slots.size());
  run->slots.emplace_back(std::move(source), static_cast<uint32_t>(plan.rows.size()));
  for (size_t i = 0; i < positions.size(); ++i) {
    uint64_t& ref = run->refs[positions[i]];
    const uint64_t old = ref & ~kTombstone;  // A tombstone that moves stays one.
    ref = (ref & kTombstone) | MakeRef(slot, static_cast<uint32_t>(i));
    ReleaseRefs(run, &old, 1);
  }
  return arrow::Status::OK();
}

// Frees memory that a merged run keeps for little. It may stop half-way (no memory, too long a row): the run is whole
// all the same.
inline arrow::Status RewriteSparse(const Layout& layout, bool tombstones, Run* run) {
  const std::vector<bool> chosen = ChooseRewritten(*run, tombstones);
  if (chosen.empty()) return arrow::Status::OK();
  const std::vector<Slot> kept = run->slots;  // Sources of the plan stay alive until it is done with.
  RowPlan plan;
  std::vector<uint32_t> numbers(kept.size(), 0);
  for (size_t i = 0; i < kept.size(); ++i) {
    if (!chosen[i]) continue;
    numbers[i] = static_cast<uint32_t>(plan.sources.size());
    plan.sources.push_back(kept[i].source.get());
  }
  std::vector<size_t> positions;
  int64_t bytes = 0;
  for (size_t i = 0; i < run->size; ++i) {
    const uint32_t slot = SlotOf(run->refs[i]);
    if (slot < chosen.size() && chosen[slot]) {
      plan.rows.push_back({numbers[slot], RowOf(run->refs[i])});
      positions.push_back(i);
      bytes += kept[slot].source->bytes / kept[slot].source->rows;
    }
    const bool full = plan.rows.size() == kRewriteRows || bytes > kRewriteBytes;
    if (plan.rows.empty() || !(full || i + 1 == run->size)) continue;
    plan.FindSpans();
    const arrow::Status status = RewriteRows(layout, plan, positions, tombstones, run);
    if (status.IsCapacityError() || status.IsOutOfMemory()) break;
    ARROW_RETURN_NOT_OK(status);
    plan.rows.clear();
    positions.clear();
    bytes = 0;
  }
  TidySlots(run);
  return arrow::Status::OK();
}

// Bytes of the allocations that a source's columns keep alive, each once.
inline int64_t BytesKept(const Source& source) {
  std::vector<const arrow::Buffer*> roots;
  const auto add = [&roots](const auto& self, const arrow::ArrayData& array) -> void {
    for (const auto& buffer : array.buffers) {
      if (buffer == nullptr) continue;
      const arrow::Buffer* root = buffer.get();
      while (root->parent() != nullptr) root = root->parent().get();
      // Two objects may stand for one allocation.
      const auto same = [root](const arrow::Buffer* other) { return other->data() == root->data(); };
      if (std::none_of(roots.begin(), roots.end(), same)) roots.push_back(root);
    }
    for (const auto& child : array.child_data) self(self, *child);
  };
  for (const auto& column : source.columns) add(add, *column);
  int64_t bytes = 0;
  for (const arrow::Buffer* root : roots) bytes += root->capacity();
  return bytes;
}

// Copies the rows of a source that is a small part of the memory which it would keep alive.
inline arrow::Status DetachSmall(const Layout& layout, Source* source) {
  // How much of its children a slice of a nested type has is not known at a glance: then few rows count as few bytes.
  const auto nested = [](const auto& column) { return !column->child_data.empty(); };
  const bool guess = std::any_of(source->columns.begin(), source->columns.end(), nested);
  const bool small = source->rows < kSmallRows || (!guess && source->bytes <= kCopyBytes);
  if (source->rows == 0 || !small) return arrow::Status::OK();
  const int64_t kept = BytesKept(*source);
  if (kept <= kCopyKept || (!guess && source->bytes > kept / kCopyShare)) return arrow::Status::OK();
  RowPlan plan;
  plan.sources.push_back(source);
  for (int64_t row = 0; row < source->rows; ++row) plan.rows.push_back({0, static_cast<uint32_t>(row)});
  plan.FindSpans();
  Source copy;
  for (int i = 0; i < layout.schema->num_fields(); ++i) {
    ARROW_ASSIGN_OR_RAISE(auto column, GatherColumn(plan, i, layout.schema->field(i)->type(), false));
    AddColumn(&copy, std::move(column));
  }
  source->bytes = copy.bytes;
  source->columns = std::move(copy.columns);
  source->views = std::move(copy.views);
  return arrow::Status::OK();
}

class MemtableCore {
 public:
  static arrow::Status Make(std::shared_ptr<arrow::Schema> schema, const std::vector<std::string>& key,
                            bool keep_tombstones, std::shared_ptr<MemtableCore>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      auto table = std::make_shared<MemtableCore>();
      table->keep_tombstones_ = keep_tombstones;
      ARROW_RETURN_NOT_OK(Layout::Make(std::move(schema), key, &table->layout_));
      auto state = std::make_shared<State>();
      state->layout = table->layout_;
      state->shape.whole = table->layout_->whole;
      table->state_ = std::move(state);
      *out = std::move(table);
      return arrow::Status::OK();
    });
  }

  const Layout& layout() const noexcept { return *layout_; }

  std::shared_ptr<const State> Take() const noexcept {
    const std::lock_guard<std::mutex> guard(state_lock_);
    return state_;
  }

  arrow::Status Upsert(const arrow::RecordBatch& batch, uint64_t index) noexcept {
    return Guarded([&]() -> arrow::Status {
      const std::lock_guard<std::mutex> guard(writer_lock_);
      const std::shared_ptr<const State> state = Take();
      ARROW_RETURN_NOT_OK(CheckIndex(*state, index));
      ARROW_RETURN_NOT_OK(layout_->CheckBatch(batch));
      auto source = std::make_shared<Source>();
      source->rows = batch.num_rows();
      source->index = index;
      std::vector<std::shared_ptr<arrow::ArrayData>> key_columns;
      source->columns.reserve(static_cast<size_t>(batch.num_columns()));
      source->views.reserve(static_cast<size_t>(batch.num_columns()));
      for (int i = 0; i < batch.num_columns(); ++i) AddColumn(source.get(), batch.column_data(i));
      ARROW_RETURN_NOT_OK(DetachSmall(*layout_, source.get()));
      for (const int column : layout_->key) key_columns.push_back(source->columns[static_cast<size_t>(column)]);
      ARROW_ASSIGN_OR_RAISE(auto keys, layout_->codec->EncodeColumns(key_columns, batch.num_rows()));
      State base = *state;
      Reshape(*keys, &base);
      const size_t count = Sort(*keys, base.shape.skip);
      if (!layout_->whole) source->keys = std::move(keys);
      std::shared_ptr<Run> run;
      if (count > 0) run = MakeRun(std::move(source), items_.get(), count, false);
      return Publish(base, std::move(run), index);
    });
  }

  arrow::Status Delete(const arrow::RecordBatch& batch, uint64_t index, int64_t* deleted) noexcept {
    return Guarded([&]() -> arrow::Status {
      const std::lock_guard<std::mutex> guard(writer_lock_);
      const std::shared_ptr<const State> state = Take();
      ARROW_RETURN_NOT_OK(CheckIndex(*state, index));
      std::shared_ptr<const KeyColumn> keys;
      ARROW_RETURN_NOT_OK(layout_->codec->Encode(batch, &keys));
      State base = *state;
      if (keep_tombstones_) Reshape(*keys, &base);
      const size_t count = keep_tombstones_ ? Sort(*keys, base.shape.skip) : SortPresent(*keys, base);
      std::shared_ptr<Run> run;
      if (count > 0) {
        auto source = std::make_shared<Source>();
        source->rows = keys->rows;
        source->index = index;
        if (!layout_->whole) source->keys = std::move(keys);
        run = MakeRun(std::move(source), items_.get(), count, true);
        if (!keep_tombstones_) run->delta.store(-static_cast<int64_t>(count), std::memory_order_relaxed);
      }
      ARROW_RETURN_NOT_OK(Publish(base, std::move(run), index));
      *deleted = static_cast<int64_t>(count);
      return arrow::Status::OK();
    });
  }

 private:
  static arrow::Status CheckIndex(const State& state, uint64_t index) {
    if (index >= state.index) return arrow::Status::OK();
    return arrow::Status::UnknownError("index ", index, " was to be applied after ", state.index);
  }

  // Makes `state` one that `keys` fit into as well: all its keys must begin with the bytes that are skipped. Most
  // tables see this with their first batches only. One whose keys keep differing earlier and earlier stops skipping,
  // once that has cost enough.
  static void Reshape(const KeyColumn& keys, State* state) {
    if (state->shape.whole || keys.rows == 0) return;
    if (state->runs.empty()) {
      const auto* first = reinterpret_cast<const char*>(keys.data(0));
      state->shape.skip = std::min(keys.size(0), kSkipMax);
      state->start = std::make_shared<const std::string>(first, state->shape.skip);
      state->reshapes = 0;
    }
    uint64_t skip = state->shape.skip;
    for (int64_t row = 0; row < keys.rows && skip > 0; ++row) {
      skip = std::min(skip, keys.size(row));
      const auto* key = reinterpret_cast<const char*>(keys.data(row));
      if (std::memcmp(state->start->data(), key, skip) == 0) continue;
      uint64_t same = 0;
      while ((*state->start)[same] == key[same]) ++same;
      skip = same;
    }
    if (skip < state->shape.skip && !state->runs.empty()) {
      if (state->runs.back()->size >= kReshapeRows && ++state->reshapes > kReshapesMax) skip = 0;
      for (auto& run : state->runs) run = RewordRun(*run, skip);
    }
    state->shape.skip = skip;
  }

  // Leaves the distinct keys in items_, ascending; returns how many.
  size_t Sort(const KeyColumn& keys, uint64_t skip) {
    const size_t rows = static_cast<size_t>(keys.rows);
    if (rows > room_) {
      items_ = std::make_unique_for_overwrite<SortItem[]>(rows);
      scratch_ = std::make_unique_for_overwrite<SortItem[]>(rows);
      room_ = rows;
    }
    return SortDistinct(keys, items_.get(), scratch_.get(), skip);
  }

  // As Sort, but leaves only keys of rows that are there: without older rows outside, nothing else needs a tombstone.
  size_t SortPresent(const KeyColumn& keys, const State& state) {
    const size_t distinct = Sort(keys, 0);
    std::vector<KeyView> views;
    views.reserve(distinct);
    for (size_t i = 0; i < distinct; ++i) views.push_back(state.ViewKey(keys, items_[i].row));
    const std::vector<Hit> hits = state.Find(views, 0);
    size_t count = 0;
    for (size_t i = 0; i < distinct; ++i) {
      if (hits[i].live()) items_[count++] = {views[i].word, items_[i].row};
    }
    return count;
  }

  // Puts `run` (or nothing) before the runs of `old`, merges what is due, and makes it the state.
  arrow::Status Publish(const State& old, std::shared_ptr<Run> run, uint64_t index) {
    auto state = std::make_shared<State>();
    state->layout = layout_;
    state->shape = old.shape;
    state->start = old.start;
    state->reshapes = old.reshapes;
    state->index = index;
    size_t merged = 0;
    if (run != nullptr) {
      if (old.runs.empty()) {
        run->delta.store(static_cast<int64_t>(run->size - run->tombstones), std::memory_order_relaxed);
      }
      while (merged < old.runs.size() && run->size * 2 > old.runs[merged]->size) {
        const bool bottom = merged + 1 == old.runs.size();
        run = MergeRuns(*run, *old.runs[merged], bottom, keep_tombstones_, old.shape);
        ++merged;
        ARROW_RETURN_NOT_OK(RewriteSparse(*layout_, false, run.get()));
        ARROW_RETURN_NOT_OK(RewriteSparse(*layout_, true, run.get()));
      }
      if (run->size > 0) state->runs.push_back(std::move(run));
    }
    state->runs.insert(state->runs.end(), old.runs.begin() + static_cast<std::ptrdiff_t>(merged), old.runs.end());
    std::shared_ptr<const State> published = std::move(state);
    {
      const std::lock_guard<std::mutex> guard(state_lock_);
      state_.swap(published);
    }
    return arrow::Status::OK();  // What was the state is let go here, outside of the readers' lock.
  }

  std::shared_ptr<const Layout> layout_;
  bool keep_tombstones_ = false;
  std::mutex writer_lock_;
  mutable std::mutex state_lock_;
  std::shared_ptr<const State> state_;
  std::unique_ptr<SortItem[]> items_;
  std::unique_ptr<SortItem[]> scratch_;
  size_t room_ = 0;
};

}  // namespace marble
