#pragma once

#include <ssmlib/kernels/cpu/l2_normalize.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/pass.hpp>

#include <string>

namespace ssm {

template <Real T>
void apply_l2_normalize(const cpu::context& ctx, const tensor<T, 3>& x, double eps,
                        const tensor<T, 3>& y) {
  kernels::l2_normalize<T>(ctx, x.const_view(), static_cast<T>(eps), y.view());
}
template <Real T>
void apply_l2_normalize_vjp(const cpu::context& ctx, const tensor<T, 3>& x, double eps,
                            const tensor<T, 3>& dy, const tensor<T, 3>& dx) {
  kernels::l2_normalize_vjp<T>(ctx, x.const_view(), static_cast<T>(eps), dy.const_view(),
                               dx.view());
}

namespace op {

/// Every head's vector at length one: y = x / sqrt(|x|^2 + eps), as the delta rule wants its keys.
///
/// @param x    (b, T, H, N); may be a slice of a larger tensor
/// @param eps  added to the squared length; with 0 a zero vector stays zero
/// @return     (b, T, H, N)
/// @throws value_error  eps is negative.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 4, B> l2_normalize(const pass<T, B>& p, const tensor<T, 4, B>& x,
                                           double eps = 1e-6) {
  if (!(eps >= 0)) {
    throw value_error("ssm: l2_normalize: eps is " + std::to_string(eps) +
                      "; wanted a number that is not negative");
  }
  const typename B::scope scope(p.ctx);
  const tensor<T, 3, B> rows = detail::input_tokens(x);
  tensor<T, 4, B> y(x.extents());
  apply_l2_normalize(p.ctx, rows, eps, detail::input_tokens(y));
  if (p.tape == nullptr || !p.tape->wants(x)) return y;
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 4, B> dx(t->gradient(x));
    apply_l2_normalize_vjp(ctx, rows, eps, detail::input_tokens(t->gradient(y)), dx.get());
    dx.finish();
  });
  return y;
}

}  // namespace op

using op::l2_normalize;

}  // namespace ssm
