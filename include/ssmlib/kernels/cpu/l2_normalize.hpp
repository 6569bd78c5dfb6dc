#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/reduce.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cmath>

namespace ssm::kernels {

namespace detail {

/// 1 / sqrt(|x|^2 + eps); 0 for a row of zeros without eps, so that it stays zero.
template <Real T>
[[nodiscard]] T inverse_length(index_t n, const T* x, T eps) {
  const T squares = sum_of_squares(n, x) + eps;
  return squares > T(0) ? T(1) / std::sqrt(squares) : T(0);
}

/// f(token, head) for all, tokens in parallel.
template <class F>
void for_each_row(const cpu::context& ctx, index_t tokens, index_t heads, F f) {
  ctx.parallel_ranges(tokens, 32, 1, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < heads; ++h)
        f(t, h);
    }
  });
}

}  // namespace detail

/// y = x / sqrt(|x|^2 + eps) for every (token, head).
/// @param x, y  (tokens, heads, N), unit inner stride; y is overwritten
template <Real T>
void l2_normalize(const cpu::context& ctx, view<const T, 3> x, T eps, view<T, 3> y) {
  const index_t n = x.extents[2];
  detail::for_each_row(ctx, x.extents[0], x.extents[1], [&](index_t t, index_t h) {
    using P = simd::pack<T>;
    const T* from = &x(t, h, 0);
    const P inverse(detail::inverse_length(n, from, eps));
    simd::map(n, from, &y(t, h, 0), [=](P v) { return inverse * v; });
  });
}

/// dx += (dy - y (y . dy)) / sqrt(|x|^2 + eps).
template <Real T>
void l2_normalize_vjp(const cpu::context& ctx, view<const T, 3> x, T eps, view<const T, 3> dy,
                      view<T, 3> dx) {
  const index_t n = x.extents[2];
  detail::for_each_row(ctx, x.extents[0], x.extents[1], [&](index_t t, index_t h) {
    const T* from = &x(t, h, 0);
    const T inverse = detail::inverse_length(n, from, eps);
    const T along = dot(n, from, &dy(t, h, 0)) * inverse * inverse;
    axpy(n, inverse, &dy(t, h, 0), &dx(t, h, 0));
    axpy(n, -inverse * along, from, &dx(t, h, 0));
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(layers,                                                                      \
                     void l2_normalize<T>(const cpu::context&, view<const T, 3>, T, view<T, 3>)); \
  SSMLIB_INSTANTIATE(layers, void l2_normalize_vjp<T>(const cpu::context&, view<const T, 3>, T,   \
                                                      view<const T, 3>, view<T, 3>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
