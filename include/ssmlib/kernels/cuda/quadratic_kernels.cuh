#pragma once

#include <ssmlib/kernels/cuda/quadratic_tile.cuh>

/// @file
/// The kernels of masked products. All results of the operands have one form,
///
///     out[i] = the sum over j of W[i, j] b[j],
///
/// where i runs over rows t of the matrix (y, dq) or columns s (dk, dx), j over the others, and W
/// is L o alpha Q K^T, L o alpha dY X^T, or a transpose of one. The numbers of a mask get
/// reductions of G = dY X^T o alpha Q K^T, in parts that a second kernel adds up.

namespace ssm::kernels::cuda::detail {

enum class quadratic_result { y, dq, dk, dx };

template <class T>
struct quadratic_parameters {
  head_operand<const T> q, k, x, dy;
  head_operand<T> out;
  accum_t<T> alpha;
  index_t heads;
  packed_sequences sequences;
  mask_operand<T> mask;
  index_t tiles = 0, chunks = 0;  // of rows of a sequence, and of columns of `out`
  bool add = false;
};

/// Adds one head's part to a tile of `out`.
template <quadratic_result Result, class T>
SSMLIB_DEVICE void add_quadratic_head(
    const quadratic_parameters<T>& p, quadratic_tile<accum_t<T>>& tile, index_t h, index_t begin,
    int length, int row0, int chunk, accum_t<T> (&acc)[quadratic_tile<accum_t<T>>::per_thread][8]) {
  using A = accum_t<T>;
  constexpr int R = quadratic_tile<A>::per_thread, B = quadratic_tile<A>::rows;
  constexpr bool by_row = Result == quadratic_result::y || Result == quadratic_result::dq;
  constexpr bool gram = Result == quadratic_result::y || Result == quadratic_result::dx;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const head_mask<T> mask(p.mask, h, begin);
  const head_operand<const T>& t_side = gram ? p.q : p.dy;
  const head_operand<const T>& s_side = gram ? p.k : p.x;
  const head_operand<const T>& mine = by_row ? t_side : s_side;
  const head_operand<const T>& theirs = by_row ? s_side : t_side;
  const head_operand<const T>& b = Result == quadratic_result::y    ? p.x
                                   : Result == quadratic_result::dq ? p.k
                                   : Result == quadratic_result::dk ? p.q
                                                                    : p.dy;
  int first, last;
  if constexpr (by_row)
    mask.columns_of(row0, row0 + B, length, first, last);
  else
    mask.rows_of(row0, min(row0 + B, length), length, first, last);
  for (int col0 = first / B * B; col0 < last; col0 += B) {
    A s[R][R] = {};
    if (mine.present()) {
      add_dots(s, tile, mine.row(begin + row0, h), mine.token, length - row0,
               theirs.row(begin + col0, h), theirs.token, length - col0, mine.size);
    }
    __syncthreads();  // the last tile's weights have been read
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const int row = row0 + y + 16 * i, col = col0 + x + 16 * j;
        const int t = by_row ? row : col, other = by_row ? col : row;
        A w = row < length && col < length ? mask(t, other) : A(0);
        // A selected zero: what lies beyond the mask may be infinite.
        if (mine.present()) w = w == A(0) ? A(0) : w * p.alpha * s[i][j];
        tile.weights[y + 16 * i][x + 16 * j] = w;
      }
    }
    add_weighted_rows(acc, tile, b.row(begin + col0, h), b.token, min(B, length - col0),
                      chunk * quadratic_tile<A>::columns, p.out.size);
  }
}

template <class T, quadratic_result Result>
__global__ void __launch_bounds__(256, 2)
    quadratic_kernel(const __grid_constant__ quadratic_parameters<T> p) {
  using A = accum_t<T>;
  using tiles = quadratic_tile<A>;
  constexpr bool by_row = Result == quadratic_result::y || Result == quadratic_result::dq;
  __shared__ tiles tile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const index_t groups = p.out.heads, share = p.heads / groups;
  const index_t a_tile = p.sequences.count * groups * p.chunks;
  for (index_t n = blockIdx.x; n < a_tile * p.tiles; n += gridDim.x) {
    // The tiles with the longest sums first.
    const index_t place = n / a_tile, rest = n % a_tile;
    const index_t row_tile = by_row ? p.tiles - 1 - place : place;
    const int chunk = static_cast<int>(rest % p.chunks);
    const index_t group = rest / p.chunks % groups, i = rest / p.chunks / groups;
    const int length = p.sequences.length(i), row0 = static_cast<int>(row_tile) * tiles::rows;
    if (row0 >= length) continue;
    const index_t begin = p.sequences.begin(i);
    A acc[tiles::per_thread][8] = {};
    for (index_t h = group * share; h < (group + 1) * share; ++h)
      add_quadratic_head<Result>(p, tile, h, begin, length, row0, chunk, acc);
#pragma unroll
    for (int r = 0; r < tiles::per_thread; ++r) {
      const int row = row0 + y + 16 * r;
      if (row >= length) continue;
      T* out = p.out.group_row(begin + row, group);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int column = chunk * tiles::columns + x + 16 * c;
        if (column < p.out.size) store_sum(out + column, acc[r][c], p.add);
      }
    }
  }
}

/// sums[g, t] = log_a of the sequence's tokens up to t, in double: differences of far tokens' sums
/// stay good to float. A block takes a head of a sequence.
template <class A>
__global__ void __launch_bounds__(256)
    log_sums_kernel(view<const A, 2> log_a, index_t groups, packed_sequences sequences,
                    index_t tokens, double* sums) {
  __shared__ double warps[8];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (index_t n = blockIdx.x; n < sequences.count * groups; n += gridDim.x) {
    const index_t i = n / groups, g = n % groups, begin = sequences.begin(i);
    const int length = sequences.length(i);
    double before = 0;
    for (int t0 = 0; t0 < length; t0 += 256) {
      const int t = t0 + static_cast<int>(threadIdx.x);
      double sum = t < length
                       ? static_cast<double>(
                             log_a.data[(begin + t) * log_a.strides[0] + g * log_a.strides[1]])
                       : 0.0;
      // exp is 0 there all the same, and infinities have no differences.
      if (sum < -1e4) sum = -1e4;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
      if (lane == 31) warps[warp] = sum;
      __syncthreads();
      double all = 0;
      for (int w = 0; w < 8; ++w) {
        if (w == warp) sum += all;
        all += warps[w];
      }
      if (t < length) sums[g * tokens + begin + t] = before + sum;
      before += all;
      __syncthreads();
    }
  }
}

/// What a block adds up of the mask's gradient: parts (heads, parts, n), zeroed before.
template <class T>
struct mask_gradient_parameters {
  quadratic_parameters<T> problem;
  index_t parts, n;
  accum_t<T>*sums, *weight_sums;  // weight_sums: of semiseparable masks, may be absent
};

/// Semiseparable: weights holds G exp(sums_t - sums_s). Column sums are the weight's gradient; with
/// the weight, log_a[j] gets each row's sum over s < j, for the rows t >= j.
template <class T>
SSMLIB_DEVICE void add_decay_gradients(quadratic_tile<accum_t<T>>& tile, const head_mask<T>& mask,
                                       int row0, int col0, int length, accum_t<T>& before,
                                       accum_t<T>* log_a, accum_t<T>* weight) {
  using A = accum_t<T>;
  constexpr int B = quadratic_tile<A>::rows;
  const int c = threadIdx.x;
  const bool column = c < B && col0 + c < length;
  if (column && weight != nullptr) {
    A sum = A(0);
    for (int r = 0; r < B; ++r)
      sum += tile.weights[r][c];
    weight[col0 + c] += sum;
  }
  if (c < B) tile.operands[c] = column ? mask.weight_of(col0 + c) : A(0);
  __syncthreads();
  if (c < B) {  // as a row
    for (int j = 0; j < B; ++j) {
      const A h = tile.weights[c][j] * tile.operands[j];
      tile.weights[c][j] = col0 + j <= row0 + c ? before : A(0);
      before += h;
    }
  }
  __syncthreads();
  if (column) {
    A sum = A(0);
    for (int r = 0; r < B; ++r)
      sum += tile.weights[r][c];
    log_a[col0 + c] += sum;
  }
  __syncthreads();
}

/// One tile of G: adds what it has for the numbers of the mask.
template <class T>
SSMLIB_DEVICE void add_mask_tile(const mask_gradient_parameters<T>& o,
                                 quadratic_tile<accum_t<T>>& tile, const head_mask<T>& mask,
                                 index_t h, index_t begin, int length, int row0, int col0,
                                 accum_t<T>& sum, accum_t<T>* to, accum_t<T>* to_weight) {
  using A = accum_t<T>;
  constexpr int R = quadratic_tile<A>::per_thread, B = quadratic_tile<A>::rows;
  const quadratic_parameters<T>& p = o.problem;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  A g[R][R] = {}, s[R][R] = {};
  add_dots(g, tile, p.dy.row(begin + row0, h), p.dy.token, length - row0, p.x.row(begin + col0, h),
           p.x.token, length - col0, p.x.size);
  if (p.q.present()) {
    add_dots(s, tile, p.q.row(begin + row0, h), p.q.token, length - row0, p.k.row(begin + col0, h),
             p.k.token, length - col0, p.q.size);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int t = row0 + y + 16 * i, c = col0 + x + 16 * j, d = t - c;
      const bool there = t < length && c < length && d >= 0;
      A v = there ? g[i][j] : A(0);
      if (p.q.present() && there) v *= p.alpha * s[i][j];
      if (p.mask.kind == quadratic_mask_kind::decay) {
        if (there && d > 0) sum = fma(v, d * mask.power(d - 1), sum);
      } else {
        if (p.mask.kind == quadratic_mask_kind::semiseparable && there) v *= mask.decay(t, c);
        tile.weights[y + 16 * i][x + 16 * j] = v;
      }
    }
  }
  __syncthreads();
  if (p.mask.kind == quadratic_mask_kind::semiseparable) {
    add_decay_gradients(tile, mask, row0, col0, length, sum, to, to_weight);
  } else if (p.mask.kind == quadratic_mask_kind::toeplitz) {
    const int diagonal = static_cast<int>(threadIdx.x) - (B - 1), d = row0 - col0 + diagonal;
    if (diagonal < B && d >= 0 && d < length) {
      A all = A(0);
      for (int r = max(0, diagonal); r < min(B, B + diagonal); ++r)
        all += tile.weights[r][r - diagonal];
      to[d] += all;
    }
    __syncthreads();
  }
}

/// Block (h, part) takes every `parts`-th row of tiles of all sequences, and its sums alone.
template <class T>
__global__ void __launch_bounds__(256)
    mask_gradient_kernel(const __grid_constant__ mask_gradient_parameters<T> o) {
  using A = accum_t<T>;
  using tiles = quadratic_tile<A>;
  __shared__ tiles tile;
  const quadratic_parameters<T>& p = o.problem;
  const bool per_token = p.mask.kind == quadratic_mask_kind::semiseparable;
  for (index_t n = blockIdx.x; n < p.heads * o.parts; n += gridDim.x) {
    const index_t h = n / o.parts, part = n % o.parts;
    A* to = o.sums + n * o.n;
    A* to_weight = o.weight_sums == nullptr ? nullptr : o.weight_sums + n * o.n;
    A sum = A(0);  // of a thread's entries, or of a row's so far
    for (index_t i = 0; i < p.sequences.count; ++i) {
      const index_t begin = p.sequences.begin(i);
      const int length = p.sequences.length(i);
      const head_mask<T> mask(p.mask, h, begin);
      for (index_t row = (part + i) % o.parts * tiles::rows; row < length;
           row += o.parts * tiles::rows) {
        const int row0 = static_cast<int>(row);
        if (per_token) sum = A(0);
        for (int col0 = 0; col0 < min(length, row0 + tiles::rows); col0 += tiles::rows) {
          add_mask_tile(o, tile, mask, h, begin, length, row0, col0, sum,
                        per_token ? to + begin : to,
                        to_weight == nullptr ? nullptr : to_weight + begin);
        }
      }
    }
    if (p.mask.kind == quadratic_mask_kind::decay) {
      sum = warp_sum(sum);
      __syncthreads();
      if (threadIdx.x % 32 == 0) tile.operands[threadIdx.x / 32] = sum;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int w = 1; w < 8; ++w)
          sum += tile.operands[w];
        to[0] = sum;
      }
    }
  }
}

/// to[g group_step + c step] (+)= the sums of the heads and parts of group g, in order.
template <class A>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const A* sums, index_t heads, index_t parts, index_t n, A* to, index_t groups,
                     index_t group_step, index_t step, index_t wanted, bool add) {
  const index_t share = heads / groups * parts, threads = index_t{gridDim.x} * blockDim.x;
  for (index_t e = index_t{blockIdx.x} * blockDim.x + threadIdx.x; e < groups * wanted;
       e += threads) {
    const index_t g = e / wanted, c = e % wanted;
    A sum = A(0);
    for (index_t part = g * share; c < n && part < (g + 1) * share; ++part)
      sum += sums[part * n + c];
    A& target = to[g * group_step + c * step];
    target = add ? target + sum : sum;
  }
}

}  // namespace ssm::kernels::cuda::detail
