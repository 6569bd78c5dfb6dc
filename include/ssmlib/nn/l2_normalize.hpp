#pragma once

#include <ssmlib/kernels/cpu/l2_normalize.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/pass.hpp>

#include <string>

namespace ssm {

namespace op {

/// Every head's vector at length one: y = x / sqrt(|x|^2 + eps), as the delta rule wants its keys.
///
/// @param x    (b, T, H, N); may be a slice of a larger tensor
/// @param eps  added to the squared length; with 0 a zero vector stays zero
/// @return     (b, T, H, N)
/// @throws value_error  eps is negative.
template <Real T>
[[nodiscard]] tensor<T, 4> l2_normalize(const pass<T>& p, const tensor<T, 4>& x,
                                        double eps = 1e-6) {
  if (!(eps >= 0)) {
    throw value_error("ssm: l2_normalize: eps is " + std::to_string(eps) +
                      "; wanted a number that is not negative");
  }
  const tensor<T, 3> rows = detail::input_tokens(x);
  tensor<T, 4> y(x.extents());
  kernels::l2_normalize<T>(p.ctx, rows.const_view(), static_cast<T>(eps),
                           detail::input_tokens(y).view());
  if (p.tape == nullptr || !p.tape->wants(x)) return y;
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 4> dx(t->gradient(x));
    kernels::l2_normalize_vjp<T>(ctx, rows.const_view(), static_cast<T>(eps),
                                 detail::input_tokens(t->gradient(y)).const_view(),
                                 dx.get().view());
    dx.finish();
  });
  return y;
}

}  // namespace op

using op::l2_normalize;

}  // namespace ssm
