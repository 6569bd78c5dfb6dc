#pragma once

#include <ssmlib/tensor/random.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>

namespace ssm {

/// A random order of 0 .. n - 1 that is computed, not stored: each place by itself, so that a
/// shuffle resumes anywhere from two numbers.
///
/// A Feistel network of 8 rounds permutes the smallest even power of two that holds n; places
/// that land outside [0, n) are sent through again until they land inside, fewer than 4 times on
/// average.
/// @cost O(1) time and memory a place.
/// @source Luby and Rackoff 1988 for the network; Black and Rogaway 2002, "Ciphers with arbitrary
///         finite domains", section 3, for the walk; the round function is Philox 4x32-10.
class random_permutation {
 public:
  /// @param n  >= 0. (seed, stream) decide the order: a stream is an epoch.
  random_permutation(index_t n, std::uint64_t seed, std::uint64_t stream)
      : size_(n), seed_(seed), stream_(stream) {
    if (n < 0) {
      throw value_error("ssm: random_permutation of " + std::to_string(n) + "; wanted >= 0");
    }
    const int bits = n > 1 ? std::bit_width(static_cast<std::uint64_t>(n - 1)) : 0;
    half_bits_ = std::max(1, (bits + 1) / 2);
  }

  [[nodiscard]] index_t size() const { return size_; }

  /// The number at place i. @pre 0 <= i < size()
  [[nodiscard]] index_t operator()(index_t i) const {
    auto x = static_cast<std::uint64_t>(i);
    do {
      x = network(x);
    } while (x >= static_cast<std::uint64_t>(size_));
    return static_cast<index_t>(x);
  }

 private:
  static constexpr std::uint64_t rounds = 8;

  [[nodiscard]] std::uint64_t network(std::uint64_t x) const {
    const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
    std::uint64_t left = x >> half_bits_, right = x & mask;
    for (std::uint64_t r = 0; r < rounds; ++r) {
      const std::uint64_t mixed = philox::block(seed_, stream_, r << 32 | right)[0];
      const std::uint64_t next = left ^ (mixed & mask);
      left = right;
      right = next;
    }
    return left << half_bits_ | right;
  }

  index_t size_;
  std::uint64_t seed_, stream_;
  int half_bits_ = 1;
};

}  // namespace ssm
