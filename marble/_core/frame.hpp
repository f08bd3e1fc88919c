// The C++ half of frame.pyx: makes, checks and reads frames. The layout and the invariants are described there.
#pragma once

#include "hex.hpp"

#include <bit>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <arrow/api.h>
#include <arrow/ipc/api.h>
#include <arrow/python/pyarrow.h>

#define XXH_INLINE_ALL
#include <arrow/vendored/xxhash/xxhash.h>

namespace marble {

constexpr int64_t kAlignment = 64;
constexpr int64_t kPrefixBytes = 8;  // continuation marker and metadata length of an encapsulated IPC message
// Bytes in front of the body of a record batch frame: always the same, see WriteBatchFront.
constexpr int64_t kBatchFrontBytes = 768;
// No frame's metadata is larger, a schema's included: bounds what is read before the seal is known.
constexpr int64_t kMetadataBytesMax = 4096;
constexpr std::string_view kSealKey = "marble.seal";
constexpr std::string_view kSealMagic = "marble-seal:";
constexpr int64_t kSealBytes = static_cast<int64_t>(kSealMagic.size()) + 6 * kDigits;
constexpr int kColumns = 10;
constexpr int kPayload = 9;   // the column of payloads, and so the number of columns of fixed width
constexpr int kChecksum = 8;  // the column of checksums
constexpr int kBuffers = 2 * kColumns + 1;
constexpr uint8_t kHardState = 1;  // EntryKind.HARD_STATE
constexpr uint8_t kSnapshot = 11;  // EntryKind.SNAPSHOT

struct Seal {
  uint64_t length = 0, segment = 0, position = 0, synced = 0, chain = 0, checksum = 0;
  int64_t metadata_bytes = 0;  // of the frame's front, prefix and padding included; not part of the seal's text
};

// A row that says something of a group and is no entry: a hard state or a snapshot's position. It has no payload.
struct StateRow {
  uint32_t group;
  uint8_t kind;
  uint64_t index, term, session, sequence;
};

struct RowRange {
  std::shared_ptr<arrow::RecordBatch> batch;
  int64_t row, end;
};

inline const std::shared_ptr<arrow::Schema>& EntrySchema() {
  static const std::shared_ptr<arrow::Schema> schema = arrow::schema({
      arrow::field("group", arrow::uint32(), false),
      arrow::field("index", arrow::uint64(), false),
      arrow::field("term", arrow::uint64(), false),
      arrow::field("kind", arrow::uint8(), false),
      arrow::field("session", arrow::uint64(), false),
      arrow::field("sequence", arrow::uint64(), false),
      arrow::field("time_us", arrow::uint64(), false),
      arrow::field("table", arrow::uint32(), false),
      arrow::field("checksum", arrow::uint64(), false),
      arrow::field("payload", arrow::binary(), false),
  });
  return schema;
}

constexpr int kWidths[kColumns] = {4, 8, 8, 1, 8, 8, 8, 4, 8, 0};

constexpr int64_t Padded(int64_t size) noexcept { return (size + kAlignment - 1) / kAlignment * kAlignment; }

// XXH3-64 of a frame whose checksum digits, at `digits`, count as zeros ('0').
inline uint64_t FrameChecksum(const uint8_t* frame, int64_t length, int64_t digits) noexcept {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, frame, static_cast<size_t>(digits));
  XXH3_64bits_update(&state, "0000000000000000", kDigits);
  XXH3_64bits_update(&state, frame + digits + kDigits, static_cast<size_t>(length - digits - kDigits));
  return XXH3_64bits_digest(&state);
}

inline int64_t FindSeal(const uint8_t* frame, int64_t metadata_bytes) noexcept {
  const std::string_view text(reinterpret_cast<const char*>(frame), static_cast<size_t>(metadata_bytes));
  const size_t at = text.find(kSealMagic, kPrefixBytes);
  if (at == std::string_view::npos || static_cast<int64_t>(at) + kSealBytes > metadata_bytes) return -1;
  return static_cast<int64_t>(at);
}

// Puts the six numbers in place; `seal->checksum` is computed here, of everything else.
inline arrow::Status SealFrame(uint8_t* frame, Seal* seal) {
  const int64_t at = FindSeal(frame, seal->metadata_bytes);
  if (at < 0) return arrow::Status::Invalid("the frame was made without room for its seal");
  uint8_t* text = frame + at + kSealMagic.size();
  WriteHex(text, seal->length);
  WriteHex(text + kDigits, seal->segment);
  WriteHex(text + 2 * kDigits, seal->position);
  WriteHex(text + 3 * kDigits, seal->synced);
  WriteHex(text + 4 * kDigits, seal->chain);
  const int64_t digits = text + 5 * kDigits - frame;
  seal->checksum = FrameChecksum(frame, static_cast<int64_t>(seal->length), digits);
  WriteHex(frame + digits, seal->checksum);
  return arrow::Status::OK();
}

inline std::string SealPlaceholder() { return std::string(kSealMagic) + std::string(6 * kDigits, '0'); }

inline arrow::ipc::IpcWriteOptions WriteOptions() {
  auto options = arrow::ipc::IpcWriteOptions::Defaults();
  options.alignment = static_cast<int32_t>(kAlignment);
  options.use_threads = false;
  return options;
}

// Writes prefix, flatbuffer and zero padding; `front` holds Padded(kPrefixBytes + metadata.size()) bytes.
inline void WriteMetadata(uint8_t* front, const arrow::Buffer& metadata) noexcept {
  const int64_t total = Padded(kPrefixBytes + metadata.size());
  const int32_t prefix[2] = {-1, static_cast<int32_t>(total - kPrefixBytes)};
  std::memcpy(front, prefix, sizeof(prefix));
  std::memcpy(front + kPrefixBytes, metadata.data(), static_cast<size_t>(metadata.size()));
  std::memset(front + kPrefixBytes + metadata.size(), 0, static_cast<size_t>(total - kPrefixBytes - metadata.size()));
}

inline arrow::Status EncodeHeader(const std::string& format, Seal* seal, std::shared_ptr<arrow::Buffer>* out) {
  auto metadata = arrow::KeyValueMetadata::Make({"marble.format", std::string(kSealKey)}, {format, SealPlaceholder()});
  const auto schema = EntrySchema()->WithMetadata(std::move(metadata));
  const auto options = WriteOptions();
  arrow::ipc::IpcPayload payload;
  ARROW_RETURN_NOT_OK(
      arrow::ipc::GetSchemaPayload(*schema, options, arrow::ipc::DictionaryFieldMapper(*schema), &payload));
  seal->metadata_bytes = Padded(kPrefixBytes + payload.metadata->size());
  if (seal->metadata_bytes > kMetadataBytesMax) return arrow::Status::Invalid("a segment header outgrew its limit");
  seal->length = static_cast<uint64_t>(seal->metadata_bytes);
  ARROW_ASSIGN_OR_RAISE(auto buffer, arrow::AllocateBuffer(seal->metadata_bytes));
  WriteMetadata(buffer->mutable_data(), *payload.metadata);
  ARROW_RETURN_NOT_OK(SealFrame(buffer->mutable_data(), seal));
  *out = std::move(buffer);
  return arrow::Status::OK();
}

// EntryChecksum of a row without payload; the twin in transport's entry_batch covers payloads too.
inline uint64_t StateChecksum(const StateRow& state) noexcept {
  uint8_t bytes[24] = {state.kind};  // <BxxxIQQ: kind, table 0, session, sequence
  for (int i = 0; i < 8; ++i) {
    bytes[8 + i] = static_cast<uint8_t>(state.session >> (8 * i));
    bytes[16 + i] = static_cast<uint8_t>(state.sequence >> (8 * i));
  }
  return XXH3_64bits(bytes, sizeof(bytes));
}

template <typename T>
void StoreAt(uint8_t* column, int64_t row, T value) noexcept {
  std::memcpy(column + row * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

// The metadata of a record batch frame, flatbuffer by hand. Arrow's own writer pads buffers in the body to 8 bytes whatever
// its alignment option says, and payloads need 64. As the schema is fixed, so is every offset here; they count from the
// start of the flatbuffer, which is kPrefixBytes into the frame. Names are those of Arrow's Message.fbs.
inline void WriteBatchFront(uint8_t* frame, int64_t rows, int64_t payload_bytes, const int64_t* starts,
                            int64_t body_bytes) noexcept {
  constexpr int64_t kMessage = 24, kBatch = 64, kNodes = 92, kPlaces = 260, kCustomMetadata = 600, kKeyValue = 616;
  constexpr int64_t kKey = 628, kValue = 644;
  static_assert(kNodes + 4 + kColumns * 16 == kPlaces - 4 && kPlaces + 4 + kBuffers * 16 == kCustomMetadata);
  static_assert(kKey + 4 + kSealKey.size() + 1 == kValue);
  static_assert(Padded(kPrefixBytes + kValue + 4 + kSealBytes + 1) == kBatchFrontBytes);
  static_assert(std::endian::native == std::endian::little, "Arrow IPC frames are written little-endian");
  std::memset(frame, 0, static_cast<size_t>(kBatchFrontBytes));
  StoreAt<int32_t>(frame, 0, -1);
  StoreAt<int32_t>(frame, 1, static_cast<int32_t>(kBatchFrontBytes - kPrefixBytes));
  uint8_t* flat = frame + kPrefixBytes;
  const auto put = [flat](int64_t at, auto value) noexcept { std::memcpy(flat + at, &value, sizeof(value)); };
  // Offsets of a table's fields count from the table, offsets to other objects from where they are stored.
  const auto refer = [&put](int64_t at, int64_t target) noexcept { put(at, static_cast<uint32_t>(target - at)); };
  const auto vtable = [&put](int64_t at, int64_t table, int64_t table_bytes, std::initializer_list<uint16_t> fields) noexcept {
    put(at, static_cast<uint16_t>(4 + 2 * fields.size()));
    put(at + 2, static_cast<uint16_t>(table_bytes));
    int64_t slot = at + 4;
    for (const uint16_t field : fields) {
      put(slot, field);
      slot += 2;
    }
    put(table, static_cast<int32_t>(table - at));
  };
  refer(0, kMessage);
  vtable(4, kMessage, 24, {12, 14, 4, 16, 8});  // version, header_type, header, bodyLength, custom_metadata
  refer(kMessage + 4, kBatch);
  refer(kMessage + 8, kCustomMetadata);
  put(kMessage + 12, int16_t{4});  // MetadataVersion.V5
  put(kMessage + 14, uint8_t{3});  // MessageHeader.RecordBatch
  put(kMessage + 16, body_bytes);
  vtable(48, kBatch, 24, {16, 4, 8});  // length, nodes, buffers
  refer(kBatch + 4, kNodes);
  refer(kBatch + 8, kPlaces);
  put(kBatch + 16, rows);
  put(kNodes, uint32_t{kColumns});
  for (int64_t c = 0; c < kColumns; ++c) put(kNodes + 4 + 16 * c, rows);  // FieldNode: length, null_count 0
  put(kPlaces, uint32_t{kBuffers});
  int64_t at = kPlaces + 4;
  const auto buffer = [&put, &at](int64_t offset, int64_t length) noexcept {
    put(at, offset);
    put(at + 8, length);
    at += 16;
  };
  for (int c = 0; c < kColumns; ++c) {
    buffer(starts[c], 0);  // no validity bitmap
    buffer(starts[c], c < kPayload ? rows * kWidths[c] : (rows + 1) * 4);
  }
  buffer(starts[kColumns], payload_bytes);
  put(kCustomMetadata, uint32_t{1});
  refer(kCustomMetadata + 4, kKeyValue);
  vtable(608, kKeyValue, 12, {4, 8});  // key, value
  refer(kKeyValue + 4, kKey);
  refer(kKeyValue + 8, kValue);
  put(kKey, static_cast<uint32_t>(kSealKey.size()));
  std::memcpy(flat + kKey + 4, kSealKey.data(), kSealKey.size());
  put(kValue, static_cast<uint32_t>(kSealBytes));
  std::memcpy(flat + kValue + 4, kSealMagic.data(), kSealMagic.size());
}

// Lays `states` and then the rows of `ranges` out as one record batch frame: one allocation, each byte copied once.
// The caller has checked (InspectEntries) that every batch has EntrySchema() and no nulls.
inline arrow::Status EncodeFrame(const std::vector<StateRow>& states, const std::vector<RowRange>& ranges,
                                 Seal* seal, std::shared_ptr<arrow::Buffer>* out,
                                 std::shared_ptr<arrow::RecordBatch>* out_batch) {
  int64_t rows = static_cast<int64_t>(states.size());
  int64_t payload_bytes = 0;
  for (const auto& range : ranges) {
    rows += range.end - range.row;
    const auto* offsets = range.batch->column_data(kPayload)->GetValues<int32_t>(1);
    payload_bytes += offsets[range.end] - offsets[range.row];
  }
  if (rows == 0) return arrow::Status::Invalid("a frame without rows");
  if (payload_bytes > INT32_MAX) return arrow::Status::Invalid("the payloads of one frame exceed 2 GiB");

  int64_t starts[kColumns + 1];
  int64_t body_bytes = 0;
  for (int c = 0; c < kColumns; ++c) {
    starts[c] = body_bytes;
    body_bytes += Padded(c < kPayload ? rows * kWidths[c] : (rows + 1) * 4);
  }
  starts[kColumns] = body_bytes;
  body_bytes += Padded(payload_bytes);

  ARROW_ASSIGN_OR_RAISE(std::unique_ptr<arrow::Buffer> allocated, arrow::AllocateBuffer(kBatchFrontBytes + body_bytes));
  std::shared_ptr<arrow::Buffer> space = std::move(allocated);
  uint8_t* body = space->mutable_data() + kBatchFrontBytes;
  // Only the padding has to be cleared, but the columns are short beside the payload, whose padding comes last.
  std::memset(body, 0, static_cast<size_t>(starts[kColumns]));
  std::memset(body + starts[kColumns] + payload_bytes, 0, static_cast<size_t>(Padded(payload_bytes) - payload_bytes));

  int64_t row = 0;
  for (const auto& state : states) {
    StoreAt<uint32_t>(body + starts[0], row, state.group);
    StoreAt<uint64_t>(body + starts[1], row, state.index);
    StoreAt<uint64_t>(body + starts[2], row, state.term);
    StoreAt<uint8_t>(body + starts[3], row, state.kind);
    StoreAt<uint64_t>(body + starts[4], row, state.session);
    StoreAt<uint64_t>(body + starts[5], row, state.sequence);
    StoreAt<uint64_t>(body + starts[kChecksum], row, StateChecksum(state));
    StoreAt<int32_t>(body + starts[kPayload], ++row, 0);
  }
  int32_t filled = 0;
  for (const auto& range : ranges) {
    const int64_t count = range.end - range.row;
    for (int c = 0; c < kPayload; ++c) {
      const uint8_t* values = range.batch->column_data(c)->GetValues<uint8_t>(1, 0);
      const int64_t first = (range.batch->column_data(c)->offset + range.row) * kWidths[c];
      std::memcpy(body + starts[c] + row * kWidths[c], values + first, static_cast<size_t>(count * kWidths[c]));
    }
    const auto& payload = range.batch->column_data(kPayload);
    const auto* offsets = payload->GetValues<int32_t>(1) + range.row;
    const int32_t bytes = offsets[count] - offsets[0];
    if (bytes > 0) {
      std::memcpy(body + starts[kColumns] + filled, payload->buffers[2]->data() + offsets[0], static_cast<size_t>(bytes));
    }
    for (int64_t i = 1; i <= count; ++i) StoreAt<int32_t>(body + starts[kPayload], row + i, offsets[i] - offsets[0] + filled);
    filled += bytes;
    row += count;
  }

  std::vector<std::shared_ptr<arrow::ArrayData>> columns;
  columns.reserve(kColumns);
  for (int c = 0; c < kColumns; ++c) {
    std::vector<std::shared_ptr<arrow::Buffer>> buffers = {
        nullptr, arrow::SliceBuffer(space, kBatchFrontBytes + starts[c], c < kPayload ? rows * kWidths[c] : (rows + 1) * 4)};
    if (c == kPayload) buffers.push_back(arrow::SliceBuffer(space, kBatchFrontBytes + starts[kColumns], payload_bytes));
    columns.push_back(arrow::ArrayData::Make(EntrySchema()->field(c)->type(), rows, std::move(buffers), 0));
  }
  auto batch = arrow::RecordBatch::Make(EntrySchema(), rows, std::move(columns));

  seal->metadata_bytes = kBatchFrontBytes;
  uint8_t* frame = space->mutable_data();
  WriteBatchFront(frame, rows, payload_bytes, starts, body_bytes);
  seal->length = static_cast<uint64_t>(seal->metadata_bytes + body_bytes);
  ARROW_RETURN_NOT_OK(SealFrame(frame, seal));
  *out = std::move(space);
  *out_batch = std::move(batch);
  return arrow::Status::OK();
}

// 0: a sound frame of (segment, position), described in `seal`. > 0: so many bytes from `frame` on are needed to tell.
// -1: not a frame. Reads nothing beyond `available`, and parses nothing but the prefix and the seal's digits.
inline int64_t CheckFrame(const uint8_t* frame, int64_t available, uint64_t segment, uint64_t position,
                          int64_t bytes_max, Seal* seal) noexcept {
  if (available < kPrefixBytes) return kPrefixBytes;
  int32_t prefix[2];
  std::memcpy(prefix, frame, sizeof(prefix));
  const int64_t metadata_bytes = kPrefixBytes + static_cast<int64_t>(prefix[1]);
  if (prefix[0] != -1 || prefix[1] <= 0 || metadata_bytes > kMetadataBytesMax || metadata_bytes % kAlignment != 0) return -1;
  if (available < metadata_bytes) return metadata_bytes;
  const int64_t at = FindSeal(frame, metadata_bytes);
  if (at < 0) return -1;
  uint64_t* fields[6] = {&seal->length, &seal->segment, &seal->position, &seal->synced, &seal->chain, &seal->checksum};
  for (int i = 0; i < 6; ++i) {
    if (!ParseHex(frame + at + static_cast<int64_t>(kSealMagic.size()) + i * kDigits, fields[i])) return -1;
  }
  seal->metadata_bytes = metadata_bytes;
  if (seal->length > static_cast<uint64_t>(bytes_max) || seal->length < static_cast<uint64_t>(metadata_bytes) ||
      seal->length % kAlignment != 0 || seal->segment != segment || seal->position != position) {
    return -1;
  }
  const int64_t length = static_cast<int64_t>(seal->length);
  if (available < length) return length;
  return FrameChecksum(frame, length, at + kSealBytes - kDigits) == seal->checksum ? 0 : -1;
}

inline arrow::Result<std::shared_ptr<arrow::RecordBatch>> DecodeFrame(const std::shared_ptr<arrow::Buffer>& frame,
                                                                      int64_t metadata_bytes) {
  ARROW_ASSIGN_OR_RAISE(auto message,
                        arrow::ipc::ReadMessage(arrow::SliceBuffer(frame, 0, metadata_bytes),
                                                arrow::SliceBuffer(frame, metadata_bytes)));
  if (message->type() != arrow::ipc::MessageType::RECORD_BATCH) return arrow::Status::Invalid("not a record batch");
  if (message->body_length() != frame->size() - metadata_bytes) return arrow::Status::Invalid("body of another length");
  auto options = arrow::ipc::IpcReadOptions::Defaults();
  options.use_threads = false;
  ARROW_ASSIGN_OR_RAISE(auto batch, arrow::ipc::ReadRecordBatch(*message, EntrySchema(), nullptr, options));
  ARROW_RETURN_NOT_OK(batch->Validate());
  return batch;
}

inline arrow::Result<std::shared_ptr<arrow::RecordBatch>> CopyAndDecode(const uint8_t* frame, int64_t length,
                                                                        int64_t metadata_bytes) {
  ARROW_ASSIGN_OR_RAISE(auto buffer, arrow::AllocateBuffer(length));
  std::memcpy(buffer->mutable_data(), frame, static_cast<size_t>(length));
  return DecodeFrame(std::shared_ptr<arrow::Buffer>(std::move(buffer)), metadata_bytes);
}

// The columns that decisions need, as plain pointers. Null when the batch is not one of ours.
struct EntryColumns {
  const uint32_t* group;
  const uint64_t* index;
  const uint64_t* term;
  const uint8_t* kind;
  const int32_t* offsets;
  int64_t rows = 0;

  // nullptr if `batch` may be read as rows of ENTRY_SCHEMA, otherwise why not.
  const char* Open(const arrow::RecordBatch& batch) {
    if (!batch.schema()->Equals(*EntrySchema(), /*check_metadata=*/false)) return "its schema is not ENTRY_SCHEMA";
    rows = batch.num_rows();
    for (int c = 0; c < kColumns; ++c) {
      const auto& data = batch.column_data(c);
      if (data->GetNullCount() != 0) return "it has nulls";
      if (rows > 0 && data->buffers[1] == nullptr) return "a column has no values";
    }
    if (rows == 0) return nullptr;
    group = batch.column_data(0)->GetValues<uint32_t>(1);
    index = batch.column_data(1)->GetValues<uint64_t>(1);
    term = batch.column_data(2)->GetValues<uint64_t>(1);
    kind = batch.column_data(3)->GetValues<uint8_t>(1);
    offsets = batch.column_data(kPayload)->GetValues<int32_t>(1);
    const auto& payload = batch.column_data(kPayload)->buffers[2];
    const int64_t size = payload == nullptr ? 0 : payload->size();
    if (offsets[0] < 0 || offsets[rows] > size) return "its payload offsets leave the buffer";
    for (int64_t i = 0; i < rows; ++i) {
      if (offsets[i] > offsets[i + 1]) return "its payload offsets fall";
    }
    return nullptr;
  }
};

// Whether rows of `kind` say something of their group and are no entries.
constexpr bool IsState(uint8_t kind) noexcept { return kind == kHardState || kind == kSnapshot; }

// Rows [row, end) of one group: one hard state, or one snapshot's position, or as many entries as have indexes that follow
// each other. `state` is the kind of the former two and 0 for entries.
struct Run {
  uint32_t group;
  uint8_t state;
  int64_t row, end;
};

inline void FindRuns(const EntryColumns& columns, std::vector<Run>* runs) {
  for (int64_t i = 0; i < columns.rows; ++i) {
    const uint8_t state = IsState(columns.kind[i]) ? columns.kind[i] : 0;
    if (!runs->empty()) {
      Run& last = runs->back();
      if (last.group == columns.group[i] && last.state == 0 && state == 0 && columns.index[i] == columns.index[i - 1] + 1) {
        last.end = i + 1;
        continue;
      }
    }
    runs->push_back({columns.group[i], state, i, i + 1});
  }
}

// nullptr if all rows are entries of `group`, indexes follow each other from 1 or later, and terms are set and do not fall.
inline const char* CheckEntries(const EntryColumns& columns, uint32_t group, int64_t row, int64_t end) noexcept {
  for (int64_t i = row; i < end; ++i) {
    if (columns.group[i] != group) return "an entry belongs to another group";
    if (IsState(columns.kind[i]) || columns.kind[i] == 0) return "an entry has a kind that entries cannot have";
    if (columns.term[i] == 0 || columns.term[i] > INT64_MAX) return "a term is not within 1 to INDEX_MAX";
    if (columns.index[i] == 0 || columns.index[i] > INT64_MAX) return "an index is not within 1 to INDEX_MAX";
    if (i > row && columns.index[i] != columns.index[i - 1] + 1) return "indexes do not follow each other";
    if (i > row && columns.term[i] < columns.term[i - 1]) return "terms fall";
  }
  return nullptr;
}

}  // namespace marble
