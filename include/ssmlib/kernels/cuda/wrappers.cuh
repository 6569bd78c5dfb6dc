#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/grid.cuh>
#include <ssmlib/kernels/cuda/wrappers.hpp>

namespace ssm::kernels::cuda {

namespace detail {

/// The place of the head that serves head at[2] of `heads`.
template <class V>
SSMLIB_DEVICE shape<4> served_by(const V& v, shape<4> at, index_t heads) {
  at[2] = at[2] * v.extents[2] / heads;
  return at;
}

template <class T>
__global__ void add_skip_kernel(const __grid_constant__ view<const accum_t<T>, 1> d,
                                const __grid_constant__ view<const T, 4> x,
                                const __grid_constant__ view<T, 4> y) {
  const index_t heads = y.extents[2];
  for_each_element(y.extents, [&](index_t, const shape<4>& at) {
    T& sum = element(y, at);
    const accum_t<T> scale = d.data[at[2] * d.extents[0] / heads * d.strides[0]];
    sum = narrow<T>(widen(sum) + scale * widen(element(x, served_by(x, at, heads))));
  });
}

/// dx: a thread owns an element and adds up the heads that it serves.
template <class T>
__global__ void add_skip_dx_kernel(const __grid_constant__ view<const accum_t<T>, 1> d,
                                   const __grid_constant__ view<const T, 4> dy,
                                   const __grid_constant__ view<T, 4> dx) {
  const index_t heads = dy.extents[2], served = heads / dx.extents[2];
  for_each_element(dx.extents, [&](index_t, shape<4> at) {
    T& target = element(dx, at);
    accum_t<T> sum = widen(target);
    const index_t first = at[2] * served;
    for (at[2] = first; at[2] < first + served; ++at[2]) {
      sum += d.data[at[2] * d.extents[0] / heads * d.strides[0]] * widen(element(dy, at));
    }
    target = narrow<T>(sum);
  });
}

[[nodiscard]] inline index_t skip_slices(const shape<4>& dy) {
  return std::clamp<index_t>(dy[0] * dy[1] * dy[3] / 8192, 1, 64);
}

/// The sum over a slice of the tokens for one head: to (slices, heads).
template <class T>
__global__ __launch_bounds__(grid_threads) void add_skip_dd_kernel(
    const __grid_constant__ view<const T, 4> x, const __grid_constant__ view<const T, 4> dy,
    index_t slices, double* to) {
  __shared__ double warps[grid_threads / 32];
  const index_t heads = dy.extents[2], h = blockIdx.x % heads, slice = blockIdx.x / heads;
  const index_t tokens = dy.extents[0] * dy.extents[1], features = dy.extents[3];
  const index_t begin = tokens * slice / slices, end = tokens * (slice + 1) / slices;
  double sum = 0;
  for (index_t i = begin * features + threadIdx.x; i < end * features; i += grid_threads) {
    const index_t t = i / features;
    const shape<4> at{t / dy.extents[1], t % dy.extents[1], h, i % features};
    sum += static_cast<double>(widen(element(dy, at))) *
           static_cast<double>(widen(element(x, served_by(x, at, heads))));
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < grid_threads / 32; ++i)
    sum += warps[i];
  to[blockIdx.x] = sum;
}
template <class R>
__global__ void add_skip_parts_kernel(const double* parts, index_t slices, index_t heads,
                                      const __grid_constant__ view<R, 1> dd) {
  const index_t groups = dd.extents[0], served = heads / groups;
  for_each_element({1, 1, 1, groups}, [&](index_t g, const shape<4>&) {
    double sum = 0;
    for (index_t h = g * served; h < (g + 1) * served; ++h) {
      for (index_t slice = 0; slice < slices; ++slice)
        sum += parts[slice * heads + h];
    }
    dd.data[g * dd.strides[0]] += static_cast<R>(sum);
  });
}

template <class T>
__global__ void append_ones_kernel(const __grid_constant__ view<const T, 4> x,
                                   const __grid_constant__ view<T, 4> wide) {
  const index_t features = x.extents[3];
  for_each_element(wide.extents, [&](index_t, const shape<4>& at) {
    element(wide, at) =
        at[3] < features ? element(x, at) : narrow<T>(at[3] == features ? 1.f : 0.f);
  });
}

template <class T>
__global__ void divide_rows_kernel(const __grid_constant__ view<const T, 4> wide,
                                   const __grid_constant__ view<T, 4> y) {
  for_each_element(y.extents, [&](index_t, const shape<4>& at) {
    const shape<4> last{at[0], at[1], at[2], y.extents[3]};
    element(y, at) = narrow<T>(widen(element(wide, at)) / widen(element(wide, last)));
  });
}

/// y_i = n_i / z: dn = dy / z and dz = -(dy . y) / z. A warp owns a row.
template <class T>
__global__ __launch_bounds__(grid_threads) void divide_rows_vjp_kernel(
    const __grid_constant__ view<const T, 4> dy, const __grid_constant__ view<T, 4> wide) {
  const index_t features = dy.extents[3], width = wide.extents[3];
  const index_t rows = dy.extents[0] * dy.extents[1] * dy.extents[2];
  const index_t step = index_t{gridDim.x} * (grid_threads / 32);
  for (index_t row = (index_t{blockIdx.x} * grid_threads + threadIdx.x) / 32; row < rows;
       row += step) {
    const index_t token = row / dy.extents[2];
    shape<4> at{token / dy.extents[1], token % dy.extents[1], row % dy.extents[2], features};
    const accum_t<T> scale = accum_t<T>(1) / widen(element(wide, at));
    accum_t<T> sum = 0;
    for (index_t i = threadIdx.x % 32; i < features; i += 32) {
      at[3] = i;
      const accum_t<T> g = widen(element(dy, at)) * scale;
      sum += g * (widen(element(wide, at)) * scale);
      element(wide, at) = narrow<T>(g);
    }
    sum = warp_sum(sum);  // every lane has read z before any lane is past this
    for (index_t i = features + threadIdx.x % 32; i < width; i += 32) {
      at[3] = i;
      element(wide, at) = narrow<T>(i == features ? -sum : accum_t<T>(0));
    }
  }
}

}  // namespace detail

template <class T>
void add_skip(cudaStream_t stream, view<const accum_t<T>, 1> d, view<const T, 4> x, view<T, 4> y) {
  if (y.size() == 0) return;
  detail::add_skip_kernel<T><<<grid_for(y.size()), grid_threads, 0, stream>>>(d, x, y);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
std::size_t add_skip_vjp_workspace_bytes(view<const T, 4> dy) {
  return static_cast<std::size_t>(detail::skip_slices(dy.extents) * dy.extents[2]) * sizeof(double);
}
template <class T>
void add_skip_vjp(cudaStream_t stream, view<const accum_t<T>, 1> d, view<const T, 4> x,
                  view<const T, 4> dy, view<accum_t<T>, 1> dd, view<T, 4> dx, void* workspace) {
  if (dy.size() == 0) return;
  if (dx) {
    detail::add_skip_dx_kernel<T><<<grid_for(dx.size()), grid_threads, 0, stream>>>(d, dy, dx);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  if (!dd) return;
  auto* parts = static_cast<double*>(workspace);
  const index_t slices = detail::skip_slices(dy.extents), heads = dy.extents[2];
  detail::add_skip_dd_kernel<T>
      <<<static_cast<unsigned>(slices * heads), grid_threads, 0, stream>>>(x, dy, slices, parts);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  detail::add_skip_parts_kernel<accum_t<T>>
      <<<grid_for(dd.extents[0]), grid_threads, 0, stream>>>(parts, slices, heads, dd);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void append_ones(cudaStream_t stream, view<const T, 4> x, view<T, 4> wide) {
  if (wide.size() == 0) return;
  detail::append_ones_kernel<T><<<grid_for(wide.size()), grid_threads, 0, stream>>>(x, wide);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
template <class T>
void divide_rows(cudaStream_t stream, view<const T, 4> wide, view<T, 4> y) {
  if (y.size() == 0) return;
  detail::divide_rows_kernel<T><<<grid_for(y.size()), grid_threads, 0, stream>>>(wide, y);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
template <class T>
void divide_rows_vjp(cudaStream_t stream, view<const T, 4> dy, view<T, 4> wide) {
  if (dy.size() == 0) return;
  const index_t rows = dy.extents[0] * dy.extents[1] * dy.extents[2];
  detail::divide_rows_vjp_kernel<T><<<grid_for(rows * 32), grid_threads, 0, stream>>>(dy, wide);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_wrappers, void add_skip<T>(cudaStream_t, view<const accum_t<T>, 1>,      \
                                                     view<const T, 4>, view<T, 4>));               \
  SSMLIB_INSTANTIATE(cuda_wrappers,                                                                \
                     std::size_t add_skip_vjp_workspace_bytes<T>(view<const T, 4>));               \
  SSMLIB_INSTANTIATE(cuda_wrappers, void add_skip_vjp<T>(cudaStream_t, view<const accum_t<T>, 1>,  \
                                                         view<const T, 4>, view<const T, 4>,       \
                                                         view<accum_t<T>, 1>, view<T, 4>, void*)); \
  SSMLIB_INSTANTIATE(cuda_wrappers,                                                                \
                     void append_ones<T>(cudaStream_t, view<const T, 4>, view<T, 4>));             \
  SSMLIB_INSTANTIATE(cuda_wrappers,                                                                \
                     void divide_rows<T>(cudaStream_t, view<const T, 4>, view<T, 4>));             \
  SSMLIB_INSTANTIATE(cuda_wrappers,                                                                \
                     void divide_rows_vjp<T>(cudaStream_t, view<const T, 4>, view<T, 4>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
