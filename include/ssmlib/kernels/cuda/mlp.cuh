#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/mlp.hpp>
#include <ssmlib/kernels/cuda/rows.cuh>

namespace ssm::kernels::cuda {

namespace detail {

/// GELU by tanh is x s with s = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class R>
SSMLIB_DEVICE value_and_slope<R> gelu_tanh_and_slope(R x) {
  constexpr R twice = static_cast<R>(1.59576912160573071176);  // 2 sqrt(2 / pi)
  // Beyond the bounds s is 0 or 1 and the slope is s; they keep inf * 0 away and let NaN pass.
  const R a = x < R(-30) ? R(-30) : x > R(30) ? R(30) : x;
  const R square = a * a;
  const R s = sigmoid(twice * a * fma(square, R(0.044715), R(1)));
  const R slope_u2 = twice * fma(square, R(3 * 0.044715), R(1));
  return {(x < R(-30) ? R(-30) : x) * s, fma(a * s * (R(1) - s), slope_u2, s)};
}

template <class T>
struct swiglu_rows {
  view<const T, 2> gate, up;
  view<T, 2> y;
  template <int Count>
  SSMLIB_DEVICE void run(index_t row, index_t column, int valid) const {
    const auto g = read_row<Count, T>(gate, row, column, valid);
    auto u = read_row<Count, T>(up, row, column, valid);
#pragma unroll
    for (int e = 0; e < Count; ++e)
      u.v[e] *= silu(g.v[e]);
    write_row<Count, T>(y, row, column, valid, u, false);
  }
};

template <class T>
struct swiglu_vjp_rows {
  view<const T, 2> gate, up, dy;
  view<T, 2> d_gate, d_up;
  bool add;
  template <int Count>
  SSMLIB_DEVICE void run(index_t row, index_t column, int valid) const {
    auto g = read_row<Count, T>(gate, row, column, valid);
    auto u = read_row<Count, T>(up, row, column, valid);
    const auto d = read_row<Count, T>(dy, row, column, valid);
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      const auto s = silu_and_slope(g.v[e]);
      g.v[e] = d.v[e] * u.v[e] * s.slope;
      u.v[e] = d.v[e] * s.value;
    }
    if (d_gate.data) write_row<Count, T>(d_gate, row, column, valid, g, add);
    if (d_up.data) write_row<Count, T>(d_up, row, column, valid, u, add);
  }
};

template <class T>
struct gelu_tanh_rows {
  view<const T, 2> x, dy;  // dy absent: forward
  view<T, 2> y;
  bool add;
  template <int Count>
  SSMLIB_DEVICE void run(index_t row, index_t column, int valid) const {
    auto v = read_row<Count, T>(x, row, column, valid);
    numbers<accum_t<T>, Count> d{};
    if (dy.data) d = read_row<Count, T>(dy, row, column, valid);
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      const auto s = gelu_tanh_and_slope(v.v[e]);
      v.v[e] = dy.data ? d.v[e] * s.slope : s.value;
    }
    write_row<Count, T>(y, row, column, valid, v, add);
  }
};

}  // namespace detail

template <class T>
void swiglu(cudaStream_t stream, view<const T, 2> gate, view<const T, 2> up, view<T, 2> y) {
  detail::check_same_extents("swiglu", "up", gate, up);
  detail::check_same_extents("swiglu", "the result", gate, y);
  constexpr int count = detail::row_vector<T>;
  detail::for_rows<count>("swiglu", stream, y.extents[0], y.extents[1],
                          detail::all_aligned<count>(gate, up, y),
                          detail::swiglu_rows<T>{gate, up, y});
}

template <class T>
void swiglu_vjp(cudaStream_t stream, view<const T, 2> gate, view<const T, 2> up,
                view<const T, 2> dy, view<T, 2> d_gate, view<T, 2> d_up, bool add) {
  detail::check_same_extents("swiglu_vjp", "up", gate, up);
  detail::check_same_extents("swiglu_vjp", "dy", gate, dy);
  detail::check_same_extents("swiglu_vjp", "d_gate", gate, d_gate);
  detail::check_same_extents("swiglu_vjp", "d_up", gate, d_up);
  if (d_gate.data == nullptr && d_up.data == nullptr) return;
  constexpr int count = detail::row_vector<T>;
  detail::for_rows<count>("swiglu_vjp", stream, dy.extents[0], dy.extents[1],
                          detail::all_aligned<count>(gate, up, dy, d_gate, d_up),
                          detail::swiglu_vjp_rows<T>{gate, up, dy, d_gate, d_up, add});
}

template <class T>
void gelu_tanh(cudaStream_t stream, view<const T, 2> x, view<T, 2> y) {
  detail::check_same_extents("gelu_tanh", "the result", x, y);
  constexpr int count = detail::row_vector<T>;
  detail::for_rows<count>("gelu_tanh", stream, y.extents[0], y.extents[1],
                          detail::all_aligned<count>(x, y),
                          detail::gelu_tanh_rows<T>{x, {}, y, false});
}

template <class T>
void gelu_tanh_vjp(cudaStream_t stream, view<const T, 2> x, view<const T, 2> dy, view<T, 2> dx,
                   bool add) {
  detail::check_same_extents("gelu_tanh_vjp", "dy", x, dy);
  detail::check_same_extents("gelu_tanh_vjp", "dx", x, dx);
  constexpr int count = detail::row_vector<T>;
  detail::for_rows<count>("gelu_tanh_vjp", stream, dy.extents[0], dy.extents[1],
                          detail::all_aligned<count>(x, dy, dx),
                          detail::gelu_tanh_rows<T>{x, dy, dx, add});
}

#define SSMLIB_DETAIL_LIST(T)                                                                  \
  SSMLIB_INSTANTIATE(                                                                          \
      cuda_mlp, void swiglu<T>(cudaStream_t, view<const T, 2>, view<const T, 2>, view<T, 2>)); \
  SSMLIB_INSTANTIATE(cuda_mlp,                                                                 \
                     void swiglu_vjp<T>(cudaStream_t, view<const T, 2>, view<const T, 2>,      \
                                        view<const T, 2>, view<T, 2>, view<T, 2>, bool));      \
  SSMLIB_INSTANTIATE(cuda_mlp, void gelu_tanh<T>(cudaStream_t, view<const T, 2>, view<T, 2>)); \
  SSMLIB_INSTANTIATE(cuda_mlp, void gelu_tanh_vjp<T>(cudaStream_t, view<const T, 2>,           \
                                                     view<const T, 2>, view<T, 2>, bool))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
