#pragma once

#include <ssmlib/mixer/cuda/product_panels.hpp>
#include <ssmlib/mixer/cuda/semiseparable_panels.hpp>
#include <ssmlib/mixer/cuda/softmax_panels.hpp>
#include <ssmlib/mixer/panels.hpp>

#include <concepts>
#include <memory>
#include <utility>

namespace ssm {

namespace detail {

/// Given matrices on CUDA, (b, H, T, T), in the type of sums; no gradients.
template <Floating T>
class cuda_dense_panels final : public matrix_panels<T, cuda> {
 public:
  using real = accum_t<T>;

  explicit cuda_dense_panels(const tensor<real, 4, cuda>& matrices)
      : matrices_(matrices.contiguous()),
        layout_(sequence_layout::rectangular(matrices_.extent(0), matrices_.extent(2))) {
    if (matrices_.extent(2) != matrices_.extent(3)) {
      throw shape_error("ssm: panels of " + to_string<4>(matrices_.extents()) +
                        ": wanted (batch x heads x time x time)");
    }
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return matrices_.extent(1); }
  [[nodiscard]] bool is_causal() const override { return false; }
  [[nodiscard]] bool has_cheap_rows() const override { return true; }
  [[nodiscard]] cuda_matrix_tile<T> tile_at(const cuda::context&,
                                            const kernels::cuda::matrix_place& at) const override {
    const shape<4>& strides = matrices_.strides();
    cuda_matrix_tile<T> t{{}, matrices_.reshape(matrices_.size())};
    t.tile.products =
        matrices_.data() + at.token / at.length * strides[0] + at.row * strides[2] + at.column;
    t.tile.strides = {strides[0], strides[1], strides[2]};
    t.tile.product_heads = t.tile.heads = static_cast<int>(heads());
    return t;
  }

 private:
  tensor<real, 4, cuda> matrices_;
  sequence_layout layout_;
};

}  // namespace detail

/// The panels of a mixer on CUDA, as on the CPU.
/// @param t  the tape that holds its operands' gradients; null: read only
template <MatrixMixer M>
requires std::same_as<typename M::backend, cuda>
[[nodiscard]] std::shared_ptr<matrix_panels<typename M::value_type, cuda>> panels(
    M m, tape<typename M::value_type, cuda>* t = nullptr,
    [[maybe_unused]] const cuda::context& ctx = default_context<cuda>()) {
  using T = typename M::value_type;
  const cuda::scope scope(ctx);
  if constexpr (std::same_as<M, softmax_mixer<T, cuda>>) {
    return std::make_shared<detail::cuda_softmax_panels<T>>(m, t, ctx);
  } else if constexpr (detail::cuda_semiseparable_parts<M>::exist) {
    return detail::cuda_semiseparable_parts<M>::panels(m, t, ctx);
  } else {
    return std::make_shared<detail::cuda_product_panels<M>>(std::move(m), t);
  }
}
/// Matrices that are already there, (b, H, T, T).
template <Real T>
[[nodiscard]] std::shared_ptr<matrix_panels<T, cuda>> panels(const tensor<T, 4, cuda>& matrices) {
  return std::make_shared<detail::cuda_dense_panels<T>>(matrices);
}

}  // namespace ssm
