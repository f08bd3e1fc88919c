// Making the parts of an sstable that are Arrow's: the header, the messages of blocks, the footer.
//
// Layout: as Arrow's File.fbs and Message.fbs say. Arrow's own file writer has no room for a section of ours between
// the blocks and the footer, and does not align bodies; so the messages are Arrow's, and what is around them is put
// here.
// Ownership: results are fresh buffers. Thread safety: pure functions.
// Invariants:
//   1. Header, index section and footer begin at multiples of 64 of the file, and so does the body of every block.
//   2. Padding is zeros.
#pragma once

#include "memtable_state.hpp"
#include "sstable_format.hpp"

#include <arrow/buffer.h>
#include <arrow/ipc/dictionary.h>
#include <arrow/ipc/options.h>
#include <arrow/ipc/writer.h>
#include <arrow/record_batch.h>
#include <arrow/result.h>
#include <arrow/type.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

constexpr uint64_t kFileAlignment = 64;
constexpr uint64_t kMessagePrefixBytes = 8;
constexpr std::string_view kFileMagic = "ARROW1";
constexpr uint64_t kFileMagicBytes = 8;  // At the start, with its padding.
// No block has more once it is decompressed: bounds what is allocated on a file's word.
constexpr uint64_t kDecodedBytesMax = uint64_t{1} << 33;
constexpr uint64_t kFileEndBytes = 4 + kFileMagic.size();

constexpr uint64_t AlignUp(uint64_t size, uint64_t to) noexcept { return (size + to - 1) / to * to; }

// Schema of a file whose table has `layout`.
inline arrow::Result<std::shared_ptr<arrow::Schema>> FileSchema(const Layout& layout) {
  arrow::FieldVector fields = layout.get_schema->fields();
  for (const auto& field : fields) {
    if (field->name() == kIndexColumn || field->name() == kDeletedColumn) {
      return arrow::Status::Invalid("column '", field->name(), "' has a name that files of a table use themselves");
    }
    // A tombstone has nulls, and these types have no place to say so.
    const auto id = field->type()->id();
    if (id == arrow::Type::NA || arrow::is_union(id)) {
      return arrow::Status::Invalid("column '", field->name(), "' has type ", field->type()->ToString(),
                                    ", which a file cannot store");
    }
  }
  fields.push_back(arrow::field(std::string(kIndexColumn), arrow::uint64(), false));
  fields.push_back(arrow::field(std::string(kDeletedColumn), arrow::boolean(), false));
  return arrow::schema(std::move(fields));
}

// The schema message, without prefix.
inline arrow::Result<std::shared_ptr<arrow::Buffer>> EncodeSchema(const arrow::Schema& schema) {
  arrow::ipc::IpcPayload payload;
  ARROW_RETURN_NOT_OK(arrow::ipc::GetSchemaPayload(schema, arrow::ipc::IpcWriteOptions::Defaults(),
                                                   arrow::ipc::DictionaryFieldMapper(schema), &payload));
  return payload.metadata;
}

inline arrow::Result<std::shared_ptr<arrow::Buffer>> MakeHeader(const arrow::Buffer& schema) {
  const uint64_t front = kFileMagicBytes + kMessagePrefixBytes;
  const uint64_t total = AlignUp(front + static_cast<uint64_t>(schema.size()), kFileAlignment);
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> header, arrow::AllocateBuffer(static_cast<int64_t>(total)));
  uint8_t* to = header->mutable_data();
  std::memset(to, 0, total);
  std::memcpy(to, kFileMagic.data(), kFileMagic.size());
  const int32_t prefix[2] = {-1, static_cast<int32_t>(total - front)};
  std::memcpy(to + kFileMagicBytes, prefix, sizeof(prefix));
  std::memcpy(to + front, schema.data(), static_cast<size_t>(schema.size()));
  return header;
}

// The record batch message that is to stand at `offset` of the file. `entry` gets its sizes.
inline arrow::Result<std::shared_ptr<arrow::Buffer>> MakeMessage(const arrow::RecordBatch& batch,
                                                                 const arrow::ipc::IpcWriteOptions& options,
                                                                 uint64_t offset, BlockEntry* entry) {
  arrow::ipc::IpcPayload payload;
  ARROW_RETURN_NOT_OK(arrow::ipc::GetRecordBatchPayload(batch, options, &payload));
  const auto metadata = static_cast<uint64_t>(payload.metadata->size());
  const uint64_t front = AlignUp(offset + kMessagePrefixBytes + metadata, kFileAlignment) - offset;
  const uint64_t total = front + static_cast<uint64_t>(payload.body_length);
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> message, arrow::AllocateBuffer(static_cast<int64_t>(total)));
  uint8_t* to = message->mutable_data();
  const int32_t prefix[2] = {-1, static_cast<int32_t>(front - kMessagePrefixBytes)};
  std::memcpy(to, prefix, sizeof(prefix));
  std::memcpy(to + kMessagePrefixBytes, payload.metadata->data(), metadata);
  std::memset(to + kMessagePrefixBytes + metadata, 0, front - kMessagePrefixBytes - metadata);
  uint64_t at = front;
  for (const auto& buffer : payload.body_buffers) {
    const uint64_t size = buffer == nullptr ? 0 : static_cast<uint64_t>(buffer->size());
    const uint64_t padded = AlignUp(size, 8);
    if (at + padded > total) return arrow::Status::UnknownError("a message is longer than its parts");
    if (size > 0) std::memcpy(to + at, buffer->data(), size);
    std::memset(to + at + size, 0, padded - size);
    at += padded;
  }
  if (at != total) return arrow::Status::UnknownError("a message is shorter than its parts");
  if (static_cast<uint64_t>(payload.raw_body_length) > kDecodedBytesMax) {
    return arrow::Status::Invalid("a block of ", payload.raw_body_length, " bytes: its rows are too long for a file");
  }
  entry->offset = offset;
  entry->bytes = total;
  entry->decoded_bytes = static_cast<uint64_t>(payload.raw_body_length);
  entry->metadata_bytes = static_cast<uint32_t>(front);
  entry->checksum = ChecksumOf(to, total);
  return message;
}

// A flatbuffer that is put together by hand: offsets count from its beginning.
class FlatWriter {
 public:
  explicit FlatWriter(uint8_t* bytes) : bytes_(bytes) {}
  template <typename T>
  void Put(uint64_t at, T value) noexcept {
    std::memcpy(bytes_ + at, &value, sizeof(value));
  }
  // Offsets to other objects count from where they are stored.
  void Refer(uint64_t at, uint64_t target) noexcept { Put(at, static_cast<uint32_t>(target - at)); }
  void Table(uint64_t vtable, uint64_t table, uint16_t table_bytes, std::initializer_list<uint16_t> fields) noexcept {
    Put(vtable, static_cast<uint16_t>(4 + 2 * fields.size()));
    Put(vtable + 2, table_bytes);
    for (uint64_t slot = vtable + 4; const uint16_t field : fields) {
      Put(slot, field);
      slot += 2;
    }
    Put(table, static_cast<int32_t>(table - vtable));
  }
  void Text(uint64_t at, std::string_view text) noexcept {
    Put(at, static_cast<uint32_t>(text.size()));
    std::memcpy(bytes_ + at + 4, text.data(), text.size());
  }

 private:
  uint8_t* bytes_;
};

// Reads a flatbuffer that Arrow has verified, or has made.
class FlatReader {
 public:
  explicit FlatReader(const arrow::Buffer& bytes) : bytes_(bytes.data()) {}
  template <typename T>
  T Load(uint64_t at) const noexcept {
    T value;
    std::memcpy(&value, bytes_ + at, sizeof(value));
    return value;
  }
  // Where field number `field` of a table stands; 0 if it is not there.
  uint64_t Field(uint64_t table, uint64_t field) const noexcept {
    const uint64_t vtable = table - static_cast<uint64_t>(int64_t{Load<int32_t>(table)});
    if (4 + 2 * field >= Load<uint16_t>(vtable)) return 0;
    const uint16_t offset = Load<uint16_t>(vtable + 4 + 2 * field);
    return offset == 0 ? 0 : table + offset;
  }
  uint64_t Follow(uint64_t at) const noexcept { return at + Load<uint32_t>(at); }
  // The table that a message is about: Message.header.
  uint64_t Header() const noexcept { return Follow(Field(Follow(0), 2)); }

 private:
  const uint8_t* bytes_;
};

// How many bytes the buffers of a record batch message will have once they are decompressed, as they say themselves; 0
// if it is not compressed. False if a buffer does not lie in the body.
inline bool CountDecoded(const arrow::Buffer& metadata, const arrow::Buffer& body, uint64_t* total) noexcept {
  const FlatReader flat(metadata);
  const uint64_t batch = flat.Header();
  *total = 0;
  if (flat.Field(batch, 3) == 0 || flat.Field(batch, 2) == 0) return true;  // RecordBatch.compression, .buffers
  const uint64_t buffers = flat.Follow(flat.Field(batch, 2));
  const auto room = static_cast<uint64_t>(body.size());
  for (uint64_t i = 0; i < flat.Load<uint32_t>(buffers); ++i) {
    const auto offset = flat.Load<uint64_t>(buffers + 4 + 16 * i);
    const auto bytes = flat.Load<uint64_t>(buffers + 4 + 16 * i + 8);
    if (offset > room || bytes > room - offset) return false;
    if (bytes == 0) continue;
    if (bytes < sizeof(int64_t)) return false;
    int64_t decoded;
    std::memcpy(&decoded, body.data() + offset, sizeof(decoded));
    if (decoded == -1) continue;  // It was not worth compressing.
    if (decoded < 0 || decoded > static_cast<int64_t>(kDecodedBytesMax)) return false;
    *total += static_cast<uint64_t>(decoded);
  }
  return true;
}

// The file from the footer on, with its seal. `schema` is the schema message: the whole of it goes into the footer, as
// references in a flatbuffer do not mind where they stand.
inline arrow::Result<std::shared_ptr<arrow::Buffer>> MakeFooter(const std::vector<BlockEntry>& blocks,
                                                                const arrow::Buffer& schema, FileSeal seal) {
  constexpr uint64_t kFooter = 20, kDictionaries = 44, kBatches = 52;
  const uint64_t metadata = kBatches + 4 + blocks.size() * 24;
  const uint64_t key_value = metadata + 16;
  const uint64_t key = key_value + 12;
  const uint64_t value = AlignUp(key + 4 + kFileSealKey.size() + 1, 4);
  const uint64_t copy = AlignUp(value + 4 + kFileSealBytes + 1, 8);
  const uint64_t size = AlignUp(copy + static_cast<uint64_t>(schema.size()), 8);
  const uint64_t total = size + kFileEndBytes;
  if (size > INT32_MAX) return arrow::Status::Invalid("a file of too many blocks");
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> footer, arrow::AllocateBuffer(static_cast<int64_t>(total)));
  uint8_t* bytes = footer->mutable_data();
  std::memset(bytes, 0, total);
  FlatWriter flat(bytes);
  flat.Refer(0, kFooter);
  flat.Table(4, kFooter, 24, {20, 4, 8, 12, 16});  // version, schema, dictionaries, recordBatches, custom_metadata
  flat.Refer(kFooter + 4, copy + FlatReader(schema).Header());
  flat.Refer(kFooter + 8, kDictionaries);
  flat.Refer(kFooter + 12, kBatches);
  flat.Refer(kFooter + 16, metadata);
  flat.Put(kFooter + 20, int16_t{4});  // MetadataVersion.V5
  flat.Put(kBatches, static_cast<uint32_t>(blocks.size()));
  uint64_t at = kBatches + 4;
  for (const BlockEntry& block : blocks) {
    flat.Put(at, block.offset);
    flat.Put(at + 8, block.metadata_bytes);
    flat.Put(at + 16, block.bytes - block.metadata_bytes);
    at += 24;
  }
  flat.Put(metadata, uint32_t{1});
  flat.Refer(metadata + 4, key_value);
  flat.Table(metadata + 8, key_value, 12, {4, 8});  // key, value
  flat.Refer(key_value + 4, key);
  flat.Refer(key_value + 8, value);
  flat.Text(key, kFileSealKey);
  flat.Put(value, static_cast<uint32_t>(kFileSealBytes));
  std::memcpy(bytes + value + 4, kFileSealMagic.data(), kFileSealMagic.size());
  std::memcpy(bytes + copy, schema.data(), static_cast<size_t>(schema.size()));
  flat.Put(size, static_cast<uint32_t>(size));
  std::memcpy(bytes + size + 4, kFileMagic.data(), kFileMagic.size());
  seal.size += total;
  if (!SealFooter(bytes, total, &seal)) return arrow::Status::UnknownError("the footer has no room for its seal");
  return footer;
}

}  // namespace marble
