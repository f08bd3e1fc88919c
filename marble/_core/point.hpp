// One row by its key, between Python's objects and Arrow's arrays without a batch in between.
//
// Ownership: a PointHit keeps a block of a file alive, and borrows from the reader what lies in memtables.
// Thread safety: the functions that take or give a PyObject need the GIL; the others do not, and are pure.
// Invariants:
//   1. A value is given out only in a form equal to that of pyarrow's `as_py`; other types are left to that.
#pragma once

#include <Python.h>

#include "gather.hpp"
#include "key_value.hpp"

#include <arrow/type.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

namespace marble {

// Where a row is. `source` is null where no row has the key. Its columns may be null where PointValue makes objects of the views.
struct PointHit {
  const Source* source = nullptr;
  uint32_t row = 0;
  std::shared_ptr<const void> holder;  // What the source lies in, if that is a block.
};

inline PyObject* NewNone() noexcept {
  Py_INCREF(Py_None);
  return Py_None;
}

template <typename Value>
Value LoadValue(const ColumnView& view, uint32_t row) noexcept {
  Value value;
  std::memcpy(&value, view.values + row * sizeof(Value), sizeof(Value));
  return value;
}

template <typename Offset>
std::string_view BytesOf(const ColumnView& view, uint32_t row) noexcept {
  const auto first = LoadValue<Offset>(view, row);
  const auto end = LoadValue<Offset>(view, row + 1);
  if (first == end) return {"", 0};  // There may be no bytes at all to point to.
  return {reinterpret_cast<const char*>(view.data) + first, static_cast<size_t>(end - first)};
}

// The value in `row` of a column of `type`, as a new reference. Null without a Python error: it is left to others.
inline PyObject* PointValue(const arrow::DataType& type, const Source& source, int column, uint32_t row) noexcept {
  const ColumnView& view = source.views[static_cast<size_t>(column)];
  const auto bit = [&view, row](const uint8_t* bits) { return arrow::bit_util::GetBit(bits, view.offset + row); };
  const auto bytes = [](std::string_view value) {
    return PyBytes_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
  };
  const auto text = [](std::string_view value) {
    return PyUnicode_DecodeUTF8(value.data(), static_cast<Py_ssize_t>(value.size()), nullptr);
  };
  switch (type.id()) {
    case arrow::Type::BOOL:
    case arrow::Type::INT8:
    case arrow::Type::INT16:
    case arrow::Type::INT32:
    case arrow::Type::INT64:
    case arrow::Type::UINT8:
    case arrow::Type::UINT16:
    case arrow::Type::UINT32:
    case arrow::Type::UINT64:
    case arrow::Type::FLOAT:
    case arrow::Type::DOUBLE:
    case arrow::Type::STRING:
    case arrow::Type::BINARY:
    case arrow::Type::LARGE_STRING:
    case arrow::Type::LARGE_BINARY:
    case arrow::Type::FIXED_SIZE_BINARY:
      if (view.validity != nullptr && !bit(view.validity)) return NewNone();
      break;
    default:
      return nullptr;
  }
  switch (type.id()) {
    case arrow::Type::BOOL:
      return PyBool_FromLong(bit(view.values) ? 1 : 0);
    case arrow::Type::INT8:
      return PyLong_FromLong(LoadValue<int8_t>(view, row));
    case arrow::Type::INT16:
      return PyLong_FromLong(LoadValue<int16_t>(view, row));
    case arrow::Type::INT32:
      return PyLong_FromLong(LoadValue<int32_t>(view, row));
    case arrow::Type::INT64:
      return PyLong_FromLongLong(LoadValue<int64_t>(view, row));
    case arrow::Type::UINT8:
      return PyLong_FromUnsignedLong(LoadValue<uint8_t>(view, row));
    case arrow::Type::UINT16:
      return PyLong_FromUnsignedLong(LoadValue<uint16_t>(view, row));
    case arrow::Type::UINT32:
      return PyLong_FromUnsignedLong(LoadValue<uint32_t>(view, row));
    case arrow::Type::UINT64:
      return PyLong_FromUnsignedLongLong(LoadValue<uint64_t>(view, row));
    case arrow::Type::FLOAT:
      return PyFloat_FromDouble(static_cast<double>(LoadValue<float>(view, row)));
    case arrow::Type::DOUBLE:
      return PyFloat_FromDouble(LoadValue<double>(view, row));
    case arrow::Type::STRING:
      return text(BytesOf<int32_t>(view, row));
    case arrow::Type::LARGE_STRING:
      return text(BytesOf<int64_t>(view, row));
    case arrow::Type::BINARY:
      return bytes(BytesOf<int32_t>(view, row));
    case arrow::Type::LARGE_BINARY:
      return bytes(BytesOf<int64_t>(view, row));
    default: {
      const auto width = static_cast<size_t>(type.byte_width());
      return bytes(width == 0 ? std::string_view("", 0)
                              : std::string_view(reinterpret_cast<const char*>(view.values) + row * width, width));
    }
  }
}

// Reads a byte of each page that the row's bytes lie in, so that whoever holds the GIL later waits for no disk. The types are
// those of `schema`: those that the columns name lie elsewhere, and must be fetched from memory for each block.
inline void TouchRow(const arrow::Schema& schema, const PointHit& hit) noexcept {
  constexpr size_t kPage = 4096;
  uint8_t sum = 0;
  const auto touch = [&sum](std::string_view bytes) {
    for (size_t at = 0; at < bytes.size(); at += kPage) sum = static_cast<uint8_t>(sum + bytes[at]);
    if (!bytes.empty()) sum = static_cast<uint8_t>(sum + bytes.back());
  };
  for (size_t i = 0; i < hit.source->views.size(); ++i) {
    const ColumnView& view = hit.source->views[i];
    const arrow::DataType& type = *schema.field(static_cast<int>(i))->type();
    if (view.validity != nullptr) sum = static_cast<uint8_t>(sum + view.validity[(view.offset + hit.row) / 8]);
    switch (type.id()) {
      case arrow::Type::STRING:
      case arrow::Type::BINARY:
        touch(BytesOf<int32_t>(view, hit.row));
        break;
      case arrow::Type::LARGE_STRING:
      case arrow::Type::LARGE_BINARY:
        touch(BytesOf<int64_t>(view, hit.row));
        break;
      case arrow::Type::BOOL:
        sum = static_cast<uint8_t>(sum + view.values[(view.offset + hit.row) / 8]);
        break;
      default:
        if (const int64_t bytes = FixedBits(type) / 8; bytes > 0) {
          const auto* first = reinterpret_cast<const char*>(view.values) + hit.row * bytes;
          touch({first, static_cast<size_t>(bytes)});
        }
    }
  }
  asm volatile("" : : "r"(sum));
}

}  // namespace marble
