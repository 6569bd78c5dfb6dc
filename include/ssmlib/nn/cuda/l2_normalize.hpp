#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/kernels/cuda/l2_normalize.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/nn/l2_normalize.hpp>

namespace ssm {

template <Floating T>
void apply_l2_normalize(const cuda::context& ctx, const tensor<T, 3, cuda>& x, double eps,
                        const tensor<T, 3, cuda>& y) {
  if (y.size() == 0) return;
  kernels::cuda::l2_normalize<T>(ctx.stream(), x.const_view(), static_cast<accum_t<T>>(eps),
                                 y.view());
}
template <Floating T>
void apply_l2_normalize_vjp(const cuda::context& ctx, const tensor<T, 3, cuda>& x, double eps,
                            const tensor<T, 3, cuda>& dy, const tensor<T, 3, cuda>& dx) {
  if (dy.size() == 0 || !dx) return;
  const bool add = !detail::overwrites(dx);
  kernels::cuda::l2_normalize_vjp<T>(ctx.stream(), x.const_view(), static_cast<accum_t<T>>(eps),
                                     dy.const_view(), dx.view(), add);
}

}  // namespace ssm
