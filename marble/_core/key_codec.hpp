// Primary keys as bytes that sort with memcmp as the keys themselves do.
//
// Layout: the encoded key of a row is the concatenation of its key columns' encodings, in key order:
//   bool                      1 byte, 0 or 1
//   unsigned integers         big-endian
//   signed integers, date, time, timestamp, duration, decimals
//                             big-endian with the sign bit flipped
//   float32, float64          big-endian IEEE bits; all bits flipped if negative, else the sign bit; -0.0 becomes 0.0
//   fixed_size_binary         its bytes
//   string, binary (large)    its bytes with 00 written as 00 FF, then 00 00
// Ownership: `Encode` copies; a KeyColumn owns its bytes and never changes afterwards.
// Thread safety: all functions are pure; a KeyColumn may be read from any thread.
// Invariants:
//   1. Every encoding has a fixed width or ends itself, so no key of a schema is a proper prefix of another of that
//      schema. Hence two keys of which one has at most 8 bytes are equal if their first 8 bytes, padded with zeros, are
//      equal.
//   2. Equal keys have equal bytes, smaller keys have smaller bytes (as unsigned bytes, shorter first).
//   3. Nothing of a column is believed: offsets are compared with the buffer before anything is read through them.
#pragma once

#include <arrow/array/data.h>
#include <arrow/array/validate.h>
#include <arrow/memory_pool.h>
#include <arrow/record_batch.h>
#include <arrow/result.h>
#include <arrow/type.h>
#include <arrow/util/bit_util.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace marble {

// Runs `body`, which gives a Status, and turns what the standard library throws into a Status, so that no
// exception crosses into Cython.
template <typename Body>
arrow::Status Guarded(Body&& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return arrow::Status::OutOfMemory("out of memory");
  } catch (const std::exception& error) {
    return arrow::Status::UnknownError(error.what());
  }
}

inline uint64_t LoadBigEndian64(const uint8_t* bytes) noexcept {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return __builtin_bswap64(word);
}

// Bytes [depth, depth + 8) of a key as a big-endian number, with zeros beyond its end.
inline uint64_t WordOf(const uint8_t* key, uint64_t size, uint64_t depth) noexcept {
  if (depth + 8 <= size) return LoadBigEndian64(key + depth);
  uint8_t bytes[8] = {};
  if (depth < size) std::memcpy(bytes, key + depth, static_cast<size_t>(size - depth));
  return LoadBigEndian64(bytes);
}

// memcpy for sizes that are mostly small: two loads that overlap cost less than a call.
inline void CopyBytes(uint8_t* to, const uint8_t* from, size_t size) noexcept {
  if (size > 32) {
    std::memcpy(to, from, size);
  } else if (size > 16) {
    std::memcpy(to, from, 16);
    std::memcpy(to + size - 16, from + size - 16, 16);
  } else if (size >= 8) {
    uint64_t head;
    uint64_t tail;
    std::memcpy(&head, from, 8);
    std::memcpy(&tail, from + size - 8, 8);
    std::memcpy(to, &head, 8);
    std::memcpy(to + size - 8, &tail, 8);
  } else if (size >= 4) {
    uint32_t head;
    uint32_t tail;
    std::memcpy(&head, from, 4);
    std::memcpy(&tail, from + size - 4, 4);
    std::memcpy(to, &head, 4);
    std::memcpy(to + size - 4, &tail, 4);
  } else {
    for (size_t i = 0; i < size; ++i) to[i] = from[i];
  }
}

template <typename Item>
struct PoolFree {
  int64_t bytes = 0;
  void operator()(Item* items) const noexcept {
    arrow::default_memory_pool()->Free(reinterpret_cast<uint8_t*>(items), bytes);
  }
};

// An array from Arrow's memory pool, without values. The pool keeps what was freed at hand, where malloc gives it back
// to the system: keys of blocks come and go, and the page faults cost more than the encoding.
template <typename Item>
using PoolArray = std::unique_ptr<Item[], PoolFree<Item>>;

template <typename Item>
PoolArray<Item> MakePoolArray(uint64_t size) {
  const auto bytes = static_cast<int64_t>(size * sizeof(Item));
  uint8_t* items = nullptr;
  if (!arrow::default_memory_pool()->Allocate(bytes, &items).ok()) throw std::bad_alloc();
  return PoolArray<Item>(reinterpret_cast<Item*>(items), PoolFree<Item>{bytes});
}

// The encoded keys of a batch.
// - `width > 0`: key i is bytes [i * width, (i + 1) * width). `width == 0`: bytes [offsets[i], offsets[i + 1]). Keys of
//   texts have a width, too, where they happen to be of one length: then nobody needs to fetch offsets.
// - Eight zero bytes follow the last key, so that `Word` may always load eight bytes.
struct KeyColumn {
  int64_t rows = 0;
  int64_t width = 0;
  uint64_t total = 0;
  PoolArray<uint8_t> bytes;
  PoolArray<uint64_t> offsets;

  const uint8_t* data(int64_t row) const noexcept {
    return bytes.get() + (width > 0 ? static_cast<uint64_t>(row * width) : offsets[row]);
  }
  uint64_t size(int64_t row) const noexcept {
    return width > 0 ? static_cast<uint64_t>(width) : offsets[row + 1] - offsets[row];
  }
  // Bytes [depth, depth + 8) of a key as a big-endian number, with zeros beyond its end.
  uint64_t Word(int64_t row, uint64_t depth) const noexcept {
    const uint64_t length = size(row);
    if (depth >= length) return 0;
    const uint64_t word = LoadBigEndian64(data(row) + depth);
    const uint64_t left = length - depth;
    return left >= 8 ? word : word & (~uint64_t{0} << (8 * (8 - left)));
  }
  // The words of rows [first, end).
  void Words(size_t first, size_t end, uint64_t depth, uint64_t* out) const noexcept {
    if (static_cast<uint64_t>(width) < depth + 8) {
      for (size_t row = first; row < end; ++row) *out++ = Word(static_cast<int64_t>(row), depth);
      return;
    }
    const uint8_t* from = bytes.get() + first * static_cast<size_t>(width) + depth;
    for (size_t row = first; row < end; ++row, from += width) *out++ = LoadBigEndian64(from);
  }
  uint64_t nbytes() const noexcept {
    return total + 8 + (offsets == nullptr ? 0 : static_cast<uint64_t>(rows + 1) * 8);
  }
};

inline void AllocateKeyBytes(KeyColumn* keys) {
  keys->bytes = MakePoolArray<uint8_t>(keys->total + 8);
  std::memset(keys->bytes.get() + keys->total, 0, 8);
}

class KeyCodec {
 public:
  enum class Kind : uint8_t { kBool, kUnsigned, kSigned, kFloat, kDecimal, kFixedBytes, kBytes, kLargeBytes };
  struct Part {
    Kind kind;
    int64_t width;  // bytes of the encoding; 0 for kBytes and kLargeBytes
  };

  static arrow::Status Make(std::shared_ptr<arrow::Schema> schema, std::shared_ptr<const KeyCodec>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      auto codec = std::make_shared<KeyCodec>();
      codec->schema_ = std::move(schema);
      ARROW_RETURN_NOT_OK(codec->Plan());
      *out = std::move(codec);
      return arrow::Status::OK();
    });
  }

  const std::shared_ptr<arrow::Schema>& schema() const noexcept { return schema_; }
  // Bytes of every key, or 0 where keys differ in length.
  int64_t width() const noexcept { return variable_ ? 0 : fixed_; }
  // How each column is encoded.
  const std::vector<Part>& parts() const noexcept { return parts_; }

  arrow::Status Encode(const arrow::RecordBatch& batch, std::shared_ptr<const KeyColumn>* out) const noexcept {
    return Guarded([&]() -> arrow::Status {
      if (batch.num_columns() != schema_->num_fields()) {
        return arrow::Status::Invalid("a key has ", schema_->num_fields(), " columns (", Names(), "), got ",
                                      batch.num_columns());
      }
      std::vector<std::shared_ptr<arrow::ArrayData>> columns;
      for (int i = 0; i < batch.num_columns(); ++i) {
        if (batch.schema()->field(i)->name() != schema_->field(i)->name()) {
          return arrow::Status::Invalid("the key columns are ", Names(), " in this order, got '",
                                        batch.schema()->field(i)->name(), "' for '", schema_->field(i)->name(), "'");
        }
        columns.push_back(batch.column_data(i));
      }
      return EncodeColumns(columns, batch.num_rows()).Value(out);
    });
  }

  // As Encode, for columns that were picked out of a wider batch. May throw std::bad_alloc.
  arrow::Result<std::shared_ptr<const KeyColumn>> EncodeColumns(
      const std::vector<std::shared_ptr<arrow::ArrayData>>& columns, int64_t rows) const {
    if (rows > std::numeric_limits<int32_t>::max()) {
      return arrow::Status::Invalid("a batch may have ", std::numeric_limits<int32_t>::max(), " rows, got ", rows);
    }
    for (size_t i = 0; i < columns.size(); ++i) {
      ARROW_RETURN_NOT_OK(CheckColumn(*columns[i], static_cast<int>(i), rows));
    }
    auto keys = std::make_shared<KeyColumn>();
    keys->rows = rows;
    if (!variable_) {
      keys->width = fixed_;
      keys->total = static_cast<uint64_t>(rows * fixed_);
      AllocateKeyBytes(keys.get());
      uint8_t* at = keys->bytes.get();
      for (size_t i = 0; i < columns.size(); at += parts_[i].width, ++i) {
        ARROW_RETURN_NOT_OK(PutFixed(parts_[i], *columns[i], rows, [at, width = fixed_](int64_t row) {
          return at + row * width;
        }));
      }
      return keys;
    }
    std::vector<bool> zeros(columns.size());
    ARROW_RETURN_NOT_OK(MeasureKeys(columns, rows, keys.get(), &zeros));
    AllocateKeyBytes(keys.get());
    const auto cursors = MakePoolArray<uint64_t>(static_cast<uint64_t>(rows));
    for (int64_t row = 0; row < rows; ++row) cursors[row] = static_cast<uint64_t>(keys->data(row) - keys->bytes.get());
    for (size_t i = 0; i < columns.size(); ++i) {
      const Part& part = parts_[i];
      if (part.kind == Kind::kBytes) {
        PutBytes<int32_t>(*columns[i], rows, zeros[i], keys->bytes.get(), cursors.get());
      } else if (part.kind == Kind::kLargeBytes) {
        PutBytes<int64_t>(*columns[i], rows, zeros[i], keys->bytes.get(), cursors.get());
      } else {
        ARROW_RETURN_NOT_OK(PutFixed(part, *columns[i], rows, [&](int64_t row) {
          uint8_t* to = keys->bytes.get() + cursors[row];
          cursors[row] += static_cast<uint64_t>(part.width);
          return to;
        }));
      }
    }
    return keys;
  }

 private:
  std::string Names() const {
    std::string names;
    for (const auto& field : schema_->fields()) names += (names.empty() ? "'" : ", '") + field->name() + "'";
    return names;
  }

  arrow::Status Plan() {
    if (schema_->num_fields() == 0) return arrow::Status::Invalid("a key needs at least one column");
    for (const auto& field : schema_->fields()) {
      Part part{};
      switch (field->type()->id()) {
        case arrow::Type::BOOL:
          part = {Kind::kBool, 1};
          break;
        case arrow::Type::UINT8:
        case arrow::Type::UINT16:
        case arrow::Type::UINT32:
        case arrow::Type::UINT64:
          part = {Kind::kUnsigned, field->type()->byte_width()};
          break;
        case arrow::Type::INT8:
        case arrow::Type::INT16:
        case arrow::Type::INT32:
        case arrow::Type::INT64:
        case arrow::Type::DATE32:
        case arrow::Type::DATE64:
        case arrow::Type::TIME32:
        case arrow::Type::TIME64:
        case arrow::Type::TIMESTAMP:
        case arrow::Type::DURATION:
        case arrow::Type::DECIMAL32:
        case arrow::Type::DECIMAL64:
          part = {Kind::kSigned, field->type()->byte_width()};
          break;
        case arrow::Type::FLOAT:
        case arrow::Type::DOUBLE:
          part = {Kind::kFloat, field->type()->byte_width()};
          break;
        case arrow::Type::DECIMAL128:
        case arrow::Type::DECIMAL256:
          part = {Kind::kDecimal, field->type()->byte_width()};
          break;
        case arrow::Type::FIXED_SIZE_BINARY:
          part = {Kind::kFixedBytes, field->type()->byte_width()};
          break;
        case arrow::Type::STRING:
        case arrow::Type::BINARY:
          part = {Kind::kBytes, 0};
          break;
        case arrow::Type::LARGE_STRING:
        case arrow::Type::LARGE_BINARY:
          part = {Kind::kLargeBytes, 0};
          break;
        default:
          return arrow::Status::Invalid("key column '", field->name(), "' has type ", field->type()->ToString(),
                                        ", which cannot be a key: use an integer, float32, float64, bool, date, time, "
                                        "timestamp, duration, decimal, string, binary or fixed_size_binary");
      }
      fixed_ += part.width;
      variable_ = variable_ || part.width == 0;
      parts_.push_back(part);
    }
    // A key of nothing but fixed_size_binary[0] has no bytes at all; every row would be the same.
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (parts_[i].kind == Kind::kFixedBytes && parts_[i].width == 0) {
        return arrow::Status::Invalid("key column '", schema_->field(static_cast<int>(i))->name(),
                                      "' has type fixed_size_binary[0], which cannot tell rows apart");
      }
    }
    return arrow::Status::OK();
  }

  arrow::Status CheckColumn(const arrow::ArrayData& column, int i, int64_t rows) const {
    const auto& field = schema_->field(i);
    if (!column.type->Equals(*field->type())) {
      return arrow::Status::Invalid("key column '", field->name(), "' has type ", field->type()->ToString(), ", got ",
                                    column.type->ToString());
    }
    if (column.length != rows) {
      return arrow::Status::Invalid("key column '", field->name(), "' has ", column.length, " rows of ", rows);
    }
    ARROW_RETURN_NOT_OK(arrow::internal::ValidateArray(column));
    if (column.buffers[0] != nullptr && column.GetNullCount() > 0) {
      const uint8_t* validity = column.buffers[0]->data();
      int64_t row = 0;
      while (row < rows - 1 && arrow::bit_util::GetBit(validity, column.offset + row)) ++row;
      return arrow::Status::Invalid("key column '", field->name(), "' is null in row ", row,
                                    ": every key column needs a value");
    }
    return arrow::Status::OK();
  }

  // Whether there are zeros to be written as two bytes: mostly not, and one look at all rows together is cheap.
  template <typename Offset>
  static bool HasZeros(const arrow::ArrayData& column, int64_t rows, const Offset* offsets) noexcept {
    if (column.buffers[2] == nullptr || offsets[0] == offsets[rows]) return false;
    return std::memchr(column.buffers[2]->data() + offsets[0], 0, static_cast<size_t>(offsets[rows] - offsets[0]));
  }

  // `zeros` becomes whether the column has any.
  template <typename Offset>
  arrow::Status AddLengths(const arrow::ArrayData& column, int i, int64_t rows, uint64_t* lengths,
                           std::vector<bool>* zeros) const {
    const Offset* offsets = column.GetValues<Offset>(1);
    const uint8_t* data = column.buffers[2] == nullptr ? nullptr : column.buffers[2]->data();
    const int64_t size = column.buffers[2] == nullptr ? 0 : column.buffers[2]->size();
    if (rows > 0 && offsets[0] < 0) {
      return arrow::Status::Invalid("key column '", schema_->field(i)->name(), "' has broken offsets in row 0");
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = offsets[row];
      const int64_t end = offsets[row + 1];
      if (end < first || end > size) {
        return arrow::Status::Invalid("key column '", schema_->field(i)->name(), "' has broken offsets in row ", row);
      }
      lengths[row] += static_cast<uint64_t>(end - first) + 2;
    }
    if (!HasZeros(column, rows, offsets)) return arrow::Status::OK();
    (*zeros)[static_cast<size_t>(i)] = true;
    for (int64_t row = 0; row < rows; ++row) {
      uint64_t count = 0;
      for (int64_t at = offsets[row]; at < offsets[row + 1]; ++at) count += data[at] == 0;
      lengths[row] += count;
    }
    return arrow::Status::OK();
  }

  arrow::Status MeasureKeys(const std::vector<std::shared_ptr<arrow::ArrayData>>& columns, int64_t rows,
                            KeyColumn* keys, std::vector<bool>* zeros) const {
    keys->offsets = MakePoolArray<uint64_t>(static_cast<uint64_t>(rows) + 1);
    uint64_t* lengths = keys->offsets.get();
    for (int64_t row = 0; row <= rows; ++row) lengths[row] = static_cast<uint64_t>(fixed_);
    if (rows > 0) {  // Without rows there may be no offsets buffer to look into.
      for (size_t i = 0; i < columns.size(); ++i) {
        if (parts_[i].kind == Kind::kBytes) {
          ARROW_RETURN_NOT_OK(AddLengths<int32_t>(*columns[i], static_cast<int>(i), rows, lengths, zeros));
        } else if (parts_[i].kind == Kind::kLargeBytes) {
          ARROW_RETURN_NOT_OK(AddLengths<int64_t>(*columns[i], static_cast<int>(i), rows, lengths, zeros));
        }
      }
    }
    uint64_t differences = 0;
    for (int64_t row = 0; row < rows; ++row) differences |= lengths[row] ^ lengths[0];
    if (rows > 0 && differences == 0) {
      keys->width = static_cast<int64_t>(lengths[0]);
      keys->total = static_cast<uint64_t>(rows) * lengths[0];
      keys->offsets = nullptr;
      return arrow::Status::OK();
    }
    for (int64_t row = 0; row < rows; ++row) keys->total += std::exchange(lengths[row], keys->total);
    lengths[rows] = keys->total;
    return arrow::Status::OK();
  }

  template <typename Offset>
  static void PutBytes(const arrow::ArrayData& column, int64_t rows, bool zeros, uint8_t* bytes, uint64_t* cursors) {
    if (rows == 0) return;
    const Offset* offsets = column.GetValues<Offset>(1);
    const uint8_t* data = column.buffers[2] == nullptr ? nullptr : column.buffers[2]->data();
    if (!zeros) {
      for (int64_t row = 0; row < rows; ++row) {
        const auto size = static_cast<size_t>(offsets[row + 1] - offsets[row]);
        uint8_t* to = bytes + cursors[row];
        CopyBytes(to, data + offsets[row], size);
        to[size] = 0;
        to[size + 1] = 0;
        cursors[row] += size + 2;
      }
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      uint8_t* to = bytes + cursors[row];
      for (Offset at = offsets[row]; at < offsets[row + 1]; ++at) {
        const uint8_t byte = data[at];
        *to++ = byte;
        if (byte == 0) *to++ = 0xFF;
      }
      *to++ = 0;
      *to++ = 0;
      cursors[row] = static_cast<uint64_t>(to - bytes);
    }
  }

  template <typename Word, typename Place>
  static void PutWords(const arrow::ArrayData& column, int64_t rows, Word flip, Place place) {
    const Word* values = column.GetValues<Word>(1);
    for (int64_t row = 0; row < rows; ++row) {
      Word word = static_cast<Word>(values[row] ^ flip);
      if constexpr (sizeof(Word) == 2) word = __builtin_bswap16(word);
      if constexpr (sizeof(Word) == 4) word = __builtin_bswap32(word);
      if constexpr (sizeof(Word) == 8) word = __builtin_bswap64(word);
      std::memcpy(place(row), &word, sizeof(Word));
    }
  }

  template <typename Float, typename Word, typename Place>
  arrow::Status PutFloats(const Part& part, const arrow::ArrayData& column, int64_t rows, Place place) const {
    constexpr Word kSign = Word{1} << (8 * sizeof(Word) - 1);
    const Float* values = column.GetValues<Float>(1);
    for (int64_t row = 0; row < rows; ++row) {
      Float value = values[row];
      if (value != value) {
        const auto& name = schema_->field(static_cast<int>(&part - parts_.data()))->name();
        return arrow::Status::Invalid("key column '", name, "' is NaN in row ", row,
                                      ": NaN equals nothing, not even itself");
      }
      if (value == 0) value = 0;  // -0.0 equals 0.0 and must be the same key.
      Word word = std::bit_cast<Word>(value);
      word = (word & kSign) != 0 ? static_cast<Word>(~word) : static_cast<Word>(word | kSign);
      if constexpr (sizeof(Word) == 4) word = __builtin_bswap32(word);
      if constexpr (sizeof(Word) == 8) word = __builtin_bswap64(word);
      std::memcpy(place(row), &word, sizeof(Word));
    }
    return arrow::Status::OK();
  }

  template <typename Place>
  arrow::Status PutFixed(const Part& part, const arrow::ArrayData& column, int64_t rows, Place place) const {
    if (rows == 0) return arrow::Status::OK();
    if (part.kind == Kind::kBool) {
      const uint8_t* bits = column.buffers[1]->data();
      for (int64_t row = 0; row < rows; ++row) *place(row) = arrow::bit_util::GetBit(bits, column.offset + row) ? 1 : 0;
    } else if (part.kind == Kind::kFixedBytes) {
      const uint8_t* values = column.buffers[1]->data() + column.offset * part.width;
      for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(place(row), values + row * part.width, static_cast<size_t>(part.width));
      }
    } else if (part.kind == Kind::kDecimal) {
      const uint8_t* values = column.buffers[1]->data() + column.offset * part.width;
      for (int64_t row = 0; row < rows; ++row) {
        uint8_t* to = place(row);
        for (int64_t i = 0; i < part.width; ++i) to[i] = values[(row + 1) * part.width - 1 - i];
        to[0] ^= 0x80;
      }
    } else if (part.kind == Kind::kFloat) {
      if (part.width == 4) return PutFloats<float, uint32_t>(part, column, rows, place);
      return PutFloats<double, uint64_t>(part, column, rows, place);
    } else {
      const bool has_sign = part.kind == Kind::kSigned;
      if (part.width == 1) PutWords<uint8_t>(column, rows, has_sign ? 0x80 : 0, place);
      if (part.width == 2) PutWords<uint16_t>(column, rows, has_sign ? 0x8000 : 0, place);
      if (part.width == 4) PutWords<uint32_t>(column, rows, has_sign ? uint32_t{1} << 31 : 0, place);
      if (part.width == 8) PutWords<uint64_t>(column, rows, has_sign ? uint64_t{1} << 63 : 0, place);
    }
    return arrow::Status::OK();
  }

  std::shared_ptr<arrow::Schema> schema_;
  std::vector<Part> parts_;
  int64_t fixed_ = 0;      // Sum of the fixed widths.
  bool variable_ = false;  // Whether any column has no fixed width.
};

}  // namespace marble
