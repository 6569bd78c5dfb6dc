#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace ssm {

/// Philox 4x32-10: a counter-based generator. The n-th number of a stream depends on
/// (seed, stream, n) only, so that draws are reproducible in any order and on any backend.
/// @source Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
class philox {
 public:
  explicit philox(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  /// All that a generator is: one made from it goes on with the same numbers.
  struct position {
    std::uint64_t seed = 0, stream = 0;
    std::uint64_t drawn = 0;  ///< calls of bits() so far
    friend bool operator==(const position&, const position&) = default;
  };
  explicit philox(const position& p) : seed_(p.seed), stream_(p.stream), counter_(p.drawn / 4) {
    for (std::uint64_t i = 0; i < p.drawn % 4; ++i)
      (void)bits();
  }
  [[nodiscard]] position where() const {
    return {seed_, stream_, 4 * counter_ - 4 + static_cast<std::uint64_t>(used_)};
  }

  [[nodiscard]] static std::array<std::uint32_t, 4> block(std::uint64_t seed, std::uint64_t stream,
                                                          std::uint64_t counter) {
    std::array<std::uint32_t, 4> c{
        static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
        static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c[2];
      c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
           static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }

  /// The next 32 random bits.
  std::uint32_t bits() {
    if (used_ == 4) {
      block_ = block(seed_, stream_, counter_++);
      used_ = 0;
    }
    return block_[static_cast<std::size_t>(used_++)];
  }
  /// In [0, 1), a multiple of 2^-53.
  double uniform() {
    const std::uint64_t high = bits() >> 5, low = bits() >> 6;
    return static_cast<double>(high * 67108864 + low) * 0x1p-53;
  }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  /// Standard normal (Box-Muller).
  double normal() {
    const double u = 1.0 - uniform(), v = uniform();
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
  }
  /// Uniform in [0, n).
  index_t below(index_t n) { return static_cast<index_t>(uniform() * static_cast<double>(n)); }

 private:
  std::uint64_t seed_, stream_, counter_ = 0;
  std::array<std::uint32_t, 4> block_{};
  int used_ = 4;
};

namespace detail {

/// Whether this thread makes tensors for their sizes only: they are filled with zeros then, because
/// drawing numbers takes longer than all the rest.
inline thread_local bool only_sizes_matter = false;

/// A new tensor whose element i is f of a generator that has drawn i times `words` before: what one
/// generator would give one element after the other, by all threads where that pays.
template <Real T, int R, class F>
[[nodiscard]] tensor<T, R> random_elements(const shape<R>& extents, std::uint64_t seed,
                                           std::uint64_t words, F f) {
  constexpr index_t large = index_t{1} << 20;  // starting threads is a few percent of this
  if (only_sizes_matter) return tensor<T, R>::zeros(extents);
  tensor<T, R> t(extents);
  const cpu::context ctx(t.size() < large ? 1 : cpu::context::default_threads());
  ctx.parallel_ranges(t.size(), std::max<index_t>(1, t.size() / large), 1,
                      [&](index_t begin, index_t end) {
                        philox random({seed, 0, words * static_cast<std::uint64_t>(begin)});
                        for (index_t i = begin; i < end; ++i)
                          t.data()[i] = static_cast<T>(f(random));
                      });
  return t;
}

}  // namespace detail

/// A new tensor with independent uniform elements in [low, high).
template <Real T, int R>
[[nodiscard]] tensor<T, R> uniform(const shape<R>& extents, double low, double high,
                                   std::uint64_t seed) {
  return detail::random_elements<T, R>(extents, seed, 2,
                                       [&](philox& random) { return random.uniform(low, high); });
}

/// A new tensor with independent normal elements of the given standard deviation.
template <Real T, int R>
[[nodiscard]] tensor<T, R> normal(const shape<R>& extents, double deviation, std::uint64_t seed) {
  return detail::random_elements<T, R>(extents, seed, 4,
                                       [&](philox& random) { return deviation * random.normal(); });
}

}  // namespace ssm
