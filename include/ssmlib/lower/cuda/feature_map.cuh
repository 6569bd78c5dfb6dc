#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/grid.cuh>
#include <ssmlib/lower/cuda/feature_map.hpp>

namespace ssm::detail {

template <class Phi, class T>
__global__ void map_features_kernel(const __grid_constant__ view<const T, 4> from, T* to) {
  kernels::cuda::for_each_element(from.extents, [&](index_t i, const shape<4>& at) {
    const accum_t<T> x = kernels::cuda::widen(kernels::cuda::element(from, at));
    to[i] = kernels::cuda::narrow<T>(Phi::value(x));
  });
}
template <class Phi, class T>
__global__ void map_features_vjp_kernel(const __grid_constant__ view<const T, 4> from,
                                        const T* gradient, const __grid_constant__ view<T, 4> to) {
  kernels::cuda::for_each_element(from.extents, [&](index_t i, const shape<4>& at) {
    T& sum = kernels::cuda::element(to, at);
    const accum_t<T> x = kernels::cuda::widen(kernels::cuda::element(from, at));
    sum = kernels::cuda::narrow<T>(kernels::cuda::widen(sum) +
                                   kernels::cuda::widen(gradient[i]) * Phi::slope(x));
  });
}

template <class Phi, class T>
void map_features(cudaStream_t stream, view<const T, 4> from, T* to) {
  if (from.size() == 0) return;
  map_features_kernel<Phi, T>
      <<<kernels::cuda::grid_for(from.size()), kernels::cuda::grid_threads, 0, stream>>>(from, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
template <class Phi, class T>
void map_features_vjp(cudaStream_t stream, view<const T, 4> from, const T* gradient,
                      view<T, 4> to) {
  if (from.size() == 0) return;
  map_features_vjp_kernel<Phi, T>
      <<<kernels::cuda::grid_for(from.size()), kernels::cuda::grid_threads, 0, stream>>>(
          from, gradient, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(Phi, T)                                                   \
  SSMLIB_INSTANTIATE(cuda_feature_map,                                               \
                     void map_features<Phi, T>(cudaStream_t, view<const T, 4>, T*)); \
  SSMLIB_INSTANTIATE(cuda_feature_map, void map_features_vjp<Phi, T>(                \
                                           cudaStream_t, view<const T, 4>, const T*, view<T, 4>))
#define SSMLIB_DETAIL_TYPES(Phi)  \
  SSMLIB_DETAIL_LIST(Phi, bf16);  \
  SSMLIB_DETAIL_LIST(Phi, float); \
  SSMLIB_DETAIL_LIST(Phi, double)
SSMLIB_DETAIL_TYPES(feature::elu_plus_one);
SSMLIB_DETAIL_TYPES(feature::relu);
SSMLIB_DETAIL_TYPES(feature::exponential);
#undef SSMLIB_DETAIL_LIST
#undef SSMLIB_DETAIL_TYPES

}  // namespace ssm::detail
