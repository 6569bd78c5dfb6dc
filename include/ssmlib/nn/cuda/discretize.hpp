#pragma once

#include <ssmlib/kernels/cuda/discretize.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/nn/discretize.hpp>

namespace ssm {

namespace detail {

template <Floating T>
[[nodiscard]] kernels::cuda::discretize_problem<T> discretize_problem(
    const tensor<T, 2, cuda>& dt, const tensor<accum_t<T>, 1, cuda>& a,
    const tensor<accum_t<T>, 1, cuda>& dt_bias, const step_limits& limits) {
  return {dt.const_view(), a.data(), dt_bias.data(), static_cast<accum_t<T>>(limits.low),
          static_cast<accum_t<T>>(limits.high)};
}

}  // namespace detail

template <Floating T>
void apply_discretize(const cuda::context& ctx, const tensor<T, 2, cuda>& dt,
                      const tensor<accum_t<T>, 1, cuda>& a,
                      const tensor<accum_t<T>, 1, cuda>& dt_bias, const step_limits& limits,
                      const tensor<accum_t<T>, 2, cuda>& delta,
                      const tensor<accum_t<T>, 2, cuda>& log_a) {
  if (dt.size() == 0) return;
  kernels::cuda::discretize<T>(ctx.stream(), detail::discretize_problem(dt, a, dt_bias, limits),
                               delta.view(), log_a.view());
}
template <Floating T>
void apply_discretize_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& dt,
                          const tensor<accum_t<T>, 1, cuda>& a,
                          const tensor<accum_t<T>, 1, cuda>& dt_bias, const step_limits& limits,
                          const tensor<accum_t<T>, 2, cuda>& d_delta,
                          const tensor<accum_t<T>, 2, cuda>& d_log_a,
                          const tensor<T, 2, cuda>& d_dt, const tensor<accum_t<T>, 1, cuda>& d_a,
                          const tensor<accum_t<T>, 1, cuda>& d_bias) {
  if (dt.size() == 0) return;
  const auto problem = detail::discretize_problem(dt, a, dt_bias, limits);
  const bool sums = d_a || d_bias;
  const detail::cuda_workspace workspace(
      ctx, sums ? kernels::cuda::discretize_vjp_workspace_bytes<T>(problem) : 0);
  const bool add = detail::must_add(d_dt);
  const detail::added_gradient<accum_t<T>, 1> sum_a(d_a, add), sum_bias(d_bias, add);
  kernels::cuda::discretize_vjp<T>(
      ctx.stream(), problem, d_delta.const_view(), d_log_a.const_view(),
      {d_dt.view(), sum_a.get().data(), sum_bias.get().data(), add}, workspace.data());
  sum_a.finish();
  sum_bias.finish();
}

}  // namespace ssm
