#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/matrix_distance.hpp>

#include <algorithm>

/// @file
/// Distances of layer outputs, a warp a token.

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int state_threads = 256, state_rows = state_threads / 32;

[[nodiscard]] inline unsigned state_blocks(index_t tokens) {
  return static_cast<unsigned>(
      std::clamp<index_t>((tokens + state_rows - 1) / state_rows, 1, 132 * 16));
}

template <class T>
__global__ void __launch_bounds__(state_threads)
    state_distances_kernel(const state_pair<T> p, double* distances) {
  const int lane = threadIdx.x % 32;
  for (index_t t = index_t{blockIdx.x} * state_rows + threadIdx.x / 32; t < p.student.extents[0];
       t += index_t{gridDim.x} * state_rows) {
    const T* student = p.student.data + t * p.student.strides[0];
    const T* teacher = p.teacher.data + t * p.teacher.strides[0];
    double sum = 0;
    for (index_t c = lane; c < p.student.extents[1]; c += 32) {
      const double d =
          static_cast<double>(widen(student[c])) - static_cast<double>(widen(teacher[c]));
      sum += d * d;
    }
    sum = warp_sum(sum);
    if (lane == 0) distances[t] = sqrt(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(state_threads)
    state_distances_vjp_kernel(const state_pair<T> p, const double* distances,
                               const accum_t<T>* upstream, double count, const view<T, 2> d_student,
                               const view<T, 2> d_teacher) {
  using R = accum_t<T>;
  const int lane = threadIdx.x % 32;
  for (index_t t = index_t{blockIdx.x} * state_rows + threadIdx.x / 32; t < p.student.extents[0];
       t += index_t{gridDim.x} * state_rows) {
    if (!(distances[t] > 0)) continue;  // the norm's subgradient at 0
    const R factor = static_cast<R>(static_cast<double>(*upstream) / count / distances[t]);
    const T* student = p.student.data + t * p.student.strides[0];
    const T* teacher = p.teacher.data + t * p.teacher.strides[0];
    for (index_t c = lane; c < p.student.extents[1]; c += 32) {
      const R d = factor * (widen(student[c]) - widen(teacher[c]));
      if (d_student.data) {
        T& to = d_student.data[t * d_student.strides[0] + c];
        to = narrow<T>(widen(to) + d);
      }
      if (d_teacher.data) {
        T& to = d_teacher.data[t * d_teacher.strides[0] + c];
        to = narrow<T>(widen(to) - d);
      }
    }
  }
}

}  // namespace detail

template <class T>
void state_distances(cudaStream_t stream, const state_pair<T>& p, double* distances) {
  if (p.student.extents[0] == 0) return;
  detail::state_distances_kernel<T>
      <<<detail::state_blocks(p.student.extents[0]), detail::state_threads, 0, stream>>>(p,
                                                                                         distances);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void state_distances_vjp(cudaStream_t stream, const state_pair<T>& p, const double* distances,
                         const accum_t<T>* upstream, double count, view<T, 2> d_student,
                         view<T, 2> d_teacher) {
  if (p.student.extents[0] == 0) return;
  detail::state_distances_vjp_kernel<T>
      <<<detail::state_blocks(p.student.extents[0]), detail::state_threads, 0, stream>>>(
          p, distances, upstream, count, d_student, d_teacher);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                 \
  SSMLIB_INSTANTIATE(cuda_matrix_sums,                                                        \
                     void state_distances<T>(cudaStream_t, const state_pair<T>&, double*));   \
  SSMLIB_INSTANTIATE(cuda_matrix_sums, void state_distances_vjp<T>(                           \
                                           cudaStream_t, const state_pair<T>&, const double*, \
                                           const accum_t<T>*, double, view<T, 2>, view<T, 2>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
