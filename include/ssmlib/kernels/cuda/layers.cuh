#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/layers.hpp>
#include <ssmlib/kernels/cuda/rows.cuh>

namespace ssm::kernels::cuda {

namespace detail {

template <class T>
inline constexpr int row_vector = 16 / static_cast<int>(sizeof(T));

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

// ---- unit lengths -------------------------------------------------------------------------------

template <class T>
struct l2_arguments {
  view<const T, 3> x, dy;  // dy absent: forward
  view<T, 3> y;
  accum_t<T> eps;
  bool add;
  int lanes;  // of a vector, a power of two up to 32
};

/// `lanes` threads have a vector, Items times Count numbers each; with Items = 0 they read it
/// twice.
template <int Items, int Count, class T>
__global__ void __launch_bounds__(row_threads)
    l2_normalize_kernel(const __grid_constant__ l2_arguments<T> o) {
  using R = accum_t<T>;
  const index_t heads = o.x.extents[1], n = o.x.extents[2];
  const index_t vector = (index_t{blockIdx.x} * row_threads + threadIdx.x) >> (31 - __clz(o.lanes));
  const int lane = threadIdx.x & (o.lanes - 1);
  const bool mine = vector < o.x.extents[0] * heads;  // others take part in the sums
  const index_t t = mine ? quotient(vector, heads) : 0, h = mine ? vector - t * heads : 0;
  const auto row = [&](const auto& v) {
    auto flat = view<std::remove_pointer_t<decltype(v.data)>, 2>{};
    flat.data = v.data + t * v.strides[0] + h * v.strides[1];
    return flat;
  };
  const view<const T, 2> from = row(o.x);
  const view<const T, 2> cotangent = o.dy.data ? row(o.dy) : view<const T, 2>{};
  numbers<R, Count> x[Items > 0 ? Items : 1], d[Items > 0 ? Items : 1];
  R squares = R(0), along = R(0);
  const auto each = [&](auto f) {
    if constexpr (Items > 0) {
#pragma unroll
      for (int i = 0; i < Items; ++i) {
        const index_t c = index_t{(i * o.lanes + lane) * Count};
        if (mine && c < n) f(i, c, static_cast<int>(min(index_t{Count}, n - c)));
      }
    } else {
      for (index_t c = index_t{lane} * Count; mine && c < n; c += index_t{o.lanes} * Count)
        f(0, c, static_cast<int>(min(index_t{Count}, n - c)));
    }
  };
  const auto load = [&](int i, index_t c, int valid) {
    x[i] = read_row<Count, T>(from, 0, c, valid);
    if (o.dy.data) d[i] = read_row<Count, T>(cotangent, 0, c, valid);
  };
  each([&](int i, index_t c, int valid) {
    load(i, c, valid);
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      squares = fma(x[i].v[e], x[i].v[e], squares);
      if (o.dy.data) along = fma(x[i].v[e], d[i].v[e], along);
    }
  });
  for (int step = o.lanes / 2; step > 0; step /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, step);
    along += __shfl_xor_sync(0xffffffffu, along, step);
  }
  squares += o.eps;
  const R inverse = squares > R(0) ? R(1) / sqrt(squares) : squares * R(0);
  along *= inverse * inverse;
  const view<T, 2> to = row(o.y);
  each([&](int i, index_t c, int valid) {
    if constexpr (Items == 0) load(i, c, valid);
#pragma unroll
    for (int e = 0; e < Count; ++e)
      x[i].v[e] = inverse * (o.dy.data ? fma(-along, x[i].v[e], d[i].v[e]) : x[i].v[e]);
    write_row<Count, T>(to, 0, c, valid, x[i], o.add);
  });
}

template <class T>
void launch_l2_normalize(const char* name, cudaStream_t stream, l2_arguments<T> o) {
  constexpr int count = row_vector<T>;
  const index_t vectors = o.x.extents[0] * o.x.extents[1], n = o.x.extents[2];
  if (vectors * n == 0) return;
  const auto heads_aligned = [](const auto& v) {
    return v.data == nullptr || rows_are_aligned(v.data, v.strides[1], row_vector<T>);
  };
  const bool aligned = all_aligned<count>(o.x, o.dy, o.y) && heads_aligned(o.x) &&
                       heads_aligned(o.dy) && heads_aligned(o.y);
  const index_t needed = (n + count - 1) / count;
  o.lanes = 32;
  while (aligned && o.lanes > 1 && o.lanes / 2 >= needed)
    o.lanes /= 2;
  const unsigned blocks = row_blocks(name, (vectors * o.lanes + row_threads - 1) / row_threads);
  if (aligned && needed <= 32) {
    l2_normalize_kernel<1, count, T><<<blocks, row_threads, 0, stream>>>(o);
  } else if (aligned && needed <= 128) {
    l2_normalize_kernel<4, count, T><<<blocks, row_threads, 0, stream>>>(o);
  } else {
    l2_normalize_kernel<0, 1, T><<<blocks, row_threads, 0, stream>>>(o);
  }
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

// ---- step sizes ---------------------------------------------------------------------------------

inline constexpr int discretize_vector = 4;

template <class T>
struct discretize_rows {
  using R = accum_t<T>;
  discretize_problem<T> p;
  view<R, 2> delta, log_a;
  template <int Count>
  SSMLIB_DEVICE void run(index_t row, index_t column, int valid) const {
    auto step = read_row<Count, T>(p.dt, row, column, valid);
    numbers<R, Count> decay{};
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      if (e >= valid) break;
      const R r = p.bias ? step.v[e] + p.bias[column + e] : step.v[e];
      step.v[e] = min(max(softplus(r), p.low), p.high);
      decay.v[e] = step.v[e] * p.a[column + e];
    }
    write_row<Count, R>(delta, row, column, valid, step, false);
    write_row<Count, R>(log_a, row, column, valid, decay, false);
  }
};

template <class T>
struct discretize_vjp_arguments {
  using R = accum_t<T>;
  discretize_problem<T> p;
  view<const R, 2> d_delta, d_log_a;
  view<T, 2> d_dt;
  R* parts;  // (part_count, 2, heads) sums for a and the bias, or absent
  index_t part_count, column_blocks;
  bool add;
};

/// A block has 32 heads and eight tokens at a time of its part.
template <class T>
__global__ void __launch_bounds__(row_threads)
    discretize_vjp_kernel(const __grid_constant__ discretize_vjp_arguments<T> o) {
  using R = accum_t<T>;
  __shared__ R shared[2][8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t part = blockIdx.x / o.column_blocks, heads = o.p.dt.extents[1];
  const index_t h = (blockIdx.x % o.column_blocks) * 32 + lane;
  R d_a = R(0), d_bias = R(0);
  if (h < heads) {
    const R a = o.p.a[h], bias = o.p.bias ? o.p.bias[h] : R(0);
    constexpr int ahead = 4;  // tokens on their way
    const index_t tokens = o.p.dt.extents[0], stride = o.part_count * 8;
    for (index_t first = part * 8 + warp; first < tokens; first += ahead * stride) {
      R dt[ahead], dl[ahead], dd[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const index_t t = min(first + i * stride, tokens - 1);
        dt[i] = widen(o.p.dt.data[t * o.p.dt.strides[0] + h]);
        dl[i] = o.d_log_a.data[t * o.d_log_a.strides[0] + h];
        dd[i] = o.d_delta.data[t * o.d_delta.strides[0] + h];
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const index_t t = first + i * stride;
        if (t >= tokens) break;
        const R r = dt[i] + bias, raw = softplus(r), step = min(max(raw, o.p.low), o.p.high);
        const R slope = r > R(20) ? R(1) : sigmoid(r);
        const R ds = fma(a, dl[i], dd[i]);
        const R dr = raw < o.p.low || raw > o.p.high ? R(0) : ds * slope;
        if (o.d_dt.data) {
          T* to = o.d_dt.data + t * o.d_dt.strides[0] + h;
          *to = narrow<T>(o.add ? widen(*to) + dr : dr);
        }
        d_a = fma(dl[i], step, d_a);
        d_bias += dr;
      }
    }
  }
  if (o.parts == nullptr) return;
  shared[0][warp][lane] = d_a;
  shared[1][warp][lane] = d_bias;
  __syncthreads();
  if (warp > 1 || h >= heads) return;
  R sum = shared[warp][0][lane];
#pragma unroll
  for (int w = 1; w < 8; ++w)
    sum += shared[warp][w][lane];
  o.parts[(part * 2 + warp) * heads + h] = sum;
}

/// a and the bias from the parts, eight of which are on their way at once.
template <class R>
__global__ void __launch_bounds__(row_threads)
    discretize_sum_kernel(const R* parts, index_t part_count, index_t heads, R* a, R* bias,
                          bool add) {
  __shared__ R shared[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t c = index_t{blockIdx.x} * 32 + lane;  // of both, one after the other
  R sum = R(0);
  if (c < 2 * heads) {
#pragma unroll 8
    for (index_t k = warp; k < part_count; k += 8)
      sum += parts[k * 2 * heads + c];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= 2 * heads) return;
#pragma unroll
  for (int w = 1; w < 8; ++w)
    sum += shared[w][lane];
  R* to = c < heads ? a : bias;
  if (to == nullptr) return;
  to += c < heads ? c : c - heads;
  *to = add ? *to + sum : sum;
}

[[nodiscard]] inline index_t discretize_parts(index_t tokens, index_t heads) {
  const index_t column_blocks = std::max<index_t>(1, (heads + 31) / 32);
  return std::clamp<index_t>((tokens + 63) / 64, 1, std::max<index_t>(1, 528 / column_blocks));
}

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

template <class T>
void l2_normalize(cudaStream_t stream, view<const T, 3> x, accum_t<T> eps, view<T, 3> y) {
  detail::check_same_extents("l2_normalize", "the result", x, y);
  detail::launch_l2_normalize<T>("l2_normalize", stream, {x, {}, y, eps, false, 32});
}

template <class T>
void l2_normalize_vjp(cudaStream_t stream, view<const T, 3> x, accum_t<T> eps, view<const T, 3> dy,
                      view<T, 3> dx, bool add) {
  detail::check_same_extents("l2_normalize_vjp", "dy", x, dy);
  detail::check_same_extents("l2_normalize_vjp", "dx", x, dx);
  detail::launch_l2_normalize<T>("l2_normalize_vjp", stream, {x, dy, dx, eps, add, 32});
}

template <class T>
void discretize(cudaStream_t stream, const discretize_problem<T>& p, view<accum_t<T>, 2> delta,
                view<accum_t<T>, 2> log_a) {
  detail::check_same_extents("discretize", "delta", p.dt, delta);
  detail::check_same_extents("discretize", "log_a", p.dt, log_a);
  constexpr int count = detail::discretize_vector;
  detail::for_rows<count>("discretize", stream, p.dt.extents[0], p.dt.extents[1],
                          detail::all_aligned<count>(p.dt, delta, log_a),
                          detail::discretize_rows<T>{p, delta, log_a});
}

template <class T>
std::size_t discretize_vjp_workspace_bytes(const discretize_problem<T>& p) {
  const index_t tokens = p.dt.extents[0], heads = p.dt.extents[1];
  return static_cast<std::size_t>(detail::discretize_parts(tokens, heads) * 2 * heads) *
         sizeof(accum_t<T>);
}

template <class T>
void discretize_vjp(cudaStream_t stream, const discretize_problem<T>& p,
                    view<const accum_t<T>, 2> d_delta, view<const accum_t<T>, 2> d_log_a,
                    const discretize_gradients<T>& d, void* workspace) {
  using R = accum_t<T>;
  detail::check_same_extents("discretize_vjp", "d_delta", p.dt, d_delta);
  detail::check_same_extents("discretize_vjp", "d_log_a", p.dt, d_log_a);
  detail::check_same_extents("discretize_vjp", "d_dt", p.dt, d.dt);
  const index_t tokens = p.dt.extents[0], heads = p.dt.extents[1];
  if (heads == 0) return;
  const bool sums = d.a != nullptr || d.bias != nullptr;
  const detail::discretize_vjp_arguments<T> o{p,
                                              d_delta,
                                              d_log_a,
                                              d.dt,
                                              sums ? static_cast<R*>(workspace) : nullptr,
                                              detail::discretize_parts(tokens, heads),
                                              (heads + 31) / 32,
                                              d.add};
  detail::discretize_vjp_kernel<T>
      <<<detail::row_blocks("discretize_vjp", o.part_count * o.column_blocks), detail::row_threads,
         0, stream>>>(o);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (!sums) return;
  detail::discretize_sum_kernel<R>
      <<<static_cast<unsigned>((2 * heads + 31) / 32), detail::row_threads, 0, stream>>>(
          o.parts, o.part_count, heads, d.a, d.bias, d.add);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      cuda_layers, void swiglu<T>(cudaStream_t, view<const T, 2>, view<const T, 2>, view<T, 2>));  \
  SSMLIB_INSTANTIATE(cuda_layers,                                                                  \
                     void swiglu_vjp<T>(cudaStream_t, view<const T, 2>, view<const T, 2>,          \
                                        view<const T, 2>, view<T, 2>, view<T, 2>, bool));          \
  SSMLIB_INSTANTIATE(cuda_layers, void gelu_tanh<T>(cudaStream_t, view<const T, 2>, view<T, 2>));  \
  SSMLIB_INSTANTIATE(cuda_layers, void gelu_tanh_vjp<T>(cudaStream_t, view<const T, 2>,            \
                                                        view<const T, 2>, view<T, 2>, bool));      \
  SSMLIB_INSTANTIATE(                                                                              \
      cuda_layers, void l2_normalize<T>(cudaStream_t, view<const T, 3>, accum_t<T>, view<T, 3>));  \
  SSMLIB_INSTANTIATE(cuda_layers,                                                                  \
                     void l2_normalize_vjp<T>(cudaStream_t, view<const T, 3>, accum_t<T>,          \
                                              view<const T, 3>, view<T, 3>, bool));                \
  SSMLIB_INSTANTIATE(cuda_layers, void discretize<T>(cudaStream_t, const discretize_problem<T>&,   \
                                                     view<accum_t<T>, 2>, view<accum_t<T>, 2>));   \
  SSMLIB_INSTANTIATE(cuda_layers,                                                                  \
                     std::size_t discretize_vjp_workspace_bytes<T>(const discretize_problem<T>&)); \
  SSMLIB_INSTANTIATE(cuda_layers,                                                                  \
                     void discretize_vjp<T>(cudaStream_t, const discretize_problem<T>&,            \
                                            view<const accum_t<T>, 2>, view<const accum_t<T>, 2>,  \
                                            const discretize_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
