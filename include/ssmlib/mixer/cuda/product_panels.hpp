#pragma once

#include <ssmlib/lower/cuda/elements.hpp>
#include <ssmlib/mixer/cuda/matrix_panels.hpp>
#include <ssmlib/mixer/product_panels.hpp>

#include <algorithm>
#include <string_view>
#include <type_traits>
#include <utility>

namespace ssm::detail {

/// Tiles of any mixer on CUDA: its product with columns of the identity, all rows from the first
/// that is not zero. Entries have passed the mixer's own type: beside bf16 they are rounded to it,
/// and so is what each tile adds to the gradients.
template <MatrixMixer M>
class cuda_product_panels final : public matrix_panels<typename M::value_type, cuda> {
 public:
  using T = typename M::value_type;
  using real = accum_t<T>;
  using place = kernels::cuda::matrix_place;

  cuda_product_panels(M m, tape<T, cuda>* t)
      : columns_(std::move(m)), gradients_(columns_.mixer()), wanted_(t != nullptr) {
    M::operands(gradients_, [&](std::string_view, auto& operand_tensor, operand kind) {
      using operand_type = std::remove_cvref_t<decltype(operand_tensor)>;
      if constexpr (requires { t->gradient(operand_tensor); }) {
        if constexpr (operand_type::rank >= 2) {
          // Slices of a copy would be lost.
          if (kind == operand::per_token) (void)gradient_tokens(t, operand_tensor);
        }
        operand_tensor = t != nullptr ? t->gradient(operand_tensor) : operand_type{};
      } else {
        operand_tensor = {};
      }
    });
  }
  [[nodiscard]] const sequence_layout& layout() const override { return columns_.layout(); }
  [[nodiscard]] index_t heads() const override { return columns_.mixer().heads(); }
  [[nodiscard]] bool is_causal() const override { return RecurrentMixer<M>; }
  [[nodiscard]] bool has_cheap_rows() const override { return false; }

  [[nodiscard]] cuda_matrix_tile<T> tile_at(const cuda::context& ctx,
                                            const place& at) const override {
    const index_t first = columns_.first_token(at.token, at.token + at.column);
    const auto e = product(columns_.mixer(), first, at);
    const tensor<real, 4, cuda> y = as_type<real>(ctx, eval(e, ctx));
    const index_t skipped = at.token + at.row - first;  // rows, of all heads
    cuda_matrix_tile<T> t{{}, y.reshape(y.size())};
    t.tile.products = y.data() + skipped * heads() * at.columns;
    t.tile.strides = {0, at.columns, heads() * at.columns};
    t.tile.product_heads = t.tile.heads = static_cast<int>(heads());
    return t;
  }

  [[nodiscard]] bool wants_gradients() const override { return wanted_; }
  void add_products_vjp(const cuda::context& ctx, const place& at,
                        const tensor<T, 1, cuda>& d) override {
    const index_t first = columns_.first_token(at.token, at.token + at.column);
    const index_t rows = at.token + at.length - first, skipped = at.token + at.row - first;
    tensor<T, 4, cuda> dy = d.reshape(index_t{1}, at.rows, heads(), at.columns);
    if (skipped > 0) {
      dy = tensor<T, 4, cuda>::zeros(index_t{1}, rows, heads(), at.columns);
      dy.slice(1, skipped, rows).copy_from(d.reshape(index_t{1}, at.rows, heads(), at.columns));
    }
    auto gradients = product(gradients_, first, at);
    gradients.x = {};
    vjp_into(product(columns_.mixer(), first, at), dy, gradients, carry_gradient<T, cuda>{}, ctx);
  }

 private:
  [[nodiscard]] mix<M, 4> product(const M& m, index_t first, const place& at) const {
    const index_t column = at.token + at.column;
    return columns_.product(m, first, at.token + at.length, column, column + at.columns);
  }

  column_products<M> columns_;
  M gradients_;
  bool wanted_;
};

}  // namespace ssm::detail
