// The bytes of an sstable around its blocks. docs/lsm.md describes the whole file; this is the part that code needs.
//
// Layout: a file is an Arrow IPC file with one section more, which other readers do not see:
//   [0, header)      magic, schema message                        FileSeal::header_checksum
//   blocks           one record batch message each                BlockEntry::checksum
//   [index, footer)  end of stream, then the index section        FileSeal::index_checksum
//   [footer, size)   footer, its length, magic                    FileSeal::footer_checksum, its own digits as '0'
// The footer carries the metadata key `marble.sstable`: `marble-sstable:` and the numbers of FileSeal, 16 lower-case
// hex digits each. It is text because readers in other languages refuse metadata that is not UTF-8, and it is short
// because the index section, which it names, is used in place in the mapping.
// The index section begins with 8 bytes end of stream and zeros up to a multiple of 64 of the file, then IndexHead,
// then what IndexHead names.
// Ownership: plain values. Thread safety: pure functions.
// Invariants:
//   1. Every byte of a file is under exactly one of the checksums above. Those of parts are a second look at the same bytes
//      for readers of single rows, and as good: a reader needs one of the two, Verify wants both.
//   2. All numbers are little-endian; sizes and offsets are checked against the file before anything is read there.
#pragma once

#include "hex.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <arrow/vendored/xxhash/xxhash.h>

namespace marble {

static_assert(std::endian::native == std::endian::little, "sstables are mapped and used in place");

constexpr std::string_view kFileSealKey = "marble.sstable";
constexpr std::string_view kFileSealMagic = "marble-sstable:";
constexpr uint64_t kFileVersion = 2;
constexpr uint64_t kFileVersionMin = 1;  // Files without parts: with an IndexHead of kFirstHeadBytes.
constexpr uint64_t kPartBytes = 512;     // Of a block, under a checksum of its own.
constexpr uint64_t kStepBytes = 2048;    // About so many bytes of rows for each word of a key in the index.
constexpr uint32_t kPartRowsMin = 4;     // Blocks of fewer rows have no parts: most of them is read with each row.
constexpr std::string_view kIndexColumn = "_marble_index";
constexpr std::string_view kDeletedColumn = "_marble_deleted";

// What the footer says of the file.
struct FileSeal {
  uint64_t version = kFileVersion;
  uint64_t size = 0;             // Bytes of the file.
  uint64_t header_bytes = 0;     // The first block begins there.
  uint64_t header_checksum = 0;  // XXH3-64, as all checksums here.
  uint64_t index = 0;            // Where blocks end and the index section (with the end of stream) begins.
  uint64_t index_bytes = 0;      // The footer begins behind them.
  uint64_t index_checksum = 0;
  uint64_t footer_checksum = 0;
};
constexpr int kFileSealNumbers = sizeof(FileSeal) / sizeof(uint64_t);
constexpr size_t kFileSealBytes = kFileSealMagic.size() + kFileSealNumbers * kDigits;

inline uint64_t ChecksumOf(const uint8_t* bytes, uint64_t size) noexcept { return XXH3_64bits(bytes, size); }

// A file's name by its content.
inline std::string HexName(XXH128_hash_t hash) {
  std::string name(2 * kDigits, '0');
  auto* digits = reinterpret_cast<uint8_t*>(name.data());
  WriteHex(digits, hash.high64);
  WriteHex(digits + kDigits, hash.low64);
  return name;
}

inline std::string ContentName(const uint8_t* bytes, uint64_t size) { return HexName(XXH3_128bits(bytes, size)); }

// Of a file's end, from the footer on. The last of the seal's numbers, at `digits`, counts as zeros ('0').
inline uint64_t FooterChecksum(const uint8_t* footer, uint64_t size, uint64_t digits) noexcept {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, footer, digits);
  XXH3_64bits_update(&state, "0000000000000000", kDigits);
  XXH3_64bits_update(&state, footer + digits + kDigits, size - digits - kDigits);
  return XXH3_64bits_digest(&state);
}

// Where the last number of the seal in `footer` begins, or 0 if there is no whole seal.
inline uint64_t FindLastNumber(const uint8_t* footer, uint64_t size) noexcept {
  const std::string_view text(reinterpret_cast<const char*>(footer), size);
  const size_t at = text.find(kFileSealMagic);
  if (at == std::string_view::npos || size - at < kFileSealBytes) return 0;
  return at + kFileSealBytes - kDigits;
}

// Puts the numbers of `seal` in place; `footer_checksum` is computed here, of everything else up to the file's end.
inline bool SealFooter(uint8_t* footer, uint64_t size, FileSeal* seal) noexcept {
  const uint64_t last = FindLastNumber(footer, size);
  if (last == 0) return false;
  uint64_t numbers[kFileSealNumbers];
  seal->footer_checksum = 0;
  std::memcpy(numbers, seal, sizeof(numbers));
  for (int i = 0; i < kFileSealNumbers; ++i) WriteHex(footer + last - (kFileSealNumbers - 1 - i) * kDigits, numbers[i]);
  seal->footer_checksum = FooterChecksum(footer, size, last);
  WriteHex(footer + last, seal->footer_checksum);
  return true;
}

// Reads the seal of a footer whose checksum is right.
inline bool ReadSeal(const uint8_t* footer, uint64_t size, FileSeal* seal) noexcept {
  const uint64_t last = FindLastNumber(footer, size);
  if (last == 0) return false;
  uint64_t numbers[kFileSealNumbers];
  for (int i = 0; i < kFileSealNumbers; ++i) {
    if (!ParseHex(footer + last - (kFileSealNumbers - 1 - i) * kDigits, &numbers[i])) return false;
  }
  std::memcpy(seal, numbers, sizeof(numbers));
  return seal->footer_checksum == FooterChecksum(footer, size, last);
}

// Places count from the beginning of IndexHead.
struct IndexPlace {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct IndexHead {
  uint64_t blocks = 0;
  uint64_t rows = 0;  // Tombstones are rows too.
  uint64_t tombstones = 0;
  uint64_t first_index = 0;  // Smallest and largest Raft index of a row.
  uint64_t last_index = 0;
  uint64_t has_ttl = 0;  // 1 if every row that is no tombstone has a value in the TTL column, and there is such a row.
  int64_t ttl_min = 0;
  int64_t ttl_max = 0;
  IndexPlace entries;  // BlockEntry[blocks]
  IndexPlace keys;     // First and last keys of all blocks, one behind the other.
  IndexPlace bloom;    // Lines of a BloomFilter.
  IndexPlace zones;    // An Arrow IPC stream of one batch, a row for each block: see sstable_zones.hpp.
  // From version 2 on:
  IndexPlace parts;    // uint32_t for each part of each block that has parts (PartChecksum).
  IndexPlace words;    // uint64_t for each `step` rows of such a block: the eight bytes of the key of the first of them
                       // behind those that the block's first and last key begin with.
};
static_assert(sizeof(IndexHead) == 160);
constexpr uint64_t kFirstHeadBytes = 128;

struct BlockEntry {
  uint64_t offset = 0;  // Of the record batch message in the file; blocks lie one behind the other.
  uint64_t bytes = 0;   // Of the message, its metadata and body.
  uint64_t checksum = 0;
  uint64_t decoded_bytes = 0;  // Of the body, once it is decompressed.
  uint64_t first_index = 0;    // Smallest and largest Raft index of a row.
  uint64_t last_index = 0;
  uint64_t key_offset = 0;  // In the keys: the first key, then the last.
  uint32_t first_key_bytes = 0;
  uint32_t last_key_bytes = 0;
  uint32_t metadata_bytes = 0;
  uint32_t rows = 0;
  uint32_t tombstones = 0;
  uint32_t step = 0;  // Rows from one word of a key in the index to the next; 0: the block has neither words nor parts.
};
static_assert(sizeof(BlockEntry) == 80);

inline uint64_t PartsOf(const BlockEntry& block) noexcept {
  return block.step == 0 ? 0 : (block.bytes + kPartBytes - 1) / kPartBytes;
}
inline uint64_t WordsOf(const BlockEntry& block) noexcept {
  return block.step == 0 ? 0 : (uint64_t{block.rows} + block.step - 1) / block.step;
}
// Of part number `part` of a block of `size` bytes: the lower half of XXH3-64.
inline uint32_t PartChecksum(const uint8_t* block, uint64_t size, uint64_t part) noexcept {
  const uint64_t first = part * kPartBytes;
  return static_cast<uint32_t>(ChecksumOf(block + first, std::min(kPartBytes, size - first)));
}

}  // namespace marble
