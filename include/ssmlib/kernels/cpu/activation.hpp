#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/rows.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>

namespace ssm::kernels {

/// A value and its derivative.
template <Real T>
struct value_and_slope {
  simd::pack<T> value, slope;
};

/// silu(x) = x s and silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x).
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE value_and_slope<T> silu_and_slope(simd::pack<T> x) {
  using P = simd::pack<T>;
  const P clamped = max(x, P(T(-800)));  // keeps -inf * 0 away
  const P s = simd::sigmoid(clamped), y = clamped * s;
  return {y, simd::fma(y, P(T(1)) - s, s)};
}

/// GELU by tanh, x s with s = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE value_and_slope<T> gelu_tanh_and_slope(simd::pack<T> x) {
  using P = simd::pack<T>;
  constexpr T twice = static_cast<T>(1.59576912160573071176);  // 2 sqrt(2 / pi)
  // Beyond the bounds s is 0 or 1 and the slope is s; they keep inf * 0 away.
  const P a = min(max(x, P(T(-30))), P(T(30)));
  const P square = a * a;
  const P u2 = P(twice) * a * simd::fma(square, P(T(0.044715)), P(T(1)));
  const P s = simd::sigmoid(u2);
  const P slope_u2 = P(twice) * simd::fma(square, P(T(3 * 0.044715)), P(T(1)));
  return {max(x, P(T(-30))) * s, simd::fma(a * s * (P(T(1)) - s), slope_u2, s)};
}

/// y = silu(gate) * up, row by row. All (tokens, width) with unit inner stride.
template <Real T>
void swiglu(const cpu::context& ctx, view<const T, 2> gate, view<const T, 2> up, view<T, 2> y) {
  using P = simd::pack<T>;
  const index_t rows = y.extent(0), width = y.extent(1);
  for_each_piece(ctx, rows, row_pieces(rows, width), [&](index_t, index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      simd::map(width, gate.data + t * gate.stride(0), up.data + t * up.stride(0),
                y.data + t * y.stride(0),
                [](P g, P u) SSMLIB_LAMBDA_INLINE { return simd::silu(g) * u; });
    }
  });
}

/// Adds to d_gate and d_up, where they are wanted.
template <Real T>
void swiglu_vjp(const cpu::context& ctx, view<const T, 2> gate, view<const T, 2> up,
                view<const T, 2> dy, view<T, 2> d_gate, view<T, 2> d_up) {
  using P = simd::pack<T>;
  const index_t rows = dy.extent(0), width = dy.extent(1);
  for_each_piece(ctx, rows, row_pieces(rows, 2 * width), [&](index_t, index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const T *g = gate.data + t * gate.stride(0), *u = up.data + t * up.stride(0);
      const T* d = dy.data + t * dy.stride(0);
      T* dg = d_gate ? d_gate.data + t * d_gate.stride(0) : nullptr;
      T* du = d_up ? d_up.data + t * d_up.stride(0) : nullptr;
      detail::for_packs<T>(width, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
        const auto s = silu_and_slope(detail::load_up_to(g + i, count));
        const P cotangent = detail::load_up_to(d + i, count);
        if (dg) {
          detail::add_up_to(dg + i, count, cotangent * detail::load_up_to(u + i, count) * s.slope);
        }
        if (du) detail::add_up_to(du + i, count, cotangent * s.value);
      });
    }
  });
}

/// y = gelu_tanh(x), row by row.
template <Real T>
void gelu_tanh(const cpu::context& ctx, view<const T, 2> x, view<T, 2> y) {
  using P = simd::pack<T>;
  const index_t rows = y.extent(0), width = y.extent(1);
  for_each_piece(ctx, rows, row_pieces(rows, width), [&](index_t, index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      simd::map(width, x.data + t * x.stride(0), y.data + t * y.stride(0),
                [](P v) SSMLIB_LAMBDA_INLINE { return simd::gelu_tanh(v); });
    }
  });
}

/// Adds to dx.
template <Real T>
void gelu_tanh_vjp(const cpu::context& ctx, view<const T, 2> x, view<const T, 2> dy,
                   view<T, 2> dx) {
  using P = simd::pack<T>;
  const index_t rows = dy.extent(0), width = dy.extent(1);
  for_each_piece(ctx, rows, row_pieces(rows, width), [&](index_t, index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const T *v = x.data + t * x.stride(0), *d = dy.data + t * dy.stride(0);
      T* out = dx.data + t * dx.stride(0);
      detail::for_packs<T>(width, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
        const P slope = gelu_tanh_and_slope(detail::load_up_to(v + i, count)).slope;
        detail::add_up_to(out + i, count, detail::load_up_to(d + i, count) * slope);
      });
    }
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(layers, void swiglu<T>(const cpu::context&, view<const T, 2>,               \
                                            view<const T, 2>, view<T, 2>));                      \
  SSMLIB_INSTANTIATE(layers,                                                                     \
                     void swiglu_vjp<T>(const cpu::context&, view<const T, 2>, view<const T, 2>, \
                                        view<const T, 2>, view<T, 2>, view<T, 2>));              \
  SSMLIB_INSTANTIATE(layers,                                                                     \
                     void gelu_tanh<T>(const cpu::context&, view<const T, 2>, view<T, 2>));      \
  SSMLIB_INSTANTIATE(layers, void gelu_tanh_vjp<T>(const cpu::context&, view<const T, 2>,        \
                                                   view<const T, 2>, view<T, 2>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
