#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/quadratic_tile.cuh>

#include <algorithm>

/// @file
/// The gram matrix by associativity: sums M = scale u^T v of a sequence's tokens, cut into spans of
/// tokens and added up in order, then rows of M times each token's features.

namespace ssm::kernels::cuda::detail {

/// Where the (rows x columns) sums of every sequence, head and span lie, densely in this order.
struct gram_sums_layout {
  index_t heads, splits, rows, columns;

  [[nodiscard]] __host__ __device__ index_t size() const { return rows * columns; }
  [[nodiscard]] SSMLIB_DEVICE index_t at(index_t i, index_t h, index_t split) const {
    return ((i * heads + h) * splits + split) * size();
  }
};

template <class T>
__global__ void __launch_bounds__(256)
    gram_sums_kernel(head_operand<const T> u, head_operand<const T> v, accum_t<T> scale,
                     packed_sequences sequences, gram_sums_layout layout, accum_t<T>* sums) {
  using A = accum_t<T>;
  constexpr int B = 64, S = 16;
  __shared__ A rows[S][B], columns[S][B];
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const index_t row_tiles = (layout.rows + B - 1) / B, tiles = (layout.columns + B - 1) / B;
  const index_t all = sequences.count * layout.heads * layout.splits * row_tiles * tiles;
  for (index_t n = blockIdx.x; n < all; n += gridDim.x) {
    const int c0 = static_cast<int>(n % tiles) * B;
    const int r0 = static_cast<int>(n / tiles % row_tiles) * B;
    const index_t rest = n / tiles / row_tiles, split = rest % layout.splits;
    const index_t h = rest / layout.splits % layout.heads, i = rest / layout.splits / layout.heads;
    const index_t length = sequences.length(i), begin = sequences.begin(i);
    const index_t end = length * (split + 1) / layout.splits;
    A acc[4][4] = {};
    for (index_t t0 = length * split / layout.splits; t0 < end; t0 += S) {
      __syncthreads();
#pragma unroll
      for (int e = threadIdx.x; e < S * B; e += 256) {
        const int t = e / B, f = e % B;
        const bool there = t0 + t < end;
        rows[t][f] = there && r0 + f < u.size ? widen(u.row(begin + t0 + t, h)[r0 + f]) : A(0);
        columns[t][f] = there && c0 + f < v.size ? widen(v.row(begin + t0 + t, h)[c0 + f]) : A(0);
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < S; ++t) {
        A a[4], b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[j] = rows[t][y + 16 * j];
          b[j] = columns[t][x + 16 * j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            acc[j][k] = fma(a[j], b[k], acc[j][k]);
      }
    }
    A* to = sums + layout.at(i, h, split);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = r0 + y + 16 * j, c = c0 + x + 16 * k;
        if (r < u.size && c < v.size) to[r * layout.columns + c] = scale * acc[j][k];
      }
    }
  }
}

/// Adds the spans of each sequence and head to the first one, in order.
template <class A>
__global__ void __launch_bounds__(256)
    gram_add_spans_kernel(index_t count, gram_sums_layout layout, A* sums) {
  const index_t threads = index_t{gridDim.x} * blockDim.x, size = layout.size();
  for (index_t e = index_t{blockIdx.x} * blockDim.x + threadIdx.x; e < count * size; e += threads) {
    A* first = sums + e / size * layout.splits * size + e % size;
    A sum = *first;
    for (index_t split = 1; split < layout.splits; ++split)
      sum += first[split * size];
    *first = sum;
  }
}

/// out_t[f] (+)= the sum over heads of a group of u_t . row f of the head's sums.
template <class T>
__global__ void __launch_bounds__(256)
    gram_rows_kernel(head_operand<const T> u, head_operand<T> out, packed_sequences sequences,
                     gram_sums_layout layout, const accum_t<T>* sums, index_t row_tiles, bool add) {
  using A = accum_t<T>;
  using tiles = quadratic_tile<A>;
  constexpr int R = tiles::per_thread, B = tiles::rows;
  __shared__ tiles tile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const index_t groups = out.heads, share = layout.heads / groups;
  const index_t chunks = (layout.rows + B - 1) / B, a_tile = sequences.count * groups * chunks;
  for (index_t n = blockIdx.x; n < a_tile * row_tiles; n += gridDim.x) {
    const int row0 = static_cast<int>(n / a_tile) * B;
    const index_t rest = n % a_tile, group = rest / chunks % groups, i = rest / chunks / groups;
    const int f0 = static_cast<int>(rest % chunks) * B, length = sequences.length(i);
    if (row0 >= length) continue;
    const index_t begin = sequences.begin(i);
    A s[R][R] = {};
    for (index_t h = group * share; h < (group + 1) * share; ++h) {
      add_dots(s, tile, u.row(begin + row0, h), u.token, length - row0,
               sums + layout.at(i, h, 0) + f0 * layout.columns, layout.columns,
               static_cast<int>(layout.rows) - f0, u.size);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int row = row0 + y + 16 * r;
      if (row >= length) continue;
      T* to = out.group_row(begin + row, group);
#pragma unroll
      for (int c = 0; c < R; ++c) {
        const int column = f0 + x + 16 * c;
        if (column < out.size) store_sum(to + column, s[r][c], add);
      }
    }
  }
}

/// Spans of tokens whose sums are apart: enough for the card where there are few sequences.
template <class T>
[[nodiscard]] index_t gram_splits(const quadratic_problem<T>& p) {
  const index_t tiles =
      ((p.q.extents[2] + 63) / 64) * ((p.x.extents[2] + 63) / 64) * p.sequences * p.heads;
  const index_t wanted = 528 / std::max<index_t>(tiles, 1);
  return std::clamp<index_t>(wanted, 1, std::max<index_t>(1, (p.max_length + 255) / 256));
}

/// The sums of u^T v for every sequence and head, then out = w times their rows.
template <class T>
void launch_gram(cudaStream_t stream, const quadratic_problem<T>& p, view<const T, 3> u,
                 view<const T, 3> v, view<const T, 3> w, view<T, 3> out, bool add,
                 accum_t<T>* sums) {
  const packed_sequences sequences{p.offsets, p.sequences, p.max_length};
  const gram_sums_layout layout{p.heads, gram_splits(p), u.extents[2], v.extents[2]};
  const index_t count = p.sequences * p.heads;
  const index_t sum_tiles = ((layout.rows + 63) / 64) * ((layout.columns + 63) / 64);
  if (count * p.max_length * out.extents[2] == 0) return;
  if (layout.size() > 0) {
    gram_sums_kernel<T><<<blocks_for(count * layout.splits * sum_tiles), 256, 0, stream>>>(
        {u, p.heads}, {v, p.heads}, p.alpha, sequences, layout, sums);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
    if (layout.splits > 1) {
      gram_add_spans_kernel<<<blocks_for((count * layout.size() + 255) / 256), 256, 0, stream>>>(
          count, layout, sums);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    }
  }
  constexpr index_t B = quadratic_tile<accum_t<T>>::rows;
  const index_t tiles = (p.max_length + B - 1) / B, chunks = (layout.rows + B - 1) / B;
  gram_rows_kernel<T>
      <<<blocks_for(p.sequences * out.extents[1] * chunks * tiles), 256, 0, stream>>>(
          {w, p.heads}, {out, p.heads}, sequences, layout, sums, tiles, add);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
