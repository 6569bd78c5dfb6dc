#pragma once

#include <ssmlib/kernels/cuda/conv1d.hpp>
#include <ssmlib/kernels/cuda/conv1d_step.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/nn/conv1d.hpp>

#include <span>

namespace ssm {

namespace detail {

[[nodiscard]] inline kernels::cuda::conv1d_activation cuda_activation(conv1d_activation a) {
  return a == conv1d_activation::silu ? kernels::cuda::conv1d_activation::silu
                                      : kernels::cuda::conv1d_activation::none;
}

/// (sequences, 0, channels) has an address, but kernels take it as absent.
template <Floating T>
[[nodiscard]] view<T, 3> rows_or_absent(const tensor<T, 3, cuda>& t) {
  return t.size() == 0 ? view<T, 3>{} : t.view();
}

/// The operands as the CUDA kernels take them, and the offsets that they point to.
template <Floating T>
struct cuda_conv1d {
  device_layout layout;
  kernels::cuda::conv1d_problem<T> problem;

  cuda_conv1d(const cuda::context& ctx, const conv1d_operands<T, cuda>& o,
              const tensor<T, 3, cuda>& initial)
      : layout(ctx, o.layout), problem{o.x.const_view(),        o.weight.const_view(),
                                       o.bias.data(),           cuda_activation(o.activation),
                                       rows_or_absent(initial), layout.offsets,
                                       layout.sequences,        layout.max_length} {}
};

}  // namespace detail

template <Floating T>
void apply_conv1d(const cuda::context& ctx, const conv1d_operands<T, cuda>& o,
                  const tensor<T, 3, cuda>& initial, const tensor<T, 2, cuda>& y) {
  if (y.size() == 0) return;
  const detail::cuda_conv1d<T> call(ctx, o, initial);
  kernels::cuda::conv1d_forward<T>(ctx.stream(), call.problem, y.view(), {});
}

template <Floating T>
void apply_conv1d_vjp(const cuda::context& ctx, const conv1d_operands<T, cuda>& o,
                      const tensor<T, 3, cuda>& initial, const tensor<T, 2, cuda>& dy,
                      const tensor<T, 2, cuda>& dx, const tensor<accum_t<T>, 2, cuda>& d_weight,
                      const tensor<accum_t<T>, 1, cuda>& d_bias,
                      const tensor<T, 3, cuda>& d_initial) {
  if (dy.size() == 0) return;
  const detail::cuda_conv1d<T> call(ctx, o, initial);
  const bool sums = d_weight || d_bias;
  const detail::cuda_workspace workspace(
      ctx, sums ? kernels::cuda::conv1d_backward_workspace_bytes<T>(call.problem) : 0);
  const bool add = detail::must_add(dx, d_initial);
  const detail::added_gradient<accum_t<T>, 2> weight(d_weight, add);
  const detail::added_gradient<accum_t<T>, 1> bias(d_bias, add);
  kernels::cuda::conv1d_backward<T>(
      ctx.stream(), call.problem, dy.const_view(), {},
      {dx.view(), weight.get().data(), bias.get().data(), detail::rows_or_absent(d_initial), add},
      workspace.data());
  weight.finish();
  bias.finish();
}

template <Floating T>
void apply_conv1d_final(const cuda::context& ctx, const conv1d_operands<T, cuda>& o,
                        const tensor<T, 3, cuda>& initial, const tensor<T, 3, cuda>& final) {
  if (final.size() == 0) return;
  const detail::cuda_conv1d<T> call(ctx, o, initial);
  kernels::cuda::conv1d_final<T>(ctx.stream(), call.problem, final.view());
}

template <Floating T>
void apply_conv1d_final_vjp(const cuda::context& ctx, const sequence_layout& layout,
                            const tensor<T, 3, cuda>& d_final, const tensor<T, 2, cuda>& dx,
                            const tensor<T, 3, cuda>& d_initial) {
  if (d_final.size() == 0) return;
  const detail::device_layout sequences(ctx, layout);
  kernels::cuda::conv1d_problem<T> problem;
  problem.offsets = sequences.offsets;
  problem.sequences = sequences.sequences;
  problem.max_length = sequences.max_length;
  kernels::cuda::conv1d_final_vjp<T>(ctx.stream(), problem, d_final.const_view(), dx.view(),
                                     detail::rows_or_absent(d_initial));
}

template <Floating T>
void apply_conv1d_step(const cuda::context& ctx, const conv1d_operands<T, cuda>& o,
                       const tensor<T, 3, cuda>& ring, std::span<const index_t> position,
                       const tensor<T, 2, cuda>& y) {
  if (y.size() == 0) return;
  const detail::device_layout sequences(ctx, o.layout);
  const auto at = sequences.positions(ctx, position.data());
  kernels::cuda::conv1d_step_problem<T> problem;
  problem.x = o.x.const_view();
  problem.weight = o.weight.const_view();
  problem.bias = o.bias.data();
  problem.activation = detail::cuda_activation(o.activation);
  problem.ring = ring.view();
  problem.position = at.data();
  problem.offsets = sequences.offsets;
  problem.sequences = sequences.sequences;
  problem.max_length = sequences.max_length;
  kernels::cuda::conv1d_step<T>(ctx.stream(), problem, y.view());
}

}  // namespace ssm
