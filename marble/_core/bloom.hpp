// A blocked bloom filter over keys: one cache line is looked at for each key that is asked for.
//
// Layout: `lines` of 64 bytes. A key's hash (XXH3-64 of its encoded bytes) names a line by its upper half, and by its
// lower half kProbes bits in that line. The layout is part of the file format: a change needs a new version of it.
// Ownership: a filter borrows its bytes, which lie in the file's mapping.
// Thread safety: pure functions.
// Invariants:
//   1. A key whose hash was put is always found. Of those never put about one in a hundred is found too, at
//      kBitsPerKey.
#pragma once

#include "key_codec.hpp"

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <arrow/vendored/xxhash/xxhash.h>

namespace marble {

constexpr uint64_t kBloomLineBytes = 64;
constexpr uint64_t kBitsPerKey = 10;
constexpr int kProbes = 6;

inline std::string_view KeyBytes(const KeyColumn& keys, int64_t row) noexcept {
  return {reinterpret_cast<const char*>(keys.data(row)), keys.size(row)};
}

inline uint64_t HashKey(std::string_view key) noexcept { return XXH3_64bits(key.data(), key.size()); }

class BloomFilter {
 public:
  BloomFilter() = default;
  BloomFilter(const uint8_t* bytes, uint64_t lines) : bytes_(bytes), lines_(lines) {}

  bool MayContain(uint64_t hash) const noexcept {
    if (lines_ == 0) return true;
    const uint8_t* line = Line(hash);
    bool all = true;
    // All of them, without a branch for each: which one says no cannot be predicted.
    Probe(hash, [line, &all](uint32_t bit) { all &= (line[bit / 8] >> (bit % 8) & 1) != 0; });
    return all;
  }
  void Prefetch(uint64_t hash) const noexcept {
    if (lines_ > 0) __builtin_prefetch(Line(hash));
  }

  // The bytes of a filter that holds `hashes`.
  static std::vector<uint8_t> Build(const std::vector<uint64_t>& hashes) {
    const uint64_t lines = (hashes.size() * kBitsPerKey + kBloomLineBytes * 8 - 1) / (kBloomLineBytes * 8);
    std::vector<uint8_t> bytes(lines * kBloomLineBytes);
    const BloomFilter filter(bytes.data(), lines);
    for (const uint64_t hash : hashes) {
      uint8_t* line = bytes.data() + (filter.Line(hash) - bytes.data());
      Probe(hash, [line](uint32_t bit) { line[bit / 8] = static_cast<uint8_t>(line[bit / 8] | 1 << (bit % 8)); });
    }
    return bytes;
  }

 private:
  const uint8_t* Line(uint64_t hash) const noexcept { return bytes_ + (hash >> 32) * lines_ / (uint64_t{1} << 32) * 64; }

  // Each probe takes the nine upper bits of a number that is multiplied on: independent enough, and without a table.
  template <typename Take>
  static void Probe(uint64_t hash, Take take) noexcept {
    auto bits = static_cast<uint32_t>(hash);
    for (int i = 0; i < kProbes; ++i, bits *= 0x9e3779b9U) take(bits >> 23);
  }

  const uint8_t* bytes_ = nullptr;
  uint64_t lines_ = 0;
};

}  // namespace marble
