#pragma once

#include <ssmlib/expr/algorithm.hpp>
#include <ssmlib/expr/structure.hpp>
#include <ssmlib/tensor/layout.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>

namespace ssm {

/// How an operand of a node lies: per token its first two axes are (batch, time); a parameter is
/// shared by all tokens.
enum class operand { per_token, parameter };

/// A T x T matrix for every (batch, head), known by its structure and by the algorithms that can
/// multiply by it. This is the whole contract of a node:
///
///   value_type, backend, structure, algorithms   types
///   layout                                       sequence_layout; default: the operands' rectangle
///   batch(), length()                            of the per-token operands; 0: any
///   heads()                                      the largest head count among the operands
///   operands(self, f)                            static; f(name, tensor&, operand) for each
///   operand dense()                                      (b, H, T, T) in double: the definition
///
/// and, where dense() alone does not say it or the operands are not enough,
///
///   causal() -> causality        whether rows depend on tokens after theirs; see causality_of
///   on_host()                    the same node with T = double on the CPU, its tensors copied:
///   what
///                                dense() and column() of a node on another backend are those of
///   check_length(longest)        throws shape_error where a sequence of `longest` tokens is too
///   much
///
/// Head counts obey one rule: an operand with G heads serves head h of H with its head h * G / H.
template <class M>
concept MatrixMixer = requires(const M& m, M& mutable_m) {
  typename M::value_type;
  typename M::backend;
  typename M::structure;
  typename M::algorithms;
  { m.layout } -> std::convertible_to<sequence_layout>;
  { m.batch() } -> std::same_as<index_t>;
  { m.length() } -> std::same_as<index_t>;
  { m.heads() } -> std::same_as<index_t>;
  M::operands(mutable_m, [](std::string_view, auto&, operand) {});
  { m.dense() } -> std::same_as<tensor<double, 4, cpu>>;
};

/// A mixer with a state of fixed size, so that it can run one token at a time.
/// state_features(P) is the width of the (key size x width) state matrix of a head whose values
/// have P features; key_size() the other extent.
template <class M>
concept RecurrentMixer = MatrixMixer<M> &&
    M::algorithms::template contains<alg::recurrent>&& requires(const M& m) {
  { m.key_size() } -> std::same_as<index_t>;
  { m.state_features(index_t{1}) } -> std::same_as<index_t>;
};

/// Whether the rows of a mixer depend on tokens after their own.
enum class causality {
  causal,      ///< they do not: entries above the diagonal are zero, or count as zero
  not_causal,  ///< they do, so the mixer cannot run from a state
  unknown      ///< only dense() can tell
};

/// What a mixer says of itself by a member causal(); recurrent mixers are causal.
template <MatrixMixer M>
[[nodiscard]] constexpr causality causality_of(const M& m) {
  if constexpr (requires {
                  { m.causal() } -> std::same_as<causality>;
                }) {
    return m.causal();
  } else {
    return RecurrentMixer<M> ? causality::causal : causality::unknown;
  }
}

namespace detail {

/// A tensor on the host in double; absent stays absent.
template <class T, int R, Backend B>
[[nodiscard]] tensor<double, R> exact_on_host(const tensor<T, R, B>& t) {
  if (!t) return {};
  return cast<double>(on_host(t));
}

template <class T>
inline constexpr bool is_tensor = false;
template <class T, int R, class B>
inline constexpr bool is_tensor<tensor<T, R, B>> = true;

/// (T, F) -> (1, T, 1, F); (T, H, F) -> (1, T, H, F); shares the elements.
template <class T, int R, Backend B>
[[nodiscard]] tensor<T, 4, B> promote(const tensor<T, R, B>& t) {
  static_assert(R >= 2, "ssm: a mixer's operand has at least a time and a feature axis");
  if constexpr (R == 4) {
    return t;
  } else if constexpr (R == 3) {
    return t.reshape(index_t{1}, t.extent(0), t.extent(1), t.extent(2));
  } else {
    return t.reshape(index_t{1}, t.extent(0), index_t{1}, t.extent(1));
  }
}
/// For operands with one number per token and head: (T) -> (1, T, 1); (T, H) -> (1, T, H).
template <class T, int R, Backend B>
[[nodiscard]] tensor<T, 3, B> promote_scalar(const tensor<T, R, B>& t) {
  static_assert(R <= 3, "ssm: one number per token and head has axes (batch, time, head)");
  if constexpr (R == 3) {
    return t;
  } else if constexpr (R == 2) {
    return t.reshape(index_t{1}, t.extent(0), t.extent(1));
  } else {
    return t.reshape(index_t{1}, t.extent(0), index_t{1});
  }
}

/// Throws unless the smaller of two head counts divides the larger; returns the larger.
index_t join_heads(const char* what, index_t a, index_t b);
/// Throws unless two (batch, time) pairs agree; 0 means any.
void check_time(const char* what, index_t b0, index_t t0, index_t b1, index_t t1);
/// Throws unless a layout has as many tokens as an operand.
void check_tokens(const char* what, const sequence_layout& layout, index_t tokens);
/// Throws what a mixer that cannot run from a state is refused with.
[[noreturn]] void throw_not_causal(const char* what);
[[noreturn]] void throw_not_causal_entry(index_t row, index_t column);

}  // namespace detail

/// The sequences of a mixer: its layout, else the rectangle of its operands.
template <class M>
[[nodiscard]] sequence_layout layout_of(const M& m) {
  return m.layout ? m.layout : sequence_layout::rectangular(m.batch(), m.length());
}

namespace detail {
/// Throws where a mixer, or one inside it, cannot take sequences of this length.
template <class M>
void check_length(const M& m, index_t longest) {
  if constexpr (requires { m.check_length(longest); }) m.check_length(longest);
}
}  // namespace detail

/// The mixer of a packed batch: block diagonal, one block a sequence. The operands have batch 1
/// and the layout's tokens along time.
/// @throws shape_error  the layout covers another number of tokens than the operands have, or a
///                      sequence is longer than a mask goes.
template <class M>
[[nodiscard]] M packed(const sequence_layout& layout, M m) {
  if (!layout) return m;  // none: the rectangle stays
  if (m.length() != 0) detail::check_tokens("packed", layout, m.batch() * m.length());
  detail::check_length(m, layout.max_length());
  m.layout = layout;
  return m;
}

namespace detail {

/// dense() of a node, entry by entry: f(t, s, h) with t and s counted over all tokens (batch
/// times time), called for pairs of one sequence only; everything else is zero.
/// @return (b, H, T, T) for a rectangle, (1, H, tokens, tokens) for a packed batch.
template <class M, class F>
[[nodiscard]] tensor<double, 4> dense_entries(const M& m, index_t heads, F f) {
  const sequence_layout layout = layout_of(m);
  const bool packed = static_cast<bool>(m.layout);
  const index_t n = packed ? layout.tokens() : m.length();
  auto out = tensor<double, 4>::zeros(packed ? 1 : m.batch(), heads, n, n);
  for (index_t i = 0; i < layout.sequences(); ++i) {
    const index_t base = packed ? 0 : layout.begin(i);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t t = layout.begin(i); t < layout.end(i); ++t) {
        for (index_t s = layout.begin(i); s < layout.end(i); ++s) {
          out(packed ? 0 : i, h, t - base, s - base) = f(t, s, h);
        }
      }
    }
  }
  return out;
}

}  // namespace detail
}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/expr/concepts_impl.hpp>
#endif
