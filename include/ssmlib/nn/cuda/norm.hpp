#pragma once

#include <ssmlib/kernels/cuda/norm.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/nn/norm.hpp>

namespace ssm {

namespace detail {

[[nodiscard]] inline kernels::cuda::gate_order cuda_gate_order(gate_order order) {
  using to = kernels::cuda::gate_order;
  if (order == gate_order::none) return to::none;
  return order == gate_order::norm_first ? to::norm_first : to::gate_first;
}

template <Floating T>
[[nodiscard]] kernels::cuda::rms_norm_problem<T> rms_norm_problem(
    const tensor<T, 2, cuda>& x, const tensor<T, 2, cuda>& gate,
    const tensor<accum_t<T>, 1, cuda>& weight, const norm_groups& g) {
  return {x.const_view(), gate.const_view(), weight.data(),
          g.size,         g.weight_step,     static_cast<accum_t<T>>(g.eps)};
}

}  // namespace detail

template <Floating T>
void apply_rms_norm(const cuda::context& ctx, gate_order order, const tensor<T, 2, cuda>& x,
                    const tensor<T, 2, cuda>& gate, const tensor<accum_t<T>, 1, cuda>& weight,
                    const norm_groups& groups, const tensor<T, 2, cuda>& y) {
  if (x.size() == 0) return;
  kernels::cuda::rms_norm<T>(ctx.stream(), detail::cuda_gate_order(order),
                             detail::rms_norm_problem(x, gate, weight, groups), y.view());
}
template <Floating T>
void apply_rms_norm_vjp(const cuda::context& ctx, gate_order order, const tensor<T, 2, cuda>& x,
                        const tensor<T, 2, cuda>& gate, const tensor<accum_t<T>, 1, cuda>& weight,
                        const norm_groups& groups, const tensor<T, 2, cuda>& dy,
                        const tensor<T, 2, cuda>& dx, const tensor<T, 2, cuda>& d_gate,
                        const tensor<accum_t<T>, 1, cuda>& d_weight) {
  if (x.size() == 0) return;
  const auto problem = detail::rms_norm_problem(x, gate, weight, groups);
  const detail::cuda_workspace workspace(
      ctx, d_weight ? kernels::cuda::rms_norm_vjp_workspace_bytes<T>(problem) : 0);
  const bool add = detail::must_add(dx, d_gate);
  const detail::added_gradient<accum_t<T>, 1> sum(d_weight, add);
  kernels::cuda::rms_norm_vjp<T>(ctx.stream(), detail::cuda_gate_order(order), problem,
                                 dy.const_view(), {dx.view(), d_gate.view(), sum.get().data(), add},
                                 workspace.data());
  sum.finish();
}

template <Floating T>
void apply_layer_norm(const cuda::context& ctx, const tensor<T, 2, cuda>& x,
                      const tensor<accum_t<T>, 1, cuda>& weight,
                      const tensor<accum_t<T>, 1, cuda>& bias, double eps,
                      const tensor<T, 2, cuda>& y) {
  if (x.size() == 0) return;
  kernels::cuda::layer_norm<T>(
      ctx.stream(), {x.const_view(), weight.data(), bias.data(), static_cast<accum_t<T>>(eps)},
      y.view());
}
template <Floating T>
void apply_layer_norm_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& x,
                          const tensor<accum_t<T>, 1, cuda>& weight, double eps,
                          const tensor<T, 2, cuda>& dy, const tensor<T, 2, cuda>& dx,
                          const tensor<accum_t<T>, 1, cuda>& d_weight,
                          const tensor<accum_t<T>, 1, cuda>& d_bias) {
  if (x.size() == 0) return;
  const kernels::cuda::layer_norm_problem<T> problem{x.const_view(), weight.data(), nullptr,
                                                     static_cast<accum_t<T>>(eps)};
  const bool sums = d_weight || d_bias;
  const detail::cuda_workspace workspace(
      ctx, sums ? kernels::cuda::layer_norm_vjp_workspace_bytes<T>(problem) : 0);
  const bool add = detail::must_add(dx);
  const detail::added_gradient<accum_t<T>, 1> weight_sum(d_weight, add), bias_sum(d_bias, add);
  kernels::cuda::layer_norm_vjp<T>(ctx.stream(), problem, dy.const_view(),
                                   {dx.view(), weight_sum.get().data(), bias_sum.get().data(), add},
                                   workspace.data());
  weight_sum.finish();
  bias_sum.finish();
}

}  // namespace ssm
