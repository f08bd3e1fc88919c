// One value of a key, from Python or out of a filter, as the bytes that `KeyCodec` makes of it: without an array.
//
// Ownership: keys are appended to strings of the caller.
// Thread safety: the functions that take a PyObject need the GIL; the others do not, and are pure.
// Invariants:
//   1. A key is encoded here only if `KeyCodec` would encode the array that pyarrow makes of it to the same bytes;
//      everything else is left to that, with its conversions and its errors.
//      Then the values are equal to those of the row that has the key, and may stand for them.
//   2. No Python error is left set by what is left to others.
#pragma once

#include <Python.h>

#include "key_codec.hpp"

#include <arrow/type.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

namespace marble {

// The type that all items of a list or a tuple have, borrowed; null if they have several, or there are none.
//
// Whoever looks values up by many keys mostly has these from somewhere else in memory. Items are asked for well ahead of being
// looked at, and are at hand for those who read them next.
inline PyObject* TypeOfAll(PyObject* values) noexcept {
  constexpr Py_ssize_t kAhead = 32;
  constexpr ptrdiff_t kLine = 64;
  PyObject** items = PySequence_Fast_ITEMS(values);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(values);
  const auto fetch = [items](Py_ssize_t i) {
    const auto* at = reinterpret_cast<const char*>(items[i]);
    __builtin_prefetch(at);
    __builtin_prefetch(at + kLine - 1);
  };
  for (Py_ssize_t i = 0; i < std::min(kAhead, size); ++i) fetch(i);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (i + kAhead < size) fetch(i + kAhead);
    if (Py_TYPE(items[i]) != Py_TYPE(items[0])) return nullptr;
  }
  return size == 0 ? nullptr : reinterpret_cast<PyObject*>(Py_TYPE(items[0]));
}

// Appends what KeyCodec makes of bytes.
inline void AppendKeyBytes(const char* data, size_t size, std::string* key) {
  for (size_t at = 0; at < size;) {
    const void* zero = std::memchr(data + at, 0, size - at);
    const size_t end = zero == nullptr ? size : static_cast<size_t>(static_cast<const char*>(zero) - data) + 1;
    key->append(data + at, end - at);
    if (zero != nullptr) key->push_back('\xff');
    at = end;
  }
  key->append(2, '\0');
}

inline void AppendKeyWord(uint64_t word, int64_t width, std::string* key) {
  word = __builtin_bswap64(word << (64 - 8 * width));
  key->append(reinterpret_cast<const char*>(&word), static_cast<size_t>(width));
}

// Appends the encoding of one value of a key; false if that is left to others. May throw std::bad_alloc.
inline bool AppendKeyPart(const KeyCodec::Part& part, arrow::Type::type type, PyObject* value, std::string* key) {
  switch (type) {
    case arrow::Type::BINARY:
    case arrow::Type::LARGE_BINARY:
      if (!PyBytes_CheckExact(value)) return false;
      AppendKeyBytes(PyBytes_AS_STRING(value), static_cast<size_t>(PyBytes_GET_SIZE(value)), key);
      return true;
    case arrow::Type::FIXED_SIZE_BINARY:
      if (!PyBytes_CheckExact(value) || PyBytes_GET_SIZE(value) != part.width) return false;
      key->append(PyBytes_AS_STRING(value), static_cast<size_t>(part.width));
      return true;
    case arrow::Type::STRING:
    case arrow::Type::LARGE_STRING: {
      if (!PyUnicode_CheckExact(value)) return false;
      Py_ssize_t size = 0;
      const char* data = PyUnicode_AsUTF8AndSize(value, &size);
      if (data == nullptr) {
        PyErr_Clear();
        return false;
      }
      AppendKeyBytes(data, static_cast<size_t>(size), key);
      return true;
    }
    case arrow::Type::INT8:
    case arrow::Type::INT16:
    case arrow::Type::INT32:
    case arrow::Type::INT64: {
      if (!PyLong_CheckExact(value)) return false;
      int overflow = 0;
      const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
      const auto bits = static_cast<int>(8 * part.width);
      if (overflow != 0 || (bits < 64 && (number >> (bits - 1)) != (number < 0 ? -1 : 0))) return false;
      AppendKeyWord(static_cast<uint64_t>(number) ^ uint64_t{1} << (bits - 1), part.width, key);
      return true;
    }
    case arrow::Type::UINT8:
    case arrow::Type::UINT16:
    case arrow::Type::UINT32:
    case arrow::Type::UINT64: {
      if (!PyLong_CheckExact(value)) return false;
      const unsigned long long number = PyLong_AsUnsignedLongLong(value);
      if (number == std::numeric_limits<unsigned long long>::max() && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
      if (part.width < 8 && number >> (8 * part.width) != 0) return false;
      AppendKeyWord(number, part.width, key);
      return true;
    }
    case arrow::Type::BOOL:
      if (value != Py_True && value != Py_False) return false;
      key->push_back(value == Py_True ? 1 : 0);
      return true;
    default:
      return false;
  }
}

// The encoding of a tuple of values of the key's first columns; false if that is left to others. May throw
// std::bad_alloc.
inline bool EncodeKeyStart(const KeyCodec& codec, PyObject* values, std::string* key) {
  const std::vector<KeyCodec::Part>& parts = codec.parts();
  const auto count = static_cast<size_t>(PyTuple_GET_SIZE(values));
  if (count > parts.size()) return false;
  key->clear();
  for (size_t i = 0; i < count; ++i) {
    const arrow::Type::type type = codec.schema()->field(static_cast<int>(i))->type()->id();
    if (!AppendKeyPart(parts[i], type, PyTuple_GET_ITEM(values, static_cast<Py_ssize_t>(i)), key)) return false;
  }
  return true;
}

// The encoding of a tuple of all of the key's values; false if that is left to others. May throw std::bad_alloc.
inline bool EncodeKey(const KeyCodec& codec, PyObject* values, std::string* key) {
  return PyTuple_GET_SIZE(values) == static_cast<Py_ssize_t>(codec.parts().size()) && EncodeKeyStart(codec, values, key);
}

}  // namespace marble
