#pragma once

#include <ssmlib/kernels/cuda/ssd_parts.cuh>

#include <algorithm>

/// @file
/// Sums of what every head of a scalar-gated recurrence adds to the gradients of operands that
/// heads share, and of parameters. All sums have a fixed order.

namespace ssm::kernels::cuda::detail {

/// Gradients of one token and lane (a head, or some features of one), each (tokens, lanes).
template <class R>
struct ssd_token_sums {
  R *log_a, *weight, *skip;
  int lanes, parts;  // lanes of a head

  /// The sum over a head's lanes.
  SSMLIB_DEVICE R head(const R* sums, index_t t, int h) const {
    R sum = 0;
    for (int i = 0; i < parts; ++i)
      sum += sums[t * lanes + h * parts + i];
    return sum;
  }
};

inline constexpr int ssd_slices = 64;  // of the tokens, for sums over tokens

/// to (tokens, groups, columns) = the sums over the heads of a group of from (pieces, tokens,
/// heads, columns), and over the pieces.
template <class T>
__global__ void ssd_sum_heads_kernel(const ssd_arguments<T> p, const accum_t<T>* from, int pieces,
                                     index_t tokens, int heads, int columns,
                                     const ssd_operand<T> to) {
  const int groups = heads / to.heads_a_group;
  const index_t first = p.begin(0), count = (p.begin(p.sequences) - first) * groups * columns;
  const index_t stride = index_t{gridDim.x} * blockDim.x;
  for (index_t e = index_t{blockIdx.x} * blockDim.x + threadIdx.x; e < count; e += stride) {
    const index_t row = e / columns, t = first + row / groups;
    const int c = static_cast<int>(e % columns), g = static_cast<int>(row % groups);
    accum_t<T> sum = 0;
    for (int piece = 0; piece < pieces; ++piece) {
      for (int i = 0; i < to.heads_a_group; ++i) {
        sum += from[((piece * tokens + t) * heads + g * to.heads_a_group + i) * columns + c];
      }
    }
    to.data[t * to.token + g * to.group + c * to.column] = narrow<T>(sum);
  }
}

/// The gradients of log_a, weight and dt: a thread for a token and a head of the first of its
/// group.
template <class T>
__global__ void ssd_step_gradients_kernel(const ssd_arguments<T> p,
                                          const ssd_token_sums<accum_t<T>> sums,
                                          const ssd_operand<accum_t<T>> log_a,
                                          const ssd_operand<accum_t<T>> weight,
                                          const ssd_operand<T> dt) {
  using real = accum_t<T>;
  const index_t first = p.begin(0), count = (p.begin(p.sequences) - first) * p.heads;
  const index_t stride = index_t{gridDim.x} * blockDim.x;
  for (index_t e = index_t{blockIdx.x} * blockDim.x + threadIdx.x; e < count; e += stride) {
    const index_t t = first + e / p.heads;
    const int h = static_cast<int>(e % p.heads);
    const auto add = [&](const auto& to, auto&& of_head) {
      if (to.data == nullptr || h % to.heads_a_group != 0) return;
      real sum = 0;
      for (int i = 0; i < to.heads_a_group; ++i)
        sum += of_head(h + i);
      to.head(h)[t * to.token] = narrow<std::remove_reference_t<decltype(*to.data)>>(sum);
    };
    add(log_a, [&](int i) { return sums.head(sums.log_a, t, i); });
    add(weight, [&](int i) { return sums.head(sums.weight, t, i); });
    add(dt, [&](int i) {
      const ssd_steps<T> steps(p, i);
      const real step = sums.head(sums.weight, t, i) + steps.a() * sums.head(sums.log_a, t, i);
      return step * steps.slope(steps.load(t));
    });
  }
}

/// Sums over a slice of the tokens, for 32 heads: of log_a, step * log_a, dt and skip.
template <class T>
__global__ __launch_bounds__(256) void ssd_parameter_sums_kernel(
    const ssd_arguments<T> p, const ssd_token_sums<accum_t<T>> sums, accum_t<T>* to) {
  using real = accum_t<T>;
  __shared__ real shared[8][4][32];
  const int h = static_cast<int>(blockIdx.x) / ssd_slices * 32 + threadIdx.x % 32;
  const int slice = static_cast<int>(blockIdx.x) % ssd_slices, row = threadIdx.x / 32;
  const index_t first = p.begin(0), count = p.begin(p.sequences) - first;
  const index_t end = first + count * (slice + 1) / ssd_slices;
  real own[4] = {0, 0, 0, 0};
  if (h < p.heads) {
    const ssd_steps<T> steps(p, h);
    for (index_t t = first + count * slice / ssd_slices + row; t < end; t += 8) {
      const real log_a = sums.head(sums.log_a, t, h);
      own[0] += log_a;
      own[3] += sums.head(sums.skip, t, h);
      if (!steps.discretizes()) continue;
      const ssd_raw_step<T> raw = steps.load(t);
      own[1] += steps.compute(raw).weight * log_a;
      own[2] += (sums.head(sums.weight, t, h) + steps.a() * log_a) * steps.slope(raw);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    shared[row][i][threadIdx.x % 32] = own[i];
  __syncthreads();
  if (row >= 4 || h >= p.heads) return;
  real sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    sum += shared[i][row][threadIdx.x % 32];
  to[(slice * 4 + row) * p.heads + h] = sum;
}

/// The gradients of gamma, a, dt_bias and d from the slices' sums: a block a head, a warp each.
template <class T>
__global__ __launch_bounds__(128) void ssd_parameter_gradients_kernel(
    const ssd_arguments<T> p, const accum_t<T>* sums, const ssd_operand<accum_t<T>> gamma,
    const ssd_operand<accum_t<T>> a, const ssd_operand<accum_t<T>> dt_bias,
    const ssd_operand<accum_t<T>> d) {
  using real = accum_t<T>;
  const int h = static_cast<int>(blockIdx.x), which = threadIdx.x / 32;
  const ssd_operand<real>& to = which == 0 ? gamma : which == 1 ? a : which == 2 ? dt_bias : d;
  if (to.data == nullptr || h % to.heads_a_group != 0) return;
  real sum = 0;
  for (int i = 0; i < to.heads_a_group; ++i) {
#pragma unroll
    for (int slice = threadIdx.x % 32; slice < ssd_slices; slice += 32)
      sum += sums[(slice * 4 + which) * p.heads + h + i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) *to.head(h) = which == 0 ? sum / *p.gamma.head(h) : sum;
}

/// Elements of `R` that ssd_finish_gradients works in.
template <class R>
[[nodiscard]] index_t ssd_parameter_sums_size(index_t heads) {
  return 4 * ssd_slices * heads;
}

/// The gradients of steps and parameters from the tokens' sums.
template <class T>
void ssd_finish_gradients(cudaStream_t stream, const ssd_problem<T>& p,
                          const ssd_token_sums<accum_t<T>>& sums, accum_t<T>* work,
                          const ssd_gradients<T>& g) {
  using real = accum_t<T>;
  const ssd_arguments<T> arguments(p);
  const index_t elements = p.q.extent(0) * p.heads;
  if (g.log_a || g.weight || g.dt) {
    const unsigned blocks = ssd_blocks(std::clamp<index_t>((elements + 255) / 256, 1, 4096));
    ssd_step_gradients_kernel<T><<<blocks, 256, 0, stream>>>(
        arguments, sums, ssd_operand<real>(g.log_a, p.heads), ssd_operand<real>(g.weight, p.heads),
        ssd_operand<T>(g.dt, p.heads));
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  if (!g.gamma && !g.a && !g.dt_bias && !g.d) return;
  ssd_parameter_sums_kernel<T>
      <<<ssd_blocks((p.heads + 31) / 32 * ssd_slices), 256, 0, stream>>>(arguments, sums, work);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  ssd_parameter_gradients_kernel<T><<<ssd_blocks(p.heads), 128, 0, stream>>>(
      arguments, work, ssd_operand<real>(g.gamma, p.heads), ssd_operand<real>(g.a, p.heads),
      ssd_operand<real>(g.dt_bias, p.heads), ssd_operand<real>(g.d, p.heads));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
