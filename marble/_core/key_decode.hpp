// Encoded keys back into columns: tombstones are written to files with the key that they have in memory.
//
// Layout: head of key_codec.hpp. Ownership: columns own fresh buffers. Thread safety: pure functions.
// Invariants:
//   1. Encoding what was decoded gives the same bytes.
//   2. Nothing is read beyond a key's end: what is no key of the codec is refused.
#pragma once

#include "key_codec.hpp"

#include <arrow/buffer.h>
#include <arrow/util/bit_util.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

class KeyDecoder {
 public:
  // One array for each key column. May throw std::bad_alloc.
  static arrow::Result<std::vector<std::shared_ptr<arrow::ArrayData>>> Decode(const KeyCodec& codec,
                                                                              std::vector<std::string_view> keys) {
    std::vector<std::shared_ptr<arrow::ArrayData>> columns;
    for (size_t i = 0; i < codec.parts().size(); ++i) {
      const KeyCodec::Part part = codec.parts()[i];
      auto column = arrow::ArrayData::Make(codec.schema()->field(static_cast<int>(i))->type(),
                                           static_cast<int64_t>(keys.size()), {nullptr, nullptr}, 0);
      if (part.kind == KeyCodec::Kind::kBytes) {
        ARROW_RETURN_NOT_OK(TakeBytes<int32_t>(&keys, column.get()));
      } else if (part.kind == KeyCodec::Kind::kLargeBytes) {
        ARROW_RETURN_NOT_OK(TakeBytes<int64_t>(&keys, column.get()));
      } else {
        ARROW_RETURN_NOT_OK(TakeFixed(part, &keys, column.get()));
      }
      columns.push_back(std::move(column));
    }
    for (const std::string_view rest : keys) {
      if (!rest.empty()) return arrow::Status::Invalid("a key has ", rest.size(), " bytes too many");
    }
    return columns;
  }

  // As Decode, of bytes that anybody may have made.
  static arrow::Status DecodeBatch(const KeyCodec& codec, const std::vector<std::string>& keys,
                                   std::shared_ptr<arrow::RecordBatch>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      const auto rows = static_cast<int64_t>(keys.size());
      ARROW_ASSIGN_OR_RAISE(auto columns, Decode(codec, std::vector<std::string_view>(keys.begin(), keys.end())));
      *out = arrow::RecordBatch::Make(codec.schema(), rows, std::move(columns));
      ARROW_RETURN_NOT_OK((*out)->ValidateFull());
      std::shared_ptr<const KeyColumn> again;
      ARROW_RETURN_NOT_OK(codec.Encode(**out, &again));
      for (size_t i = 0; i < keys.size(); ++i) {
        const auto row = static_cast<int64_t>(i);
        const std::string_view key(reinterpret_cast<const char*>(again->data(row)), again->size(row));
        if (key != keys[i]) return arrow::Status::Invalid("key ", i, " is not what its values are encoded as");
      }
      return arrow::Status::OK();
    });
  }

 private:
  static arrow::Status TooShort() { return arrow::Status::Invalid("a key ends too early"); }

  // Takes the first bytes of each key.
  static arrow::Status TakeFixed(const KeyCodec::Part& part, std::vector<std::string_view>* keys,
                                 arrow::ArrayData* column) {
    const auto width = static_cast<size_t>(part.width);
    const bool bits = part.kind == KeyCodec::Kind::kBool;
    const auto rows = static_cast<int64_t>(keys->size());
    if (bits) {
      ARROW_ASSIGN_OR_RAISE(column->buffers[1], arrow::AllocateEmptyBitmap(rows));
    } else {
      ARROW_ASSIGN_OR_RAISE(column->buffers[1], arrow::AllocateBuffer(rows * part.width));
    }
    uint8_t* out = column->buffers[1]->mutable_data();
    for (int64_t row = 0; row < rows; ++row) {
      std::string_view& key = (*keys)[static_cast<size_t>(row)];
      if (key.size() < width) return TooShort();
      const auto* from = reinterpret_cast<const uint8_t*>(key.data());
      if (bits) {
        arrow::bit_util::SetBitTo(out, row, from[0] != 0);
      } else {
        PutValue(part, from, out + row * part.width);
      }
      key.remove_prefix(width);
    }
    return arrow::Status::OK();
  }

  static void PutValue(const KeyCodec::Part& part, const uint8_t* from, uint8_t* to) noexcept {
    const int64_t width = part.width;
    if (part.kind == KeyCodec::Kind::kFixedBytes) {
      if (width > 0) std::memcpy(to, from, static_cast<size_t>(width));
      return;
    }
    const bool negative = part.kind == KeyCodec::Kind::kFloat && (from[0] & 0x80) == 0;
    for (int64_t i = 0; i < width; ++i) {
      to[i] = negative ? static_cast<uint8_t>(~from[width - 1 - i]) : from[width - 1 - i];
    }
    // A negative float has its sign back already.
    if (part.kind != KeyCodec::Kind::kUnsigned && !negative) to[width - 1] ^= 0x80;
  }

  template <typename Offset>
  static arrow::Status TakeBytes(std::vector<std::string_view>* keys, arrow::ArrayData* column) {
    ARROW_ASSIGN_OR_RAISE(column->buffers[1],
                          arrow::AllocateBuffer(static_cast<int64_t>((keys->size() + 1) * sizeof(Offset))));
    auto* ends = reinterpret_cast<Offset*>(column->buffers[1]->mutable_data());
    std::string bytes;
    *ends = 0;
    for (std::string_view& key : *keys) {
      size_t at = 0;
      for (; at + 1 < key.size() && (key[at] != '\0' || key[at + 1] != '\0'); ++at) {
        bytes.push_back(key[at]);
        if (key[at] != '\0') continue;
        if (key[++at] != '\xff') return arrow::Status::Invalid("a key has a zero byte that stands for nothing");
      }
      if (at + 1 >= key.size()) return TooShort();
      key.remove_prefix(at + 2);
      if (bytes.size() > static_cast<uint64_t>(std::numeric_limits<Offset>::max())) {
        return arrow::Status::CapacityError("more bytes than offsets reach");
      }
      *++ends = static_cast<Offset>(bytes.size());
    }
    column->buffers.push_back(arrow::Buffer::FromString(std::move(bytes)));
    return arrow::Status::OK();
  }
};

}  // namespace marble
