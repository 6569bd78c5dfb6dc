#pragma once

#include <ssmlib/kernels/cuda/ssd_parts.cuh>

#include <algorithm>

/// @file
/// The scalar-gated recurrence for any type, size, stride and alignment: a block carries the state
/// of some features of one head through the chunks of its sequence in shared memory.

namespace ssm::kernels::cuda::detail {

inline constexpr int ssd_general_threads = 256;

/// The sizes that a block works in, all at run time.
struct ssd_general_tile {
  int chunk, width, key_step;  // tokens, features, elements from key to key

  /// Elements of shared memory of forward.
  [[nodiscard]] __host__ __device__ int elements() const {
    return 2 * chunk * key_step + chunk * width + key_step * width + chunk * (chunk + 1) +
           6 * chunk + 1;
  }
};

/// The largest tile that fits the shared memory of a block.
template <class R>
[[nodiscard]] ssd_general_tile ssd_general_fit(index_t key_size) {
  const index_t limit = std::min(220 * 1024, shared_bytes_of_block());
  // An odd step: threads along tokens meet different banks.
  const int step = static_cast<int>(std::min<index_t>(key_size, 1 << 20) | 1);
  for (const ssd_general_tile t : {ssd_general_tile{32, 32, step}, {16, 16, step}, {16, 8, step}}) {
    if (t.elements() * static_cast<index_t>(sizeof(R)) <= limit) return t;
  }
  ssd_fail("key size " + std::to_string(key_size) + " does not fit the shared memory of a block");
}

/// A chunk's decays. Lambda_i is the sum of log decays up to token i, in two numbers, so that
/// differences of large sums keep their precision. A decay that R rounds to zero starts Lambda
/// anew: tokens before it do not reach tokens from it on.
template <class R>
struct ssd_general_decays {
  R *high, *low, *weight, *start, *end;
  R* total;
  int* first;  // the first token that reaches token i

  SSMLIB_DEVICE ssd_general_decays(R* space, int chunk)
      : high(space),
        low(space + chunk),
        weight(space + 2 * chunk),
        start(space + 3 * chunk),
        end(space + 4 * chunk),
        total(space + 5 * chunk),
        first(reinterpret_cast<int*>(space + 5 * chunk + 1)) {}

  [[nodiscard]] SSMLIB_DEVICE R between(int i, int j) const {
    return j < first[i] ? R(0) : exp((high[i] - high[j]) + (low[i] - low[j]));
  }
  /// All threads of the block; tokens [t, t + n) of the head of `steps`. Ends with a barrier.
  template <class T>
  SSMLIB_DEVICE void set(const ssd_steps<T>& steps, index_t t, int n) const {
    constexpr double reset_below = sizeof(R) == 8 ? -746.0 : -104.0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const ssd_step<R> s = steps.compute(steps.load(t + i));
      high[i] = s.log_a;
      weight[i] = s.weight;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double sum = 0.0;
      int from = 0;
      bool reached = true;  // from before the chunk
      for (int i = 0; i < n; ++i) {
        const double l = high[i];
        from = l < reset_below ? i : from;
        sum = l < reset_below ? 0.0 : sum + l;
        first[i] = from;
        reached = reached && !(l < reset_below);
        start[i] = reached ? R(1) : R(0);
        high[i] = static_cast<R>(sum);
        low[i] = static_cast<R>(sum - static_cast<double>(high[i]));
      }
      *total = reached ? exp(high[n - 1]) : R(0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      if (start[i] != R(0)) start[i] = exp(high[i]);
      end[i] = between(n - 1, i);
    }
    __syncthreads();
  }
};

template <class T>
__global__ __launch_bounds__(ssd_general_threads) void ssd_forward_general_kernel(
    const ssd_arguments<T> p, const ssd_operand<T> y,
    const ssd_state_operand<const accum_t<T>> initial, const ssd_state_operand<accum_t<T>> final,
    const ssd_general_tile tile) {
  using real = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int Q = tile.chunk, W = tile.width, step = tile.key_step, N = p.key_size;
  real* q = reinterpret_cast<real*>(shared_bytes);  // (Q x step)
  real* k = q + Q * step;                           // (Q x step)
  real* x = k + Q * step;                           // (Q x W)
  real* state = x + Q * W;                          // (N x W)
  real* mixed = state + step * W;                   // (Q x Q + 1)
  ssd_general_decays<real> decays(mixed + Q * (Q + 1), Q);

  const int parts = (p.features + W - 1) / W;
  const int block = static_cast<int>(blockIdx.x);
  const int s = block / parts / p.heads, h = block / parts % p.heads;
  const int from = block % parts * W, width = min(W, p.features - from);
  const ssd_steps<T> steps(p, h);
  const T *gq = p.q.head(h), *gk = p.k.head(h), *gx = p.x.head(h);
  const real d = p.d.data == nullptr ? real(0) : *p.d.head(h);
  const index_t begin = p.begin(s), end = p.end(s);
  const real* s_in = initial.at(s, h);
  for (int e = threadIdx.x; e < N * W; e += blockDim.x) {
    const int n = e / W, c = e % W;
    state[e] = s_in == nullptr || c >= width ? real(0) : s_in[n * initial.row + from + c];
  }
  for (index_t t = begin; t < end; t += Q) {
    const int n = static_cast<int>(min(static_cast<index_t>(Q), end - t));
    __syncthreads();  // the last chunk's readers are done
    for (int e = threadIdx.x; e < n * N; e += blockDim.x) {
      const int i = e / N, c = e % N;
      q[i * step + c] = widen(gq[(t + i) * p.q.token + c * p.q.column]);
      k[i * step + c] = widen(gk[(t + i) * p.k.token + c * p.k.column]);
    }
    for (int e = threadIdx.x; e < n * W; e += blockDim.x) {
      const int i = e / W, c = e % W;
      x[e] = c < width ? widen(gx[(t + i) * p.x.token + (from + c) * p.x.column]) : real(0);
    }
    decays.set(steps, t, n);
    for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
      const int i = e / n, j = e % n;
      if (j > i) continue;
      real sum = 0;
      for (int c = 0; c < N; ++c)
        sum += q[i * step + c] * k[j * step + c];
      mixed[i * (Q + 1) + j] =
          p.alpha * decays.weight[j] * decays.between(i, j) * sum + (i == j ? d : real(0));
    }
    __syncthreads();
    for (int e = threadIdx.x; e < n * W; e += blockDim.x) {
      const int i = e / W, c = e % W;
      real before = 0, inside = 0;
      for (int r = 0; r < N; ++r)
        before += q[i * step + r] * state[r * W + c];
      for (int j = 0; j <= i; ++j)
        inside += mixed[i * (Q + 1) + j] * x[j * W + c];
      const real sum = p.alpha * decays.start[i] * before + inside;
      if (c < width) {
        y.data[(t + i) * y.token + h * y.group + (from + c) * y.column] = narrow<T>(sum);
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < N * W; e += blockDim.x) {
      const int r = e / W, c = e % W;
      real sum = *decays.total * state[e];
      for (int j = 0; j < n; ++j)
        sum += k[j * step + r] * (decays.end[j] * decays.weight[j] * x[j * W + c]);
      state[e] = sum;
    }
  }
  __syncthreads();
  real* s_out = final.at(s, h);
  if (s_out == nullptr) return;
  for (int e = threadIdx.x; e < N * W; e += blockDim.x) {
    const int n = e / W, c = e % W;
    if (c < width) s_out[n * final.row + from + c] = state[e];
  }
}

template <class T>
void ssd_forward_general(cudaStream_t stream, const ssd_problem<T>& p, const view<T, 3>& y,
                         const ssd_states<T>& states) {
  using real = accum_t<T>;
  const ssd_general_tile tile = ssd_general_fit<real>(p.key_size());
  const index_t parts = (p.features() + tile.width - 1) / tile.width;
  const auto bytes = static_cast<unsigned>(tile.elements() * sizeof(real));
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(ssd_forward_general_kernel<T>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes)));
  const unsigned blocks = ssd_blocks(p.sequences * p.heads * parts);
  ssd_forward_general_kernel<T><<<blocks, ssd_general_threads, bytes, stream>>>(
      ssd_arguments<T>(p), ssd_operand<T>(y, p.heads),
      ssd_state_operand<const real>(states.initial), ssd_state_operand<real>(states.final), tile);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
