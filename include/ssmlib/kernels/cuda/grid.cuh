#pragma once

#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>

/// @file
/// Small kernels that go over the elements of strided operands.

namespace ssm::kernels::cuda {

inline constexpr int grid_threads = 256;

/// Blocks for n elements: enough to fill a card, and the threads loop over the rest.
[[nodiscard]] inline unsigned grid_for(index_t n) {
  constexpr index_t most = 132 * 16;
  return static_cast<unsigned>(std::clamp<index_t>((n + grid_threads - 1) / grid_threads, 1, most));
}

/// f(i, indices) for the elements that are this thread's, i counted in dense order.
template <class F>
SSMLIB_DEVICE void for_each_element(const shape<4>& extents, F f) {
  const index_t n = extents[0] * extents[1] * extents[2] * extents[3];
  const index_t step = index_t{blockDim.x} * gridDim.x;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    const index_t row = i / extents[3], plane = row / extents[2];
    f(i, shape<4>{plane / extents[1], plane % extents[1], row % extents[2], i % extents[3]});
  }
}

template <class T>
SSMLIB_DEVICE T& element(const view<T, 4>& v, const shape<4>& at) {
  return v.data[at[0] * v.strides[0] + at[1] * v.strides[1] + at[2] * v.strides[2] +
                at[3] * v.strides[3]];
}

}  // namespace ssm::kernels::cuda
