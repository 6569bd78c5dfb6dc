#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/channels.hpp>
#include <ssmlib/kernels/cuda/grid.cuh>

namespace ssm::kernels::cuda {

namespace detail {

template <class T>
__global__ void __launch_bounds__(grid_threads)
    outer_channels_kernel(const __grid_constant__ channel_problem<T> p,
                          const __grid_constant__ view<accum_t<T>, 4> z) {
  const index_t heads = z.extents[2], width = p.v.extents[3];
  for_each_element(z.extents, [&](index_t, const shape<4>& at) {
    const index_t j = at[3] / width;
    const shape<4> u{at[0], at[1], group_of(at[2], heads, p.u.extents[2]), p.first + j};
    const shape<4> v{at[0], at[1], group_of(at[2], heads, p.v.extents[2]), at[3] - j * width};
    element(z, at) = p.scale * widen(element(p.u, u)) * widen(element(p.v, v));
  });
}

/// A warp a sum, its lanes side by side along p.
template <class T>
__global__ void __launch_bounds__(grid_threads)
    add_channels_to_u_kernel(const __grid_constant__ channel_problem<T> p,
                             const __grid_constant__ view<const accum_t<T>, 4> z,
                             const __grid_constant__ view<accum_t<T>, 4> to) {
  using A = accum_t<T>;
  const index_t heads = z.extents[2], width = p.v.extents[3], time = to.extents[1];
  const index_t groups = to.extents[2], share = heads / groups;
  const index_t sums = to.extents[0] * time * groups * p.count;
  const index_t warps = index_t{gridDim.x} * (grid_threads / 32), lane = threadIdx.x % 32;
  for (index_t i = index_t{blockIdx.x} * (grid_threads / 32) + threadIdx.x / 32; i < sums;
       i += warps) {
    const index_t j = i % p.count, g = i / p.count % groups, token = i / p.count / groups;
    const shape<4> at{token / time, token % time, g, p.first + j};
    A sum = A(0);
    for (index_t h = g * share; h < (g + 1) * share; ++h) {
      const index_t hv = group_of(h, heads, p.v.extents[2]);
      for (index_t f = lane; f < width; f += 32) {
        sum = fma(element(z, {at[0], at[1], h, j * width + f}),
                  widen(element(p.v, {at[0], at[1], hv, f})), sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) element(to, at) += p.scale * sum;
  }
}

template <class T>
__global__ void __launch_bounds__(grid_threads)
    add_channels_to_v_kernel(const __grid_constant__ channel_problem<T> p,
                             const __grid_constant__ view<const accum_t<T>, 4> z,
                             const __grid_constant__ view<accum_t<T>, 4> to) {
  using A = accum_t<T>;
  const index_t heads = z.extents[2], width = to.extents[3], share = heads / to.extents[2];
  for_each_element(to.extents, [&](index_t, const shape<4>& at) {
    A sum = A(0);
    for (index_t h = at[2] * share; h < (at[2] + 1) * share; ++h) {
      const index_t hu = group_of(h, heads, p.u.extents[2]);
      for (index_t j = 0; j < p.count; ++j) {
        sum = fma(widen(element(p.u, {at[0], at[1], hu, p.first + j})),
                  element(z, {at[0], at[1], h, j * width + at[3]}), sum);
      }
    }
    element(to, at) += p.scale * sum;
  });
}

}  // namespace detail

template <class T>
void outer_channels(cudaStream_t stream, const channel_problem<T>& p, view<accum_t<T>, 4> z) {
  if (z.size() == 0) return;
  detail::outer_channels_kernel<T><<<grid_for(z.size()), grid_threads, 0, stream>>>(p, z);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
template <class T>
void add_channels_to_u(cudaStream_t stream, const channel_problem<T>& p,
                       view<const accum_t<T>, 4> z, view<accum_t<T>, 4> to) {
  const index_t sums = to.extents[0] * to.extents[1] * to.extents[2] * p.count;
  if (sums == 0) return;
  detail::add_channels_to_u_kernel<T><<<grid_for(32 * sums), grid_threads, 0, stream>>>(p, z, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
template <class T>
void add_channels_to_v(cudaStream_t stream, const channel_problem<T>& p,
                       view<const accum_t<T>, 4> z, view<accum_t<T>, 4> to) {
  if (to.size() == 0) return;
  detail::add_channels_to_v_kernel<T><<<grid_for(to.size()), grid_threads, 0, stream>>>(p, z, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(                                                                            \
      cuda_channels,                                                                             \
      void outer_channels<T>(cudaStream_t, const channel_problem<T>&, view<accum_t<T>, 4>));     \
  SSMLIB_INSTANTIATE(cuda_channels,                                                              \
                     void add_channels_to_u<T>(cudaStream_t, const channel_problem<T>&,          \
                                               view<const accum_t<T>, 4>, view<accum_t<T>, 4>)); \
  SSMLIB_INSTANTIATE(cuda_channels,                                                              \
                     void add_channels_to_v<T>(cudaStream_t, const channel_problem<T>&,          \
                                               view<const accum_t<T>, 4>, view<accum_t<T>, 4>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
