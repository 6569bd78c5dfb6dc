#pragma once

#include <ssmlib/base/types.hpp>

#include <concepts>
#include <string_view>
#include <type_traits>

namespace ssm {

/// Ways to multiply by a mixer. Each is a small value; `mixer * X` holds one as a type.
namespace alg {

/// Materialise T x T blocks and multiply. O(T^2); every mixer has it, every other is tested
/// against it.
struct quadratic {
  static constexpr std::string_view name = "quadratic";
};
/// Tiles of the matrix with an online softmax; O(T^2) time, O(T) memory.
struct tiled {
  static constexpr std::string_view name = "tiled";
};
/// Quadratic inside chunks, recurrent between them; O(T).
struct chunked {
  static constexpr std::string_view name = "chunked";
  index_t size = 0;  ///< tokens a chunk; 0: the size measured best for the mixer
};
/// One token at a time; O(T), and the same bits however a sequence is split.
struct recurrent {
  static constexpr std::string_view name = "recurrent";
};
/// A parallel scan over blocks of time.
struct scan {
  static constexpr std::string_view name = "scan";
  index_t size = 0;  ///< tokens a block; 0: the size measured best
};
/// By associativity: Q (K^T X), for matrices without a mask.
struct associative {
  static constexpr std::string_view name = "associative";
};
/// Through the mask's own fast product (an FFT for Toeplitz masks).
struct structured {
  static constexpr std::string_view name = "structured";
};
/// Chosen when evaluated, by shape, from the crossovers in docs/performance.md.
struct automatic {
  static constexpr std::string_view name = "automatic";
};

}  // namespace alg

/// The algorithms of a mixer, best first; the first is the default.
template <class... A>
struct alg_list {
  template <class X>
  static constexpr bool contains = (std::same_as<X, A> || ...);

  /// f(A{}) for each, in order.
  template <class F>
  static void for_each(F&& f) {
    (f(A{}), ...);
  }
};

namespace detail {
template <class L>
struct first_algorithm;
template <class A, class... Rest>
struct first_algorithm<alg_list<A, Rest...>> {
  using type = A;
};
}  // namespace detail

/// The default algorithm of a mixer type.
template <class M>
using default_algorithm = typename detail::first_algorithm<typename M::algorithms>::type;

}  // namespace ssm
