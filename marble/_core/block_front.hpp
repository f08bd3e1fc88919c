// The front of a block: where its message says that the buffers of its columns lie.
//
// Layout: an Arrow IPC message, its metadata a flatbuffer (RecordBatch). Only blocks with parts are read so (file_parts.hpp).
// Ownership: borrows the file; what was read is remembered there. Thread safety: any thread.
// Invariants:
//   1. The front is interpreted only after the checksums of its parts were found right, and by a reader that goes nowhere
//      outside of it: nobody has verified the flatbuffer.
//   2. What ReadPlaces gives was compared with the block: buffers lie within its body and have what so many rows need.
#pragma once

#include "sstable.hpp"

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

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

class BlockFront {
 public:
  // Where the buffers of all columns of block `i` lie, in the table's order and our own two behind them. Read at the first
  // time, and remembered by the file.
  static arrow::Result<const ColumnPlace*> Places(const TableFile& file, size_t i) {
    const ColumnPlace* known = file.parts()[i].places.load(std::memory_order_acquire);
    if (known != nullptr) return known;
    return BlockFront(file, i).Read();
  }

 private:
  BlockFront(const TableFile& file, size_t i)
      : file_(file), number_(i), entry_(file.entry(i)), bytes_(file.parts()[i].bytes), columns_(file.flat_columns().size()) {}

  template <typename... Words>
  arrow::Status Wrong(Words&&... words) const {
    return Damaged(file_.name(), entry_.offset, "block ", number_, " cannot be read: ", std::forward<Words>(words)...);
  }

  arrow::Result<const ColumnPlace*> Read() {
    ARROW_RETURN_NOT_OK(file_.CheckParts(number_, 0, entry_.metadata_bytes));
    if (reinterpret_cast<uintptr_t>(bytes_ + entry_.metadata_bytes) % 8 != 0) return Wrong("its body lies askew");
    CarefulReader flat(bytes_ + kMessagePrefixBytes, entry_.metadata_bytes - kMessagePrefixBytes);
    const uint64_t message = flat.Follow(0);
    const uint64_t version = flat.Field(message, 0);
    const uint64_t kind = flat.Field(message, 1);
    const uint64_t header = flat.Field(message, 2);
    if (version == 0 || flat.Load<int16_t>(version) != 4 || kind == 0 || flat.Load<uint8_t>(kind) != 3 || header == 0) {
      return Wrong("not a record batch");
    }
    const uint64_t batch = flat.Follow(header);
    const uint64_t length = flat.Field(batch, 0);
    const uint64_t node_field = flat.Field(batch, 1);
    const uint64_t buffer_field = flat.Field(batch, 2);
    if (length == 0 || flat.Load<int64_t>(length) != int64_t{entry_.rows} || node_field == 0 || buffer_field == 0 ||
        flat.Field(batch, 3) != 0) {
      return Wrong("another number of rows, or compressed");
    }
    size_t buffers_of_all = 0;
    for (const FlatColumn& column : file_.flat_columns()) buffers_of_all += column.buffers;
    const uint64_t nodes = flat.Follow(node_field);
    const uint64_t buffers = flat.Follow(buffer_field);
    if (flat.Load<uint32_t>(nodes) != columns_ || flat.Load<uint32_t>(buffers) != buffers_of_all) {
      return Wrong("another number of columns");
    }
    auto places = MakePlaces(columns_);
    uint64_t buffer = buffers + 4;
    for (size_t column = 0; column < columns_; ++column) {
      const uint64_t node = nodes + 4 + 16 * column;
      const auto rows = flat.Load<int64_t>(node);
      const auto nulls = flat.Load<int64_t>(node + 8);
      ARROW_RETURN_NOT_OK(ReadColumn(&flat, column, rows, nulls, &buffer, &places[column]));
    }
    if (!flat.sound()) return Wrong("its front is cut short");
    return FileParts::Remember(file_.parts()[number_], std::move(places));
  }

  arrow::Status ReadColumn(CarefulReader* flat, size_t column, int64_t length, int64_t nulls, uint64_t* at,
                           ColumnPlace* out) const {
    const FlatColumn& how = file_.flat_columns()[column];
    const uint64_t room = entry_.bytes - entry_.metadata_bytes;
    uint64_t places[3] = {0, 0, 0};
    uint64_t sizes[3] = {0, 0, 0};
    for (size_t i = 0; i < how.buffers; ++i, *at += 16) {
      const auto offset = flat->Load<uint64_t>(*at);
      sizes[i] = flat->Load<uint64_t>(*at + 8);
      if (offset > room || sizes[i] > room - offset || offset % 8 != 0) return Wrong("a buffer lies outside of it");
      places[i] = entry_.metadata_bytes + offset;
    }
    const uint64_t rows = entry_.rows;
    const bool own = column + 2 >= columns_;
    if (length != static_cast<int64_t>(rows) || nulls > length || (nulls != 0 && (own || how.in_key)) ||
        (nulls != 0 && sizes[0] < (rows + 7) / 8) || sizes[1] < how.BytesFor(rows)) {
      return Wrong("column ", column, " has another number of rows");
    }
    // A block with parts is smaller than 4 GiB.
    *out = {nulls == 0 ? 0 : static_cast<uint32_t>(places[0]), static_cast<uint32_t>(places[1]),
            static_cast<uint32_t>(places[2]), static_cast<uint32_t>(sizes[2])};
    return arrow::Status::OK();
  }

  const TableFile& file_;
  const size_t number_;
  const BlockEntry& entry_;
  const uint8_t* const bytes_;
  const size_t columns_;
};

}  // namespace marble
