#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/dense_product.hpp>
#include <ssmlib/kernels/cuda/grid.cuh>

namespace ssm::kernels::cuda {

namespace detail {

/// The last sequence that begins at or before token t: the one that holds it.
SSMLIB_DEVICE index_t sequence_of(const index_t* offsets, index_t sequences, index_t t) {
  index_t low = 0, high = sequences;  // offsets[low] <= t < offsets[high]
  while (high - low > 1) {
    const index_t middle = (low + high) / 2;
    (offsets[middle] <= t ? low : high) = middle;
  }
  return low;
}

template <class T>
__global__ void dense_product_kernel(const __grid_constant__ dense_product_problem<T> p,
                                     const __grid_constant__ view<T, 4> y) {
  const index_t heads = y.extents[2], time = y.extents[1];
  for_each_element(y.extents, [&](index_t, const shape<4>& at) {
    const index_t t = at[0] * time + at[1];
    index_t sequence = t / p.max_length, begin = sequence * p.max_length,
            end = begin + p.max_length;
    if (p.offsets != nullptr) {
      sequence = sequence_of(p.offsets, p.sequences, t);
      begin = p.offsets[sequence], end = p.offsets[sequence + 1];
    }
    const index_t base = p.packed ? 0 : begin;
    const double* row = p.matrix.data + (p.packed ? 0 : sequence) * p.matrix.strides[0] +
                        at[2] * p.matrix.extents[1] / heads * p.matrix.strides[1] +
                        (t - base) * p.matrix.strides[2];
    shape<4> from{0, 0, at[2] * p.x.extents[2] / heads, at[3]};
    double sum = 0;
    for (index_t s = begin; s < end; ++s) {
      from[0] = s / time, from[1] = s % time;
      sum += row[(s - base) * p.matrix.strides[3]] * static_cast<double>(widen(element(p.x, from)));
    }
    if constexpr (std::is_same_v<T, bf16>) {
      element(y, at) = narrow<T>(static_cast<float>(sum));
    } else {
      element(y, at) = static_cast<T>(sum);
    }
  });
}

}  // namespace detail

template <class T>
void dense_product(cudaStream_t stream, const dense_product_problem<T>& p, view<T, 4> y) {
  if (y.size() == 0) return;
  detail::dense_product_kernel<T><<<grid_for(y.size()), grid_threads, 0, stream>>>(p, y);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T) \
  SSMLIB_INSTANTIATE(         \
      cuda_dense_product,     \
      void dense_product<T>(cudaStream_t, const dense_product_problem<T>&, view<T, 4>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
