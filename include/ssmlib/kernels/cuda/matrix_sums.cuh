#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/grid.cuh>
#include <ssmlib/kernels/cuda/matrix_distance.hpp>

/// @file
/// What goes over the tokens of a sequence before and after the tiles of matrix_distance.cuh. A
/// block has one sequence and head, in pieces of as many tokens as it has threads.

namespace ssm::kernels::cuda {

namespace detail {

struct token_range {
  index_t begin, end;
};
SSMLIB_DEVICE token_range tokens_of(const matrix_sequences& s, index_t i) {
  if (s.offsets) return {s.offsets[i], s.offsets[i + 1]};
  return {i * s.max_length, (i + 1) * s.max_length};
}

/// The sum of x over the threads up to this one; `total`, over all. In a fixed order.
template <class X>
SSMLIB_DEVICE X block_scan(X x, X* shared, X& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const X other = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x += other;
  }
  __syncthreads();
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  X before = 0, all = 0;
  for (int w = 0; w < grid_threads / 32; ++w) {
    if (w < warp) before += shared[w];
    all += shared[w];
  }
  total = all;
  return before + x;
}
/// The sum over the block, for all threads.
SSMLIB_DEVICE double block_sum(double x, double* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < grid_threads / 32; ++w)
    sum += shared[w];
  return sum;
}

/// @param log_decay(t, h)  in double
template <class F>
SSMLIB_DEVICE void scan_decays(const matrix_sequences& s, int heads, F log_decay, double* sums,
                               std::int32_t* resets) {
  __shared__ double of_warps[grid_threads / 32];
  __shared__ std::int32_t resets_of_warps[grid_threads / 32];
  const int h = static_cast<int>(blockIdx.x % heads);
  const token_range range = tokens_of(s, blockIdx.x / heads);
  double sum = 0;
  std::int32_t count = 0;
  for (index_t t0 = range.begin; t0 < range.end; t0 += grid_threads) {
    const index_t t = t0 + threadIdx.x;
    const double x = t < range.end ? log_decay(t, h) : 0.0;
    const bool reset = x == -INFINITY;
    double all;
    std::int32_t all_resets;
    const double before = block_scan(reset ? 0.0 : x, of_warps, all);
    const std::int32_t resets_before =
        block_scan<std::int32_t>(reset ? 1 : 0, resets_of_warps, all_resets);
    if (t < range.end) {
      sums[t * heads + h] = sum + before;
      resets[t * heads + h] = count + resets_before;
    }
    sum += all;
    count += all_resets;
  }
}
template <class R>
__global__ void __launch_bounds__(grid_threads)
    sum_log_decays_kernel(const matrix_sequences s, const view<const R, 2> log_a, double* sums,
                          std::int32_t* resets) {
  scan_decays(
      s, static_cast<int>(log_a.extents[1]),
      [&](index_t t, int h) {
        return static_cast<double>(log_a.data[t * log_a.strides[0] + h * log_a.strides[1]]);
      },
      sums, resets);
}
template <class R>
__global__ void __launch_bounds__(grid_threads)
    sum_constant_decays_kernel(const matrix_sequences s, const view<const R, 1> gamma, double* sums,
                               std::int32_t* resets) {
  scan_decays(
      s, static_cast<int>(gamma.extents[0]),
      [&](index_t, int h) { return log(static_cast<double>(gamma.data[h * gamma.strides[0]])); },
      sums, resets);
}

template <class R>
__global__ void __launch_bounds__(grid_threads)
    matrix_norms_kernel(const matrix_sequences s, int heads, const R* squares, R* norms) {
  __shared__ double shared[grid_threads / 32];
  const int h = static_cast<int>(blockIdx.x % heads);
  const token_range range = tokens_of(s, blockIdx.x / heads);
  double sum = 0;
  for (index_t t = range.begin + threadIdx.x; t < range.end; t += grid_threads)
    sum += squares[t * heads + h];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) norms[blockIdx.x] = sqrt(sum);
}
template <class R>
__global__ void __launch_bounds__(grid_threads)
    matrix_factors_kernel(index_t n, const double* norms, const R* upstream, double count,
                          R* factors) {
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += index_t{blockDim.x} * gridDim.x) {
    factors[i] =
        norms[i] > 0 ? static_cast<R>(static_cast<double>(*upstream) / (norms[i] * count)) : R(0);
  }
}

/// The sums of a head of the mask: of whole rows, and of whole columns with their weight.
template <class R>
struct decay_sums {
  const decay_gradients<R>& g;
  const matrix_sums& sums;
  int mask_head;

  SSMLIB_DEVICE int begin() const { return mask_head * (g.heads / g.decay_heads); }
  SSMLIB_DEVICE int end() const { return begin() + g.heads / g.decay_heads; }
  /// Of token t: what row t adds to the gradients of log_a before it, less what column t takes.
  SSMLIB_DEVICE double difference(index_t t) const {
    double row = 0, column = 0;
    for (int h = begin(); h < end(); ++h) {
      row += sums.row[t * g.heads + h];
      column += sums.column[t * g.heads + h];
    }
    return row - column * weight(t);
  }
  SSMLIB_DEVICE double weight(index_t t) const {
    if (!g.weight.data) return 1.0;
    return static_cast<double>(
        g.weight.data[t * g.weight.strides[0] + mask_head * g.weight.strides[1]]);
  }
};

/// From the last token to the first: d_log_a(u) is the sum of the differences from u on.
template <class R>
__global__ void __launch_bounds__(grid_threads)
    finish_log_decays_kernel(const matrix_sequences s, const matrix_sums sums,
                             const __grid_constant__ decay_gradients<R> g) {
  __shared__ double of_warps[grid_threads / 32];
  const int h = static_cast<int>(blockIdx.x % g.decay_heads);
  const token_range range = tokens_of(s, blockIdx.x / g.decay_heads);
  const decay_sums<R> d{g, sums, h};
  double sum = 0;
  for (index_t last = range.end - 1; last >= range.begin; last -= grid_threads) {
    const index_t t = last - threadIdx.x;
    double all;
    const double from_here = block_scan(t >= range.begin ? d.difference(t) : 0.0, of_warps, all);
    if (t >= range.begin) {
      // No token is before the first.
      g.d_log_a.data[t * g.d_log_a.strides[0] + h * g.d_log_a.strides[1]] =
          t > range.begin ? static_cast<R>(sum + from_here) : R(0);
    }
    sum += all;
  }
}
template <class R>
__global__ void __launch_bounds__(grid_threads)
    finish_weights_kernel(index_t tokens, const matrix_sums sums,
                          const __grid_constant__ decay_gradients<R> g) {
  const index_t n = tokens * g.decay_heads;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += index_t{blockDim.x} * gridDim.x) {
    const index_t t = i / g.decay_heads, h = i % g.decay_heads;
    const decay_sums<R> d{g, sums, static_cast<int>(h)};
    double sum = 0;
    for (int k = d.begin(); k < d.end(); ++k)
      sum += sums.column[t * g.heads + k] + sums.diagonal[t * g.heads + k];
    g.d_weight.data[t * g.d_weight.strides[0] + h * g.d_weight.strides[1]] = static_cast<R>(sum);
  }
}
/// d_gamma gamma = the sum of y (t - s): each row and column counts as often as its token is far
/// from the beginning.
template <class R>
__global__ void __launch_bounds__(grid_threads)
    finish_gamma_kernel(const matrix_sequences s, const matrix_sums sums,
                        const __grid_constant__ decay_gradients<R> g) {
  __shared__ double shared[grid_threads / 32];
  const int h = static_cast<int>(blockIdx.x);
  const decay_sums<R> d{g, sums, h};
  double sum = 0;
  for (index_t i = 0; i < s.sequences; ++i) {
    const token_range range = tokens_of(s, i);
    for (index_t t = range.begin + threadIdx.x; t < range.end; t += grid_threads)
      sum += static_cast<double>(t - range.begin) * d.difference(t);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) {
    g.d_gamma.data[h * g.d_gamma.strides[0]] =
        static_cast<R>(sum / static_cast<double>(g.gamma.data[h * g.gamma.strides[0]]));
  }
}
template <class R>
__global__ void __launch_bounds__(grid_threads)
    finish_diagonal_kernel(index_t tokens, const matrix_sums sums,
                           const __grid_constant__ decay_gradients<R> g) {
  __shared__ double shared[grid_threads / 32];
  const int share = g.heads / static_cast<int>(g.d_diagonal.extents[0]);
  double sum = 0;
  for (index_t t = threadIdx.x; t < tokens; t += grid_threads) {
    for (int h = static_cast<int>(blockIdx.x) * share; h < static_cast<int>(blockIdx.x + 1) * share;
         ++h)
      sum += sums.d_diagonal[t * g.heads + h];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0)
    g.d_diagonal.data[blockIdx.x * g.d_diagonal.strides[0]] = static_cast<R>(sum);
}

[[nodiscard]] inline unsigned blocks_of(index_t sequences, index_t heads) {
  return static_cast<unsigned>(sequences * heads);
}

}  // namespace detail

template <Real R>
void sum_log_decays(cudaStream_t stream, const matrix_sequences& s, view<const R, 2> log_a,
                    double* sums, std::int32_t* resets) {
  if (log_a.size() == 0) return;
  detail::sum_log_decays_kernel<R>
      <<<detail::blocks_of(s.sequences, log_a.extents[1]), grid_threads, 0, stream>>>(s, log_a,
                                                                                      sums, resets);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
template <Real R>
void sum_constant_decays(cudaStream_t stream, const matrix_sequences& s, view<const R, 1> gamma,
                         double* sums, std::int32_t* resets) {
  if (gamma.size() == 0 || s.sequences == 0) return;
  detail::sum_constant_decays_kernel<R>
      <<<detail::blocks_of(s.sequences, gamma.extents[0]), grid_threads, 0, stream>>>(s, gamma,
                                                                                      sums, resets);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Real R>
void matrix_norms(cudaStream_t stream, const matrix_sequences& s, int heads, const R* squares,
                  R* norms) {
  if (s.sequences == 0) return;
  detail::matrix_norms_kernel<R>
      <<<detail::blocks_of(s.sequences, heads), grid_threads, 0, stream>>>(s, heads, squares,
                                                                           norms);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
template <Real R>
void matrix_factors(cudaStream_t stream, index_t n, const double* norms, const R* upstream,
                    double count, R* factors) {
  if (n == 0) return;
  detail::matrix_factors_kernel<R>
      <<<grid_for(n), grid_threads, 0, stream>>>(n, norms, upstream, count, factors);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Real R>
void finish_decay_gradients(cudaStream_t stream, const matrix_sequences& s, index_t tokens,
                            const matrix_sums& sums, const decay_gradients<R>& g) {
  if (g.d_log_a.data && g.d_log_a.size() > 0) {
    detail::finish_log_decays_kernel<R>
        <<<detail::blocks_of(s.sequences, g.decay_heads), grid_threads, 0, stream>>>(s, sums, g);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  if (g.d_weight.data && g.d_weight.size() > 0) {
    detail::finish_weights_kernel<R>
        <<<grid_for(tokens * g.decay_heads), grid_threads, 0, stream>>>(tokens, sums, g);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  if (g.d_gamma.data && g.d_gamma.size() > 0) {
    detail::finish_gamma_kernel<R>
        <<<static_cast<unsigned>(g.decay_heads), grid_threads, 0, stream>>>(s, sums, g);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  if (g.d_diagonal.data && g.d_diagonal.size() > 0) {
    detail::finish_diagonal_kernel<R>
        <<<static_cast<unsigned>(g.d_diagonal.extents[0]), grid_threads, 0, stream>>>(tokens, sums,
                                                                                      g);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
}

SSMLIB_INSTANTIATE(cuda_matrix_sums,
                   void matrix_norms<double>(cudaStream_t, const matrix_sequences&, int,
                                             const double*, double*));
#define SSMLIB_DETAIL_LIST(R)                                                                \
  SSMLIB_INSTANTIATE(cuda_matrix_sums,                                                       \
                     void sum_log_decays<R>(cudaStream_t, const matrix_sequences&,           \
                                            view<const R, 2>, double*, std::int32_t*));      \
  SSMLIB_INSTANTIATE(cuda_matrix_sums,                                                       \
                     void sum_constant_decays<R>(cudaStream_t, const matrix_sequences&,      \
                                                 view<const R, 1>, double*, std::int32_t*)); \
  SSMLIB_INSTANTIATE(                                                                        \
      cuda_matrix_sums,                                                                      \
      void matrix_factors<R>(cudaStream_t, index_t, const double*, const R*, double, R*));   \
  SSMLIB_INSTANTIATE(cuda_matrix_sums, void finish_decay_gradients<R>(                       \
                                           cudaStream_t, const matrix_sequences&, index_t,   \
                                           const matrix_sums&, const decay_gradients<R>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
