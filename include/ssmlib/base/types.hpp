#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ssm {

/// Sizes, strides and token positions. Signed 64-bit, so that differences and products are safe.
using index_t = std::int64_t;

/// A 16-bit storage type: the upper half of an IEEE binary32. It has no arithmetic of its own:
/// kernels widen to float, compute and accumulate in float, and round once when they store.
struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  /// Rounds to nearest, ties to even; NaN stays NaN.
  explicit bf16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
    bits = nan ? static_cast<std::uint16_t>((u >> 16) | 0x40u)
               : static_cast<std::uint16_t>(rounded >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
  friend bool operator==(bf16, bf16) = default;  // compares bits: a storage type
};

/// Types that a tensor can hold.
template <class T>
concept Element = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, bf16> ||
    std::same_as<T, std::int32_t> || std::same_as<T, std::int64_t>;

/// Types that algorithms compute in: float, and double for tests and references.
template <class T>
concept Real = std::same_as<T, float> || std::same_as<T, double>;

/// Types that mixers and layers hold: Real, and bf16 on backends that compute from it (CUDA).
template <class T>
concept Floating = Real<T> || std::same_as<T, bf16>;

/// The type that sums of T are accumulated in, and that decays, states, statistics, parameters and
/// their gradients have beside activations of type T: float for bf16, else T.
template <class T>
using accum_t = std::conditional_t<std::is_same_v<T, bf16>, float, T>;

/// The head of an operand with `groups` heads that serves head `h` of `heads`.
[[nodiscard]] constexpr index_t group_of(index_t h, index_t heads, index_t groups) {
  return h * groups / heads;
}

/// The smallest multiple of `step` that is not below n.
[[nodiscard]] constexpr index_t round_up(index_t n, index_t step) {
  return (n + step - 1) / step * step;
}

}  // namespace ssm
