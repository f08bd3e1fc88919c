// Numbers as 16 lower-case hex digits: how seals stand in text that other readers of a file may see.
#pragma once

#include <cstdint>

namespace marble {

constexpr int kDigits = 16;

inline void WriteHex(uint8_t* out, uint64_t value) noexcept {
  for (int i = kDigits - 1; i >= 0; --i, value >>= 4) out[i] = static_cast<uint8_t>("0123456789abcdef"[value & 15]);
}

// Exactly the digits that WriteHex makes: an upper-case digit is a flipped bit, not a number.
inline bool ParseHex(const uint8_t* text, uint64_t* value) noexcept {
  uint64_t result = 0;
  for (int i = 0; i < kDigits; ++i) {
    const uint8_t c = text[i];
    if (c >= '0' && c <= '9') result = result << 4 | static_cast<uint64_t>(c - '0');
    else if (c >= 'a' && c <= 'f') result = result << 4 | static_cast<uint64_t>(c - 'a' + 10);
    else return false;
  }
  *value = result;
  return true;
}

}  // namespace marble
