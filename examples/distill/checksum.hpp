#pragma once

#include <cstdint>
#include <cstdio>
#include <span>
#include <string>

namespace demo {

/// FNV-1a, 64 bits: tells texts apart, no protection against somebody who wants them to be alike.
/// @source Fowler, Noll, Vo, Eastlake and Hansen, draft-eastlake-fnv, section 2.
[[nodiscard]] inline std::uint64_t fnv1a(std::span<const std::uint8_t> bytes) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const std::uint8_t b : bytes)
    hash = (hash ^ b) * 0x100000001b3u;
  return hash;
}

/// The same as 16 hexadecimal digits.
[[nodiscard]] inline std::string checksum(std::span<const std::uint8_t> bytes) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(fnv1a(bytes)));
  return digits;
}

}  // namespace demo
