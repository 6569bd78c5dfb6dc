#pragma once

#include <ssmlib/kernels/cuda/gemm.hpp>
#include <ssmlib/kernels/cuda/skinny.hpp>
#include <ssmlib/lower/cuda/elements.hpp>
#include <ssmlib/lower/cuda/elementwise.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/nn/linear.hpp>

#include <algorithm>
#include <cstdint>

namespace ssm {

namespace detail {

/// y = x W^T + bias where a row's bits are the same whatever the other rows and their number. The
/// kernel then may depend on the number of features only, not on how rows happen to be aligned.
template <Floating T>
void linear_in_fixed_order(const cuda::context& ctx, const tensor<T, 2, cuda>& x,
                           const tensor<T, 2, cuda>& weight,
                           const tensor<accum_t<T>, 1, cuda>& bias, const tensor<T, 2, cuda>& y) {
  constexpr index_t most = 64;  // rows that the kernel takes
  const auto is_aligned = [](const tensor<T, 2, cuda>& t) {
    return reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0 &&
           t.strides()[0] * static_cast<index_t>(sizeof(T)) % 16 == 0 &&
           (t.strides()[1] == 1 || t.extent(1) <= 1);
  };
  const bool rows_can_align = x.extent(1) * static_cast<index_t>(sizeof(T)) % 16 == 0;
  const tensor<T, 2, cuda> from = !rows_can_align || is_aligned(x) ? x : x.clone();
  const tensor<T, 2, cuda> w = !rows_can_align || is_aligned(weight) ? weight : weight.clone();
  for (index_t first = 0; first < x.extent(0); first += most) {
    const index_t last = std::min(first + most, x.extent(0));
    kernels::cuda::skinny_problem<T, T, T> p;
    p.x = from.slice(0, first, last).const_view();
    p.w = w.const_view();
    p.y = y.slice(0, first, last).view();
    p.bias = bias.data();
    p.most = kernels::cuda::rung_of(ctx.arch());
    const cuda_workspace workspace(ctx, kernels::cuda::skinny_workspace_bytes(p));
    kernels::cuda::skinny_forward(ctx.stream(), p, workspace.data());
  }
}

template <class Out, class In, class A, class B, class C>
void multiply(const cuda::context& ctx, const A& a, const B& b, double beta, const C& c,
              const Out* bias = nullptr) {
  using namespace kernels::cuda;
  kernels::cuda::gemm(ctx, gemm_problem<In, Out>{single(a), single(b), single(c), bias, 1.0, beta});
}

}  // namespace detail

/// Through cuBLASLt; with `fixed_order` through our own kernels, in passes of 64 rows.
template <Floating T>
void apply_linear(const cuda::context& ctx, bool fixed_order, const tensor<T, 2, cuda>& x,
                  const tensor<T, 2, cuda>& weight, const tensor<accum_t<T>, 1, cuda>& bias,
                  const tensor<T, 2, cuda>& y) {
  if (y.size() == 0) return;
  const cuda::scope scope(ctx);
  if (fixed_order) return detail::linear_in_fixed_order(ctx, x, weight, bias, y);
  const tensor<T, 1, cuda> b = detail::as_type<T>(ctx, bias);
  detail::multiply<T, T>(ctx, x.const_view(), kernels::cuda::exchanged(weight.const_view()), 0.0,
                         y.view(), b.data());
}

/// Sums of the weight's gradient are in float for bf16, straight into the gradient.
template <Floating T>
void apply_linear_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& x,
                      const tensor<T, 2, cuda>& weight, const tensor<T, 2, cuda>& dy,
                      const tensor<T, 2, cuda>& dx, const tensor<accum_t<T>, 2, cuda>& d_weight,
                      const tensor<accum_t<T>, 1, cuda>& d_bias) {
  if (dy.size() == 0) return;
  const cuda::scope scope(ctx);
  if (dx) {
    const double beta = detail::overwrites(dx) ? 0.0 : 1.0;
    detail::multiply<T, T>(ctx, dy.const_view(), weight.const_view(), beta, dx.view());
  }
  if (d_weight) {
    const double beta = detail::overwrites(d_weight) ? 0.0 : 1.0;
    detail::multiply<accum_t<T>, T>(ctx, kernels::cuda::exchanged(dy.const_view()), x.const_view(),
                                    beta, d_weight.view());
  }
  if (d_bias) {  // as the gradient of what is repeated over all rows; the values are not read
    const auto sum = dy + d_bias;
    auto gradients = sum;
    gradients.a = {};
    vjp_into(sum, dy, gradients, ctx);
  }
}

}  // namespace ssm
