#pragma once

#include <ssmlib/kernels/cuda/ssd_general.cuh>
#include <ssmlib/kernels/cuda/ssd_gradients.cuh>

/// @file
/// The backward pass of the scalar-gated recurrence for any type, size, stride and alignment: a
/// block takes one head of one sequence, forward for the states at the chunks' starts, then
/// backward.

namespace ssm::kernels::cuda::detail {

/// The sizes that a block of the backward pass works in.
struct ssd_backward_tile {
  int chunk, width, key_step;

  [[nodiscard]] __host__ __device__ int elements() const {
    return 2 * chunk * key_step + 4 * chunk * width + 2 * key_step * width +
           3 * chunk * (chunk + 1) + 8 * chunk + 1 + ssd_general_threads;
  }
};

template <class R>
[[nodiscard]] ssd_backward_tile ssd_backward_fit(index_t key_size) {
  const index_t limit = std::min(220 * 1024, shared_bytes_of_block());
  const int step = static_cast<int>(std::min<index_t>(key_size, 1 << 20) | 1);
  for (const ssd_backward_tile t :
       {ssd_backward_tile{32, 32, step}, {16, 16, step}, {16, 8, step}}) {
    if (t.elements() * static_cast<index_t>(sizeof(R)) <= limit) return t;
  }
  ssd_fail("key size " + std::to_string(key_size) + " does not fit the shared memory of a block");
}

/// What the blocks leave in the workspace.
template <class R>
struct ssd_general_sums {
  R *q, *k;   // (tokens, heads, key size)
  R* x;       // (tokens, heads, features), or null: written where it is wanted
  R* states;  // (chunks of all sequences, heads, key size, width)
  ssd_token_sums<R> tokens;
};

/// Pointers into shared memory of one block.
template <class R>
struct ssd_backward_space {
  R *q, *k;             // (chunk x key_step)
  R *x, *dy, *ke, *qh;  // (chunk x width): k E and q H besides
  R *h, *e;             // (key x width): the state, and the gradient of the one after the chunk
  R *sd, *gd, *z;       // (chunk x chunk + 1): scores and dy x^T, decayed, and their product
  R *p, *r;             // (chunk)
  R* sums;              // a number a thread
  ssd_general_decays<R> decays;

  SSMLIB_DEVICE ssd_backward_space(R* at, const ssd_backward_tile& t)
      : q(at),
        k(q + t.chunk * t.key_step),
        x(k + t.chunk * t.key_step),
        dy(x + t.chunk * t.width),
        ke(dy + t.chunk * t.width),
        qh(ke + t.chunk * t.width),
        h(qh + t.chunk * t.width),
        e(h + t.key_step * t.width),
        sd(e + t.key_step * t.width),
        gd(sd + t.chunk * (t.chunk + 1)),
        z(gd + t.chunk * (t.chunk + 1)),
        p(z + t.chunk * (t.chunk + 1)),
        r(p + t.chunk),
        sums(r + t.chunk),
        decays(sums + ssd_general_threads, t.chunk) {}
};

/// Loads n rows of `columns` of one head; columns past `width` are zero.
template <class T, class R>
SSMLIB_DEVICE void ssd_load_rows(R* to, int step, const T* from, const ssd_operand<const T>& v,
                                 index_t t, int n, int first, int columns, int width) {
  for (int e = threadIdx.x; e < n * columns; e += blockDim.x) {
    const int i = e / columns, c = e % columns;
    to[i * step + c] = c < width ? widen(from[(t + i) * v.token + (first + c) * v.column]) : R(0);
  }
}

/// The gradients of one chunk of n tokens from t on, for features [from, from + width).
template <class T>
SSMLIB_DEVICE void ssd_chunk_gradients(const ssd_backward_space<accum_t<T>>& m,
                                       const ssd_arguments<T>& p, const ssd_backward_tile& tile,
                                       const ssd_general_sums<accum_t<T>>& to,
                                       const ssd_operand<T>& dx, index_t t, int n, int head,
                                       int from, int width) {
  using real = accum_t<T>;
  const int W = tile.width, step = tile.key_step, N = p.key_size, Q = tile.chunk + 1;
  const real d = p.d.data == nullptr ? real(0) : *p.d.head(head);
  const real *w = m.decays.weight, *end = m.decays.end, *start = m.decays.start;
  real kappa = 0;
  for (int e = threadIdx.x; e < N * W; e += blockDim.x)
    kappa += m.e[e] * m.h[e];
  m.sums[threadIdx.x] = *m.decays.total * kappa;
  for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
    const int i = e / n, j = e % n;
    if (j > i) continue;
    real score = 0, g = 0;
    for (int c = 0; c < N; ++c)
      score += m.q[i * step + c] * m.k[j * step + c];
    for (int c = 0; c < W; ++c)
      g += m.dy[i * W + c] * m.x[j * W + c];
    const real decay = p.alpha * m.decays.between(i, j);
    m.sd[i * Q + j] = decay * score;
    m.gd[i * Q + j] = decay * g;
    m.z[i * Q + j] = decay * score * g;
    if (i == j) {
      real& skip = to.tokens.skip[(t + i) * p.heads + head];
      skip = from == 0 ? g : skip + g;
    }
  }
  for (int e = threadIdx.x; e < n * W; e += blockDim.x) {
    const int i = e / W, c = e % W;
    real ke = 0, qh = 0;
    for (int r = 0; r < N; ++r) {
      ke += m.k[i * step + r] * m.e[r * W + c];
      qh += m.q[i * step + r] * m.h[r * W + c];
    }
    m.ke[e] = end[i] * ke;
    m.qh[e] = p.alpha * start[i] * qh;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < n * W; e += blockDim.x) {
    const int j = e / W, c = e % W;
    real sum = m.ke[e];
    for (int i = j; i < n; ++i)
      sum += m.sd[i * Q + j] * m.dy[i * W + c];
    const real value = w[j] * sum + d * m.dy[e];
    if (c >= width) continue;
    if (to.x != nullptr) {
      to.x[((t + j) * p.heads + head) * p.features + from + c] = value;
    } else if (dx.data != nullptr) {
      dx.data[(t + j) * dx.token + head * dx.group + (from + c) * dx.column] = narrow<T>(value);
    }
  }
  for (int e = threadIdx.x; e < n * N; e += blockDim.x) {
    const int i = e / N, c = e % N;
    real q = 0, k = 0;
    for (int f = 0; f < W; ++f) {
      q += m.dy[i * W + f] * m.h[c * W + f];
      k += m.x[i * W + f] * m.e[c * W + f];
    }
    q *= p.alpha * start[i];
    k *= end[i];
    for (int j = 0; j <= i; ++j)
      q += w[j] * m.gd[i * Q + j] * m.k[j * step + c];
    for (int j = i; j < n; ++j)
      k += m.gd[j * Q + i] * m.q[j * step + c];
    k *= w[i];
    const index_t at = ((t + i) * p.heads + head) * N + c;
    to.q[at] = from == 0 ? q : to.q[at] + q;
    to.k[at] = from == 0 ? k : to.k[at] + k;
  }
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    real before = 0, after = 0, weight = 0;
    for (int c = 0; c < W; ++c) {
      before += m.dy[i * W + c] * m.qh[i * W + c];
      after += m.x[i * W + c] * m.ke[i * W + c];
    }
    for (int j = i; j < n; ++j)
      weight += m.z[j * Q + i];
    m.p[i] = before;
    m.r[i] = w[i] * after;
    real& sum = to.tokens.weight[(t + i) * p.heads + head];
    sum = from == 0 ? weight + after : sum + (weight + after);
  }
  __syncthreads();
  // Only pairs of tokens on both sides of a decay: no difference of large sums.
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    real sum = 0;
    for (int e = 0; e < ssd_general_threads; ++e)
      sum += m.sums[e];
    for (int a = i; a < n; ++a) {
      sum += m.p[a];
      for (int b = 0; b < i; ++b)
        sum += w[b] * m.z[a * Q + b];
    }
    for (int b = 0; b < i; ++b)
      sum += m.r[b];
    real& log_a = to.tokens.log_a[(t + i) * p.heads + head];
    log_a = from == 0 ? sum : log_a + sum;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < N * W; e += blockDim.x) {
    const int r = e / W, c = e % W;
    real sum = 0;
    for (int i = 0; i < n; ++i)
      sum += p.alpha * start[i] * m.q[i * step + r] * m.dy[i * W + c];
    m.e[e] = *m.decays.total * m.e[e] + sum;
  }
}

template <class T>
__global__ __launch_bounds__(ssd_general_threads) void ssd_backward_general_kernel(
    const ssd_arguments<T> p, const ssd_operand<const T> dy,
    const ssd_state_operand<const accum_t<T>> initial,
    const ssd_state_operand<const accum_t<T>> d_final,
    const ssd_state_operand<accum_t<T>> d_initial, const ssd_operand<T> dx,
    const ssd_general_sums<accum_t<T>> to, const ssd_backward_tile tile) {
  using real = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const ssd_backward_space<real> m(reinterpret_cast<real*>(shared_bytes), tile);
  const int Q = tile.chunk, W = tile.width, step = tile.key_step, N = p.key_size;
  const int s = static_cast<int>(blockIdx.x) / p.heads,
            head = static_cast<int>(blockIdx.x) % p.heads;
  const ssd_steps<T> steps(p, head);
  const T *gq = p.q.head(head), *gk = p.k.head(head), *gx = p.x.head(head), *gy = dy.head(head);
  const index_t begin = p.begin(s), end = p.end(s);
  const int chunks = static_cast<int>((end - begin + Q - 1) / Q);
  // Sequence s has at most one chunk more than its share of the tokens.
  real* states = to.states + (begin / Q + s) * p.heads * N * W + index_t{head} * N * W;
  const auto chunk_state = [&](int c) { return states + c * index_t{p.heads} * N * W; };
  for (int from = 0; from < p.features; from += W) {
    const int width = min(W, p.features - from);
    const auto boundary = [&](real* state, const auto& v) {
      const real* at = v.at(s, head);
      for (int e = threadIdx.x; e < N * W; e += blockDim.x) {
        const int r = e / W, c = e % W;
        state[e] = at == nullptr || c >= width ? real(0) : at[r * v.row + from + c];
      }
    };
    __syncthreads();
    boundary(m.h, initial);
    for (int c = 0; c < chunks; ++c) {
      const index_t t = begin + c * index_t{Q};
      const int n = static_cast<int>(min(static_cast<index_t>(Q), end - t));
      for (int e = threadIdx.x; e < N * W; e += blockDim.x)
        chunk_state(c)[e] = m.h[e];
      if (c + 1 == chunks) break;
      __syncthreads();
      ssd_load_rows(m.k, step, gk, p.k, t, n, 0, N, N);
      ssd_load_rows(m.x, W, gx, p.x, t, n, from, W, width);
      m.decays.set(steps, t, n);
      for (int e = threadIdx.x; e < N * W; e += blockDim.x) {
        const int r = e / W, f = e % W;
        real sum = *m.decays.total * m.h[e];
        for (int j = 0; j < n; ++j)
          sum += m.k[j * step + r] * (m.decays.end[j] * m.decays.weight[j] * m.x[j * W + f]);
        m.h[e] = sum;
      }
    }
    boundary(m.e, d_final);
    for (int c = chunks - 1; c >= 0; --c) {
      const index_t t = begin + c * index_t{Q};
      const int n = static_cast<int>(min(static_cast<index_t>(Q), end - t));
      __syncthreads();
      ssd_load_rows(m.q, step, gq, p.q, t, n, 0, N, N);
      ssd_load_rows(m.k, step, gk, p.k, t, n, 0, N, N);
      ssd_load_rows(m.x, W, gx, p.x, t, n, from, W, width);
      ssd_load_rows(m.dy, W, gy, dy, t, n, from, W, width);
      for (int e = threadIdx.x; e < N * W; e += blockDim.x)
        m.h[e] = chunk_state(c)[e];
      m.decays.set(steps, t, n);
      ssd_chunk_gradients(m, p, tile, to, dx, t, n, head, from, width);
    }
    real* out = d_initial.at(s, head);
    for (int e = threadIdx.x; out != nullptr && e < N * W; e += blockDim.x) {
      const int r = e / W, c = e % W;
      if (c < width) out[r * d_initial.row + from + c] = m.e[e];
    }
  }
}

/// Elements of the accumulator's type that ssd_backward_general works in.
template <class T>
[[nodiscard]] index_t ssd_backward_general_size(const ssd_problem<T>& p) {
  using real = accum_t<T>;
  const ssd_backward_tile tile = ssd_backward_fit<real>(p.key_size());
  const index_t tokens = p.q.extent(0), heads = tokens * p.heads;
  const index_t states = tokens / tile.chunk + p.sequences + 1;
  return heads * (2 * p.key_size() + 3) + (p.x.extent(1) == p.heads ? 0 : heads * p.features()) +
         states * p.heads * p.key_size() * tile.width + ssd_parameter_sums_size<real>(p.heads);
}

template <class T>
void ssd_backward_general(cudaStream_t stream, const ssd_problem<T>& p, const view<const T, 3>& dy,
                          const ssd_states<T>& states, const ssd_gradients<T>& g, void* workspace) {
  using real = accum_t<T>;
  const ssd_backward_tile tile = ssd_backward_fit<real>(p.key_size());
  const index_t tokens = p.q.extent(0), rows = tokens * p.heads;
  const ssd_arguments<T> arguments(p);
  const bool direct = p.x.extent(1) == p.heads;
  ssd_general_sums<real> sums{};
  auto* at = static_cast<real*>(workspace);
  const auto take = [&](index_t n) { return at += n, at - n; };
  sums.q = take(rows * p.key_size());
  sums.k = take(rows * p.key_size());
  sums.x = direct ? nullptr : take(rows * p.features());
  sums.states = take((tokens / tile.chunk + p.sequences + 1) * p.heads * p.key_size() * tile.width);
  sums.tokens = {take(rows), take(rows), take(rows), static_cast<int>(p.heads), 1};
  const auto bytes = static_cast<unsigned>(tile.elements() * sizeof(real));
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(ssd_backward_general_kernel<T>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes)));
  ssd_backward_general_kernel<T>
      <<<ssd_blocks(p.sequences * p.heads), ssd_general_threads, bytes, stream>>>(
          arguments, ssd_operand<const T>(dy, p.heads),
          ssd_state_operand<const real>(states.initial), ssd_state_operand<const real>(g.d_final),
          ssd_state_operand<real>(g.d_initial), ssd_operand<T>(g.x, p.heads), sums, tile);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  const auto sum = [&](const real* from, const view<T, 3>& to) {
    if (!to || from == nullptr) return;
    const unsigned blocks = ssd_blocks(std::clamp<index_t>((to.size() + 255) / 256, 1, 8192));
    ssd_sum_heads_kernel<T>
        <<<blocks, 256, 0, stream>>>(arguments, from, 1, tokens, static_cast<int>(p.heads),
                                     static_cast<int>(to.extent(2)), ssd_operand<T>(to, p.heads));
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  sum(sums.q, g.q), sum(sums.k, g.k), sum(sums.x, g.x);
  ssd_finish_gradients(stream, p, sums.tokens, at, g);
}

}  // namespace ssm::kernels::cuda::detail
