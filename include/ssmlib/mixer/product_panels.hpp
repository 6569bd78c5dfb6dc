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

/// Panels of any mixer: its product with columns of the identity.
template <MatrixMixer M>
class product_panels final : public matrix_panels<typename M::value_type> {
 public:
  using T = typename M::value_type;

  product_panels(M m, tape<T>* t) : mixer_(std::move(m)), layout_(layout_of(mixer_)) {
    gradients_ = mixer_;
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
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return mixer_.heads(); }
  [[nodiscard]] bool is_causal() const override { return RecurrentMixer<M>; }

  [[nodiscard]] bool has_cheap_rows() const override { return false; }
  void tile_into(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                 const tensor<T, 3>& out) const override {
    const index_t first = first_token(i, s0), end = layout_.end(i);
    const index_t n = out.extent(0), s1 = s0 + out.extent(2);
    // Tokens before `first` have no part in these columns.
    const index_t zeros = std::clamp<index_t>(first - row, 0, n);
    out.slice(0, 0, zeros).fill(T(0));
    if (zeros == n) return;
    const auto e = product(mixer_, i, first, s0, s1);
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
    const index_t first = first_token(i, s0), s1 = s0 + d.extent(2);
    const auto e = product(mixer_, i, first, s0, s1);
    auto gradients = product(gradients_, i, first, s0, s1);
    gradients.x = {};
    vjp_into(e, cotangent(d, row, first, layout_.end(i)), gradients, carry_gradient<T>{}, ctx);
  }

 private:
  [[nodiscard]] index_t first_token(index_t i, index_t s0) const {
    return has_local_columns<M> ? s0 : layout_.begin(i);
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
  [[nodiscard]] mix<M, 4> product(const M& m, index_t i, index_t first, index_t s0,
                                  index_t s1) const {
    const index_t end = layout_.end(i);
    mix<M, 4> e{m, {}, {}};
    M::operands(e.mixer, [&](std::string_view, auto& t, operand kind) {
      if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
        if (kind == operand::per_token && t) t = as_packed(t).slice(1, first, end);
      }
    });
    e.mixer.layout = sequence_layout::rectangular(1, end - first);
    e.x = tensor<T, 4>::zeros(1, end - first, 1, s1 - s0);
    for (index_t s = s0; s < s1; ++s)
      e.x(0, s - first, 0, s - s0) = T(1);
    return e;
  }

  M mixer_, gradients_;
  sequence_layout layout_;
};

}  // namespace detail
}  // namespace ssm
