// Walking many sorted sources as one, in key order, batch by batch: of each key the newest version counts.
//
// Layout: lanes (merge_lanes.hpp) are merged a block at a time (merge_pieces.hpp): from each lane a stretch that ends at
// one common key, so that a block needs only as much memory as it has rows, and no two blocks share a key.
// Ownership: a cursor shares the states and the blocks that it reads from, and so outlives who made it.
// Thread safety: `Next` takes a lock; callers in several threads take turns. Nothing else changes after construction.
// Invariants:
//   1. Windows of lanes hold what is in no block yet.
//   2. pending_[pending_at_...] are refs in the order of the scan, with slots numbered over all sources (`sources_`).
//      A scan of versions has the words of these refs in pending_words_.
//   3. A block that a stream gave is held while its lane stands in it or a pending ref names it.
#pragma once

#include "key_decode.hpp"
#include "merge_lanes.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/array/util.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace marble {

constexpr size_t kScanBytesMax = 64 << 20;   // A batch is cut once its rows have about so many bytes.
constexpr size_t kScanBatchRows = 64 << 10;  // And it has no more rows than this.
constexpr size_t kScanBlockRows = 16 << 10;  // A block fits the cache together with its merge buffers.
constexpr size_t kHeldBlocks = 64;           // Blocks held before it is asked which are still needed.

// What a scan gives. Of a scan of rows, `rows` only.
struct ScanBatch {
  std::shared_ptr<arrow::RecordBatch> rows;
  std::shared_ptr<arrow::Array> indexes;  // uint64: log index of each row's write.
  std::shared_ptr<arrow::Array> deleted;  // bool: whether it is a tombstone.
};

class MergeCursor {
 public:
  using States = std::vector<std::shared_ptr<const State>>;
  using Streams = std::vector<std::unique_ptr<BlockStream>>;

  // Sources come newest first, all of `layout`; states before streams.
  static arrow::Status Make(std::shared_ptr<const Layout> layout, States states, Streams streams, ScanOptions options,
                            std::shared_ptr<MergeCursor>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      *out = std::make_shared<MergeCursor>(std::move(layout), std::move(states), std::move(streams), std::move(options));
      return arrow::Status::OK();
    });
  }

  MergeCursor(std::shared_ptr<const Layout> layout, States states, Streams streams, ScanOptions options)
      : layout_(std::move(layout)), states_(std::move(states)), options_(std::move(options)) {
    arrow::FieldVector fields;
    // A tombstone's values are null.
    const auto& schema = options_.versions ? layout_->get_schema : layout_->schema;
    for (const int column : options_.columns) fields.push_back(schema->field(column));
    schema_ = arrow::schema(std::move(fields), layout_->schema->metadata());
    std::erase_if(states_, [](const auto& state) { return state->runs.empty(); });
    shape_ = {layout_->whole, ChooseSkip(streams)};
    for (const auto& state : states_) {
      for (const auto& run : state->runs) {
        lanes_.push_back(Lane::OfRun(*state, *run, options_, shape_.skip, sources_.size()));
        for (const Slot& slot : run->slots) AddSource(slot.source.get(), slot.row_bytes);
      }
    }
    first_block_ = sources_.size();
    for (auto& stream : streams) lanes_.push_back(Lane::OfStream(std::move(stream)));
    streams_ = std::max<size_t>(1, streams.size());
    if (options_.limit < kScanBlockRows) block_rows_ = std::max<size_t>(16, options_.limit);
  }

  const std::shared_ptr<arrow::Schema>& schema() const noexcept { return schema_; }

  // Sets `out` to the next batch, its rows to null after the last. After an error the cursor stands where it stood,
  // unless memory ran out half way: then it says so for good.
  arrow::Status Next(ScanBatch* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      const std::lock_guard<std::mutex> guard(mutex_);
      const uint64_t wanted = std::min({RowsMost(), uint64_t{kScanBatchRows}, options_.limit - given_});
      if (broken_) return arrow::Status::OutOfMemory("an earlier step of this scan ran out of memory: begin it anew");
      for (bool more = true; more && pending_.size() - pending_at_ < wanted && pending_bytes_ < kScanBytesMax;) {
        broken_ = true;
        const arrow::Status status = FillBlock(&more);
        broken_ = false;
        ARROW_RETURN_NOT_OK(status);
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
        given_ += rows;
        if (rows_are_long_) pending_bytes_ = CountBytes();
        return arrow::Status::OK();
      }
      *out = {};
      return arrow::Status::OK();
    });
  }

  // Lets go of all that the cursor reads from; it has ended then.
  void Close() noexcept {
    // Freed behind the lock: memory may belong to Python, and wait for the GIL.
    std::vector<Lane> lanes;
    std::vector<StreamBlock> held;
    States states;
    const std::lock_guard<std::mutex> guard(mutex_);
    lanes.swap(lanes_);
    held.swap(held_);
    states.swap(states_);
    pending_.clear();
    pending_at_ = 0;
    free_.clear();
  }

 private:
  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

  // How many bytes all keys that the scan meets begin with.
  uint64_t ChooseSkip(const Streams& streams) {
    if (layout_->whole) return 0;
    bool any = false;
    std::string start;
    const auto take = [&](std::string_view other) {
      start.resize(any ? CommonBytes(start, other) : other.size());
      if (!any) start = other;
      any = true;
    };
    for (const auto& state : states_) take(std::string_view(*state->start).substr(0, state->shape.skip));
    for (const auto& stream : streams) take(stream->Start());
    // Keys between two bounds begin as both do. But words of runs are not made anew for that.
    const bool bounded = options_.has_upper && options_.lower < options_.upper;
    const size_t both = bounded && states_.empty() ? CommonBytes(options_.lower, options_.upper) : 0;
    return std::max(start.size(), both);
  }

  void AddSource(const Source* source, uint64_t row_bytes) {
    if (sources_.size() >= kSlotMax) throw std::bad_alloc();
    sources_.push_back(source);
    numbers_.push_back(kNone);
    NoteBytes(row_bytes);
  }

  void NoteBytes(uint64_t row_bytes) noexcept {
    if (row_bytes > longest_) longest_ = row_bytes;
    rows_are_long_ = longest_ * kScanBatchRows > kScanBytesMax;
  }

  // Takes a block that a stream gave into the sources; returns its slot.
  uint32_t HoldBlock(StreamBlock block) {
    if (free_.empty()) {
      held_.emplace_back();
      free_.push_back(static_cast<uint32_t>(sources_.size()));
      AddSource(nullptr, 0);
    }
    const uint32_t slot = free_.back();
    sources_[slot] = block.source.get();
    NoteBytes(block.source->RowBytes());
    held_[slot - first_block_] = std::move(block);
    free_.pop_back();
    return slot;
  }

  // Lets go of the blocks that nothing here names any more.
  void DropBlocks() {
    if (held_.size() - free_.size() < drop_at_) return;
    std::vector<bool> named(held_.size(), false);
    const auto name = [&](uint64_t ref) {
      if (SlotOf(ref) >= first_block_) named[SlotOf(ref) - first_block_] = true;
    };
    for (size_t i = pending_at_; i < pending_.size(); ++i) name(pending_[i]);
    for (const Lane& lane : lanes_) {
      for (size_t i = lane.first; lane.stream != nullptr && i < lane.end; ++i) name(lane.refs[i]);
    }
    for (size_t i = 0; i < held_.size(); ++i) {
      if (named[i] || held_[i].source == nullptr) continue;
      free_.push_back(static_cast<uint32_t>(first_block_ + i));  // First: if it throws, the block stays.
      sources_[first_block_ + i] = nullptr;
      held_[i] = {};
    }
    drop_at_ = std::max(kHeldBlocks, 2 * (held_.size() - free_.size()));
  }

  // Rows that the window of a stream is to have, unless they are long. A block of a merge takes no more than ends before
  // the nearest end of a window: with windows of one block each, a merge of many streams would go on a few rows at a time.
  size_t WindowRows() const noexcept {
    const uint64_t known = given_ + (pending_.size() - pending_at_);
    const uint64_t left = options_.limit - std::min(options_.limit, known);
    const size_t fair = std::min(block_rows_, kScanBlockRows / streams_);
    return static_cast<size_t>(std::min<uint64_t>(std::max<size_t>(1, fair), left));
  }

  // Sees to it that each lane has a window unless it has ended.
  arrow::Status FillWindows() {
    DropBlocks();
    for (Lane& lane : lanes_) {
      if (lane.stream != nullptr) {
        ARROW_RETURN_NOT_OK(ReadAhead(&lane));
      } else if (lane.size() == 0 && lane.more) {
        lane.Reword(shape_.skip, options_.reverse);
      }
    }
    return arrow::Status::OK();
  }

  arrow::Status ReadAhead(Lane* lane) {
    const size_t wanted = WindowRows();
    if (lane->size() == 0) lane->stalled = false;
    while (lane->more && (lane->size() == 0 || (lane->size() < wanted && !rows_are_long_ && !lane->stalled))) {
      StreamBlock block;
      const arrow::Status status = lane->stream->Next(&block);
      // Rows before a damaged block are given out first.
      lane->stalled = !status.ok() && lane->size() > 0;
      if (lane->stalled) break;
      ARROW_RETURN_NOT_OK(status);
      if (block.source == nullptr) {
        lane->more = false;
        break;
      }
      const uint32_t slot = HoldBlock(block);
      lane->Adopt(block, options_, shape_.skip, slot);
    }
    return arrow::Status::OK();
  }

  // Merges one more block into pending_; `more` says whether there was any.
  arrow::Status FillBlock(bool* more) {
    ARROW_RETURN_NOT_OK(FillWindows());
    size_t in_runs = 0;
    size_t total = 0;
    for (const Lane& lane : lanes_) {
      in_runs += lane.stream == nullptr ? lane.size() : 0;
      total += lane.size();
    }
    *more = total > 0;
    if (total == 0) return arrow::Status::OK();
    size_t most = block_rows_;
    if (rows_are_long_) most = std::max<size_t>(16, std::min(most, kScanBytesMax / longest_));
    block_rows_ = std::min(kScanBlockRows, block_rows_ * 2);
    // The block ends at the nearest of the keys that stand a fair share further on in their windows: no lane gives more
    // than its share, and the lane with the nearest gives all of it, so every block moves on.
    const Lane* bound_lane = nullptr;
    KeyView bound{};
    for (const Lane& lane : lanes_) {
      if (lane.size() == 0) continue;
      size_t share = std::min(most, lane.size());
      if (lane.stream == nullptr && in_runs > most) {
        const double part = static_cast<double>(lane.size()) / static_cast<double>(in_runs);
        share = std::min(lane.size(), static_cast<size_t>(part * static_cast<double>(most)) + 1);
      }
      if (share == lane.size() && !lane.more) continue;
      const size_t last = options_.reverse ? lane.end - share : lane.first + share - 1;
      const KeyView key = lane.Key(last, shape_, sources_.data());
      const int order = bound_lane == nullptr ? 0 : Compare(key, bound, shape_);
      if (bound_lane != nullptr && (options_.reverse ? order <= 0 : order >= 0)) continue;
      bound_lane = &lane;
      bound = key;
    }
    std::vector<std::pair<size_t, size_t>> taken;  // Of each lane's window.
    taken.reserve(lanes_.size());
    for (const Lane& lane : lanes_) {
      size_t first = lane.first;
      size_t end = lane.end;
      if (bound_lane != nullptr && first < end) {
        (options_.reverse ? first : end) = lane.Bound(bound, !options_.reverse, shape_, sources_.data());
      }
      taken.emplace_back(first, end);
    }
    MergeBlock(taken);
    for (size_t i = 0; i < lanes_.size(); ++i) {
      (options_.reverse ? lanes_[i].end : lanes_[i].first) = options_.reverse ? taken[i].first : taken[i].second;
    }
    return arrow::Status::OK();
  }

  void MergeBlock(const std::vector<std::pair<size_t, size_t>>& taken) {
    std::vector<Piece> pieces;
    size_t total = 0;
    for (size_t i = 0; i < taken.size(); ++i) {
      const auto [first, end] = taken[i];
      if (first == end) continue;
      pieces.push_back({lanes_[i].words + first, lanes_[i].refs + first, end - first, lanes_[i].base});
      total += end - first;
    }
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(pending_at_));
    pending_.reserve(pending_.size() + total);
    if (options_.versions) {
      pending_words_.erase(pending_words_.begin(), pending_words_.begin() + static_cast<std::ptrdiff_t>(pending_at_));
      pending_words_.reserve(pending_words_.size() + total);
    }
    pending_at_ = 0;
    if (!pieces.empty()) AppendPending(folder_.Fold(&pieces, shape_, sources_.data()));
  }

  void AppendPending(const Piece& piece) noexcept {
    const bool hide = !options_.versions || options_.drop_tombstones;
    for (size_t i = 0; i < piece.size; ++i) {
      const size_t at = options_.reverse ? piece.size - 1 - i : i;
      const uint64_t ref = piece.refs[at] + piece.base;
      if (hide && (ref & kTombstone) != 0) continue;
      pending_.push_back(ref);
      if (options_.versions) pending_words_.push_back(piece.words[at]);
    }
    if (rows_are_long_) pending_bytes_ = CountBytes();
  }

  // Rows of a batch, at most: so many that they have about as many bytes as wanted, if all are as long as those of that source
  // whose rows are longest.
  uint64_t RowsMost() const noexcept {
    const uint64_t fit = longest_ == 0 ? options_.batch_rows_max : options_.batch_bytes_max / longest_;
    return std::min(options_.batch_rows_max, std::max<uint64_t>(1, fit));
  }

  uint64_t BytesOf(uint64_t ref) const noexcept {
    return sources_[SlotOf(ref)]->RowBytes();
  }

  uint64_t CountBytes() const noexcept {
    uint64_t bytes = 0;
    for (size_t i = pending_at_; i < pending_.size() && bytes < kScanBytesMax; ++i) bytes += BytesOf(pending_[i]);
    return bytes;
  }

  // How many of the pending rows make the next batch; 0 at the end.
  size_t CutBatch() const noexcept {
    const uint64_t left = pending_.size() - pending_at_;
    const auto most = static_cast<size_t>(std::min({RowsMost(), left, options_.limit - given_}));
    uint64_t bytes = 0;
    for (size_t i = 0; rows_are_long_ && i < most; ++i) {
      bytes += BytesOf(pending_[pending_at_ + i]);
      if (bytes > kScanBytesMax) return i + 1;
    }
    return most;
  }

  arrow::Status Gather(size_t rows, ScanBatch* out) {
    RowPlan plan;
    std::vector<uint32_t> touched;
    std::vector<size_t> bare;  // Rows that are tombstones of a memtable: they have a key and nothing else.
    // No allocation may fail between the first mark in numbers_ and the last one wiped off.
    plan.rows.resize(rows);
    plan.sources.reserve(std::min(rows, sources_.size()) + 1);
    touched.reserve(std::min(rows, sources_.size()));
    if (options_.versions) bare.reserve(rows);
    for (size_t i = 0; i < rows; ++i) {
      const uint64_t ref = pending_[pending_at_ + i];
      if ((ref & kTombstone) != 0 && SlotOf(ref) < first_block_) {
        bare.push_back(i);
        continue;
      }
      uint32_t& number = numbers_[SlotOf(ref)];
      if (number == kNone) {
        touched.push_back(SlotOf(ref));
        number = static_cast<uint32_t>(plan.sources.size());
        plan.sources.push_back(sources_[SlotOf(ref)]);
      }
      plan.rows[i] = {number, RowOf(ref)};
    }
    for (const uint32_t slot : touched) numbers_[slot] = kNone;
    Source graves;
    if (!bare.empty()) {
      ARROW_RETURN_NOT_OK(FillGraves(bare, &graves));
      for (size_t i = 0; i < bare.size(); ++i) {
        plan.rows[bare[i]] = {static_cast<uint32_t>(plan.sources.size()), static_cast<uint32_t>(i)};
      }
      plan.sources.push_back(&graves);
    }
    plan.FindSpans();
    std::vector<std::shared_ptr<arrow::ArrayData>> columns;
    for (const int column : options_.columns) {
      const auto& type = layout_->schema->field(column)->type();
      ARROW_ASSIGN_OR_RAISE(auto data, GatherColumn(plan, column, type, true));
      columns.push_back(std::move(data));
    }
    if (options_.versions) ARROW_RETURN_NOT_OK(GatherVersions(rows, out));
    out->rows = arrow::RecordBatch::Make(schema_, static_cast<int64_t>(rows), std::move(columns));
    return arrow::Status::OK();
  }

  // Makes rows of tombstones that have a key only: every other column is null.
  arrow::Status FillGraves(const std::vector<size_t>& bare, Source* graves) const {
    std::vector<uint8_t> words(bare.size() * 8);
    std::vector<std::string_view> keys;
    for (size_t i = 0; i < bare.size(); ++i) {
      if (shape_.whole) {
        uint8_t* bytes = words.data() + 8 * i;
        const uint64_t word = __builtin_bswap64(pending_words_[pending_at_ + bare[i]]);
        std::memcpy(bytes, &word, 8);
        keys.emplace_back(reinterpret_cast<const char*>(bytes), static_cast<size_t>(layout_->codec->width()));
      } else {
        const uint64_t ref = pending_[pending_at_ + bare[i]];
        keys.push_back(ViewOf(*sources_[SlotOf(ref)]->keys, RowOf(ref)));
      }
    }
    ARROW_ASSIGN_OR_RAISE(auto decoded, KeyDecoder::Decode(*layout_->codec, std::move(keys)));
    std::vector<std::shared_ptr<arrow::ArrayData>> columns(static_cast<size_t>(layout_->schema->num_fields()));
    for (size_t i = 0; i < decoded.size(); ++i) columns[static_cast<size_t>(layout_->key[i])] = std::move(decoded[i]);
    graves->rows = static_cast<int64_t>(bare.size());
    for (size_t i = 0; i < columns.size(); ++i) {
      if (columns[i] == nullptr) {
        const auto& type = layout_->schema->field(static_cast<int>(i))->type();
        ARROW_ASSIGN_OR_RAISE(const auto nulls, arrow::MakeArrayOfNull(type, graves->rows));
        columns[i] = nulls->data();
      }
      AddColumn(graves, std::move(columns[i]));
    }
    return arrow::Status::OK();
  }

  arrow::Status GatherVersions(size_t rows, ScanBatch* out) const {
    const auto count = static_cast<int64_t>(rows);
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> indexes, arrow::AllocateBuffer(count * 8));
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> deleted, arrow::AllocateEmptyBitmap(count));
    auto* to = reinterpret_cast<uint64_t*>(indexes->mutable_data());
    for (size_t i = 0; i < rows; ++i) {
      const uint64_t ref = pending_[pending_at_ + i];
      const uint32_t slot = SlotOf(ref);
      to[i] = slot < first_block_ ? sources_[slot]->IndexOf(RowOf(ref)) : held_[slot - first_block_].indexes[RowOf(ref)];
      if ((ref & kTombstone) != 0) arrow::bit_util::SetBit(deleted->mutable_data(), static_cast<int64_t>(i));
    }
    out->indexes = std::make_shared<arrow::UInt64Array>(count, std::move(indexes));
    out->deleted = std::make_shared<arrow::BooleanArray>(count, std::move(deleted));
    return arrow::Status::OK();
  }

  const std::shared_ptr<const Layout> layout_;
  States states_;
  const ScanOptions options_;
  KeyShape shape_;
  std::shared_ptr<arrow::Schema> schema_;
  std::vector<Lane> lanes_;             // Newest first.
  std::vector<const Source*> sources_;  // Slots of all runs, then blocks; null where a slot is no longer used.
  std::vector<uint32_t> numbers_;       // Scratch of Gather: kNone between calls.
  size_t streams_ = 1;                  // Lanes that are streams, at least 1.
  size_t first_block_ = 0;              // Slot of the first block.
  std::vector<StreamBlock> held_;       // Blocks by slot, from first_block_ on.
  std::vector<uint32_t> free_;          // Slots of blocks that were let go.
  size_t drop_at_ = kHeldBlocks;
  PieceFolder folder_;
  size_t block_rows_ = kScanBlockRows;
  std::vector<uint64_t> pending_;
  std::vector<uint64_t> pending_words_;
  size_t pending_at_ = 0;
  uint64_t longest_ = 0;       // Bytes of a row of the source with the longest.
  bool rows_are_long_ = false;  // Whether some source's rows are so long that bytes must be counted.
  uint64_t pending_bytes_ = 0;  // Of pending rows, where they are counted.
  uint64_t given_ = 0;          // Rows given out.
  bool broken_ = false;         // Whether an exception left the lanes half way.
  std::mutex mutex_;
};

// A scan of one state alone.
inline arrow::Status MakeScan(std::shared_ptr<const State> state, ScanOptions options,
                              std::shared_ptr<MergeCursor>* out) noexcept {
  return Guarded([&]() -> arrow::Status {
    const std::shared_ptr<const Layout> layout = state->layout;
    MergeCursor::States states;
    states.push_back(std::move(state));
    return MergeCursor::Make(layout, std::move(states), {}, std::move(options), out);
  });
}

}  // namespace marble
