// What is said of stored bytes that are not what was written: a status of its own, which names the file and the place.
//
// Ownership: plain values. Thread safety: immutable.
#pragma once

#include <arrow/status.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace marble {

// Where stored bytes are not what was written.
class DamageDetail : public arrow::StatusDetail {
 public:
  static constexpr const char* kId = "marble::DamageDetail";
  DamageDetail(std::string file, uint64_t offset) : file_(std::move(file)), offset_(offset) {}
  const char* type_id() const override { return kId; }
  std::string ToString() const override { return file_ + ", offset " + std::to_string(offset_); }
  const std::string& file() const noexcept { return file_; }
  uint64_t offset() const noexcept { return offset_; }

 private:
  std::string file_;
  uint64_t offset_;
};

template <typename... Words>
arrow::Status Damaged(const std::string& file, uint64_t offset, Words&&... words) {
  return arrow::Status(arrow::StatusCode::IOError, arrow::internal::JoinToString(std::forward<Words>(words)...),
                       std::make_shared<DamageDetail>(file, offset));
}

// The detail of a status that Damaged made, else null.
inline const DamageDetail* DamageOf(const arrow::Status& status) noexcept {
  const auto* detail = status.detail().get();
  // By name: the class exists once in each of our modules.
  return detail != nullptr && std::string_view(detail->type_id()) == DamageDetail::kId
             ? static_cast<const DamageDetail*>(detail)
             : nullptr;
}

}  // namespace marble
