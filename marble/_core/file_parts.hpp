// What a file's index knows of the parts of its blocks, which of them have been found sound, and what their fronts say.
//
// Layout: sstable_format.hpp. Blocks with parts follow each other in both tables: a checksum for each part, a word for each
// `step` rows. Of each block two cache lines are kept (BlockParts): all that is needed of the index to look a key up in it,
// so that nobody goes through the index's own tables for each key.
// Ownership: borrows the mapping; owns what it remembers. Thread safety: immutable but for the memos, which any thread may
// set at any time: a bit for each part, and where a block's buffers lie. They say nothing about other memory, since a mapping
// does not change.
// Invariants:
//   1. A part's bit is set only after its checksum was found right in this mapping.
//   2. Where the buffers of a block lie is remembered only as it was read from its front after that was found sound, and
//      compared with the block's bounds. What is remembered stays as it is while the file is there.
#pragma once

#include "gather.hpp"
#include "key_sort.hpp"
#include "sstable_format.hpp"

#include <arrow/type.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <string_view>
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

// Where the buffers of a column lie in their block, in bytes from its beginning.
struct ColumnPlace {
  uint32_t validity = 0;  // 0, where the front lies: no row is null.
  uint32_t values = 0;    // Or offsets.
  uint32_t data = 0;      // Behind offsets,
  uint32_t data_bytes = 0;
};

// Cache lines to be fetched from memory. They are asked for one right behind the other: each may have to wait until it is known
// in which page of memory it lies, and the processor finds that out for several of them at a time only if there is nothing
// else to do in between.
class Fetches {
 public:
  void Add(const void* at) noexcept {
    lines_[count_++] = at;
    if (count_ == kMost) Run();
  }
  void Run() noexcept {
    for (size_t i = 0; i < count_; ++i) __builtin_prefetch(lines_[i]);
    count_ = 0;
  }

 private:
  static constexpr size_t kMost = 512;
  size_t count_ = 0;
  const void* lines_[kMost];
};

// Those of all columns of a block. They begin with a cache line, which mostly is all of them.
struct FreePlaces {
  void operator()(const ColumnPlace* places) const noexcept {
    ::operator delete[](const_cast<ColumnPlace*>(places), std::align_val_t{64});
  }
};
using ColumnPlaces = std::unique_ptr<ColumnPlace[], FreePlaces>;

inline ColumnPlaces MakePlaces(size_t columns) {
  return ColumnPlaces(new (std::align_val_t{64}) ColumnPlace[columns]);
}

// What looking keys up needs to know of a block: what changes never, and what is found out about it.
struct alignas(64) BlockParts {
  static constexpr size_t kTops = 8;

  const uint8_t* bytes = nullptr;  // Of the block, in the mapping.
  uint64_t part = 0;               // Its first one among all parts of the file,
  uint64_t word = 0;               // and its first word.
  uint32_t size = 0;               // Bytes of the block,
  uint32_t rows = 0;
  uint32_t step = 0;               // 0: rows of it cannot be read alone.
  uint32_t words = 0;
  uint32_t skip = 0;               // So many bytes all its keys begin with; words are those behind them.
  bool tombstones = false;         // Whether there is one.
  mutable std::atomic<uint8_t> visits{0};
  mutable std::atomic<const ColumnPlace*> places{nullptr};  // Of its columns, once somebody has read the front.
  // The words at 1/9, 2/9, ... of all: between which of them a key lies says in which line of the index to look.
  uint64_t tops[kTops] = {};

  // Which of the words stands at i/9; `tops` has those for 1 to 8, Top(kTops + 1) is behind all of them.
  size_t Top(size_t i) const noexcept { return i * words / (kTops + 1); }
  // How many of `tops` are below `word`: [Top(i), Top(i + 1)] has the first word that is not.
  size_t CountBelow(uint64_t word) const noexcept {
    size_t below = 0;
    for (const uint64_t top : tops) below += top < word ? 1 : 0;
    return below;
  }
};
static_assert(sizeof(BlockParts) == 128);

class FileParts {
 public:
  // A block is read as a whole once so many rows of it were read alone: so many readings of a whole block save about what it
  // costs to make one, if they follow each other soon.
  static constexpr uint8_t kVisits = 96;

  FileParts() = default;
  FileParts(const FileParts&) = delete;
  FileParts& operator=(const FileParts&) = delete;
  ~FileParts() {
    for (size_t i = 0; i < count_; ++i) FreePlaces()(blocks_[i].places.load(std::memory_order_relaxed));
  }

  // `checksums` and `words` are the index's tables of so many entries; false if they are not those of `blocks`, which lie in
  // `file` and have their first and last keys in `keys`.
  bool Set(const uint8_t* file, std::span<const BlockEntry> blocks, const char* keys, std::span<const uint32_t> checksums,
           std::span<const uint64_t> words) {
    uint64_t parts = 0;
    uint64_t steps = 0;
    for (const BlockEntry& entry : blocks) {
      parts += PartsOf(entry);
      steps += WordsOf(entry);
    }
    if (parts != checksums.size() || steps != words.size()) return false;
    checksums_ = checksums;
    words_ = words;
    checked_ = std::make_unique<std::atomic<uint64_t>[]>(parts / 64 + 1);
    blocks_ = std::make_unique<BlockParts[]>(blocks.size());
    count_ = blocks.size();
    parts = steps = 0;
    for (size_t i = 0; i < count_; ++i) {
      blocks_[i].part = parts;
      blocks_[i].word = steps;
      SetBlock(file, blocks[i], keys, words.subspan(steps, WordsOf(blocks[i])), &blocks_[i]);
      parts += PartsOf(blocks[i]);
      steps += WordsOf(blocks[i]);
    }
    return true;
  }

  const BlockParts& operator[](size_t i) const noexcept { return blocks_[i]; }

  std::span<const uint64_t> Words(const BlockParts& block) const noexcept {
    return words_.subspan(block.word, block.words);
  }

  // Whether bytes [first, first + size) of a block are sound: all parts that they lie in.
  bool Check(const BlockParts& block, uint64_t first, uint64_t size) const noexcept {
    for (uint64_t part = first / kPartBytes; part * kPartBytes < first + size; ++part) {
      const uint64_t number = block.part + part;
      if (!IsChecked(number) && !CheckPart(block, part)) return false;
    }
    return true;
  }

  // Whether all checksums of a block are right, whatever was found before.
  bool CheckAll(const BlockParts& block) const noexcept {
    for (uint64_t part = 0; part * kPartBytes < block.size; ++part) {
      if (PartChecksum(block.bytes, block.size, part) != checksums_[block.part + part]) return false;
    }
    return true;
  }

  // Counts a row that is read alone; false each time that so many were.
  static bool Visit(const BlockParts& block) noexcept {
    const uint8_t seen = block.visits.load(std::memory_order_relaxed);  // Approximately, if threads meet.
    block.visits.store(seen < kVisits ? static_cast<uint8_t>(seen + 1) : uint8_t{0}, std::memory_order_relaxed);
    return seen < kVisits;
  }

  // Keeps `places`, of all columns of a block. Returns those that are kept: another thread may have been faster.
  static const ColumnPlace* Remember(const BlockParts& block, ColumnPlaces places) noexcept {
    const ColumnPlace* there = nullptr;
    if (!block.places.compare_exchange_strong(there, places.get(), std::memory_order_acq_rel)) return there;
    return places.release();
  }

  // Sets [first, end) to the rows of a block that a key of its range with this word may be in.
  void Locate(const BlockParts& block, uint64_t word, int64_t* first, int64_t* end) const noexcept {
    const std::span<const uint64_t> words = Words(block);
    const size_t top = block.CountBelow(word);
    const size_t above = LowerBoundWord(words.data(), block.Top(top), block.Top(top + 1), word);
    size_t behind = above;
    while (behind < words.size() && words[behind] == word) ++behind;
    *first = above == 0 ? 0 : static_cast<int64_t>(above - 1) * block.step;
    *end = std::min<int64_t>(static_cast<int64_t>(behind) * block.step, block.rows);
  }

  // Has fetched from memory what the others need of block `i`, in this order:
  void Prefetch(size_t i) const noexcept {
    __builtin_prefetch(&blocks_[i]);
    __builtin_prefetch(&blocks_[i].tops);
  }
  // for Locate, of the block's own memory the former,
  void PrefetchWords(const BlockParts& block, uint64_t word, Fetches* fetches) const noexcept {
    constexpr uint64_t kLine = 64;
    const size_t top = block.CountBelow(word);
    const auto* first = reinterpret_cast<const uint8_t*>(words_.data() + block.word + block.Top(top));
    const auto* last = reinterpret_cast<const uint8_t*>(words_.data() + block.word + block.Top(top + 1));
    for (; first < last; first += kLine) fetches->Add(first);
    fetches->Add(last);
    const std::atomic<uint64_t>* memo = &checked_[block.part / 64];
    fetches->Add(memo);
    fetches->Add(memo + block.size / kPartBytes / 64 + 1);
  }
  // and the bytes [at, at + size) of a block, with all of their parts that are still to be checked.
  void PrefetchBytes(const BlockParts& block, uint64_t at, uint64_t size, Fetches* fetches) const noexcept {
    constexpr uint64_t kLine = 64;
    constexpr uint64_t kMost = 1024;  // The processor goes on by itself.
    const uint64_t end = std::min<uint64_t>(at + std::min(size, kMost), block.size);
    for (uint64_t part = at / kPartBytes; part * kPartBytes < end; ++part) {
      const bool checked = IsChecked(block.part + part);
      const uint64_t first = checked ? std::max(at, part * kPartBytes) : part * kPartBytes;
      const uint64_t last = checked ? std::min(end, (part + 1) * kPartBytes) : (part + 1) * kPartBytes;
      for (uint64_t line = first / kLine * kLine; line < last; line += kLine) fetches->Add(block.bytes + line);
    }
  }

 private:
  static void SetBlock(const uint8_t* file, const BlockEntry& entry, const char* keys, std::span<const uint64_t> words,
                       BlockParts* out) noexcept {
    const char* first = keys + entry.key_offset;
    out->bytes = file + entry.offset;
    out->rows = entry.rows;
    out->skip = static_cast<uint32_t>(
        CommonBytes({first, entry.first_key_bytes}, {first + entry.first_key_bytes, entry.last_key_bytes}));
    out->tombstones = entry.tombstones > 0;
    // Blocks that these numbers are too small for are read as a whole.
    out->step = entry.bytes <= std::numeric_limits<uint32_t>::max() ? entry.step : 0;
    if (out->step == 0) return;
    out->size = static_cast<uint32_t>(entry.bytes);
    out->words = static_cast<uint32_t>(words.size());
    for (size_t i = 0; i < BlockParts::kTops; ++i) out->tops[i] = words[out->Top(i + 1)];
  }

  bool IsChecked(uint64_t number) const noexcept {
    return (checked_[number / 64].load(std::memory_order_relaxed) >> number % 64 & 1) != 0;
  }
  bool CheckPart(const BlockParts& block, uint64_t part) const noexcept {
    const uint64_t number = block.part + part;
    if (PartChecksum(block.bytes, block.size, part) != checksums_[number]) return false;
    checked_[number / 64].fetch_or(uint64_t{1} << number % 64, std::memory_order_relaxed);
    return true;
  }

  size_t count_ = 0;
  std::unique_ptr<BlockParts[]> blocks_;
  std::span<const uint32_t> checksums_;
  std::span<const uint64_t> words_;
  std::unique_ptr<std::atomic<uint64_t>[]> checked_;  // A bit for each part.
};

}  // namespace marble
