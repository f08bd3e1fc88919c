// What a stream brings, looked at before Arrow unpacks it. See _gate.pyx for the rules.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <typeinfo>
#include <utility>

#include "arrow/buffer.h"
#include "arrow/flight/transport.h"
#include "gate_builder.hpp"

namespace marble {

// -- messages ---------------------------------------------------------------------------------------------------------------

// Reads the header of an IPC message: a flatbuffer from a stranger, before Arrow has looked at it. Every access is checked.
class Header {
 public:
  Header(const uint8_t* data, int64_t size) : data_(data), size_(size) {}

  template <typename T>
  bool Load(int64_t at, T* out) const {
    if (at < 0 || at > size_ - static_cast<int64_t>(sizeof(T))) return false;
    std::memcpy(out, data_ + at, sizeof(T));
    return true;
  }

  // Where the field of `slot` stands in the table at `table`; 0 if it is absent, -1 if that cannot be read.
  int64_t Field(int64_t table, int slot) const {
    int32_t back;
    uint16_t vtable_bytes;
    uint16_t field;
    if (!Load(table, &back)) return -1;
    const int64_t vtable = table - back;
    if (!Load(vtable, &vtable_bytes)) return -1;
    if (vtable_bytes < 4 + 2 * slot + 2) return 0;
    if (!Load(vtable + 4 + 2 * slot, &field)) return -1;
    return field == 0 ? 0 : table + field;
  }

  // What the offset at `at` points to; -1 if that cannot be read.
  int64_t Follow(int64_t at) const {
    uint32_t offset;
    return at > 0 && Load(at, &offset) ? at + offset : -1;
  }

  int64_t Root() const {
    uint32_t offset;
    return Load(0, &offset) ? static_cast<int64_t>(offset) : -1;
  }

 private:
  const uint8_t* data_;
  int64_t size_;
};

enum class Kind : uint8_t { kNone = 0, kSchema = 1, kDictionary = 2, kBatch = 3 };

// How many bytes the body of a message takes when it is unpacked; -1 if the header is not one that can be read.
inline int64_t UnpackedBytes(const arrow::Buffer& metadata, const arrow::Buffer* body, Kind* kind) {
  const Header header(metadata.data(), metadata.size());
  const int64_t message = header.Root();
  if (message < 0) return -1;
  const int64_t kind_at = header.Field(message, 1);
  uint8_t number = 0;
  if (kind_at < 0 || (kind_at > 0 && !header.Load(kind_at, &number))) return -1;
  *kind = static_cast<Kind>(number);
  const bool dictionary = *kind == Kind::kDictionary;
  if (!dictionary && *kind != Kind::kBatch) return 0;
  int64_t batch = header.Follow(header.Field(message, 2));
  if (batch >= 0 && dictionary) batch = header.Follow(header.Field(batch, 1));
  if (batch < 0) return -1;
  const int64_t body_bytes = body == nullptr ? 0 : body->size();
  const int64_t compression = header.Field(batch, 3);
  if (compression < 0) return -1;
  if (compression == 0) return body_bytes;
  const int64_t buffers_at = header.Field(batch, 2);
  if (buffers_at == 0) return 0;
  const int64_t buffers = header.Follow(buffers_at);
  uint32_t count;
  if (buffers < 0 || !header.Load(buffers, &count)) return -1;
  int64_t sum = 0;
  for (uint32_t i = 0; i < count; ++i) {
    int64_t offset;
    int64_t length;
    const int64_t at = buffers + 4 + 16 * static_cast<int64_t>(i);
    if (!header.Load(at, &offset) || !header.Load(at + 8, &length)) return -1;
    if (length == 0) continue;
    if (offset < 0 || length < 8 || offset > body_bytes || length > body_bytes - offset) return -1;
    int64_t unpacked;
    std::memcpy(&unpacked, body->data() + offset, 8);
    if (unpacked == -1) unpacked = length - 8;  // a buffer that did not shrink stands there as it is
    if (unpacked < 0 || __builtin_add_overflow(sum, unpacked, &sum)) return -1;
  }
  return sum;
}

// Stands in a call's reader between it and gRPC, and looks at each message before Arrow unpacks it.
class Filter final : public fl::internal::TransportDataStream {
 public:
  Filter(fl::internal::TransportDataStream* inner, GateState* state) : inner_(inner), state_(state) {}

  bool ReadData(fl::internal::FlightData* data) override {
    if (!violation_.empty() || !inner_->ReadData(data)) return false;
    if (data->metadata == nullptr) return true;
    Kind kind = Kind::kNone;
    const int64_t bytes = UnpackedBytes(*data->metadata, data->body.get(), &kind);
    if (bytes < 0) return Refuse("a message whose header cannot be read");
    if (kind == Kind::kSchema && !TakesSchema(data->metadata->size())) return false;
    const bool dictionary = kind == Kind::kDictionary;
    if (dictionary && __builtin_add_overflow(dictionaries_, bytes, &dictionaries_)) return Refuse("dictionaries without end");
    if (bytes > state_->unpacked_bytes_max || dictionaries_ > state_->unpacked_bytes_max) {
      return Refuse("a message that unpacks to " + std::to_string(dictionary ? dictionaries_ : bytes) +
                    " bytes: this node takes " + std::to_string(state_->unpacked_bytes_max) + " at most; send smaller batches");
    }
    return true;
  }

  // Arrow makes several objects of each field, which take many times what stands in the message.
  bool TakesSchema(int64_t bytes) {
    if (bytes <= state_->schema_bytes_max) return true;
    return Refuse("a schema of " + std::to_string(bytes) + " bytes: this node takes " + std::to_string(state_->schema_bytes_max) +
                  " at most; leave out metadata, and columns that no table has");
  }

  const std::string& violation() const { return violation_; }

 private:
  bool Refuse(std::string why) {
    violation_ = std::move(why);
    state_->refused.fetch_add(1);
    return false;
  }

  fl::internal::TransportDataStream* inner_;
  GateState* state_;
  int64_t dictionaries_ = 0;
  std::string violation_;
};

// Where a TransportMessageReader keeps its PeekableFlightDataReader, whose first member is the stream that it reads: the place of
// that pointer, or null if this is not the reader that we know.
inline fl::internal::TransportDataStream** FindStream(fl::FlightMessageReader* reader) {
  if (std::strstr(typeid(*reader).name(), "TransportMessageReader") == nullptr) return nullptr;
  char* start = reinterpret_cast<char*>(reader);
  if (reinterpret_cast<const char*>(&reader->descriptor()) != start + sizeof(void*)) return nullptr;
  char* peekable;
  void* stream;
  void* vtable;
  if (!Peek(start + sizeof(void*) + sizeof(fl::FlightDescriptor), &peekable) || !Peek(peekable, &stream)) return nullptr;
  if (!Peek(stream, &vtable) || !InFlightLibrary(vtable)) return nullptr;
  if (std::strstr(typeid(*static_cast<fl::internal::TransportDataStream*>(stream)).name(), "DataStream") == nullptr) return nullptr;
  return reinterpret_cast<fl::internal::TransportDataStream**>(peekable);
}

// Arrow's PeekableFlightDataReader.
struct PeekableMirror {
  void* stream;
  void* descriptor;
  void* metadata[2];  // a shared_ptr<Buffer>, and so the next two
  void* app_metadata[2];
  void* body[2];
  bool finished;
  bool valid;
};

// The bytes of the header of a call's first message, which Arrow has read already for its descriptor, so that no filter sees it. If it
// has a header, that is the schema, of which Arrow has made fields: what can be done is to end the call, which frees them. 0 if it
// has none; -1 if this is not laid out as we know.
inline int64_t FirstHeaderBytes(const void* peekable) {
  PeekableMirror seen;
  if (!Peek(peekable, &seen)) return -1;
  if (seen.finished || seen.metadata[0] == nullptr) return 0;
  static const arrow::Buffer known(nullptr, 0);
  void* vtable;
  if (!Peek(seen.metadata[0], &vtable)) return -1;
  if (vtable != *reinterpret_cast<void* const*>(&known) && !InFlightLibrary(vtable)) return -1;
  return static_cast<const arrow::Buffer*>(seen.metadata[0])->size();
}

}  // namespace marble
