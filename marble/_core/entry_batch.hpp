// Log entries as rows of a record batch: the loops and the Arrow calls behind entry_batch.pyx.
//
// Column layout (ENTRY_SCHEMA, no nulls): group u32, index u64, term u64, kind u8, session u64, sequence u64,
// time_us u64, table u32, checksum u64, payload binary (int32 offsets).
// Ownership: everything that is returned owns its buffers; `Entries` only borrows and must not outlive its batch.
// Thread safety: pure functions over immutable buffers. No Python object is touched, so the caller may drop the GIL.
// Invariants:
//  1. A payload is a whole number of 64-byte units, so in one contiguous payload column all payloads start aligned alike.
//  2. `OpenEntries` checks schema, nulls and presence of buffers; offsets must have been checked by whoever let the batch
//     into the process (`validate(full=True)` at the wire, the seal of a frame on disk).
#pragma once

#define XXH_INLINE_ALL
#include "arrow/vendored/xxhash/xxhash.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "arrow/api.h"
#include "arrow/io/memory.h"
#include "arrow/ipc/api.h"
#include "arrow/python/pyarrow.h"
#include "arrow/util/bit_util.h"

namespace marble {

using arrow::Buffer;
using arrow::RecordBatch;
using arrow::Result;
using arrow::Schema;
using arrow::Status;

constexpr int64_t kPayloadAlignment = 64;
constexpr uint64_t kIndexMax = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
constexpr int kEntryColumns = 10;
constexpr int kPayloadColumn = 9;

// EntryKind, as far as the rules here ask for it. Entries are the kinds from kNoop to kTransaction but kSnapshot.
constexpr uint8_t kNoop = 2;
constexpr uint8_t kMembership = 8;
constexpr uint8_t kOpenSession = 9;
constexpr uint8_t kCloseSession = 10;
constexpr uint8_t kSnapshot = 11;
constexpr uint8_t kTransaction = 13;

inline bool IsEntry(uint8_t kind) noexcept { return kind >= kNoop && kind <= kTransaction && kind != kSnapshot; }

// Whether an entry of `kind` has a payload; the others never have one.
inline bool HasPayload(uint8_t kind) noexcept {
  return kind != kNoop && kind != kOpenSession && kind != kCloseSession;
}

// What a proposer gives: an entry without its place in the log.
struct ProposalData {
  uint8_t kind = 0;
  uint32_t table = 0;
  uint64_t session = 0;
  uint64_t sequence = 0;
  uint64_t checksum = 0;
  std::shared_ptr<Buffer> payload;  // null when empty

  int64_t size() const { return payload ? payload->size() : 0; }
};

// XXH3-64 over the little-endian struct <BxxxIQQ (kind, 3 zero bytes, table, session, sequence) and the payload.
inline uint64_t EntryChecksum(uint8_t kind, uint32_t table, uint64_t session, uint64_t sequence, const uint8_t* payload,
                              int64_t size) noexcept {
  uint8_t head[24] = {kind};
  std::memcpy(head + 4, &table, 4);
  std::memcpy(head + 8, &session, 8);
  std::memcpy(head + 16, &sequence, 8);
  if (size == 0) return XXH3_64bits(head, sizeof(head));
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, head, sizeof(head));
  XXH3_64bits_update(&state, payload, static_cast<size_t>(size));
  return XXH3_64bits_digest(&state);
}

inline void Seal(ProposalData* proposal) noexcept {
  const uint8_t* data = proposal->payload ? proposal->payload->data() : nullptr;
  proposal->checksum = EntryChecksum(proposal->kind, proposal->table, proposal->session, proposal->sequence, data,
                                     proposal->size());
}

// Borrowed pointers to the first row of every column.
struct Entries {
  int64_t rows = 0;
  const uint32_t* group = nullptr;
  const uint64_t* index = nullptr;
  const uint64_t* term = nullptr;
  const uint8_t* kind = nullptr;
  const uint64_t* session = nullptr;
  const uint64_t* sequence = nullptr;
  const uint64_t* time_us = nullptr;
  const uint32_t* table = nullptr;
  const uint64_t* checksum = nullptr;
  const int32_t* offsets = nullptr;
  const uint8_t* data = nullptr;

  int64_t size(int64_t row) const { return int64_t{offsets[row + 1]} - offsets[row]; }
  const uint8_t* payload(int64_t row) const { return data + offsets[row]; }
};

inline Status OpenEntries(const RecordBatch& batch, const Schema& expected, Entries* out) {
  if (batch.schema().get() != &expected && !batch.schema()->Equals(expected, /*check_metadata=*/false)) {
    return Status::Invalid("not a batch of log entries, its schema is: ", batch.schema()->ToString());
  }
  out->rows = batch.num_rows();
  if (out->rows == 0) return Status::OK();
  for (int i = 0; i < batch.num_columns(); ++i) {
    const auto& column = *batch.column_data(i);
    if (column.GetNullCount() != 0) return Status::Invalid("column ", expected.field(i)->name(), " has a null");
    if (column.buffers.size() < 2 || column.buffers[1] == nullptr) {
      return Status::Invalid("column ", expected.field(i)->name(), " has no values");
    }
  }
  out->group = batch.column_data(0)->GetValues<uint32_t>(1);
  out->index = batch.column_data(1)->GetValues<uint64_t>(1);
  out->term = batch.column_data(2)->GetValues<uint64_t>(1);
  out->kind = batch.column_data(3)->GetValues<uint8_t>(1);
  out->session = batch.column_data(4)->GetValues<uint64_t>(1);
  out->sequence = batch.column_data(5)->GetValues<uint64_t>(1);
  out->time_us = batch.column_data(6)->GetValues<uint64_t>(1);
  out->table = batch.column_data(7)->GetValues<uint32_t>(1);
  out->checksum = batch.column_data(8)->GetValues<uint64_t>(1);
  const auto& payload = *batch.column_data(kPayloadColumn);
  out->offsets = payload.GetValues<int32_t>(1);
  // Offsets are absolute in the value buffer, so its data pointer takes no array offset.
  static const uint8_t empty = 0;
  out->data = payload.buffers[2] ? payload.buffers[2]->data() : &empty;
  return Status::OK();
}

// The first row whose checksum is not that of its content, or -1.
inline int64_t FirstDamaged(const Entries& e) noexcept {
  for (int64_t row = 0; row < e.rows; ++row) {
    if (e.checksum[row] != EntryChecksum(e.kind[row], e.table[row], e.session[row], e.sequence[row], e.payload(row),
                                         e.size(row))) {
      return row;
    }
  }
  return -1;
}

// Index and term of a row within their ranges.
inline Status CheckPlace(const Entries& e, int64_t row) {
  const uint64_t index = e.index[row];
  if (index == 0 || index > kIndexMax) return Status::Invalid("index ", index, " is out of range");
  if (e.term[row] == 0 || e.term[row] > kIndexMax) {
    return Status::Invalid("term ", e.term[row], " of entry ", index, " is out of range");
  }
  return Status::OK();
}

// Whether the rows are a run of one group's log that may come from a peer.
inline Status CheckContiguous(const Entries& e) {
  for (int64_t row = 0; row < e.rows; ++row) {
    ARROW_RETURN_NOT_OK(CheckPlace(e, row));
    const uint64_t index = e.index[row];
    const uint8_t kind = e.kind[row];
    if (!IsEntry(kind)) return Status::Invalid("entry ", index, " has the unknown kind ", static_cast<int>(kind));
    if (kind == kCloseSession && e.session[row] == 0) return Status::Invalid("entry ", index, " closes no session");
    if (e.time_us[row] > kIndexMax) {
      return Status::Invalid("time ", e.time_us[row], " of entry ", index, " is out of range");
    }
    const int64_t size = e.size(row);
    if (size < 0 || size % kPayloadAlignment != 0 || HasPayload(kind) != (size != 0)) {
      return Status::Invalid("entry ", index, " of kind ", static_cast<int>(kind), " has a payload of ", size, " bytes");
    }
    if (row == 0) continue;
    if (e.group[row] != e.group[0]) {
      return Status::Invalid("entry ", index, " is of group ", e.group[row], ", not ", e.group[0]);
    }
    if (index != e.index[row - 1] + 1) return Status::Invalid("entry ", index, " follows entry ", e.index[row - 1]);
    if (e.term[row] < e.term[row - 1]) {
      return Status::Invalid("term falls from ", e.term[row - 1], " to ", e.term[row], " at entry ", index);
    }
  }
  return Status::OK();
}

// Whether there is exactly one row, it is no entry but describes a snapshot, and it may come from a peer.
inline Status CheckSnapshot(const Entries& e) {
  if (e.rows != 1) return Status::Invalid(e.rows, " rows where one describes a snapshot");
  ARROW_RETURN_NOT_OK(CheckPlace(e, 0));
  if (e.kind[0] != kSnapshot) return Status::Invalid("a row of kind ", static_cast<int>(e.kind[0]), " is no snapshot");
  if (e.time_us[0] != 0 || e.table[0] != 0) return Status::Invalid("a snapshot with a time or a table");
  const int64_t size = e.size(0);
  if (size < 0 || size % kPayloadAlignment != 0) return Status::Invalid("a snapshot with a payload of ", size, " bytes");
  return Status::OK();
}

// Indexes of the rows that change the membership.
inline void FindChanges(const Entries& e, std::vector<uint64_t>* out) {
  for (int64_t row = 0; row < e.rows; ++row) {
    if (e.kind[row] == kMembership) out->push_back(e.index[row]);
  }
}

// Rows for `proposals` at first_index, first_index + 1, ... All fixed-width columns share one allocation.
inline Result<std::shared_ptr<RecordBatch>> BuildEntries(const std::shared_ptr<Schema>& schema, uint32_t group,
                                                         uint64_t first_index, uint64_t term, uint64_t time_us,
                                                         const std::vector<const ProposalData*>& proposals) {
  const int64_t rows = static_cast<int64_t>(proposals.size());
  int64_t payload_bytes = 0;
  for (const auto* proposal : proposals) payload_bytes += proposal->size();
  if (payload_bytes > std::numeric_limits<int32_t>::max()) {
    return Status::CapacityError("payloads of ", payload_bytes, " bytes do not fit one batch");
  }
  static constexpr int64_t kWidths[kEntryColumns] = {4, 8, 8, 1, 8, 8, 8, 4, 8, 4};
  int64_t starts[kEntryColumns + 1] = {0};
  for (int i = 0; i < kEntryColumns; ++i) {
    const int64_t cells = rows + (i == kPayloadColumn ? 1 : 0);
    starts[i + 1] = starts[i] + arrow::bit_util::RoundUpToMultipleOf64(cells * kWidths[i]);
  }
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<Buffer> fixed, arrow::AllocateBuffer(starts[kEntryColumns]));
  uint8_t* base = fixed->mutable_data();
  std::memset(base, 0, static_cast<size_t>(starts[kEntryColumns]));
  auto* groups = reinterpret_cast<uint32_t*>(base + starts[0]);
  auto* indexes = reinterpret_cast<uint64_t*>(base + starts[1]);
  auto* terms = reinterpret_cast<uint64_t*>(base + starts[2]);
  auto* kinds = base + starts[3];
  auto* sessions = reinterpret_cast<uint64_t*>(base + starts[4]);
  auto* sequences = reinterpret_cast<uint64_t*>(base + starts[5]);
  auto* times = reinterpret_cast<uint64_t*>(base + starts[6]);
  auto* tables = reinterpret_cast<uint32_t*>(base + starts[7]);
  auto* checksums = reinterpret_cast<uint64_t*>(base + starts[8]);
  auto* offsets = reinterpret_cast<int32_t*>(base + starts[kPayloadColumn]);
  std::shared_ptr<Buffer> data;
  uint8_t* target = nullptr;
  if (rows == 1 && payload_bytes > 0) {
    data = proposals[0]->payload;
  } else {
    ARROW_ASSIGN_OR_RAISE(data, arrow::AllocateBuffer(payload_bytes));
    target = data->mutable_data();
  }
  int32_t offset = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const ProposalData& proposal = *proposals[static_cast<size_t>(row)];
    groups[row] = group;
    indexes[row] = first_index + static_cast<uint64_t>(row);
    terms[row] = term;
    kinds[row] = proposal.kind;
    sessions[row] = proposal.session;
    sequences[row] = proposal.sequence;
    times[row] = time_us;
    tables[row] = proposal.table;
    checksums[row] = proposal.checksum;
    if (target != nullptr && proposal.size() > 0) {
      std::memcpy(target + offset, proposal.payload->data(), static_cast<size_t>(proposal.size()));
    }
    offset += static_cast<int32_t>(proposal.size());
    offsets[row + 1] = offset;
  }
  std::vector<std::shared_ptr<arrow::ArrayData>> columns;
  columns.reserve(kEntryColumns);
  for (int i = 0; i < kEntryColumns; ++i) {
    const int64_t cells = rows + (i == kPayloadColumn ? 1 : 0);
    std::vector<std::shared_ptr<Buffer>> buffers = {nullptr, arrow::SliceBuffer(fixed, starts[i], cells * kWidths[i])};
    if (i == kPayloadColumn) buffers.push_back(data);
    columns.push_back(arrow::ArrayData::Make(schema->field(i)->type(), rows, std::move(buffers), /*null_count=*/0));
  }
  return RecordBatch::Make(schema, rows, std::move(columns));
}

// The encapsulated IPC message of `batch`, its end filled with zeros to a whole number of 64 bytes.
inline Result<std::shared_ptr<Buffer>> EncodePayload(const RecordBatch& batch) {
  auto options = arrow::ipc::IpcWriteOptions::Defaults();
  options.alignment = kPayloadAlignment;
  arrow::ipc::IpcPayload payload;
  ARROW_RETURN_NOT_OK(arrow::ipc::GetRecordBatchPayload(batch, options, &payload));
  const int64_t size = arrow::ipc::GetPayloadSize(payload, options);
  const int64_t padded = arrow::bit_util::RoundUpToMultipleOf64(size);
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<Buffer> buffer, arrow::AllocateBuffer(padded));
  std::memset(buffer->mutable_data() + size, 0, static_cast<size_t>(padded - size));
  arrow::io::FixedSizeBufferWriter stream(buffer);
  int32_t metadata_length = 0;
  ARROW_RETURN_NOT_OK(arrow::ipc::WriteIpcPayload(payload, options, &stream, &metadata_length));
  ARROW_ASSIGN_OR_RAISE(const int64_t written, stream.Tell());
  if (written != size) return Status::UnknownError("wrote ", written, " bytes where ", size, " were announced");
  return buffer;
}

// Where a flatbuffer table keeps the field of `slot` (0, 1, ...), or 0 when absent. The buffer has passed Arrow's verifier.
inline int64_t FlatbufferField(const uint8_t* base, int64_t table, int slot) {
  int32_t back;
  uint16_t vtable_bytes;
  uint16_t field;
  std::memcpy(&back, base + table, 4);
  const int64_t vtable = table - back;
  std::memcpy(&vtable_bytes, base + vtable, 2);
  if (vtable_bytes < 4 + 2 * slot + 2) return 0;
  std::memcpy(&field, base + vtable + 4 + 2 * slot, 2);
  return field == 0 ? 0 : table + field;
}

inline uint32_t LoadU32(const uint8_t* base, int64_t at) {
  uint32_t value;
  std::memcpy(&value, base + at, 4);
  return value;
}

inline int64_t CountNodes(const arrow::DataType& type) {
  int64_t nodes = 1;
  for (const auto& field : type.fields()) nodes += CountNodes(*field->type());
  return nodes;
}

// Refuses what Arrow's reader would take: compressed bodies (a few KB may unpack to GBs) and surplus columns.
// Message: version 0, header type 1, header 2, body length 3. RecordBatch: length 0, nodes 1, buffers 2, compression 3.
inline Status CheckPayloadHeader(const Buffer& metadata, const Schema& schema) {
  const uint8_t* base = metadata.data();
  const int64_t message = LoadU32(base, 0);
  const int64_t header_at = FlatbufferField(base, message, 2);
  if (header_at == 0) return Status::Invalid("a message without header");
  const int64_t header = header_at + LoadU32(base, header_at);
  if (FlatbufferField(base, header, 3) != 0) return Status::Invalid("a payload with compressed buffers");
  const int64_t nodes_at = FlatbufferField(base, header, 1);
  const int64_t nodes = nodes_at == 0 ? 0 : LoadU32(base, nodes_at + LoadU32(base, nodes_at));
  int64_t expected = 0;
  for (const auto& field : schema.fields()) expected += CountNodes(*field->type());
  if (nodes != expected) {
    return Status::Invalid("a payload of ", nodes, " columns (nested ones counted) where the schema has ", expected);
  }
  return Status::OK();
}

// Inverse of EncodePayload. Zero-copy where `buffer` starts 8-byte aligned, else over one aligned copy of it.
inline Result<std::shared_ptr<RecordBatch>> DecodePayload(std::shared_ptr<Buffer> buffer,
                                                          const std::shared_ptr<Schema>& schema) {
  if (buffer->size() < 8 || buffer->size() % kPayloadAlignment != 0) {
    return Status::Invalid("a payload of ", buffer->size(), " bytes");
  }
  if (buffer->address() % 8 != 0) {
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<Buffer> copy, arrow::AllocateBuffer(buffer->size()));
    std::memcpy(copy->mutable_data(), buffer->data(), static_cast<size_t>(buffer->size()));
    buffer = std::move(copy);
  }
  const int64_t metadata_length = LoadU32(buffer->data(), 4);
  if (LoadU32(buffer->data(), 0) != 0xFFFFFFFFu || metadata_length < 8 || metadata_length > buffer->size() - 8) {
    return Status::Invalid("a payload that is not an encapsulated IPC message");
  }
  auto metadata = arrow::SliceBuffer(buffer, 8, metadata_length);
  auto body = arrow::SliceBuffer(buffer, 8 + metadata_length);
  ARROW_ASSIGN_OR_RAISE(auto message, arrow::ipc::Message::Open(metadata, body));
  if (message->type() != arrow::ipc::MessageType::RECORD_BATCH) return Status::Invalid("a payload without record batch");
  if (message->metadata_version() != arrow::ipc::MetadataVersion::V5) return Status::Invalid("a payload not of IPC V5");
  const int64_t body_length = message->body_length();
  if (body_length < 0 || body_length > body->size() || body->size() - body_length >= kPayloadAlignment) {
    return Status::Invalid("a payload whose body should have ", body_length, " bytes and has ", body->size());
  }
  for (int64_t at = body_length; at < body->size(); ++at) {
    if (body->data()[at] != 0) return Status::Invalid("a payload with bytes after its end");
  }
  ARROW_RETURN_NOT_OK(CheckPayloadHeader(*metadata, *schema));
  arrow::ipc::DictionaryMemo memo;
  ARROW_ASSIGN_OR_RAISE(auto batch, arrow::ipc::ReadRecordBatch(*message, schema, &memo,
                                                                arrow::ipc::IpcReadOptions::Defaults()));
  ARROW_RETURN_NOT_OK(batch->Validate());
  return batch;
}

// The two columns of an EntrySpan: terms (shared with the batch) and payload sizes (new).
inline Status SpanColumns(const RecordBatch& batch, const Entries& e, std::shared_ptr<Buffer>* terms,
                          std::shared_ptr<Buffer>* sizes) {
  const auto& column = *batch.column_data(2);
  *terms = arrow::SliceBuffer(column.buffers[1], column.offset * 8, e.rows * 8);
  ARROW_ASSIGN_OR_RAISE(*sizes, arrow::AllocateBuffer(e.rows * 8));
  auto* out = reinterpret_cast<uint64_t*>((*sizes)->mutable_data());
  for (int64_t row = 0; row < e.rows; ++row) out[row] = static_cast<uint64_t>(e.size(row));
  return Status::OK();
}

inline std::shared_ptr<Buffer> PayloadSlice(const RecordBatch& batch, const Entries& e, int64_t row) {
  const auto& values = batch.column_data(kPayloadColumn)->buffers[2];
  return arrow::SliceBuffer(values, e.offsets[row], e.size(row));
}

// XXH3-64 over the columns index, term, time_us and checksum, one after the other: what the header of a packet adds to the entries' own checksums.
inline uint64_t PlacesChecksum(const Entries& e, uint64_t seed) noexcept {
  XXH3_state_t state;
  XXH3_64bits_reset_withSeed(&state, seed);
  XXH3_64bits_update(&state, e.index, static_cast<size_t>(e.rows) * 8);
  XXH3_64bits_update(&state, e.term, static_cast<size_t>(e.rows) * 8);
  XXH3_64bits_update(&state, e.time_us, static_cast<size_t>(e.rows) * 8);
  XXH3_64bits_update(&state, e.checksum, static_cast<size_t>(e.rows) * 8);
  return XXH3_64bits_digest(&state);
}

// A copy of `batch` in one 64-byte aligned allocation. What Flight hands out starts at any address, so that every payload
// would be copied later, one by one, and a small batch would pin the network buffer it lies in.
inline Result<std::shared_ptr<RecordBatch>> Align(const RecordBatch& batch, const std::shared_ptr<Schema>& schema) {
  int64_t total = 0;
  for (const auto& column : batch.column_data()) {
    if (!column->child_data.empty() || column->dictionary) return Status::Invalid("a nested column");
    for (const auto& buffer : column->buffers) {
      if (buffer) total += arrow::bit_util::RoundUpToMultipleOf64(buffer->size());
    }
  }
  ARROW_ASSIGN_OR_RAISE(std::shared_ptr<Buffer> target, arrow::AllocateBuffer(total));
  int64_t at = 0;
  std::vector<std::shared_ptr<arrow::ArrayData>> columns;
  for (const auto& column : batch.column_data()) {
    auto copy = std::make_shared<arrow::ArrayData>(*column);
    for (auto& buffer : copy->buffers) {
      if (!buffer) continue;
      const int64_t size = buffer->size();
      const int64_t padded = arrow::bit_util::RoundUpToMultipleOf64(size);
      if (size > 0) std::memcpy(target->mutable_data() + at, buffer->data(), static_cast<size_t>(size));
      std::memset(target->mutable_data() + at + size, 0, static_cast<size_t>(padded - size));
      buffer = arrow::SliceBuffer(target, at, size);
      at += padded;
    }
    columns.push_back(std::move(copy));
  }
  return RecordBatch::Make(schema, batch.num_rows(), std::move(columns));
}

// All that a batch from a peer must pass before anyone looks at it; the result is aligned and owns its memory.
inline Result<std::shared_ptr<RecordBatch>> Admit(const RecordBatch& batch, const std::shared_ptr<Schema>& schema,
                                                  int64_t bytes_max, bool snapshot) {
  if (!batch.schema()->Equals(*schema, /*check_metadata=*/false)) return Status::Invalid("not a batch of log entries");
  if (batch.num_rows() == 0) return Status::Invalid("a batch without entries");
  int64_t bytes = 0;
  for (const auto& column : batch.column_data()) {
    for (const auto& buffer : column->buffers) bytes += buffer ? buffer->size() : 0;
  }
  if (bytes > bytes_max) return Status::Invalid("entries of ", bytes, " bytes where ", bytes_max, " are allowed");
  ARROW_ASSIGN_OR_RAISE(auto aligned, Align(batch, schema));
  ARROW_RETURN_NOT_OK(aligned->ValidateFull());
  Entries entries;
  ARROW_RETURN_NOT_OK(OpenEntries(*aligned, *schema, &entries));
  ARROW_RETURN_NOT_OK(snapshot ? CheckSnapshot(entries) : CheckContiguous(entries));
  const int64_t damaged = FirstDamaged(entries);
  if (damaged >= 0) {
    return Status::Invalid("entry ", entries.index[damaged], " of term ", entries.term[damaged], ", group ",
                           entries.group[damaged], " does not match its checksum");
  }
  return aligned;
}

}  // namespace marble
