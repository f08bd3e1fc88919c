// Reading single rows of a block that nobody has read yet, by looking only at the parts of it where they lie.
//
// Layout: the block's message is cut into parts of kPartBytes, each with a checksum of its own in the index section; and
// the index has the word of every `step`-th key (sstable_format.hpp), so that few keys have to be looked at. Only blocks
// that are not compressed, of columns whose rows lie in one place per buffer (HasFlatColumns), have parts.
// Ownership: a PartialBlock borrows the file, which outlives it, and points into the file's mapping.
// Thread safety: a PartialBlock belongs to one thread at a time; the file's memo of parts is for all.
// Invariants:
//   1. No byte of a block is interpreted before the checksum of its part, or of the whole block, was found right in this
//      mapping. That is remembered only after it was so.
//   2. Nothing that the bytes say is followed before it was compared with the bounds of the block: where buffers lie,
//      offsets, that texts are UTF-8 and values what Arrow's full validation lets pass. Of rows that are not asked for
//      nothing is said.
//   3. A key that is not there is missing for a reason: its neighbours, which lie side by side, are below and above it.
//      That the other keys of the block ascend is checked when the block is read as a whole.
#pragma once

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

// Reads a flatbuffer that nobody has verified: what lies outside of it is 0, and `sound` is false from then on.
class CarefulReader {
 public:
  CarefulReader(const uint8_t* bytes, uint64_t size) : bytes_(bytes), size_(size) {}
  bool sound() const noexcept { return sound_; }
  template <typename T>
  T Load(uint64_t at) noexcept {
    T value{};
    if (at > size_ || sizeof(T) > size_ - at) {
      sound_ = false;
    } else {
      std::memcpy(&value, bytes_ + at, sizeof(T));
    }
    return value;
  }
  // Where field number `field` of a table stands; 0 if it is not there.
  uint64_t Field(uint64_t table, uint64_t field) noexcept {
    const uint64_t vtable = table - static_cast<uint64_t>(int64_t{Load<int32_t>(table)});
    if (4 + 2 * field >= Load<uint16_t>(vtable)) return 0;
    const uint16_t offset = Load<uint16_t>(vtable + 4 + 2 * field);
    return offset == 0 ? 0 : table + offset;
  }
  uint64_t Follow(uint64_t at) noexcept { return at + Load<uint32_t>(at); }

 private:
  const uint8_t* bytes_;
  uint64_t size_;
  bool sound_ = true;
};

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

class PartialBlock {
 public:
  // Reads what of block `i` is needed to find rows; `file.HasParts(i)`. What was read before is forgotten, its memory used
  // again. `for_objects`: rows are to become Python's objects.
  arrow::Status Open(const TableFile& file, size_t i, bool for_objects) {
    file_ = &file;
    number_ = i;
    entry_ = &file.entry(i);
    bytes_ = file.BytesOf(i);
    for_objects_ = for_objects;
    return ReadFront();
  }

  // Its views are sound for the rows that CheckRow was called for. Columns are there only where PointValue wants them.
  const Source& source() const noexcept { return source_; }

  // What Open needs, fetched from memory while the caller does something else.
  static void Prefetch(const TableFile& file, size_t i) noexcept {
    constexpr uint64_t kFrontMost = 2048;
    file.parts().Prefetch(i);
    const BlockEntry& entry = file.entry(i);
    for (uint64_t at = 0; at < std::min<uint64_t>(entry.metadata_bytes, kFrontMost); at += kPartBytes) {
      file.parts().PrefetchPart(i, entry, file.BytesOf(i), at);
    }
  }
  // The same for Find of this key.
  void PrefetchKey(std::string_view key) const noexcept {
    int64_t first = 0;
    int64_t end = 0;
    Locate(key, &first, &end);
    for (const int column : file_->layout()->key) {
      PrefetchPlace(static_cast<size_t>(column), first);
      PrefetchBytes(static_cast<size_t>(column), first);
      PrefetchBytes(static_cast<size_t>(column), end - 1);
    }
    for (size_t column = 0; column < source_.views.size(); ++column) PrefetchPlace(column, first);
  }
  // The same for CheckRow.
  void PrefetchRow(int64_t row) const noexcept {
    for (size_t column = 0; column < source_.views.size(); ++column) {
      if (Flat(column).in_key) continue;
      PrefetchPlace(column, row);
      PrefetchBytes(column, row);
    }
  }

  // Sets `row` to the one that has `key`, or to -1. `key` lies in [first_key(i), last_key(i)].
  arrow::Status Find(std::string_view key, int64_t* row) {
    int64_t first = 0;
    int64_t end = 0;
    Locate(key, &first, &end);
    const int64_t bounds[2] = {first, end};
    *row = -1;
    int order = 0;
    while (first < end) {
      const int64_t middle = first + (end - first) / 2;
      ARROW_RETURN_NOT_OK(Compare(middle, key, &order));
      if (order == 0) {
        *row = middle;
        return arrow::Status::OK();
      }
      order < 0 ? first = middle + 1 : end = middle;
    }
    // The search has met both neighbours, unless one of them lies outside of where it looked.
    if (first == bounds[0] && first > 0) {
      ARROW_RETURN_NOT_OK(Compare(first - 1, key, &order));
      if (order >= 0) return WrongWords();
    }
    if (first == bounds[1] && first < entry_->rows) {
      ARROW_RETURN_NOT_OK(Compare(first, key, &order));
      if (order <= 0) return WrongWords();
    }
    return arrow::Status::OK();
  }

  // Whether a row is a tombstone.
  arrow::Status IsDeleted(int64_t row, bool* deleted) {
    *deleted = false;
    if (entry_->tombstones == 0) return arrow::Status::OK();
    const ColumnView& view = own_[1];
    ARROW_RETURN_NOT_OK(CheckBytes(view.values + row / 8, 1));
    *deleted = arrow::bit_util::GetBit(view.values, row);
    return arrow::Status::OK();
  }

  // Checks all of a row that may be given out: `columns` of the table, or all, but those of the key, which the caller has.
  arrow::Status CheckRow(int64_t row, std::span<const int> columns) {
    for (const int column : columns) ARROW_RETURN_NOT_OK(CheckValue(static_cast<size_t>(column), row));
    return arrow::Status::OK();
  }
  arrow::Status CheckRow(int64_t row) {
    for (size_t column = 0; column + 2 < Columns(); ++column) ARROW_RETURN_NOT_OK(CheckValue(column, row));
    return arrow::Status::OK();
  }

 private:
  size_t Columns() const noexcept { return file_->flat_columns().size(); }
  const FlatColumn& Flat(size_t column) const noexcept { return file_->flat_columns()[column]; }

  // Sets [first, end) to the rows that `key` may be in, by the words of the index.
  void Locate(std::string_view key, int64_t* first, int64_t* end) const noexcept {
    const uint64_t word = WordOf(key, CommonBytes(file_->first_key(number_), file_->last_key(number_)));
    const std::span<const uint64_t> words = file_->StepWords(number_);
    const size_t above = LowerBoundWord(words.data(), 0, words.size(), word);
    size_t behind = above;
    while (behind < words.size() && words[behind] == word) ++behind;
    *first = above == 0 ? 0 : static_cast<int64_t>(above - 1) * entry_->step;
    *end = std::min<int64_t>(static_cast<int64_t>(behind) * entry_->step, entry_->rows);
  }

  // The second buffer's bytes of a row.
  void PrefetchPlace(size_t column, int64_t row) const noexcept {
    const FlatColumn& how = Flat(column);
    if (how.width == 0 && how.kind != FlatColumn::Kind::kBits) return;
    const uint8_t* at = source_.views[column].values + (how.kind == FlatColumn::Kind::kBits ? row / 8 : row * how.width);
    PrefetchAt(at);
  }
  // About where a text lies, if all of them are of about one length: nobody has looked at the offsets.
  void PrefetchBytes(size_t column, int64_t row) const noexcept {
    if (Flat(column).buffers < 3 || row < 0) return;
    const double share = static_cast<double>(row) / entry_->rows;
    PrefetchAt(source_.views[column].data + static_cast<uint64_t>(static_cast<double>(data_bytes_[column]) * share));
  }
  void PrefetchAt(const uint8_t* at) const noexcept {
    file_->parts().PrefetchPart(number_, *entry_, bytes_, static_cast<uint64_t>(at - bytes_));
  }

  template <typename... Words>
  arrow::Status Wrong(Words&&... words) const {
    return Damaged(file_->name(), entry_->offset, "block ", number_, std::forward<Words>(words)...);
  }
  arrow::Status WrongWords() const { return Wrong(" has other keys than the index says"); }
  arrow::Status CheckBytes(const uint8_t* first, uint64_t size) const {
    return file_->CheckParts(number_, static_cast<uint64_t>(first - bytes_), size);
  }

  // Where the buffers lie, as the message's front says.
  arrow::Status ReadFront() {
    ARROW_RETURN_NOT_OK(file_->CheckParts(number_, 0, entry_->metadata_bytes));
    if (reinterpret_cast<uintptr_t>(bytes_ + entry_->metadata_bytes) % 8 != 0) {
      return Wrong(" cannot be read: its body lies askew");
    }
    CarefulReader flat(bytes_ + kMessagePrefixBytes, entry_->metadata_bytes - kMessagePrefixBytes);
    const uint64_t message = flat.Follow(0);
    const uint64_t version = flat.Field(message, 0);
    const uint64_t kind = flat.Field(message, 1);
    const uint64_t header = flat.Field(message, 2);
    if (version == 0 || flat.Load<int16_t>(version) != 4 || kind == 0 || flat.Load<uint8_t>(kind) != 3 || header == 0) {
      return Wrong(" cannot be read: not a record batch");
    }
    const uint64_t batch = flat.Follow(header);
    const uint64_t length = flat.Field(batch, 0);
    const uint64_t node_field = flat.Field(batch, 1);
    const uint64_t buffer_field = flat.Field(batch, 2);
    if (length == 0 || flat.Load<int64_t>(length) != int64_t{entry_->rows} || node_field == 0 || buffer_field == 0 ||
        flat.Field(batch, 3) != 0) {
      return Wrong(" cannot be read: another number of rows, or compressed");
    }
    size_t buffers_of_all = 0;
    for (const FlatColumn& column : file_->flat_columns()) buffers_of_all += column.buffers;
    const uint64_t nodes = flat.Follow(node_field);
    const uint64_t buffers = flat.Follow(buffer_field);
    if (flat.Load<uint32_t>(nodes) != Columns() || flat.Load<uint32_t>(buffers) != buffers_of_all) {
      return Wrong(" cannot be read: another number of columns");
    }
    source_.rows = kNeverMost;
    source_.views.resize(Columns() - 2);
    source_.columns.resize(Columns() - 2);
    data_bytes_.resize(Columns());
    uint64_t buffer = buffers + 4;
    for (size_t column = 0; column < Columns(); ++column) {
      const uint64_t node = nodes + 4 + 16 * column;
      ARROW_RETURN_NOT_OK(ReadColumn(&flat, column, flat.Load<int64_t>(node), flat.Load<int64_t>(node + 8), &buffer));
    }
    return flat.sound() ? arrow::Status::OK() : Wrong(" cannot be read: its front is cut short");
  }

  arrow::Status ReadColumn(CarefulReader* flat, size_t column, int64_t length, int64_t nulls, uint64_t* at) {
    const FlatColumn& how = Flat(column);
    const uint64_t room = entry_->bytes - entry_->metadata_bytes;
    const uint8_t* places[3] = {nullptr, nullptr, nullptr};
    uint64_t sizes[3] = {0, 0, 0};
    for (size_t i = 0; i < how.buffers; ++i, *at += 16) {
      const auto offset = flat->Load<uint64_t>(*at);
      sizes[i] = flat->Load<uint64_t>(*at + 8);
      if (offset > room || sizes[i] > room - offset || offset % 8 != 0) {
        return Wrong(" cannot be read: a buffer lies outside of it");
      }
      places[i] = bytes_ + entry_->metadata_bytes + offset;
    }
    const uint64_t rows = entry_->rows;
    const bool own = column + 2 >= Columns();
    if (length != static_cast<int64_t>(rows) || nulls > length || (nulls != 0 && (own || how.in_key)) ||
        (nulls != 0 && sizes[0] < (rows + 7) / 8) || sizes[1] < how.BytesFor(rows)) {
      return Wrong(" cannot be read: column ", column, " has another number of rows");
    }
    ColumnView& view = own ? own_[column + 2 - Columns()] : source_.views[column];
    view = {nulls == 0 ? nullptr : places[0], sizes[1] == 0 ? kNothing : places[1],
            how.buffers == 3 ? places[2] : nullptr, 0};
    data_bytes_[column] = sizes[2];
    if (!own && (how.has_range || (for_objects_ && !how.is_plain))) {
      const arrow::Buffer* whole = file_->buffer().get();
      const auto slice = [this, whole](const uint8_t* first, uint64_t size) {
        return first == nullptr
                   ? nullptr
                   : arrow::SliceBuffer(file_->buffer(), first - whole->data(), static_cast<int64_t>(size));
      };
      source_.columns[column] = arrow::ArrayData::Make(
          file_->layout()->schema->field(static_cast<int>(column))->type(), length,
          {slice(view.validity, sizes[0]), slice(places[1], sizes[1])}, nulls == 0 ? 0 : arrow::kUnknownNullCount);
    }
    return arrow::Status::OK();
  }

  // Checks where the bytes of a text lie.
  template <typename Offset>
  arrow::Status CheckEnds(size_t column, int64_t row, std::string_view* value) {
    const ColumnView& view = source_.views[column];
    const uint8_t* at = view.values + row * static_cast<int64_t>(sizeof(Offset));
    ARROW_RETURN_NOT_OK(CheckBytes(at, 2 * sizeof(Offset)));
    Offset ends[2];
    std::memcpy(ends, at, sizeof(ends));
    if (ends[0] < 0 || ends[1] < ends[0] || static_cast<uint64_t>(ends[1]) > data_bytes_[column]) {
      return Wrong(" cannot be read: offsets of column ", column, " point outside of it");
    }
    *value = {"", 0};
    if (ends[0] == ends[1]) return arrow::Status::OK();
    *value = {reinterpret_cast<const char*>(view.data) + ends[0], static_cast<size_t>(ends[1] - ends[0])};
    return CheckBytes(view.data + ends[0], value->size());
  }

  // Checks the bytes that a value lies in, be it null or not: that is what gathering reads.
  arrow::Status CheckPlace(size_t column, int64_t row, std::string_view* text) {
    const FlatColumn& how = Flat(column);
    const uint8_t* values = source_.views[column].values;
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
    const ColumnView& view = source_.views[column];
    if (view.validity != nullptr) ARROW_RETURN_NOT_OK(CheckBytes(view.validity + row / 8, 1));
    std::string_view text;
    ARROW_RETURN_NOT_OK(CheckPlace(column, row, &text));
    if (view.validity != nullptr && !arrow::bit_util::GetBit(view.validity, row)) return arrow::Status::OK();
    if (how.is_text && !arrow::util::ValidateUTF8(text)) return Wrong(" cannot be read: a text that is not UTF-8");
    if (how.has_range) {
      const auto status = arrow::internal::ValidateArrayFull(*source_.columns[column]->Slice(row, 1));
      if (!status.ok()) return Wrong(" cannot be read: ", status.message());
    }
    return arrow::Status::OK();
  }

  // Sets `order` to where the key of a row stands beside `key`.
  arrow::Status Compare(int64_t row, std::string_view key, int* order) {
    const std::vector<int>& columns = file_->layout()->key;
    std::string_view text;
    if (columns.size() == 1 && Flat(static_cast<size_t>(columns[0])).buffers == 3) {
      // Most keys. Without zeros, bytes are encoded as they are, and two zeros behind them.
      ARROW_RETURN_NOT_OK(CheckPlace(static_cast<size_t>(columns[0]), row, &text));
      if (std::memchr(text.data(), 0, text.size()) == nullptr) {
        *order = text.compare(key.substr(0, std::min(key.size(), text.size())));
        if (*order == 0) *order = std::string_view("\0\0", 2).compare(key.substr(text.size()));
        return arrow::Status::OK();
      }
    }
    key_.clear();
    for (size_t i = 0; i < columns.size(); ++i) {
      const auto column = static_cast<size_t>(columns[i]);
      ARROW_RETURN_NOT_OK(CheckPlace(column, row, &text));
      AppendRowPart(file_->layout()->codec->parts()[i], source_.views[column], static_cast<uint64_t>(row), &key_);
    }
    *order = std::string_view(key_).compare(key);
    return arrow::Status::OK();
  }

  const TableFile* file_ = nullptr;
  size_t number_ = 0;
  const BlockEntry* entry_ = nullptr;
  const uint8_t* bytes_ = nullptr;
  bool for_objects_ = false;
  Source source_;                     // The table's columns,
  ColumnView own_[2];                 // and our own: index, deleted.
  std::vector<uint64_t> data_bytes_;  // For each column those behind its offsets.
  std::string key_;                   // Of the row that was compared last.
};

}  // namespace marble
