// What filters are: their type, and the range of keys that some of them say and no more.
//
// Ownership: an expression is borrowed for the length of a call; bounds are copies.
// Thread safety: pure functions, which need no GIL.
// Invariants:
//   1. Where a range is given, a row passes the filter if and only if its key lies in it: every conjunct compares a key
//      column with a constant of its kind (or says how its text begins), and all key columns before it are equal to
//      one. Everything else is left to others.
//   2. Bounds are half open, in the encoding of `KeyCodec`.
#pragma once

#include "key_codec.hpp"
#include "key_value.hpp"

#include <arrow/compute/api_scalar.h>
#include <arrow/compute/expression.h>
#include <arrow/scalar.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

struct KeyBounds {
  std::string lower;
  bool has_upper = false;
  std::string upper;

  void Above(const std::string& key) {
    if (key > lower) lower = key;
  }
  void Below(const std::string& key) {
    if (!has_upper || key < upper) upper = key;
    has_upper = true;
  }
};

// The smallest bytes above all that begin with `prefix`; none if nothing is.
inline std::optional<std::string> PrefixEnd(std::string prefix) {
  while (!prefix.empty() && prefix.back() == '\xff') prefix.pop_back();
  if (prefix.empty()) return std::nullopt;
  prefix.back() = static_cast<char>(static_cast<unsigned char>(prefix.back()) + 1);
  return prefix;
}

class KeyFilter {
 public:
  // False if `filter` is left to others. May throw std::bad_alloc.
  static bool Find(const arrow::compute::Expression& filter, const KeyCodec& codec, KeyBounds* out) {
    KeyFilter found(codec);
    return found.Add(filter, 0) && found.Bound(out);
  }

 private:
  static constexpr int kDepthMax = 100;  // Filters come from strangers.

  enum class Op : uint8_t { kEqual, kLess, kLessEqual, kGreater, kGreaterEqual, kStartsWith };

  // `bytes` encode the constant; of kStartsWith they do not say where the text ends.
  struct Demand {
    size_t column;
    Op op;
    std::string bytes;
  };

  struct Comparison {
    std::string_view function;
    Op op;
    Op turned;  // With the constant on the left.
  };
  static constexpr std::array<Comparison, 5> kComparisons{{{"equal", Op::kEqual, Op::kEqual},
                                                           {"less", Op::kLess, Op::kGreater},
                                                           {"less_equal", Op::kLessEqual, Op::kGreaterEqual},
                                                           {"greater", Op::kGreater, Op::kLess},
                                                           {"greater_equal", Op::kGreaterEqual, Op::kLessEqual}}};

  explicit KeyFilter(const KeyCodec& codec) : codec_(codec) {}

  // Texts and bytes, which Arrow compares with each other, byte by byte.
  static bool IsBytes(arrow::Type::type type) noexcept {
    return type == arrow::Type::BINARY || type == arrow::Type::LARGE_BINARY || type == arrow::Type::STRING ||
           type == arrow::Type::LARGE_STRING;
  }
  arrow::Type::type TypeOf(size_t column) const { return codec_.schema()->field(static_cast<int>(column))->type()->id(); }

  // The key column that an expression is; false if it is none.
  bool ColumnOf(const arrow::compute::Expression& expression, size_t* column) const {
    const arrow::FieldRef* ref = expression.field_ref();
    const std::string* name = ref == nullptr ? nullptr : ref->name();
    const int found = name == nullptr ? -1 : codec_.schema()->GetFieldIndex(*name);
    *column = static_cast<size_t>(std::max(found, 0));
    return found >= 0;
  }

  bool Add(const arrow::compute::Expression& filter, int depth) {
    const auto* call = filter.call();
    if (call == nullptr || depth == kDepthMax) return false;
    const std::string& function = call->function_name;
    if (function == "and_kleene" || function == "and") {
      return std::all_of(call->arguments.begin(), call->arguments.end(),
                         [this, depth](const auto& argument) { return Add(argument, depth + 1); });
    }
    Demand demand{};
    if (function == "starts_with") {
      // Whoever makes an expression by hand may give any function any options.
      if (call->arguments.size() != 1 || call->options == nullptr ||
          std::string_view(call->options->type_name()) != arrow::compute::MatchSubstringOptions::kTypeName ||
          !ColumnOf(call->arguments[0], &demand.column)) {
        return false;
      }
      const auto& options = static_cast<const arrow::compute::MatchSubstringOptions&>(*call->options);
      if (options.ignore_case || !IsBytes(TypeOf(demand.column))) return false;
      demand.op = Op::kStartsWith;
      AppendKeyBytes(options.pattern.data(), options.pattern.size(), &demand.bytes);
      demand.bytes.resize(demand.bytes.size() - 2);
      demands_.push_back(std::move(demand));
      return true;
    }
    for (const Comparison& comparison : kComparisons) {
      if (function != comparison.function || call->arguments.size() != 2) continue;
      const bool turned = call->arguments[0].literal() != nullptr;
      const arrow::Datum* value = call->arguments[turned ? 0 : 1].literal();
      if (value == nullptr || !value->is_scalar() || !ColumnOf(call->arguments[turned ? 1 : 0], &demand.column) ||
          !AppendScalar(demand.column, *value->scalar(), &demand.bytes)) {
        return false;
      }
      demand.op = turned ? comparison.turned : comparison.op;
      demands_.push_back(std::move(demand));
      return true;
    }
    return false;
  }

  // Appends the encoding of a constant of a key column; false if it is not of the column's kind, or does not fit it.
  bool AppendScalar(size_t column, const arrow::Scalar& value, std::string* key) const {
    if (!value.is_valid) return false;
    const arrow::Type::type type = TypeOf(column);
    if (IsBytes(type) && IsBytes(value.type->id())) {
      const auto& bytes = static_cast<const arrow::BaseBinaryScalar&>(value).value;
      AppendKeyBytes(reinterpret_cast<const char*>(bytes->data()), static_cast<size_t>(bytes->size()), key);
      return true;
    }
    bool negative = false;
    uint64_t word = 0;
    if (!WordOfScalar(value, &word, &negative)) return false;
    const int64_t width = codec_.parts()[column].width;
    const auto bits = static_cast<int>(8 * width);
    if (codec_.parts()[column].kind == KeyCodec::Kind::kUnsigned) {
      if (negative || (bits < 64 && word >> bits != 0)) return false;
      AppendKeyWord(word, width, key);
      return true;
    }
    if (!arrow::is_signed_integer(type)) return false;  // Times are encoded so, too, but compare by their unit.
    const auto number = static_cast<int64_t>(word);
    if ((number < 0) != negative || (bits < 64 && (number >> (bits - 1)) != (negative ? -1 : 0))) return false;
    AppendKeyWord(word ^ uint64_t{1} << (bits - 1), width, key);
    return true;
  }

  // The value of an integer, negative ones modulo 2^64.
  static bool WordOfScalar(const arrow::Scalar& value, uint64_t* word, bool* negative) {
    const auto signed_word = [word, negative](int64_t number) {
      *word = static_cast<uint64_t>(number);
      *negative = number < 0;
      return true;
    };
    switch (value.type->id()) {
      case arrow::Type::INT8:
        return signed_word(static_cast<const arrow::Int8Scalar&>(value).value);
      case arrow::Type::INT16:
        return signed_word(static_cast<const arrow::Int16Scalar&>(value).value);
      case arrow::Type::INT32:
        return signed_word(static_cast<const arrow::Int32Scalar&>(value).value);
      case arrow::Type::INT64:
        return signed_word(static_cast<const arrow::Int64Scalar&>(value).value);
      case arrow::Type::UINT8:
        *word = static_cast<const arrow::UInt8Scalar&>(value).value;
        return true;
      case arrow::Type::UINT16:
        *word = static_cast<const arrow::UInt16Scalar&>(value).value;
        return true;
      case arrow::Type::UINT32:
        *word = static_cast<const arrow::UInt32Scalar&>(value).value;
        return true;
      case arrow::Type::UINT64:
        *word = static_cast<const arrow::UInt64Scalar&>(value).value;
        return true;
      default:
        return false;
    }
  }

  // Puts the demands together; false if one is about a column before which another is not equal to a constant.
  bool Bound(KeyBounds* out) const {
    if (demands_.empty()) return false;
    std::string start;
    size_t used = 0;
    for (size_t column = 0; column < codec_.parts().size(); ++column) {
      const Demand* equal = nullptr;
      for (const Demand& demand : demands_) {
        if (demand.column != column) continue;
        ++used;
        Narrow(start, demand, out);
        if (demand.op == Op::kEqual) equal = &demand;
      }
      if (equal == nullptr) break;
      start += equal->bytes;
    }
    return used == demands_.size();
  }

  // Keys that begin with `start`, and whose next column is as demanded.
  static void Narrow(const std::string& start, const Demand& demand, KeyBounds* out) {
    const auto below_all_of = [out](const std::string& prefix) {
      if (const auto end = PrefixEnd(prefix)) out->Below(*end);
    };
    const std::string first = start + demand.bytes;
    out->Above(start);
    below_all_of(start);
    switch (demand.op) {
      case Op::kEqual:
      case Op::kStartsWith:
        out->Above(first);
        below_all_of(first);
        break;
      case Op::kLess:
        out->Below(first);
        break;
      case Op::kLessEqual:
        below_all_of(first);
        break;
      case Op::kGreaterEqual:
        out->Above(first);
        break;
      case Op::kGreater:
        if (const auto end = PrefixEnd(first)) {
          out->Above(*end);
        } else {
          out->Below("");
        }
        break;
    }
  }

  const KeyCodec& codec_;
  std::vector<Demand> demands_;
};

// The type of what an expression gives for each row of `schema`.
inline arrow::Status TypeOfRows(const arrow::compute::Expression& expression, const arrow::Schema& schema,
                                std::shared_ptr<arrow::DataType>* out) noexcept {
  return Guarded([&]() -> arrow::Status {
    ARROW_ASSIGN_OR_RAISE(const auto bound, expression.Bind(schema));
    if (!bound.IsScalarExpression()) return arrow::Status::Invalid("it is not computed row by row");
    *out = bound.type()->GetSharedPtr();
    return arrow::Status::OK();
  });
}

}  // namespace marble
