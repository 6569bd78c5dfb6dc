#pragma once

#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/quadratic.hpp>

#include <algorithm>

/// @file
/// What the quadratic kernels share: operands, sequences, entries of masks, and products of tiles
/// by 256 threads, where thread (x, y) of 16 x 16 has the rows y + 16 i and the columns x + 16 j.

namespace ssm::kernels::cuda::detail {

/// A (tokens, heads, features) operand of a problem with `of_heads` heads; strides in elements.
template <class T>
struct head_operand {
  T* data = nullptr;
  index_t token = 0, head = 0, heads = 1, of_heads = 1;
  int size = 0;

  head_operand() = default;
  head_operand(view<T, 3> v, index_t all_heads)
      : data(v.data),
        token(v.strides[0]),
        head(v.strides[1]),
        heads(v.extents[1]),
        of_heads(all_heads),
        size(static_cast<int>(v.extents[2])) {}
  /// The row that serves head h.
  SSMLIB_DEVICE T* row(index_t t, index_t h) const {
    return data + t * token + group_of(h, of_heads, heads) * head;
  }
  SSMLIB_DEVICE T* group_row(index_t t, index_t g) const { return data + t * token + g * head; }
  [[nodiscard]] SSMLIB_DEVICE bool present() const { return data != nullptr; }
};

/// Where sequences lie.
struct packed_sequences {
  const index_t* offsets;
  index_t count, max_length;

  SSMLIB_DEVICE index_t begin(index_t i) const { return offsets ? offsets[i] : i * max_length; }
  SSMLIB_DEVICE int length(index_t i) const {
    return static_cast<int>(offsets ? offsets[i + 1] - offsets[i] : max_length);
  }
};

inline constexpr index_t folded_blocks = index_t{1} << 20;

/// Blocks for `work` tasks that blocks share in strides of the grid.
inline unsigned blocks_for(index_t work) {
  return static_cast<unsigned>(std::min(work, folded_blocks));
}

/// A mask as kernels receive it.
template <class T>
struct mask_operand {
  using A = accum_t<T>;
  quadratic_mask_kind kind;
  int window;
  const A* gamma;
  index_t gamma_step;
  const double* sums;  // (G, tokens): of log_a within each sequence
  index_t tokens;
  view<const A, 2> weight;
  const A* kernel;
  index_t kernel_group, kernel_step;
  index_t groups, weight_groups, heads;
};

/// The entries of one head of one sequence; tokens count from the sequence's begin.
template <class T>
struct head_mask {
  using A = accum_t<T>;
  const mask_operand<T>& m;
  const double* sums = nullptr;
  const A* weight = nullptr;
  index_t weight_step = 0;
  const A* kernel = nullptr;
  A gamma = A(0);
  double log_gamma = 0;

  SSMLIB_DEVICE head_mask(const mask_operand<T>& mask, index_t h, index_t begin) : m(mask) {
    const index_t g = group_of(h, m.heads, m.groups);
    if (m.kind == quadratic_mask_kind::decay) {
      gamma = m.gamma[g * m.gamma_step];
      log_gamma = log(static_cast<double>(gamma));
    } else if (m.kind == quadratic_mask_kind::semiseparable) {
      sums = m.sums + g * m.tokens + begin;
      if (m.weight.data != nullptr) {
        weight_step = m.weight.strides[0];
        weight = m.weight.data + begin * weight_step +
                 group_of(h, m.heads, m.weight_groups) * m.weight.strides[1];
      }
    } else if (m.kind == quadratic_mask_kind::toeplitz) {
      kernel = m.kernel + g * m.kernel_group;
    }
  }
  /// gamma^d; 1 for d = 0, also where gamma is 0.
  [[nodiscard]] SSMLIB_DEVICE A power(int d) const {
    return d == 0 ? A(1) : exp(static_cast<A>(d * log_gamma));
  }
  [[nodiscard]] SSMLIB_DEVICE A decay(int t, int s) const {
    return exp(static_cast<A>(sums[t] - sums[s]));
  }
  [[nodiscard]] SSMLIB_DEVICE A weight_of(int s) const {
    return weight == nullptr ? A(1) : weight[s * weight_step];
  }
  [[nodiscard]] SSMLIB_DEVICE A kernel_of(int d) const { return kernel[d * m.kernel_step]; }
  [[nodiscard]] SSMLIB_DEVICE A operator()(int t, int s) const {
    const int d = t - s;
    if (m.kind == quadratic_mask_kind::none) return A(1);
    if (d < 0) return A(0);
    switch (m.kind) {
      case quadratic_mask_kind::window:
        return d < m.window ? A(1) : A(0);
      case quadratic_mask_kind::decay:
        return power(d);
      case quadratic_mask_kind::semiseparable:
        return decay(t, s) * weight_of(s);
      case quadratic_mask_kind::toeplitz:
        return kernel_of(d);
      default:
        return A(1);
    }
  }
  /// The columns [first, last) where the rows [begin, end) may be other than zero.
  SSMLIB_DEVICE void columns_of(int begin, int end, int length, int& first, int& last) const {
    first = m.kind == quadratic_mask_kind::window ? max(0, begin + 1 - m.window) : 0;
    last = m.kind == quadratic_mask_kind::none ? length : min(length, end);
  }
  /// The rows [first, last) that see some of the columns [begin, end).
  SSMLIB_DEVICE void rows_of(int begin, int end, int length, int& first, int& last) const {
    first = m.kind == quadratic_mask_kind::none ? 0 : begin;
    last = length;
    if (m.kind == quadratic_mask_kind::window && m.window < length) {
      last = min(length, end - 1 + m.window);
    }
  }
};

template <class A>
struct quadratic_tile {
  static constexpr int per_thread = sizeof(A) == 8 ? 2 : 4;  // rows and columns
  static constexpr int rows = 16 * per_thread, features = 32, columns = 128, staged = 16;
  static constexpr int operand = rows * (features + 1);
  static_assert(2 * operand >= staged * columns);
  A operands[2 * operand];
  A weights[rows][rows + 1];
};

/// s[i][j] += a_{y + 16 i} . b_{x + 16 j} over `size` features; rows from a_rows or b_rows on are
/// zeros.
template <class A, class U, class V>
SSMLIB_DEVICE void add_dots(A (&s)[quadratic_tile<A>::per_thread][quadratic_tile<A>::per_thread],
                            quadratic_tile<A>& tile, const U* a, index_t a_step, int a_rows,
                            const V* b, index_t b_step, int b_rows, int size) {
  using tiles = quadratic_tile<A>;
  constexpr int R = tiles::per_thread, F = tiles::features;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  for (int f0 = 0; f0 < size; f0 += F) {
    __syncthreads();
#pragma unroll 4
    for (int n = threadIdx.x; n < tiles::rows * F; n += 256) {
      const int row = n / F, f = n % F, column = f0 + f;
      const bool there = column < size;
      tile.operands[row * (F + 1) + f] =
          there && row < a_rows ? static_cast<A>(widen(a[row * a_step + column])) : A(0);
      tile.operands[tiles::operand + row * (F + 1) + f] =
          there && row < b_rows ? static_cast<A>(widen(b[row * b_step + column])) : A(0);
    }
    __syncthreads();
#pragma unroll 8
    for (int f = 0; f < F; ++f) {
      A u[R], w[R];
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

/// acc[i][c] += the sum over j of weights[y + 16 i][j] b_j[first + x + 16 c], in the order of j.
template <class A, class V>
SSMLIB_DEVICE void add_weighted_rows(A (&acc)[quadratic_tile<A>::per_thread][8],
                                     quadratic_tile<A>& tile, const V* b, index_t b_step,
                                     int b_rows, int first, int size) {
  using tiles = quadratic_tile<A>;
  constexpr int R = tiles::per_thread, C = tiles::columns;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16, width = min(C, size - first);
  for (int j0 = 0; j0 < b_rows; j0 += tiles::staged) {
    __syncthreads();
#pragma unroll 8
    for (int n = threadIdx.x; n < tiles::staged * C; n += 256) {
      const int row = n / C, c = n % C;
      tile.operands[n] = c < width && j0 + row < b_rows
                             ? static_cast<A>(widen(b[(j0 + row) * b_step + first + c]))
                             : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < tiles::staged; ++j) {
      A w[R];
#pragma unroll
      for (int i = 0; i < R; ++i)
        w[i] = tile.weights[y + 16 * i][j0 + j];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (16 * c >= width) break;
        const A value = tile.operands[j * C + x + 16 * c];
#pragma unroll
        for (int i = 0; i < R; ++i)
          acc[i][c] = fma(w[i], value, acc[i][c]);
      }
    }
  }
}

template <class T>
SSMLIB_DEVICE void store_sum(T* to, accum_t<T> sum, bool add) {
  *to = narrow<T>(add ? widen(*to) + sum : sum);
}

}  // namespace ssm::kernels::cuda::detail
