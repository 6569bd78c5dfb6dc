#pragma once

#include <ssmlib/kernels/cuda/attention_parts.cuh>

/// @file
/// Attention for any element type, sizes and strides, forward and backward, without matrix
/// instructions. All four results have one form,
///
///     out[i] = sum over j of W[i, j] b[j],
///
/// where i runs over queries (y, dq) or keys (dk, dv), j over the others, and W is the softmax
/// matrix, its derivative, or a transpose of one: one kernel with four modes.

namespace ssm::kernels::cuda::detail {

enum class attention_result { y, dq, dk, dv };

template <class T>
struct general_parameters {
  using stat = attention_stat<T>;
  attention_operand<const T> q, k, v, dy;
  attention_operand<T> out;
  stat* log_sum;  // (heads, queries); may be absent in the forward
  index_t log_sum_head;
  const stat* delta;  // (heads, queries), dense
  index_t query_tokens;
  stat scale;
  attention_layout layout;
  attention_schedule schedule;
  int chunks;  // of output columns
};

template <class T>
struct general_tile {
  using A = attention_stat<T>;
  static constexpr int per_thread = std::is_same_v<T, double> ? 2 : 4;  // rows and columns
  static constexpr int rows = 16 * per_thread, features = 32, columns = 128, staged = 16;
  static constexpr int operand = rows * (features + 1);
  static_assert(2 * operand >= staged * columns);
  A operands[2 * operand];
  A weights[rows][rows + 1];
};

/// s[i][j] = a_{y + 16 i} . b_{x + 16 j} for the tile's rows of two operands; rows from `a_rows` or
/// `b_rows` on are zeros.
template <class T>
SSMLIB_DEVICE void general_dots(
    attention_stat<T> (&s)[general_tile<T>::per_thread][general_tile<T>::per_thread],
    general_tile<T>& tile, const T* a, index_t a_step, int a_rows, const T* b, index_t b_step,
    int b_rows, int size) {
  using tiles = general_tile<T>;
  constexpr int R = tiles::per_thread, F = tiles::features;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < R; ++j)
      s[i][j] = 0;
  for (int f0 = 0; f0 < size; f0 += F) {
    __syncthreads();
    for (int n = threadIdx.x; n < tiles::rows * F; n += 256) {
      const int row = n / F, f = n % F;
      const bool there = f0 + f < size;
      tile.operands[row * (F + 1) + f] =
          there && row < a_rows ? widen(a[row * a_step + f0 + f]) : attention_stat<T>(0);
      tile.operands[tiles::operand + row * (F + 1) + f] =
          there && row < b_rows ? widen(b[row * b_step + f0 + f]) : attention_stat<T>(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int f = 0; f < F; ++f) {
      attention_stat<T> u[R], w[R];
#pragma unroll
      for (int i = 0; i < R; ++i) {
        u[i] = tile.operands[(y + 16 * i) * (F + 1) + f];
        w[i] = tile.operands[tiles::operand + (x + 16 * i) * (F + 1) + f];
      }
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j)
          s[i][j] = fma(u[i], w[j], s[i][j]);
    }
  }
}

/// acc[i][c] += sum over j of weights[y + 16 i][j] b_j[first + x + 16 c], in the order of j.
template <class T>
SSMLIB_DEVICE void general_accumulate(attention_stat<T> (&acc)[general_tile<T>::per_thread][8],
                                      general_tile<T>& tile, const T* b, index_t b_step, int b_rows,
                                      int first, int size) {
  using tiles = general_tile<T>;
  constexpr int R = tiles::per_thread, C = tiles::columns;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int width = min(C, size - first);
  for (int j0 = 0; j0 < b_rows; j0 += tiles::staged) {
    __syncthreads();
    for (int n = threadIdx.x; n < tiles::staged * C; n += 256) {
      const int row = n / C, c = n % C;
      tile.operands[n] = c < width && j0 + row < b_rows ? widen(b[(j0 + row) * b_step + first + c])
                                                        : attention_stat<T>(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < tiles::staged; ++j) {
      attention_stat<T> w[R];
#pragma unroll
      for (int i = 0; i < R; ++i)
        w[i] = tile.weights[y + 16 * i][j0 + j];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (16 * c >= width) break;
        const attention_stat<T> value = tile.operands[j * C + x + 16 * c];
#pragma unroll
        for (int i = 0; i < R; ++i)
          acc[i][c] = fma(w[i], value, acc[i][c]);
      }
    }
  }
}

SSMLIB_DEVICE float row_max(float x) {
  for (int step = 8; step > 0; step /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
SSMLIB_DEVICE double row_max(double x) {
  for (int step = 8; step > 0; step /= 2)
    x = fmax(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <class A>
SSMLIB_DEVICE A row_sum(A x) {
  for (int step = 8; step > 0; step /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

/// The forward's logits (masked: -infinity) of one row become weights; brings the row's sums up to
/// the new largest logit.
template <class A, int R>
SSMLIB_DEVICE void general_softmax_row(A (&s)[R], A& largest, A& sum, A (&acc)[8]) {
  A high = s[0];
#pragma unroll
  for (int j = 1; j < R; ++j)
    high = max(high, s[j]);
  high = max(largest, row_max(high));
  const A shift = high == -A(INFINITY) ? A(0) : high, factor = exp(largest - shift);
  A part = 0;
#pragma unroll
  for (int j = 0; j < R; ++j) {
    s[j] = exp(s[j] - shift);
    part += s[j];
  }
  largest = high;
  sum = sum * factor + row_sum(part);
#pragma unroll
  for (int c = 0; c < 8; ++c)
    acc[c] *= factor;
}

/// One tile of `out` for one result head: adds to acc.
template <class T, attention_result Result>
SSMLIB_DEVICE void general_head(const general_parameters<T>& p, general_tile<T>& tile, int h,
                                const attention_span& span, int row0, int first_column,
                                attention_stat<T> (&acc)[general_tile<T>::per_thread][8],
                                attention_stat<T> (&largest)[general_tile<T>::per_thread],
                                attention_stat<T> (&sum)[general_tile<T>::per_thread]) {
  using A = attention_stat<T>;
  using tiles = general_tile<T>;
  constexpr int R = tiles::per_thread, B = tiles::rows;
  constexpr bool by_query = Result == attention_result::y || Result == attention_result::dq;
  constexpr bool derivative = Result == attention_result::dq || Result == attention_result::dk;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16, heads = p.layout.heads;
  const int qh = static_cast<int>(static_cast<index_t>(h) * p.q.heads / heads);
  const int kh = static_cast<int>(static_cast<index_t>(h) * p.k.heads / heads);
  const int vh = static_cast<int>(static_cast<index_t>(h) * p.v.heads / heads);
  int first, last;
  if constexpr (by_query)
    p.layout.keys_of(span, row0, row0 + B, first, last);
  else
    p.layout.queries_of(span, row0, row0 + B, first, last);
  for (int col0 = first / B * B; col0 < last; col0 += B) {
    const int cols = (by_query ? span.keys : span.queries) - col0;
    const int q0 = by_query ? row0 : col0, k0 = by_query ? col0 : row0;
    const int q_rows = span.queries - q0, k_rows = span.keys - k0;
    const T* q = p.q.row(span.query_begin + q0, qh);
    const T* k = p.k.row(span.key_begin + k0, kh);
    const T* v = p.v.row(span.key_begin + k0, vh);
    const T* dy = Result == attention_result::y ? nullptr : p.dy.row(span.query_begin + q0, h);
    A s[R][R], ds[R][R];
    if constexpr (by_query)
      general_dots<T>(s, tile, q, p.q.token, q_rows, k, p.k.token, k_rows, p.q.size);
    else
      general_dots<T>(s, tile, k, p.k.token, k_rows, q, p.q.token, q_rows, p.q.size);
    if constexpr (Result == attention_result::dq)
      general_dots<T>(ds, tile, dy, p.dy.token, q_rows, v, p.v.token, k_rows, p.v.size);
    if constexpr (Result == attention_result::dk)
      general_dots<T>(ds, tile, v, p.v.token, k_rows, dy, p.dy.token, q_rows, p.v.size);
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const int row = row0 + y + 16 * i, col = col0 + x + 16 * j;
        const int t = by_query ? row : col, key = by_query ? col : row;
        const bool kept =
            t < span.queries && key < span.keys && p.layout.keeps(t + span.shift(), key);
        if constexpr (Result == attention_result::y) {
          s[i][j] = kept ? s[i][j] * p.scale : -A(INFINITY);
        } else {
          const index_t place = span.query_begin + t;
          A w = kept ? exp(s[i][j] * p.scale - p.log_sum[h * p.log_sum_head + place]) : A(0);
          if constexpr (derivative)
            w = kept ? w * (ds[i][j] - p.delta[h * p.query_tokens + place]) * p.scale : A(0);
          s[i][j] = w;
        }
      }
      if constexpr (Result == attention_result::y)
        general_softmax_row(s[i], largest[i], sum[i], acc[i]);
#pragma unroll
      for (int j = 0; j < R; ++j)
        tile.weights[y + 16 * i][x + 16 * j] = s[i][j];
    }
    const T* b = Result == attention_result::y    ? v
                 : Result == attention_result::dq ? k
                 : Result == attention_result::dk ? q
                                                  : dy;
    const index_t b_step = Result == attention_result::y    ? p.v.token
                           : Result == attention_result::dq ? p.k.token
                           : Result == attention_result::dk ? p.q.token
                                                            : p.dy.token;
    general_accumulate<T>(acc, tile, b, b_step, min(B, cols), first_column, p.out.size);
  }
}

template <class T, attention_result Result>
__global__ __launch_bounds__(256) void attention_general_kernel(
    const __grid_constant__ general_parameters<T> p) {
  using A = attention_stat<T>;
  using tiles = general_tile<T>;
  constexpr int R = tiles::per_thread;
  constexpr bool by_query = Result == attention_result::y || Result == attention_result::dq;
  __shared__ tiles tile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int shared_by = p.layout.heads / p.out.heads;  // result heads of one output head
  for (index_t n = blockIdx.x; n < p.schedule.size() * p.chunks; n += gridDim.x) {
    const int first_column = static_cast<int>(n % p.chunks) * tiles::columns;
    const attention_tile work = p.schedule[n / p.chunks];
    const attention_span span = p.layout.span(work.sequence);
    const int row0 = work.tile * tiles::rows, end = by_query ? span.queries : span.keys;
    if (row0 >= end) continue;
    A acc[R][8] = {}, largest[R], sum[R] = {};
    for (int i = 0; i < R; ++i)
      largest[i] = -A(INFINITY);
    for (int h = work.head * shared_by; h < (work.head + 1) * shared_by; ++h)
      general_head<T, Result>(p, tile, h, span, row0, first_column, acc, largest, sum);
    for (int i = 0; i < R; ++i) {
      const int row = row0 + y + 16 * i;
      if (row >= end) continue;
      const index_t token = (by_query ? span.query_begin : span.key_begin) + row;
      const A factor = Result != attention_result::y ? A(1) : sum[i] > 0 ? 1 / sum[i] : A(0);
      T* out = p.out.row(token, work.head);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int column = first_column + x + 16 * c;
        if (column < p.out.size) out[column] = narrow<T>(acc[i][c] * factor);
      }
      if (Result == attention_result::y && p.log_sum && x == 0 && first_column == 0)
        p.log_sum[work.head * p.log_sum_head + token] = largest[i] + log(sum[i]);
    }
  }
}

/// delta[h, t] = dy_t . y_t: the part of every logit's derivative that its row shares.
template <class T>
__global__ __launch_bounds__(256) void attention_delta_kernel(attention_operand<const T> dy,
                                                              attention_operand<const T> y,
                                                              index_t tokens,
                                                              attention_stat<T>* delta) {
  const int lane = threadIdx.x % 32;
  const index_t step = static_cast<index_t>(gridDim.x) * 8;
  for (index_t n = blockIdx.x * index_t{8} + threadIdx.x / 32; n < tokens * y.heads; n += step) {
    const index_t t = n / y.heads;
    const int h = static_cast<int>(n - t * y.heads);
    attention_stat<T> sum = 0;
    for (int c = lane; c < y.size; c += 32)
      sum = fma(widen(dy.row(t, h)[c]), widen(y.row(t, h)[c]), sum);
    sum = warp_sum(sum);
    if (lane == 0) delta[h * tokens + t] = sum;
  }
}

inline unsigned folded_grid(index_t blocks) {
  return static_cast<unsigned>(std::min<index_t>(blocks, index_t{1} << 20));
}

template <class T, attention_result Result>
void launch_general(cudaStream_t stream, const attention_problem<T>& problem,
                    general_parameters<T> p, view<T, 3> out) {
  constexpr bool by_query = Result == attention_result::y || Result == attention_result::dq;
  using tiles = general_tile<T>;
  p.out = attention_operand<T>(out);
  p.chunks = (p.out.size + tiles::columns - 1) / tiles::columns;
  const index_t rows = by_query ? p.layout.max_length : p.layout.max_key_length;
  const index_t other = by_query ? p.layout.max_key_length : p.layout.max_length;
  p.schedule = make_schedule(problem.sequences, p.out.heads, rows, tiles::rows, by_query,
                             other * (p.q.size + p.v.size) * index_t{sizeof(T)}, 1);
  const index_t blocks = p.schedule.pairs * p.schedule.tiles * p.chunks;
  if (blocks == 0) return;
  attention_general_kernel<T, Result><<<folded_grid(blocks), 256, 0, stream>>>(p);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
general_parameters<T> make_general(const attention_problem<T>& problem) {
  return {attention_operand<const T>(problem.q),
          attention_operand<const T>(problem.k),
          attention_operand<const T>(problem.v),
          {},
          {},
          nullptr,
          0,
          nullptr,
          problem.q.extents[0],
          static_cast<attention_stat<T>>(problem.scale),
          attention_layout(problem),
          {},
          1};
}

template <class T>
void general_forward(cudaStream_t stream, const attention_problem<T>& problem, view<T, 3> y,
                     view<attention_stat<T>, 2> log_sum) {
  general_parameters<T> p = make_general(problem);
  p.log_sum = log_sum.data;
  p.log_sum_head = log_sum.strides[0];
  launch_general<T, attention_result::y>(stream, problem, p, y);
}

template <class T>
void general_backward(cudaStream_t stream, const attention_problem<T>& problem, view<const T, 3> y,
                      view<const attention_stat<T>, 2> log_sum, view<const T, 3> dy, view<T, 3> dq,
                      view<T, 3> dk, view<T, 3> dv, attention_stat<T>* delta) {
  general_parameters<T> p = make_general(problem);
  p.dy = attention_operand<const T>(dy);
  p.log_sum = const_cast<attention_stat<T>*>(log_sum.data);  // read only in the backward
  p.log_sum_head = log_sum.strides[0];
  p.delta = delta;
  const index_t rows = p.query_tokens * p.layout.heads;
  if ((dq || dk) && rows > 0) {
    attention_delta_kernel<T><<<folded_grid((rows + 7) / 8), 256, 0, stream>>>(
        p.dy, attention_operand<const T>(y), p.query_tokens, delta);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  if (dq) launch_general<T, attention_result::dq>(stream, problem, p, dq);
  if (dk) launch_general<T, attention_result::dk>(stream, problem, p, dk);
  if (dv) launch_general<T, attention_result::dv>(stream, problem, p, dv);
}

}  // namespace ssm::kernels::cuda::detail
