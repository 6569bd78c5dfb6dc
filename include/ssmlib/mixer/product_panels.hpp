#pragma once

#include <ssmlib/expr/hadamard.hpp>
#include <ssmlib/lower/state.hpp>
#include <ssmlib/mixer/matrix_panels.hpp>

#include <algorithm>
#include <concepts>
#include <string_view>
#include <type_traits>
#include <utility>

namespace ssm {

/// Whether column s of a mixer depends on the tokens from s on only, so that panels can be read
/// from the operands after s. Normalised rows depend on all earlier columns.
template <class M>
inline constexpr bool has_local_columns = RecurrentMixer<M>;
template <class M>
inline constexpr bool has_local_columns<row_normalized<M>> = false;
template <class M>
inline constexpr bool has_local_columns<with_diagonal<M>> = has_local_columns<M>;

namespace detail {

/// Columns [s0, s1) of any mixer: its product with those of the identity, from the operands of the
/// tokens that these columns depend on.
template <MatrixMixer M>
class column_products {
 public:
  using T = typename M::value_type;
  using B = typename M::backend;

  explicit column_products(M m) : mixer_(std::move(m)), layout_(layout_of(mixer_)) {}

  [[nodiscard]] const M& mixer() const { return mixer_; }
  [[nodiscard]] const sequence_layout& layout() const { return layout_; }
  /// The first token with a part in the columns from s0, of the sequence that begins at `begin`.
  [[nodiscard]] static index_t first_token(index_t begin, index_t s0) {
    return has_local_columns<M> ? s0 : begin;
  }
  /// @param m  the mixer, or one with its gradients as operands
  /// @return   (1, end - first, H, s1 - s0) by m
  [[nodiscard]] mix<M, 4> product(const M& m, index_t first, index_t end, index_t s0,
                                  index_t s1) const {
    mix<M, 4> e{m, {}, {}};
    M::operands(e.mixer, [&](std::string_view, auto& t, operand kind) {
      if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
        if (kind == operand::per_token && t) t = as_packed(t).slice(1, first, end);
      }
    });
    e.mixer.layout = sequence_layout::rectangular(1, end - first);
    const index_t n = s1 - s0;
    tensor<T, 4> ones = tensor<T, 4>::zeros(index_t{1}, n, index_t{1}, n);
    for (index_t s = 0; s < n; ++s)
      ones(0, s, 0, s) = T(1.0f);
    e.x = tensor<T, 4, B>::zeros(index_t{1}, end - first, index_t{1}, n);
    e.x.slice(1, s0 - first, s1 - first).copy_from(on_backend<B>(ones));
    return e;
  }

 private:
  M mixer_;
  sequence_layout layout_;
};

/// Panels of any mixer.
template <MatrixMixer M>
class product_panels final : public matrix_panels<typename M::value_type> {
 public:
  using T = typename M::value_type;

  product_panels(M m, tape<T>* t) : columns_(std::move(m)), gradients_(columns_.mixer()) {
    M::operands(gradients_, [&](std::string_view, auto& operand_tensor, operand kind) {
      using operand_type = std::remove_cvref_t<decltype(operand_tensor)>;
      if constexpr (std::same_as<typename operand_type::value_type, T>) {
        if constexpr (operand_type::rank >= 2) {
          // Slices of a copy would be lost.
          if (kind == operand::per_token) (void)gradient_tokens(t, operand_tensor);
        }
        operand_tensor = t ? t->gradient(operand_tensor) : operand_type{};
      }
    });
  }
  [[nodiscard]] const sequence_layout& layout() const override { return columns_.layout(); }
  [[nodiscard]] index_t heads() const override { return columns_.mixer().heads(); }
  [[nodiscard]] bool is_causal() const override { return RecurrentMixer<M>; }

  [[nodiscard]] bool has_cheap_rows() const override { return false; }
  void tile_into(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                 const tensor<T, 3>& out) const override {
    const index_t first = first_token(i, s0), end = layout().end(i);
    const index_t n = out.extent(0), s1 = s0 + out.extent(2);
    // Tokens before `first` have no part in these columns.
    const index_t zeros = std::clamp<index_t>(first - row, 0, n);
    out.slice(0, 0, zeros).fill(T(0));
    if (zeros == n) return;
    const auto e = columns_.product(columns_.mixer(), first, end, s0, s1);
    const tensor<T, 3> rows = out.slice(0, zeros, n);
    if (row <= first && row + n == end) {
      eval_into(e, rows.reshape(index_t{1}, end - first, heads(), s1 - s0), {}, ctx);
    } else {
      const tensor<T, 4> y = eval(e, ctx);
      const index_t at = row + zeros - first;
      rows.copy_from(y.reshape(end - first, heads(), s1 - s0).slice(0, at, at + n - zeros));
    }
  }

  void add_vjp(const cpu::context& ctx, index_t i, index_t row, index_t s0, const tensor<T, 3>&,
               const tensor<T, 3>& d) override {
    const index_t first = first_token(i, s0), end = layout().end(i), s1 = s0 + d.extent(2);
    auto gradients = columns_.product(gradients_, first, end, s0, s1);
    gradients.x = {};
    vjp_into(columns_.product(columns_.mixer(), first, end, s0, s1), cotangent(d, row, first, end),
             gradients, carry_gradient<T>{}, ctx);
  }

 private:
  [[nodiscard]] index_t first_token(index_t i, index_t s0) const {
    return columns_.first_token(layout().begin(i), s0);
  }
  // The rows [first, end) of d, which begins at `row`; zeros around it.
  [[nodiscard]] tensor<T, 4> cotangent(const tensor<T, 3>& d, index_t row, index_t first,
                                       index_t end) const {
    const index_t n = end - first, skip = std::clamp<index_t>(first - row, 0, d.extent(0));
    const tensor<T, 3> used = d.slice(0, skip, d.extent(0));
    if (used.extent(0) == n) return used.reshape(index_t{1}, n, d.extent(1), d.extent(2));
    auto dy = tensor<T, 3>::zeros(n, d.extent(1), d.extent(2));
    const index_t at = std::max<index_t>(row - first, 0);
    dy.slice(0, at, at + used.extent(0)).copy_from(used);
    return dy.reshape(index_t{1}, n, d.extent(1), d.extent(2));
  }

  column_products<M> columns_;
  M gradients_;
};

}  // namespace detail
}  // namespace ssm
