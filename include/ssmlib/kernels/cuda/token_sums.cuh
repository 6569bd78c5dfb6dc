#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/cross_entropy.hpp>
#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/rows.cuh>

/// @file
/// Sums of a loss over tokens and over sequences, in double and in an order that depends on their
/// number only.

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int token_threads = 1024;

[[nodiscard]] inline index_t token_parts(index_t tokens) {
  return std::clamp<index_t>(tokens / 4096, 1, 256);
}

/// The sums of two numbers over a block; thread 0 has them.
SSMLIB_DEVICE void add_up_block(double& a, double& b) {
  __shared__ double shared[2][32];
  a = warp_sum(a), b = warp_sum(b);
  if (threadIdx.x % 32 == 0) {
    shared[0][threadIdx.x / 32] = a;
    shared[1][threadIdx.x / 32] = b;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const bool mine = threadIdx.x < blockDim.x / 32;
  a = warp_sum(mine ? shared[0][threadIdx.x] : 0.0);
  b = warp_sum(mine ? shared[1][threadIdx.x] : 0.0);
}

/// The sum and count of [begin, end) over a block.
template <class R>
SSMLIB_DEVICE void sum_counted(const token_values<R>& v, index_t begin, index_t end, double& sum,
                               double& count) {
  sum = count = 0;
  for (index_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    if (v.targets && v.targets[t] == v.ignore_index) continue;
    if (v.mask && v.mask[t] == 0) continue;
    sum += static_cast<double>(v.values[t]);
    count += 1;
  }
  add_up_block(sum, count);
}

template <class R>
__global__ void __launch_bounds__(token_threads)
    sum_tokens_kernel(const token_values<R> v, double* parts) {
  double sum, count;
  sum_counted(v, v.tokens * blockIdx.x / gridDim.x, v.tokens * (blockIdx.x + 1) / gridDim.x, sum,
              count);
  if (threadIdx.x != 0) return;
  parts[2 * blockIdx.x] = sum;
  parts[2 * blockIdx.x + 1] = count;
}

template <class Sum>
__global__ void __launch_bounds__(256)
    sum_parts_kernel(const Sum* parts, index_t part_count, const token_sums to) {
  const bool mine = threadIdx.x < part_count;
  double sum = mine ? parts[2 * threadIdx.x] : 0.0, count = mine ? parts[2 * threadIdx.x + 1] : 0.0;
  add_up_block(sum, count);
  if (threadIdx.x != 0) return;
  sum *= to.factor;
  if (to.add) sum += *to.sum, count += *to.count;
  *to.sum = sum;
  *to.count = count;
  if (to.loss)
    *to.loss = to.loss_factor * sum / (to.divide_by != 0 ? to.divide_by : max(count, 1.0));
}

template <class R>
__global__ void __launch_bounds__(256)
    sum_sequences_kernel(const token_values<R> v, const index_t* offsets, index_t length,
                         double* to) {
  const index_t i = blockIdx.x, begin = offsets ? offsets[i] : i * length;
  double sum, count;
  sum_counted(v, begin, offsets ? offsets[i + 1] : begin + length, sum, count);
  if (threadIdx.x == 0) to[i] = sum;
}

}  // namespace detail

template <class R>
std::size_t sum_tokens_workspace_bytes(const token_values<R>& v) {
  return static_cast<std::size_t>(2 * detail::token_parts(v.tokens)) * sizeof(double);
}

template <class R>
void sum_tokens(cudaStream_t stream, const token_values<R>& v, const token_sums& to,
                void* workspace) {
  const index_t parts = detail::token_parts(v.tokens);
  auto* sums = static_cast<double*>(workspace);
  detail::sum_tokens_kernel<R>
      <<<static_cast<unsigned>(parts), detail::token_threads, 0, stream>>>(v, sums);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  detail::sum_parts_kernel<<<1, 256, 0, stream>>>(sums, parts, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class R>
void sum_sequences(cudaStream_t stream, const token_values<R>& v, const index_t* offsets,
                   index_t sequences, double* to) {
  if (sequences == 0) return;
  if (offsets == nullptr && v.tokens % sequences != 0) {
    throw shape_error("ssm: sum_sequences: " + std::to_string(v.tokens) + " tokens are not " +
                      std::to_string(sequences) + " sequences of one length; give offsets");
  }
  detail::sum_sequences_kernel<R>
      <<<detail::row_blocks("sum_sequences", sequences), 256, 0, stream>>>(
          v, offsets, v.tokens / sequences, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(R)                                                                     \
  SSMLIB_INSTANTIATE(cuda_cross_entropy,                                                          \
                     std::size_t sum_tokens_workspace_bytes<R>(const token_values<R>&));          \
  SSMLIB_INSTANTIATE(cuda_cross_entropy, void sum_tokens<R>(cudaStream_t, const token_values<R>&, \
                                                            const token_sums&, void*));           \
  SSMLIB_INSTANTIATE(cuda_cross_entropy,                                                          \
                     void sum_sequences<R>(cudaStream_t, const token_values<R>&, const index_t*,  \
                                           index_t, double*))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
