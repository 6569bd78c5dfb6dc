#pragma once

#include <ssmlib/lower/state.hpp>
#include <ssmlib/mixer/panels.hpp>
#include <ssmlib/nn/conv1d.hpp>
#include <ssmlib/nn/linear.hpp>
#include <ssmlib/nn/pass.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>

namespace ssm {

/// The state of a sequence mixer: that of its matrix, and the last inputs of its convolution if it
/// has one. A value; see lower/state.hpp.
template <Floating T, class Matrix, Backend B = cpu>
struct mixer_state {
  Matrix matrix;
  conv_state<T, B> conv;  ///< of no channels where the mixer has no convolution

  [[nodiscard]] index_t sequences() const { return matrix.sequences(); }
  [[nodiscard]] index_t position(index_t i) const { return matrix.position(i); }
  [[nodiscard]] index_t max_rollback() const { return matrix.max_rollback(); }
  [[nodiscard]] index_t can_roll_back(index_t i) const { return matrix.can_roll_back(i); }
  void rollback(index_t n) { rollback(detail::same_count(sequences(), n)); }
  void rollback(std::span<const index_t> n) {
    matrix.rollback(n);  // checks first, so nothing is half undone
    if (conv.channels() > 0) conv.rollback(n);
  }
  void skip(const sequence_layout& layout) requires requires(Matrix& m) { m.skip(layout); }
  {
    matrix.skip(layout);
    if (conv.channels() > 0) conv.skip(layout);
  }
  bool reserve(index_t tokens) {
    if constexpr (requires {
                    { matrix.reserve(tokens) } -> std::same_as<bool>;
                  }) {
      return matrix.reserve(tokens);
    } else {
      return false;
    }
  }
  friend bool operator==(const mixer_state&, const mixer_state&) = default;
  /// Whether they fit the same mixers, but for the number of sequences.
  [[nodiscard]] bool same_sizes(const mixer_state& other) const {
    if constexpr (requires { matrix.same_sizes(other.matrix); }) {
      if (!matrix.same_sizes(other.matrix)) return false;
    }
    return conv.same_sizes(other.conv);
  }
};

/// What a mixer makes of its input: the product to evaluate, and what finish() needs besides.
template <class Product, Floating T, Backend B = cpu>
struct projected {
  Product product;       ///< mixer * X
  tensor<T, 3, B> gate;  ///< (b, T, ...), or absent
};

namespace detail {
/// advance() of whatever state it is, found by argument-dependent lookup: the member function of
/// that name in sequence_mixer would hide it.
template <class Product, class State>
[[nodiscard]] auto advance_matrix(const Product& product, State& state,
                                  const typename Product::backend::context& ctx) {
  return advance(product, state, ctx);
}
}  // namespace detail

/// A sequence mixer of a model: projections, a matrix mixer, and an output projection.
///
/// A mixer derives from this with itself as Self and provides
///
///   project(p, u, layout, conv_state*)  -> projected<mix<...>, T, B>   null conv: whole sequences
///   finish(p, y, projected)             -> (b, T, d)
///   conv_channels(), conv_width()       0, 1 where there is no convolution
///   static parameters(self, f)          see nn/parameter.hpp
///
/// and gets whole-sequence evaluation, the matrix itself, and stepping from a state.
template <class Self, Floating T, Backend B = cpu>
class sequence_mixer {
 public:
  using value_type = T;
  using backend = B;

  /// Whole sequences from an empty state. @param u  (b, T, d)  @return (b, T, d)
  [[nodiscard]] tensor<T, 3, B> forward(const pass<T, B>& p, const tensor<T, 3, B>& u,
                                        const sequence_layout& layout) const {
    const typename B::scope scope(p.ctx);
    const auto parts = self().project(p, u, layout, nullptr);
    return self().finish(p, eval(parts.product, p.tape, p.ctx), parts);
  }

  /// The T x T matrices for this input, recorded on p.tape like any other value.
  [[nodiscard]] auto matrix(const pass<T, B>& p, const tensor<T, 3, B>& u,
                            const sequence_layout& layout) const {
    return self().project(p, u, layout, nullptr).product.mixer;
  }
  [[nodiscard]] std::shared_ptr<matrix_panels<T, B>> matrix_panels_of(
      const pass<T, B>& p, const tensor<T, 3, B>& u, const sequence_layout& layout) const {
    const typename B::scope scope(p.ctx);
    return panels(matrix(p, u, layout), p.tape, p.ctx);
  }

  /// An empty state. @param max_rollback  the most tokens that rollback() must be able to undo
  [[nodiscard]] auto initial_state(index_t sequences, index_t max_rollback = 0) const {
    const tensor<T, 3, B> nothing(1, 0, self().width());
    const auto& ctx = detail::current_context<B>();  // where the state will be
    const auto parts = self().project({ctx}, nothing, sequence_layout::from_lengths({0}), nullptr);
    auto matrix_part = make_state(parts.product, sequences, max_rollback);
    return mixer_state<T, decltype(matrix_part), B>{
        std::move(matrix_part),
        conv_state<T, B>(sequences, self().conv_channels(), self().conv_width(), max_rollback)};
  }

  /// New tokens, one layout sequence for each of the state's, from where the state stands.
  template <class State>
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, State& state, const tensor<T, 3, B>& u,
                                        const sequence_layout& layout) const {
    const typename B::scope scope(p.ctx);
    const auto parts = self().project(p, u, layout, &state.conv);
    return self().finish(p, detail::advance_matrix(parts.product, state.matrix, p.ctx), parts);
  }

 private:
  [[nodiscard]] const Self& self() const { return static_cast<const Self&>(*this); }
};

/// The state type of a sequence mixer.
template <class S>
using state_of = decltype(std::declval<const S&>().initial_state(index_t{1}, index_t{0}));

/// A module whose heart is a T x T matrix: what models are made of, what MOHAWK aligns.
template <class S>
concept SequenceMixer = requires(const S& s,
                                 const pass<typename S::value_type, typename S::backend>& p,
                                 const tensor<typename S::value_type, 3, typename S::backend>& u,
                                 const sequence_layout& layout, state_of<S>& state) {
  { s.matrix(p, u, layout) } -> MatrixMixer;
  { s.forward(p, u, layout) } -> std::same_as<std::remove_cvref_t<decltype(u)>>;
  { s.advance(p, state, u, layout) } -> std::same_as<std::remove_cvref_t<decltype(u)>>;
  {s.initial_state(index_t{1}, index_t{0})};
  { state == state } -> std::same_as<bool>;
  state.rollback(index_t{1});
};

namespace detail {

/// (b, T, H * F) -> (b, T, H, F), the elements shared.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 4, B> split_heads(const tensor<T, 3, B>& x, index_t heads) {
  return x.reshape(x.extent(0), x.extent(1), heads, x.extent(2) / std::max<index_t>(heads, 1));
}
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> merge_heads(const tensor<T, 4, B>& x) {
  return x.reshape(x.extent(0), x.extent(1), x.extent(2) * x.extent(3));
}
/// Consecutive feature slices of these sizes.
template <std::size_t N, Floating T, Backend B>
[[nodiscard]] std::array<tensor<T, 3, B>, N> split_features(const tensor<T, 3, B>& x,
                                                            const std::array<index_t, N>& sizes) {
  std::array<tensor<T, 3, B>, N> parts;
  index_t begin = 0;
  for (std::size_t i = 0; i < N; ++i) {
    parts[i] = x.slice(2, begin, begin + sizes[i]);
    begin += sizes[i];
  }
  return parts;
}

/// The convolution of a mixer, over whole sequences or from a state.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> convolve(const pass<T, B>& p, const causal_conv1d<T, B>& conv,
                                       const tensor<T, 3, B>& x, const sequence_layout& layout,
                                       conv_state<T, B>* state) {
  return state != nullptr ? conv.advance(p, x, *state, layout) : conv(p, x, layout);
}

}  // namespace detail
}  // namespace ssm
