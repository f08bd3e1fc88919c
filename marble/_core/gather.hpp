// Gathering rows that lie in many batches into one, a column at a time.
//
// Layout: a plan lists, row by row, the source and the row in it; sources may be null, and then the row is missing
// (null).
// Ownership: a plan borrows its sources for the length of a call. Results own fresh buffers, except where all rows are
// one stretch that is most of one source: then they are slices that share its buffers.
// Thread safety: pure functions; sources are only read.
// Invariants:
//   1. Rows named by a plan exist, and sources passed full validation: their offsets are followed without a further
//      look.
//   2. An array that would overflow 32-bit offsets is refused with CapacityError, never made.
#pragma once

#include "memtable_run.hpp"

#include <arrow/array/array_base.h>
#include <arrow/array/builder_base.h>
#include <arrow/array/util.h>
#include <arrow/buffer.h>
#include <arrow/builder.h>
#include <arrow/util/bitmap_ops.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace marble {

struct RowRef {
  uint32_t source;
  uint32_t row;
};

// Rows [row, row + length) of a source.
struct Span {
  uint32_t source;
  uint32_t row;
  uint32_t length;
};

struct RowPlan {
  std::vector<const Source*> sources;
  std::vector<RowRef> rows;
  std::vector<Span> spans;  // The same rows as `rows`; see FindSpans.

  // Puts neighbouring rows of one source together. Data that arrived in key order gathers by the stretch.
  void FindSpans() {
    spans.clear();
    spans.reserve(rows.size());
    for (const RowRef& ref : rows) {
      if (!spans.empty()) {
        Span& last = spans.back();
        if (last.source == ref.source && last.row + last.length == ref.row && sources[ref.source] != nullptr) {
          ++last.length;
          continue;
        }
      }
      spans.push_back({ref.source, ref.row, 1});
    }
  }
  bool in_spans() const noexcept { return spans.size() * 4 <= rows.size(); }
};

// Bits of a fixed-width value, 0 for other types.
inline int64_t FixedBits(const arrow::DataType& type) noexcept {
  const auto* fixed = dynamic_cast<const arrow::FixedWidthType*>(&type);
  return fixed == nullptr ? 0 : fixed->bit_width();
}

// Dictionaries may differ from batch to batch and extension types run code that is not ours.
inline arrow::Status CheckStorable(const arrow::DataType& type, const std::string& column) {
  if (type.id() == arrow::Type::DICTIONARY || type.id() == arrow::Type::RUN_END_ENCODED ||
      type.id() == arrow::Type::EXTENSION) {
    return arrow::Status::Invalid("column '", column, "' has type ", type.ToString(),
                                  ", which a table cannot store: cast it to its plain type");
  }
  for (const auto& field : type.fields()) ARROW_RETURN_NOT_OK(CheckStorable(*field->type(), column));
  return arrow::Status::OK();
}

// About how many bytes the rows of an array have.
inline int64_t AboutBytes(const arrow::ArrayData& array) {
  if (array.length == 0) return 0;
  const int64_t bits = FixedBits(*array.type);
  if (bits > 0) return (array.length * bits + 7) / 8;
  int64_t bytes = 0;
  switch (array.type->id()) {
    case arrow::Type::STRING:
    case arrow::Type::BINARY: {
      const int32_t* offsets = array.GetValues<int32_t>(1);
      return 4 * array.length + offsets[array.length] - offsets[0];
    }
    case arrow::Type::LARGE_STRING:
    case arrow::Type::LARGE_BINARY: {
      const int64_t* offsets = array.GetValues<int64_t>(1);
      return 8 * array.length + offsets[array.length] - offsets[0];
    }
    default:
      // Children and views of a slice are those of the whole array: an upper bound will do.
      for (const auto& buffer : array.buffers) bytes += buffer == nullptr ? 0 : buffer->size();
      for (const auto& child : array.child_data) bytes += AboutBytes(*child);
      return bytes;
  }
}

// Bytes from one row to the next in buffer 1: values, or the offsets of strings. 0 for bits and for types without such
// a buffer.
inline int64_t Stride(const arrow::DataType& type) noexcept {
  switch (type.id()) {
    case arrow::Type::STRING:
    case arrow::Type::BINARY:
      return 4;
    case arrow::Type::LARGE_STRING:
    case arrow::Type::LARGE_BINARY:
      return 8;
    default:
      return FixedBits(type) / 8;
  }
}

// What a row of nothing looks like, for types without a buffer of values (fixed_size_binary[0], null).
alignas(64) inline constexpr uint8_t kNothing[64] = {};

// Sets `even` and `width` if all rows have the same number of bytes, as many tables have them: ids, hashes, numbers that are
// written with leading zeros.
template <typename Offset>
void MeasureRows(const arrow::ArrayData& array, ColumnView* view) noexcept {
  using Number = std::make_unsigned_t<Offset>;
  if (array.length == 0 || view->data == nullptr) return;
  const auto* offsets = reinterpret_cast<const Number*>(view->values);
  const Number width = offsets[1] - offsets[0];
  Number differences = 0;
  for (int64_t row = 1; row < array.length; ++row) differences |= (offsets[row + 1] - offsets[row]) ^ width;
  if (width == 0 || differences != 0) return;
  view->even = view->data + offsets[0];
  view->width = static_cast<int64_t>(width);
}

inline ColumnView ViewColumn(const arrow::ArrayData& array) noexcept {
  const auto buffer = [&array](size_t i) -> const uint8_t* {
    return i < array.buffers.size() && array.buffers[i] != nullptr ? array.buffers[i]->data() : nullptr;
  };
  ColumnView view{nullptr, buffer(1), buffer(2), array.offset};
  if (array.null_count.load(std::memory_order_relaxed) != 0) view.validity = buffer(0);
  view.values = view.values == nullptr ? kNothing : view.values + array.offset * Stride(*array.type);
  const auto id = array.type->id();
  if (id == arrow::Type::STRING || id == arrow::Type::BINARY) MeasureRows<int32_t>(array, &view);
  if (id == arrow::Type::LARGE_STRING || id == arrow::Type::LARGE_BINARY) MeasureRows<int64_t>(array, &view);
  return view;
}

// Takes the columns of a batch, or of rewritten rows, into a source.
inline void AddColumn(Source* source, std::shared_ptr<arrow::ArrayData> column) {
  source->bytes += AboutBytes(*column);
  source->views.push_back(ViewColumn(*column));
  source->columns.push_back(std::move(column));
}

// The columns of `plan.sources`, and a row of zeros in place of a missing source.
class ColumnViews {
 public:
  ColumnViews(const RowPlan& plan, size_t column, int64_t stride) {
    const std::vector<const Source*>& sources = plan.sources;
    views_.reserve(sources.size());
    for (size_t i = 0; i < sources.size(); ++i) {
      // Both lie anywhere.
      if (i + 16 < sources.size()) __builtin_prefetch(sources[i + 16]);
      const Source* next = i + 8 < sources.size() ? sources[i + 8] : nullptr;
      if (next != nullptr) __builtin_prefetch(next->views.data() + column);
      const Source* source = sources[i];
      if (source != nullptr) {
        views_.push_back(source->views[column]);
        nulls_ = nulls_ || views_.back().validity != nullptr;
        continue;
      }
      zeros_.assign(static_cast<size_t>(std::max<int64_t>(stride, 16)), 0);
      views_.push_back({zeros_.data(), zeros_.data(), zeros_.data(), 0});
      nulls_ = true;
    }
  }
  const ColumnView& operator[](size_t source) const noexcept { return views_[source]; }
  bool nulls() const noexcept { return nulls_; }

 private:
  std::vector<uint8_t> zeros_;
  std::vector<ColumnView> views_;
  bool nulls_ = false;  // Whether any row may be null.
};

// Copies bit columns (`values` of a bool, or validity) into a fresh bitmap. A null source bitmap stands for ones.
template <typename Bits>
arrow::Result<std::shared_ptr<arrow::Buffer>> GatherBits(const RowPlan& plan, const ColumnViews& views, Bits bits) {
  const int64_t rows = static_cast<int64_t>(plan.rows.size());
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> bitmap, arrow::AllocateEmptyBitmap(rows));
  uint8_t* out = bitmap->mutable_data();
  if (plan.in_spans()) {
    int64_t at = 0;
    for (const Span& span : plan.spans) {
      const uint8_t* from = bits(views[span.source]);
      if (from == nullptr) {
        arrow::bit_util::SetBitsTo(out, at, span.length, true);
      } else {
        arrow::internal::CopyBitmap(from, views[span.source].offset + span.row, span.length, out, at);
      }
      at += span.length;
    }
    return bitmap;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const RowRef ref = plan.rows[static_cast<size_t>(i)];
    const uint8_t* from = bits(views[ref.source]);
    const bool bit = from == nullptr || arrow::bit_util::GetBit(from, views[ref.source].offset + ref.row);
    out[i / 8] = static_cast<uint8_t>(out[i / 8] | (bit ? 1 << (i % 8) : 0));
  }
  return bitmap;
}

template <size_t kWidth>
void GatherValues(const RowPlan& plan, const ColumnViews& views, uint8_t* out) noexcept {
  for (const RowRef& ref : plan.rows) {
    std::memcpy(out, views[ref.source].values + ref.row * kWidth, kWidth);
    out += kWidth;
  }
}

inline arrow::Result<std::shared_ptr<arrow::Buffer>> GatherFixed(const RowPlan& plan, const ColumnViews& views,
                                                                 size_t width) {
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> buffer,
                        arrow::AllocateBuffer(static_cast<int64_t>(plan.rows.size() * width)));
  uint8_t* out = buffer->mutable_data();
  if (plan.in_spans() || (width != 1 && width != 2 && width != 4 && width != 8 && width != 16)) {
    for (const Span& span : plan.spans) {
      if (width == 0) break;
      std::memcpy(out, views[span.source].values + span.row * width, span.length * width);
      out += span.length * width;
    }
    return buffer;
  }
  if (width == 1) GatherValues<1>(plan, views, out);
  if (width == 2) GatherValues<2>(plan, views, out);
  if (width == 4) GatherValues<4>(plan, views, out);
  if (width == 8) GatherValues<8>(plan, views, out);
  if (width == 16) GatherValues<16>(plan, views, out);
  return buffer;
}

constexpr size_t kAheadBytes = 7 << 10;  // What is on its way from memory: so many bytes,
constexpr size_t kAheadStretches = 64;   // of so many stretches, at most.
constexpr size_t kFetchBytes = 576;      // So many bytes of a stretch are asked for; the processor goes on by itself.
constexpr size_t kLineBytes = 64;
constexpr size_t kInlineBytes = 256;     // Longer stretches are worth a call of memcpy.

// Asks for the bytes of a stretch, line by line.
inline void FetchBytes(const uint8_t* bytes, size_t size) noexcept {
  const size_t most = std::min(size, kFetchBytes);
  for (size_t at = 0; at < most; at += kLineBytes) __builtin_prefetch(bytes + at);
  if (most > 0) __builtin_prefetch(bytes + most - 1);
}

// memcpy for sizes up to a few cache lines: whole words of 16 bytes and a last one that overlaps, without a call.
inline void CopyStretch(uint8_t* to, const uint8_t* from, size_t size) noexcept {
  if (size <= 16 || size > kInlineBytes) return CopyBytes(to, from, size);
  for (size_t at = 0; at + 16 < size; at += 16) std::memcpy(to + at, from + at, 16);
  std::memcpy(to + size - 16, from + size - 16, 16);
}

// Rows in any order lie anywhere, and the processor waits for several of them at a time only if it is told in time. So
// the first round, over offsets, writes down where the bytes of each stretch are, and the second one asks for them well
// ahead of copying them.
template <typename Offset>
arrow::Status GatherBytes(const RowPlan& plan, const ColumnViews& views, arrow::ArrayData* out) {
  using Number = std::make_unsigned_t<Offset>;  // It may wrap.
  const size_t rows = plan.rows.size();
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> offsets,
                        arrow::AllocateBuffer(static_cast<int64_t>((rows + 1) * sizeof(Offset))));
  auto* ends = reinterpret_cast<Offset*>(offsets->mutable_data());
  const size_t count = plan.spans.size();
  const auto starts = MakePoolArray<const uint8_t*>(count);
  const auto offsets_of = [&views](const Span& span) {
    return reinterpret_cast<const Offset*>(views[span.source].values) + span.row;
  };
  const auto fetch_offsets = [&](size_t i) {
    if (i < count && views[plan.spans[i].source].width == 0) __builtin_prefetch(offsets_of(plan.spans[i]));
  };
  uint64_t total = 0;
  Offset* end = ends;
  for (size_t i = 0; i < count; ++i) {
    fetch_offsets(i + kAheadStretches / 2);
    const Span& span = plan.spans[i];
    const ColumnView& view = views[span.source];
    if (view.width > 0) {
      starts[i] = view.even + span.row * view.width;
      for (uint32_t row = 0; row < span.length; ++row, total += static_cast<uint64_t>(view.width)) {
        *end++ = static_cast<Offset>(total);
      }
      continue;
    }
    const Offset* from = offsets_of(span);
    starts[i] = view.data + from[0];
    const Number shift = static_cast<Number>(total) - static_cast<Number>(from[0]);
    for (uint32_t row = 0; row < span.length; ++row) {
      *end++ = static_cast<Offset>(static_cast<Number>(from[row]) + shift);
    }
    total += static_cast<uint64_t>(from[span.length]) - static_cast<uint64_t>(from[0]);
  }
  if (total > static_cast<uint64_t>(std::numeric_limits<Offset>::max())) {
    return arrow::Status::CapacityError("more bytes than offsets reach");
  }
  ends[rows] = static_cast<Offset>(total);
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> data, arrow::AllocateBuffer(static_cast<int64_t>(total)));
  uint8_t* const to = data->mutable_data();
  size_t ahead = 0;      // The stretch to be asked for next,
  size_t ahead_row = 0;  // and its first row.
  size_t row = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto first = static_cast<size_t>(ends[row]);
    while (ahead < std::min(count, i + kAheadStretches) && static_cast<size_t>(ends[ahead_row]) < first + kAheadBytes) {
      const auto from = static_cast<size_t>(ends[ahead_row]);
      ahead_row += plan.spans[ahead].length;
      FetchBytes(starts[ahead++], static_cast<size_t>(ends[ahead_row]) - from);
    }
    row += plan.spans[i].length;
    CopyStretch(to + first, starts[i], static_cast<size_t>(ends[row]) - first);
  }
  out->buffers = {nullptr, std::move(offsets), std::move(data)};
  return arrow::Status::OK();
}

// Arrow's builders keep field names of their own for some types; the table's type is the one that counts.
inline void SetType(arrow::ArrayData* array, const std::shared_ptr<arrow::DataType>& type) {
  array->type = type;
  for (size_t i = 0; i < array->child_data.size() && static_cast<int>(i) < type->num_fields(); ++i) {
    SetType(array->child_data[i].get(), type->field(static_cast<int>(i))->type());
  }
}

// Builders check the bytes of a string but not the number of a list's elements.
inline arrow::Status CheckOffsetsReach(const arrow::ArrayData& array) {
  const auto id = array.type->id();
  const bool narrow = id == arrow::Type::LIST || id == arrow::Type::MAP || id == arrow::Type::LIST_VIEW ||
                      id == arrow::Type::DENSE_UNION;
  for (const auto& child : array.child_data) {
    if (narrow && child->length > std::numeric_limits<int32_t>::max()) {
      return arrow::Status::CapacityError("more elements than offsets reach");
    }
    ARROW_RETURN_NOT_OK(CheckOffsetsReach(*child));
  }
  return arrow::Status::OK();
}

// Any type, by Arrow's builder for it.
inline arrow::Result<std::shared_ptr<arrow::ArrayData>> GatherAny(const RowPlan& plan, int column,
                                                                  const std::shared_ptr<arrow::DataType>& type) {
  std::unique_ptr<arrow::ArrayBuilder> builder;
  ARROW_RETURN_NOT_OK(arrow::MakeBuilder(arrow::default_memory_pool(), type, &builder));
  ARROW_RETURN_NOT_OK(builder->Reserve(static_cast<int64_t>(plan.rows.size())));
  std::vector<arrow::ArraySpan> arrays;
  arrays.reserve(plan.sources.size());
  for (const Source* source : plan.sources) {
    arrays.emplace_back();
    if (source != nullptr) arrays.back().SetMembers(*source->columns[static_cast<size_t>(column)]);
  }
  for (const Span& span : plan.spans) {
    if (plan.sources[span.source] == nullptr) {
      ARROW_RETURN_NOT_OK(builder->AppendNull());
    } else {
      ARROW_RETURN_NOT_OK(builder->AppendArraySlice(arrays[span.source], span.row, span.length));
    }
  }
  std::shared_ptr<arrow::ArrayData> out;
  ARROW_RETURN_NOT_OK(builder->FinishInternal(&out));
  ARROW_RETURN_NOT_OK(CheckOffsetsReach(*out));
  SetType(out.get(), type);
  return out;
}

// One column of the planned rows. `share` allows slices of a source in place of copies.
inline arrow::Result<std::shared_ptr<arrow::ArrayData>> GatherColumn(const RowPlan& plan, int column,
                                                                     const std::shared_ptr<arrow::DataType>& type,
                                                                     bool share) {
  const int64_t rows = static_cast<int64_t>(plan.rows.size());
  if (share && plan.spans.size() == 1) {
    const Source* source = plan.sources[plan.spans[0].source];
    if (source != nullptr && rows * 2 >= source->rows) {
      return source->columns[static_cast<size_t>(column)]->Slice(plan.spans[0].row, rows);
    }
  }
  const auto id = type->id();
  const int64_t bits = FixedBits(*type);
  const bool narrow = id == arrow::Type::STRING || id == arrow::Type::BINARY;
  const bool large = id == arrow::Type::LARGE_STRING || id == arrow::Type::LARGE_BINARY;
  const bool fixed = bits > 0 || id == arrow::Type::FIXED_SIZE_BINARY;
  if (!fixed && !narrow && !large) return GatherAny(plan, column, type);
  const ColumnViews views(plan, static_cast<size_t>(column), Stride(*type));
  auto out = arrow::ArrayData::Make(type, rows, {nullptr, nullptr}, 0);
  if (narrow) {
    ARROW_RETURN_NOT_OK(GatherBytes<int32_t>(plan, views, out.get()));
  } else if (large) {
    ARROW_RETURN_NOT_OK(GatherBytes<int64_t>(plan, views, out.get()));
  } else if (bits == 1) {
    const auto values = [](const ColumnView& view) { return view.values; };
    ARROW_ASSIGN_OR_RAISE(out->buffers[1], GatherBits(plan, views, values));
  } else {
    ARROW_ASSIGN_OR_RAISE(out->buffers[1], GatherFixed(plan, views, static_cast<size_t>(bits / 8)));
  }
  if (views.nulls()) {
    const auto validity = [](const ColumnView& view) { return view.validity; };
    ARROW_ASSIGN_OR_RAISE(out->buffers[0], GatherBits(plan, views, validity));
    out->null_count = rows - arrow::internal::CountSetBits(out->buffers[0]->data(), 0, rows);
    if (out->null_count == 0) out->buffers[0] = nullptr;
  }
  return out;
}

}  // namespace marble
