// What a filter demands of single columns: its conjuncts that compare a column with a constant.
//
// A filter comes as the bytes that pyarrow pickles an expression as; Arrow reads them back. Conjuncts of any other form
// are left out, so what is found here is necessary for a row to pass, not sufficient.
// Ownership: values are copies. Thread safety: pure functions.
#pragma once

#include "key_codec.hpp"

#include <arrow/array/array_base.h>
#include <arrow/buffer.h>
#include <arrow/compute/api_scalar.h>
#include <arrow/compute/expression.h>
#include <arrow/scalar.h>

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

// `column` `op` `value`; op is one of ==, <, <=, >, >=, in, starts_with. `in` has `values`, not all null.
struct Conjunct {
  std::string column;
  std::string op;
  std::shared_ptr<arrow::Scalar> value;
  std::shared_ptr<arrow::Array> values;
};

class ConjunctFinder {
 public:
  static arrow::Status Find(std::shared_ptr<arrow::Buffer> filter, std::vector<Conjunct>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      ARROW_ASSIGN_OR_RAISE(const auto expression, arrow::compute::Deserialize(std::move(filter)));
      Add(expression, 0, out);
      return arrow::Status::OK();
    });
  }

 private:
  static constexpr int kDepthMax = 1000;  // Filters come from strangers: deeper down they are left alone.

  struct Comparison {
    std::string_view function;
    const char* op;
    const char* turned;  // With the constant on the left.
  };
  static constexpr std::array<Comparison, 5> kComparisons{{{"equal", "==", "=="},
                                                           {"less", "<", ">"},
                                                           {"less_equal", "<=", ">="},
                                                           {"greater", ">", "<"},
                                                           {"greater_equal", ">=", "<="}}};

  static const std::string* NameOf(const arrow::compute::Expression& expression) {
    const arrow::FieldRef* ref = expression.field_ref();
    return ref == nullptr ? nullptr : ref->name();
  }

  static std::shared_ptr<arrow::Scalar> ValueOf(const arrow::compute::Expression& expression) {
    const arrow::Datum* datum = expression.literal();
    return datum == nullptr || !datum->is_scalar() || !datum->scalar()->is_valid ? nullptr : datum->scalar();
  }

  static void Add(const arrow::compute::Expression& expression, int depth, std::vector<Conjunct>* out) {
    const auto* call = expression.call();
    if (call == nullptr || depth == kDepthMax) return;
    const std::string& function = call->function_name;
    if (function == "and_kleene" || function == "and") {
      for (const auto& argument : call->arguments) Add(argument, depth + 1, out);
      return;
    }
    for (const Comparison& comparison : kComparisons) {
      if (function != comparison.function || call->arguments.size() != 2) continue;
      for (const int left : {0, 1}) {
        const std::string* name = NameOf(call->arguments[static_cast<size_t>(left)]);
        auto value = ValueOf(call->arguments[static_cast<size_t>(1 - left)]);
        if (name == nullptr || value == nullptr) continue;
        out->push_back({*name, left == 0 ? comparison.op : comparison.turned, std::move(value), nullptr});
      }
      return;
    }
    if (call->arguments.size() != 1 || call->options == nullptr) return;
    const std::string* name = NameOf(call->arguments[0]);
    if (name == nullptr) return;
    // Whoever makes an expression by hand may give any function any options.
    const std::string_view options_type = call->options->type_name();
    if (function == "is_in" && options_type == arrow::compute::SetLookupOptions::kTypeName) {
      const auto& options = static_cast<const arrow::compute::SetLookupOptions&>(*call->options);
      if (!options.value_set.is_array()) return;
      out->push_back({*name, "in", nullptr, options.value_set.make_array()});
    } else if (function == "starts_with" && options_type == arrow::compute::MatchSubstringOptions::kTypeName) {
      const auto& options = static_cast<const arrow::compute::MatchSubstringOptions&>(*call->options);
      if (options.ignore_case) return;
      out->push_back({*name, "starts_with", std::make_shared<arrow::StringScalar>(options.pattern), nullptr});
    }
  }
};

}  // namespace marble
