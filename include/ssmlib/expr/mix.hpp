#pragma once

#include <ssmlib/expr/concepts.hpp>

#include <algorithm>
#include <concepts>
#include <string_view>
#include <type_traits>
#include <utility>

namespace ssm {

/// mixer * X with the algorithm as a type. Nothing is computed until eval(); the node owns what it
/// reads, so it may be stored, returned and captured.
template <MatrixMixer M, int R, class Alg = default_algorithm<M>>
struct mix {
  using value_type = typename M::value_type;
  using backend = typename M::backend;
  using mixer_type = M;
  using algorithm_type = Alg;
  static constexpr int rank = R;

  M mixer;
  tensor<value_type, 4, backend> x;  // (b, T, Hx, P)
  Alg algorithm{};

  /// Heads of the result: the largest count among the mixer's operands and X.
  [[nodiscard]] index_t heads() const { return std::max(mixer.heads(), x.extent(2)); }
  /// (b, T, H, P)
  [[nodiscard]] shape<4> extents() const {
    return {x.extent(0), x.extent(1), heads(), x.extent(3)};
  }

  /// The same product by another algorithm.
  template <class Other>
  [[nodiscard]] mix<M, R, Other> with(Other algorithm_value) const {
    static_assert(
        M::algorithms::template contains<Other> || std::same_as<Other, alg::quadratic> ||
            std::same_as<Other, alg::automatic>,
        "ssm: this mixer has no such algorithm; M::algorithms lists the ones that it has");
    return {mixer, x, algorithm_value};
  }
  /// The same product for a packed batch; see ssm::packed.
  [[nodiscard]] mix packed(const sequence_layout& layout) const {
    return {ssm::packed(layout, mixer), x, algorithm};
  }
  /// f(name, tensor&, operand) for every operand of the mixer and for "x".
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    M::operands(self.mixer, f);
    f("x", self.x, operand::per_token);
  }
};

/// The product of a mixer and X: (b, T, H, P), (T, H, P) or (T, P).
/// @return (like X) lazily; H is the larger head count.
/// @throws shape_error  batch, length or heads do not fit, or a sequence is longer than a mask
/// goes.
template <MatrixMixer M, Floating T, int R, Backend B>
[[nodiscard]] mix<M, R> operator*(M mixer, const tensor<T, R, B>& x) {
  static_assert(std::same_as<typename M::backend, B>,
                "ssm: mixer * X mixes two backends; copy one operand with to<backend>(...)");
  static_assert(std::same_as<typename M::value_type, T>,
                "ssm: mixer * X mixes two element types; convert one with cast<T>(...)");
  tensor<T, 4, B> x4 = detail::promote(x);
  if (!mixer.layout) {
    detail::check_time("mixer * X", mixer.batch(), mixer.length(), x4.extent(0), x4.extent(1));
    if (mixer.length() == 0) {  // a bare mask takes its length from X
      mixer.layout = sequence_layout::rectangular(x4.extent(0), x4.extent(1));
    }
  } else {
    detail::check_tokens("mixer * X", mixer.layout, x4.extent(0) * x4.extent(1));
  }
  detail::check_length(mixer, mixer.layout ? mixer.layout.max_length() : mixer.length());
  detail::join_heads("mixer * X", mixer.heads(), x4.extent(2));
  return {std::move(mixer), std::move(x4), {}};
}

/// A gradient holder for an expression: the same type with a zero tensor in place of each operand.
template <class E>
[[nodiscard]] E zeros_like(E e) {
  E::operands(e, [](std::string_view, auto& t, operand) {
    if (t) t = std::remove_cvref_t<decltype(t)>::zeros(t.extents());
  });
  return e;
}

/// What a recurrent mixer carries from one call to the next.
///
/// States are (sequences, H, key size, state_features(P)). Absent tensors mean: start from zero,
/// do not return the final state, keep no snapshots. `initial` and `final` may be one tensor.
template <Floating T, Backend B = cpu>
struct carry {
  tensor<accum_t<T>, 4, B> initial;
  tensor<accum_t<T>, 4, B> final;

  /// A ring of states for rollback: the state *before* the token at position p of sequence i goes
  /// to row (p mod slots) * sequences + i. Only alg::recurrent writes it.
  tensor<accum_t<T>, 4, B> snapshots;
  index_t slots = 0;
  const index_t* first_position = nullptr;  // per sequence
};

/// The same for a vector-Jacobian product.
template <Floating T, Backend B = cpu>
struct carry_gradient {
  tensor<accum_t<T>, 4, B> initial;    ///< read: the forward call's initial state, or absent
  tensor<accum_t<T>, 4, B> d_final;    ///< read: gradient of the final state, or absent
  tensor<accum_t<T>, 4, B> d_initial;  ///< added to: gradient of the initial state, or absent
};

}  // namespace ssm
