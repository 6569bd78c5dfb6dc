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

namespace detail {

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

}  // namespace detail

/// The sequences of a mixer: its layout, else the rectangle of its operands.
template <class M>
[[nodiscard]] sequence_layout layout_of(const M& m) {
  return m.layout ? m.layout : sequence_layout::rectangular(m.batch(), m.length());
}

/// The mixer of a packed batch: block diagonal, one block a sequence. The operands have batch 1
/// and the layout's tokens along time.
/// @throws shape_error  the layout covers another number of tokens than the operands have.
template <class M>
[[nodiscard]] M packed(const sequence_layout& layout, M m) {
  if (!layout) return m;  // none: the rectangle stays
  if (m.length() != 0) detail::check_tokens("packed", layout, m.batch() * m.length());
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
