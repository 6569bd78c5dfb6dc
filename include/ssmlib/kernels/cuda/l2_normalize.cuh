#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/l2_normalize.hpp>
#include <ssmlib/kernels/cuda/rows.cuh>

namespace ssm::kernels::cuda {

namespace detail {

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

}  // namespace detail

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

#define SSMLIB_DETAIL_LIST(T)                                                                \
  SSMLIB_INSTANTIATE(cuda_l2_normalize, void l2_normalize<T>(cudaStream_t, view<const T, 3>, \
                                                             accum_t<T>, view<T, 3>));       \
  SSMLIB_INSTANTIATE(cuda_l2_normalize,                                                      \
                     void l2_normalize_vjp<T>(cudaStream_t, view<const T, 3>, accum_t<T>,    \
                                              view<const T, 3>, view<T, 3>, bool))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
