// What a file's index knows of the parts of its blocks, and which of them have been found sound.
//
// Layout: sstable_format.hpp. Blocks with parts follow each other in both tables: a checksum for each part, a word for each
// `step` rows.
// Ownership: borrows the mapping. Thread safety: immutable but for the memo, of which each bit may be set by any thread at
// any time; it says nothing about other memory, since a mapping does not change.
// Invariants:
//   1. A part's bit is set only after its checksum was found right in this mapping.
#pragma once

#include "gather.hpp"
#include "sstable_format.hpp"

#include <arrow/type.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace marble {

// How the rows of a column lie in its buffers, where each row lies in one place of each.
struct FlatColumn {
  enum class Kind : uint8_t { kBits, kFixed, kNarrow, kLarge };
  Kind kind;
  int64_t width;    // Bytes from row to row: of values, or of offsets.
  size_t buffers;   // Validity, values or offsets, and the bytes behind offsets.
  bool is_text;     // Must be UTF-8.
  bool has_range;   // Not every number of that width is a value.
  bool is_plain;    // PointValue makes objects of it.
  bool in_key;

  // What the second buffer must have for so many rows.
  uint64_t BytesFor(uint64_t rows) const noexcept {
    if (kind == Kind::kBits) return (rows + 7) / 8;
    return (kind == Kind::kFixed ? rows : rows + 1) * static_cast<uint64_t>(width);
  }
};

// Sets `out`; false if the type is none of these.
inline bool DescribeFlat(const arrow::DataType& type, FlatColumn* out) noexcept {
  const auto id = type.id();
  const int64_t bits = FixedBits(type);
  *out = {FlatColumn::Kind::kFixed, bits / 8, 2, false, false, true, false};
  if (arrow::is_base_binary_like(id)) {
    const bool narrow = arrow::is_binary_like(id);
    out->kind = narrow ? FlatColumn::Kind::kNarrow : FlatColumn::Kind::kLarge;
    out->width = narrow ? 4 : 8;
    out->buffers = 3;
    out->is_text = id == arrow::Type::STRING || id == arrow::Type::LARGE_STRING;
    return true;
  }
  if (id == arrow::Type::BOOL) {
    out->kind = FlatColumn::Kind::kBits;
    return true;
  }
  out->has_range = arrow::is_decimal(id) || id == arrow::Type::DATE64 || arrow::is_time(id);
  out->is_plain = arrow::is_integer(id) || id == arrow::Type::FLOAT || id == arrow::Type::DOUBLE ||
                  id == arrow::Type::FIXED_SIZE_BINARY;
  return id == arrow::Type::FIXED_SIZE_BINARY || (bits > 0 && bits % 8 == 0);
}

// The columns of a file's schema, none if any of them has rows that lie elsewhere: in children, say.
inline std::vector<FlatColumn> DescribeFlat(const arrow::Schema& schema, const std::vector<int>& key) {
  std::vector<FlatColumn> columns(static_cast<size_t>(schema.num_fields()));
  for (size_t i = 0; i < columns.size(); ++i) {
    if (!DescribeFlat(*schema.field(static_cast<int>(i))->type(), &columns[i])) return {};
  }
  for (const int column : key) columns[static_cast<size_t>(column)].in_key = true;
  return columns;
}

class FileParts {
 public:
  // A block is read as a whole once so many rows of it were read alone: then its parts are no advantage any more.
  static constexpr uint8_t kVisits = 32;

  // `checksums` and `words` are the index's tables of so many entries; false if they are not those of `blocks`.
  bool Set(std::span<const BlockEntry> blocks, std::span<const uint32_t> checksums, std::span<const uint64_t> words) {
    uint64_t part = 0;
    uint64_t word = 0;
    for (const BlockEntry& block : blocks) {
      first_.push_back({part, word});
      part += PartsOf(block);
      word += WordsOf(block);
    }
    checksums_ = checksums;
    words_ = words;
    checked_ = std::make_unique<std::atomic<uint64_t>[]>(part / 64 + 1);
    visits_ = std::make_unique<std::atomic<uint8_t>[]>(blocks.size());
    return part == checksums.size() && word == words.size();
  }

  std::span<const uint64_t> Words(size_t i, const BlockEntry& block) const noexcept {
    return words_.subspan(first_[i].word, WordsOf(block));
  }

  // Whether bytes [first, first + size) of block `i`, which begins at `bytes`, are sound: all parts that they lie in.
  bool Check(size_t i, const BlockEntry& block, const uint8_t* bytes, uint64_t first, uint64_t size) const noexcept {
    for (uint64_t part = first / kPartBytes; part * kPartBytes < first + size; ++part) {
      const uint64_t number = first_[i].part + part;
      std::atomic<uint64_t>& memo = checked_[number / 64];
      const uint64_t bit = uint64_t{1} << number % 64;
      if ((memo.load(std::memory_order_relaxed) & bit) != 0) continue;
      if (PartChecksum(bytes, block.bytes, part) != checksums_[number]) return false;
      memo.fetch_or(bit, std::memory_order_relaxed);
    }
    return true;
  }

  // Whether all checksums of block `i` are right, whatever was found before.
  bool CheckAll(size_t i, const BlockEntry& block, const uint8_t* bytes) const noexcept {
    for (uint64_t part = 0; part < PartsOf(block); ++part) {
      if (PartChecksum(bytes, block.bytes, part) != checksums_[first_[i].part + part]) return false;
    }
    return true;
  }

  // Counts a row that is read alone; false each time that so many were.
  bool Visit(size_t i) const noexcept {
    const uint8_t seen = visits_[i].load(std::memory_order_relaxed);  // Approximately, if threads meet.
    visits_[i].store(seen < kVisits ? static_cast<uint8_t>(seen + 1) : uint8_t{0}, std::memory_order_relaxed);
    return seen < kVisits;
  }

  // Has what Words and Check need of block `i` fetched from memory.
  void Prefetch(size_t i) const noexcept {
    __builtin_prefetch(words_.data() + first_[i].word);
    __builtin_prefetch(checksums_.data() + first_[i].part);
    __builtin_prefetch(&checked_[first_[i].part / 64]);
  }
  // Has the byte at `at` of a block fetched, and with it all of its part if that is still to be checked.
  void PrefetchPart(size_t i, const BlockEntry& block, const uint8_t* bytes, uint64_t at) const noexcept {
    constexpr uint64_t kLine = 64;
    if (at >= block.bytes) return;
    const uint64_t number = first_[i].part + at / kPartBytes;
    __builtin_prefetch(bytes + at);
    if ((checked_[number / 64].load(std::memory_order_relaxed) >> number % 64 & 1) != 0) return;
    const uint64_t first = at / kPartBytes * kPartBytes;
    const uint64_t end = std::min(first + kPartBytes, block.bytes);
    for (uint64_t line = first; line < end; line += kLine) __builtin_prefetch(bytes + line);
  }

 private:
  struct First {
    uint64_t part, word;
  };
  std::vector<First> first_;  // Of each block.
  std::span<const uint32_t> checksums_;
  std::span<const uint64_t> words_;
  std::unique_ptr<std::atomic<uint64_t>[]> checked_;  // A bit for each part.
  std::unique_ptr<std::atomic<uint8_t>[]> visits_;    // Of each block.
};

}  // namespace marble
