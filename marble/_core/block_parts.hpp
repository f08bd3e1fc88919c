// Reading single rows of a block that nobody has read yet, by looking only at the parts of it where they lie.
//
// Layout: the block's message is cut into parts of kPartBytes, each with a checksum of its own in the index section; and
// the index has the word of every `step`-th key (sstable_format.hpp), so that few keys have to be looked at. Only blocks
// that are not compressed, of columns whose rows lie in one place per buffer (HasFlatColumns), have parts.
// Ownership: a PartialBlock borrows the file, which outlives it, and points into the file's mapping.
// Thread safety: a PartialBlock belongs to one thread at a time; the file's memos are for all.
// Invariants:
//   1. No byte of a block is interpreted before the checksum of its part, or of the whole block, was found right in this
//      mapping. That is remembered only after it was so.
//   2. Nothing that the bytes say is followed before it was compared with the bounds of the block: where buffers lie,
//      offsets, that texts are UTF-8 and values what Arrow's full validation lets pass. Of rows that are not asked for
//      nothing is said.
//   3. A key that is not there is missing for a reason: its neighbours, which lie side by side, are below and above it.
//      That the other keys of the block ascend is checked when the block is read as a whole.
#pragma once

#include "block_front.hpp"
#include "gather.hpp"
#include "key_value.hpp"
#include "sstable.hpp"

#include <arrow/array/validate.h>
#include <arrow/util/utf8.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace marble {

// Appends the encoding of one value of a key, of a row that is not null.
inline void AppendRowPart(const KeyCodec::Part& part, const ColumnView& view, uint64_t row, std::string* key) {
  using Kind = KeyCodec::Kind;
  const auto bytes = [&view, key]<typename Offset>(uint64_t at, Offset) {
    Offset ends[2];
    std::memcpy(ends, view.values + at * sizeof(Offset), sizeof(ends));
    const auto size = static_cast<size_t>(ends[1] - ends[0]);
    AppendKeyBytes(size == 0 ? "" : reinterpret_cast<const char*>(view.data) + ends[0], size, key);
  };
  if (part.kind == Kind::kBytes) return bytes(row, int32_t{0});
  if (part.kind == Kind::kLargeBytes) return bytes(row, int64_t{0});
  if (part.kind == Kind::kBool) {
    key->push_back(arrow::bit_util::GetBit(view.values, static_cast<int64_t>(row)) ? 1 : 0);
    return;
  }
  const auto width = static_cast<size_t>(part.width);
  const auto* from = reinterpret_cast<const char*>(view.values) + row * width;
  if (part.kind == Kind::kFixedBytes) {
    key->append(from, width);
    return;
  }
  const size_t first = key->size();
  for (size_t i = width; i > 0; --i) key->push_back(from[i - 1]);  // Big-endian.
  char* to = key->data() + first;
  if (part.kind == Kind::kFloat) {
    bool zero = true;  // -0.0 is 0.0.
    for (size_t i = 0; i < width; ++i) zero = zero && (i == 0 ? (to[i] & 0x7F) : to[i]) == 0;
    if (zero) to[0] = 0;
    if ((to[0] & 0x80) != 0) {
      for (size_t i = 0; i < width; ++i) to[i] = static_cast<char>(~to[i]);
      return;
    }
  }
  if (part.kind != Kind::kUnsigned) to[0] = static_cast<char>(to[0] ^ 0x80);
}

// Rows that a source claims to have that must not be shared as a whole.
constexpr int64_t kNeverMost = std::numeric_limits<int64_t>::max() / 4;

// One key that is looked for in one block. Its steps follow each other; what each of them needs from memory, the one before
// has asked for, so that who looks for many keys at a time lets all of them do one step before any of them does the next.
class PartialBlock {
 public:
  // Has fetched what Open needs, once what FileParts::Prefetch asks for is there.
  static void Prefetch(const TableFile& file, size_t i, std::string_view key, Fetches* fetches) noexcept {
    const BlockParts& block = file.parts()[i];
    file.parts().PrefetchWords(block, WordOf(key, block.skip), fetches);
    const ColumnPlace* places = block.places.load(std::memory_order_acquire);
    if (places == nullptr) {
      file.parts().PrefetchBytes(block, 0, file.entry(i).metadata_bytes, fetches);
      return;
    }
    const auto* first = reinterpret_cast<const char*>(places);
    for (size_t at = 0; at < file.flat_columns().size() * sizeof(ColumnPlace); at += 64) fetches->Add(first + at);
  }

  // Block `i` of a file that has parts of it, and a key in [first_key(i), last_key(i)], which outlives its use here. What was
  // looked for before is forgotten, its memory used again.
  arrow::Status Open(const TableFile& file, size_t i, std::string_view key) {
    file_ = &file;
    number_ = i;
    block_ = &file.parts()[i];
    key_ = key;
    // Without zeros, bytes are encoded as they are, and two zeros behind them: then they compare as they are.
    plain_ = file.layout()->key.size() == 1 && PlainColumn().buffers == 3 && key.size() >= 2 &&
             std::memchr(key.data(), 0, key.size()) == key.data() + key.size() - 2;
    ARROW_ASSIGN_OR_RAISE(places_, BlockFront::Places(file, i));
    file.parts().Locate(*block_, WordOf(key, block_->skip), &first_, &end_);
    return arrow::Status::OK();
  }
  // What PrefetchKeys needs, and the places of the values in `columns`.
  void PrefetchPlaces(std::span<const int> columns, Fetches* fetches) const noexcept {
    const auto fetch = [&](int column) {
      PrefetchPlace(static_cast<size_t>(column), first_, end_ - first_, fetches);
    };
    for (const int column : file_->layout()->key) fetch(column);
    for (const int column : columns) {
      if (!Flat(static_cast<size_t>(column)).in_key) fetch(column);
    }
  }
  // What Find needs.
  void PrefetchKeys(Fetches* fetches) const noexcept {
    for (const int column : file_->layout()->key) {
      PrefetchTexts(static_cast<size_t>(column), first_, end_ - first_, fetches);
    }
  }
  // What CheckRow needs.
  void PrefetchRow(int64_t row, std::span<const int> columns, Fetches* fetches) const noexcept {
    for (const int column : columns) {
      if (!Flat(static_cast<size_t>(column)).in_key) PrefetchTexts(static_cast<size_t>(column), row, 1, fetches);
    }
  }

  // Sets `row` to the one that has the key, or to -1.
  arrow::Status Find(int64_t* row) {
    if (plain_ && PlainColumn().kind == FlatColumn::Kind::kNarrow) return FindBy(PlainKeys<int32_t>{this}, row);
    if (plain_) return FindBy(PlainKeys<int64_t>{this}, row);
    return FindBy(EncodedKeys{this}, row);
  }

  // Whether a row is a tombstone.
  arrow::Status IsDeleted(int64_t row, bool* deleted) {
    *deleted = false;
    if (!block_->tombstones) return arrow::Status::OK();
    const ColumnView view = View(Columns() - 1);
    ARROW_RETURN_NOT_OK(CheckBytes(view.values + row / 8, 1));
    *deleted = arrow::bit_util::GetBit(view.values, row);
    return arrow::Status::OK();
  }

  // Checks all of a row that may be given out: `columns` of the table, or all, but those of the key, which the caller has.
  arrow::Status CheckRow(int64_t row, std::span<const int> columns) {
    for (const int column : columns) ARROW_RETURN_NOT_OK(CheckValue(static_cast<size_t>(column), row));
    return arrow::Status::OK();
  }

  // How to reach a column. Sound for the rows that CheckRow was called for.
  ColumnView View(size_t column) const noexcept {
    const ColumnPlace& place = places_[column];
    return {place.validity == 0 ? nullptr : block_->bytes + place.validity, block_->bytes + place.values,
            block_->bytes + place.data, 0};
  }

  // About how many bytes so many rows have behind the offsets of a column.
  uint64_t TextBytes(size_t column, uint64_t rows) const noexcept {
    return static_cast<uint64_t>(places_[column].data_bytes) * rows / block_->rows;
  }

  // The table's columns, to be made Python's objects; sound where View is. Arrays are there only where PointValue wants them.
  Source MakeSource() const {
    Source source;
    source.rows = kNeverMost;
    source.columns.resize(Columns() - 2);
    for (size_t column = 0; column < source.columns.size(); ++column) {
      source.views.push_back(View(column));
      if (!Flat(column).is_plain) source.columns[column] = MakeData(column);
    }
    return source;
  }

 private:
  size_t Columns() const noexcept { return file_->flat_columns().size(); }
  const FlatColumn& Flat(size_t column) const noexcept { return file_->flat_columns()[column]; }

  // The key's first column: the only one, and bytes, if `plain_`.
  const FlatColumn& PlainColumn() const noexcept { return Flat(static_cast<size_t>(file_->layout()->key[0])); }

  // The second buffer's bytes of `count` rows, and of offsets one more.
  void PrefetchPlace(size_t column, int64_t row, int64_t count, Fetches* fetches) const noexcept {
    const FlatColumn& how = Flat(column);
    const bool bits = how.kind == FlatColumn::Kind::kBits;
    const auto first = static_cast<uint64_t>(bits ? row / 8 : row * how.width);
    const auto size = static_cast<uint64_t>(bits ? count / 8 + 1 : (count + (how.buffers == 3 ? 1 : 0)) * how.width);
    if (size > 0) file_->parts().PrefetchBytes(*block_, places_[column].values + first, size, fetches);
  }
  // The texts of `count` rows, whose offsets are on their way.
  void PrefetchTexts(size_t column, int64_t row, int64_t count, Fetches* fetches) const noexcept {
    const FlatColumn& how = Flat(column);
    if (how.kind == FlatColumn::Kind::kNarrow) return PrefetchTexts<uint32_t>(column, row, count, fetches);
    if (how.kind == FlatColumn::Kind::kLarge) return PrefetchTexts<uint64_t>(column, row, count, fetches);
  }
  template <typename Offset>
  void PrefetchTexts(size_t column, int64_t row, int64_t count, Fetches* fetches) const noexcept {
    const ColumnPlace& place = places_[column];
    const uint64_t at = place.values + static_cast<uint64_t>(row) * sizeof(Offset);
    // Whoever reads them for good says what is wrong with them.
    if (!file_->parts().Check(*block_, at, static_cast<uint64_t>(count + 1) * sizeof(Offset))) return;
    Offset first;
    Offset end;
    std::memcpy(&first, block_->bytes + at, sizeof(Offset));
    std::memcpy(&end, block_->bytes + at + static_cast<uint64_t>(count) * sizeof(Offset), sizeof(Offset));
    if (first < end && end <= place.data_bytes) {
      file_->parts().PrefetchBytes(*block_, place.data + first, end - first, fetches);
    }
  }

  template <typename... Words>
  arrow::Status Wrong(Words&&... words) const {
    return Damaged(file_->name(), file_->entry(number_).offset, "block ", number_, std::forward<Words>(words)...);
  }
  arrow::Status WrongOffsets(size_t column) const {
    return Wrong(" cannot be read: offsets of column ", column, " point outside of it");
  }
  arrow::Status WrongWords() const { return Wrong(" has other keys than the index says"); }
  arrow::Status CheckBytes(const uint8_t* first, uint64_t size) const {
    return file_->CheckParts(number_, static_cast<uint64_t>(first - block_->bytes), size);
  }

  // A column as an array that shares the file's memory; without what lies behind offsets.
  std::shared_ptr<arrow::ArrayData> MakeData(size_t column) const {
    const FlatColumn& how = Flat(column);
    const ColumnPlace& place = places_[column];
    const auto slice = [this](uint64_t first, uint64_t size) {
      const auto start = block_->bytes - file_->buffer()->data();
      return arrow::SliceBuffer(file_->buffer(), start + static_cast<int64_t>(first), static_cast<int64_t>(size));
    };
    const uint64_t rows = block_->rows;
    return arrow::ArrayData::Make(file_->layout()->schema->field(static_cast<int>(column))->type(),
                                  static_cast<int64_t>(rows),
                                  {place.validity == 0 ? nullptr : slice(place.validity, (rows + 7) / 8),
                                   slice(place.values, how.BytesFor(rows))},
                                  place.validity == 0 ? 0 : arrow::kUnknownNullCount);
  }

  // Checks where the bytes of a text lie.
  template <typename Offset>
  arrow::Status CheckEnds(size_t column, int64_t row, std::string_view* value) {
    const ColumnView view = View(column);
    const uint8_t* at = view.values + row * static_cast<int64_t>(sizeof(Offset));
    ARROW_RETURN_NOT_OK(CheckBytes(at, 2 * sizeof(Offset)));
    Offset ends[2];
    std::memcpy(ends, at, sizeof(ends));
    if (ends[0] < 0 || ends[1] < ends[0] || static_cast<uint64_t>(ends[1]) > places_[column].data_bytes) {
      return WrongOffsets(column);
    }
    *value = {"", 0};
    if (ends[0] == ends[1]) return arrow::Status::OK();
    *value = {reinterpret_cast<const char*>(view.data) + ends[0], static_cast<size_t>(ends[1] - ends[0])};
    return CheckBytes(view.data + ends[0], value->size());
  }

  // Checks the bytes that a value lies in, be it null or not: that is what gathering reads.
  arrow::Status CheckPlace(size_t column, int64_t row, std::string_view* text) {
    const FlatColumn& how = Flat(column);
    const uint8_t* values = View(column).values;
    switch (how.kind) {
      case FlatColumn::Kind::kNarrow:
        return CheckEnds<int32_t>(column, row, text);
      case FlatColumn::Kind::kLarge:
        return CheckEnds<int64_t>(column, row, text);
      case FlatColumn::Kind::kBits:
        return CheckBytes(values + row / 8, 1);
      default:
        return how.width == 0 ? arrow::Status::OK()
                              : CheckBytes(values + row * how.width, static_cast<uint64_t>(how.width));
    }
  }

  arrow::Status CheckValue(size_t column, int64_t row) {
    const FlatColumn& how = Flat(column);
    if (how.in_key) return arrow::Status::OK();
    const ColumnView view = View(column);
    if (view.validity != nullptr) ARROW_RETURN_NOT_OK(CheckBytes(view.validity + row / 8, 1));
    std::string_view text;
    ARROW_RETURN_NOT_OK(CheckPlace(column, row, &text));
    if (view.validity != nullptr && !arrow::bit_util::GetBit(view.validity, row)) return arrow::Status::OK();
    if (how.is_text && !arrow::util::ValidateUTF8(text)) return Wrong(" cannot be read: a text that is not UTF-8");
    if (how.has_range) {
      const auto status = arrow::internal::ValidateArrayFull(*MakeData(column)->Slice(row, 1));
      if (!status.ok()) return Wrong(" cannot be read: ", status.message());
    }
    return arrow::Status::OK();
  }

  // How keys of rows compare with the one that is looked for. Prepare checks what most rows of [first, end) need; Compare sets
  // `order` to where the key of a row stands beside the other.
  //
  // One column of bytes without zeros in the key that is looked for:
  template <typename Offset>
  struct PlainKeys {
    PartialBlock* block;
    const uint8_t* offsets = nullptr;
    const char* texts = nullptr;
    std::string_view key{};
    Offset bounds[2] = {0, 0};  // Texts in between lie in parts that are sound.

    arrow::Status Prepare(int64_t first, int64_t end) {
      const auto column = static_cast<size_t>(block->file_->layout()->key[0]);
      const ColumnView view = block->View(column);
      offsets = view.values;
      texts = reinterpret_cast<const char*>(view.data);
      key = block->key_.substr(0, block->key_.size() - 2);
      const uint8_t* at = offsets + first * static_cast<int64_t>(sizeof(Offset));
      ARROW_RETURN_NOT_OK(block->CheckBytes(at, static_cast<uint64_t>(end - first + 1) * sizeof(Offset)));
      Load(first, &bounds[0]);
      Load(end, &bounds[1]);
      if (bounds[0] < 0 || bounds[1] < bounds[0] || static_cast<uint64_t>(bounds[1]) > block->places_[column].data_bytes) {
        return block->WrongOffsets(column);
      }
      const auto size = static_cast<uint64_t>(bounds[1] - bounds[0]);
      return size == 0 ? arrow::Status::OK() : block->CheckBytes(view.data + bounds[0], size);
    }
    arrow::Status Compare(int64_t row, int* order) const {
      Offset first;
      Offset end;
      Load(row, &first);
      Load(row + 1, &end);
      if (first < bounds[0] || end < first || bounds[1] < end) {
        return block->WrongOffsets(static_cast<size_t>(block->file_->layout()->key[0]));
      }
      *order = std::string_view(texts + first, static_cast<size_t>(end - first)).compare(key);
      return arrow::Status::OK();
    }
    void Load(int64_t row, Offset* out) const noexcept {
      std::memcpy(out, offsets + row * static_cast<int64_t>(sizeof(Offset)), sizeof(Offset));
    }
  };
  // All others:
  struct EncodedKeys {
    PartialBlock* block;

    arrow::Status Prepare(int64_t, int64_t) { return arrow::Status::OK(); }
    arrow::Status Compare(int64_t row, int* order) const {
      const Layout& layout = *block->file_->layout();
      std::string_view text;
      block->encoded_.clear();
      for (size_t i = 0; i < layout.key.size(); ++i) {
        const auto column = static_cast<size_t>(layout.key[i]);
        ARROW_RETURN_NOT_OK(block->CheckPlace(column, row, &text));
        AppendRowPart(layout.codec->parts()[i], block->View(column), static_cast<uint64_t>(row), &block->encoded_);
      }
      *order = std::string_view(block->encoded_).compare(block->key_);
      return arrow::Status::OK();
    }
  };

  template <typename Keys>
  arrow::Status FindBy(Keys keys, int64_t* row) const {
    *row = -1;
    int order = 0;
    // The first row that is not below the key. Which way each step goes cannot be predicted, so it is masked, not chosen.
    int64_t at = first_;
    if (first_ < end_) {
      ARROW_RETURN_NOT_OK(keys.Prepare(first_, end_));
      int64_t size = end_ - first_;
      while (size > 1) {
        const int64_t half = size / 2;
        ARROW_RETURN_NOT_OK(keys.Compare(at + half - 1, &order));
        at += half & (int64_t{0} - (order < 0 ? 1 : 0));
        size -= half;
      }
      ARROW_RETURN_NOT_OK(keys.Compare(at, &order));
      if (order == 0) {
        *row = at;
        return arrow::Status::OK();
      }
      at += order < 0 ? 1 : 0;
      // Where keys ascend, a step has found the row behind not to be below, or there is none.
      if (order < 0 && at < end_) return WrongWords();
    }
    // The search has met both neighbours, unless one of them lies outside of where it looked.
    if (at == first_ && at > 0) {
      ARROW_RETURN_NOT_OK(keys.Prepare(at - 1, at));
      ARROW_RETURN_NOT_OK(keys.Compare(at - 1, &order));
      if (order >= 0) return WrongWords();
    }
    if (at == end_ && at < block_->rows) {
      ARROW_RETURN_NOT_OK(keys.Prepare(at, at + 1));
      ARROW_RETURN_NOT_OK(keys.Compare(at, &order));
      if (order <= 0) return WrongWords();
    }
    return arrow::Status::OK();
  }

  const TableFile* file_ = nullptr;
  size_t number_ = 0;
  const BlockParts* block_ = nullptr;
  const ColumnPlace* places_ = nullptr;  // Of all columns: the table's, and our own: index, deleted.
  std::string_view key_;
  bool plain_ = false;  // The key is bytes without zeros.
  int64_t first_ = 0;   // The key is in [first_, end_) or nowhere.
  int64_t end_ = 0;
  std::string encoded_;  // The key of the row that was compared last.
};

}  // namespace marble
