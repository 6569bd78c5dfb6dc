#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/kernels/cuda/mlp.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/nn/mlp.hpp>

namespace ssm {

template <Floating T>
void apply_swiglu(const cuda::context& ctx, const tensor<T, 2, cuda>& gate,
                  const tensor<T, 2, cuda>& up, const tensor<T, 2, cuda>& y) {
  if (y.size() == 0) return;
  kernels::cuda::swiglu<T>(ctx.stream(), gate.const_view(), up.const_view(), y.view());
}
template <Floating T>
void apply_swiglu_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& gate,
                      const tensor<T, 2, cuda>& up, const tensor<T, 2, cuda>& dy,
                      const tensor<T, 2, cuda>& d_gate, const tensor<T, 2, cuda>& d_up) {
  if (dy.size() == 0) return;
  const bool add = detail::must_add(d_gate, d_up);
  kernels::cuda::swiglu_vjp<T>(ctx.stream(), gate.const_view(), up.const_view(), dy.const_view(),
                               d_gate.view(), d_up.view(), add);
}

template <Floating T>
void apply_gelu_tanh(const cuda::context& ctx, const tensor<T, 2, cuda>& x,
                     const tensor<T, 2, cuda>& y) {
  if (y.size() == 0) return;
  kernels::cuda::gelu_tanh<T>(ctx.stream(), x.const_view(), y.view());
}
template <Floating T>
void apply_gelu_tanh_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& x,
                         const tensor<T, 2, cuda>& dy, const tensor<T, 2, cuda>& dx) {
  if (dy.size() == 0 || !dx) return;
  const bool add = !detail::overwrites(dx);
  kernels::cuda::gelu_tanh_vjp<T>(ctx.stream(), x.const_view(), dy.const_view(), dx.view(), add);
}

}  // namespace ssm
