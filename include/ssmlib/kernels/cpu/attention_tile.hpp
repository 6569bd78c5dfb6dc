#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/kernels/cpu/gemm_kernel.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <numbers>
#include <numeric>
#include <type_traits>

/// @file
/// Tiles of softmax attention: query rows against keys that lie transposed, tile by tile.
///
/// Key tiles start at multiples of `attention_tile` counted from the first token of the sequence,
/// and each element of every product is summed in one order. So the bits of a query's result depend
/// on its position, its keys and its values, and not on which other queries are computed with it.

namespace ssm::kernels {

/// What one matrix of logits is: c q_t . k_s over the tokens s that are kept.
struct attention_options {
  double scale = 1.0;
  bool causal = false;
  index_t window = 0;  ///< keep t - window < s <= t; 0: all s <= t. With `causal` only.
};

namespace detail {

/// Keys of a tile and query rows of a task: a multiple of every register tile's columns.
inline constexpr index_t attention_tile = 96;
/// Tiles after which a row's running sums are closed and added to the total, so that the pieces of
/// a long row can be computed at once.
inline constexpr index_t attention_segment = 16;

template <Real T>
inline constexpr index_t attention_cols = gemm_tile<T>::cols;
static_assert(attention_tile % attention_cols<float> == 0 &&
              attention_tile % attention_cols<double> == 0);

/// The unit of logits: attention in float works with powers of 2, which take fewer operations.
template <Real T>
inline constexpr double logit_unit = std::is_same_v<T, float> ? std::numbers::log2e : 1.0;

/// The exponential of a logit x <= 0 in that unit: 2^x or e^x. Float: 1 ulp; 0 below 2^-126.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE simd::pack<T> weight_of(simd::pack<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return simd::exp(x);
  } else {
    using P = simd::pack<float>;
    // (2^r - 1) / r on [-1/2, 1/2], relative error of 2^r 5e-9; fitted at Chebyshev nodes.
    static constexpr float c[] = {6.9314718803e-01f, 2.4022650761e-01f, 5.5503571142e-02f,
                                  9.6180825573e-03f, 1.3390863365e-03f, 1.5453162945e-04f};
    constexpr float round = 0x1.8p23f;  // adding it rounds to an integer in the low bits
    const P clamped = simd::max(x, P(-127.0f));
    const P shifted = clamped + P(round);
    const P r = clamped - (shifted - P(round));
    // An exponent field of 0 makes the factor for -127 zero.
    const auto exponent = ((P::uvec)shifted.v + (127u - std::bit_cast<std::uint32_t>(round))) << 23;
    return simd::fma(r, simd::detail::polynomial(r, c), P(1.0f)) * P((P::vec)exponent);
  }
}

/// The tokens [begin, end) of its sequence that a query row is multiplied with.
struct key_range {
  index_t begin, end;
};
[[nodiscard]] inline key_range keys_of(const attention_options& o, index_t position,
                                       index_t length) {
  if (!o.causal) return {0, length};
  return {o.window == 0 ? 0 : std::max<index_t>(0, position + 1 - o.window), position + 1};
}

/// The keys and values of one sequence and head. Tile j holds keys transposed, (key size x ld), and
/// values, (tokens x value_width), the width rounded up to whole register tiles with zeros.
template <Real T>
struct key_value_tiles {
  const T* keys = nullptr;
  const T* values = nullptr;
  index_t key_step = 0, value_step = 0;  // from tile to tile
  index_t slots = 0;                     // tile j is in slot j mod slots
  index_t key_size = 0, value_width = 0;
  index_t padded = 0;  // tokens with room; the last tile may be narrower than the others

  [[nodiscard]] const T* key_tile(index_t j) const { return keys + j % slots * key_step; }
  [[nodiscard]] const T* value_tile(index_t j) const { return values + j % slots * value_step; }
  [[nodiscard]] index_t leading(index_t j) const {
    return std::min(attention_tile, padded - j * attention_tile);
  }
};

/// to[d * ld + s] = rows[s * step + d] for s < count; zeros up to ld.
template <Real T>
void transpose_rows(const T* rows, index_t step, index_t count, index_t size, T* to, index_t ld) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  index_t s = 0;
  for (; s + w <= count; s += w) {
    index_t d = 0;
    for (; d + w <= size; d += w) {
      P block[P::width];
      transpose_block(rows + s * step + d, step, block);
      simd::unroll<P::width>([&](auto i)
                                 SSMLIB_LAMBDA_INLINE { block[i].store(to + (d + i) * ld + s); });
    }
    for (; d < size; ++d) {
      for (index_t i = 0; i < w; ++i)
        to[d * ld + s + i] = rows[(s + i) * step + d];
    }
  }
  for (index_t d = 0; d < size; ++d) {
    for (index_t i = s; i < count; ++i)
      to[d * ld + i] = rows[i * step + d];
    std::fill(to + d * ld + count, to + (d + 1) * ld, T(0));
  }
}

/// to[s * width + p] = rows[s * step + p] for p < size, zeros up to width and, up to `padded`, for
/// the tokens from `count` on.
template <Real T>
void copy_rows(const T* rows, index_t step, index_t count, index_t size, T* to, index_t width,
               index_t padded) {
  for (index_t s = 0; s < count; ++s) {
    std::copy_n(rows + s * step, size, to + s * width);
    std::fill(to + s * width + size, to + (s + 1) * width, T(0));
  }
  std::fill(to + count * width, to + padded * width, T(0));
}

/// Which columns of a tile some row of each register tile of rows needs: outside, nothing is
/// computed.
struct tile_bounds {
  static constexpr index_t max_blocks = attention_tile / 6;
  index_t begin[max_blocks], end[max_blocks];
  index_t blocks = 0, rows_a_block = 0, rows = 0;
  bool empty = true;

  /// @param origin  position of the tile's first key
  /// @param columns of the tile
  tile_bounds(const key_range* range, index_t row_count, index_t block, index_t origin,
              index_t columns)
      : blocks((row_count + block - 1) / block), rows_a_block(block), rows(row_count) {
    for (index_t b = 0; b < blocks; ++b) {
      index_t low = columns, high = 0;
      for (index_t i = b * block; i < std::min(rows, (b + 1) * block); ++i) {
        low = std::min(low, std::max<index_t>(0, range[i].begin - origin));
        high = std::max(high, std::min(columns, range[i].end - origin));
      }
      begin[b] = low;
      end[b] = std::max(low, high);
      empty = empty && low >= high;
    }
  }
  [[nodiscard]] int rows_of(index_t b) const {
    return static_cast<int>(std::min(rows_a_block, rows - b * rows_a_block));
  }
};

/// A product with few rows on the left: more columns at once than multiply_tile takes, so
/// that enough sums are under way; each has the same order.
template <Real T, int Rows, int Vectors>
SSMLIB_NOINLINE void multiply_few_rows(const left_panel<T>& left, const T* SSMLIB_RESTRICT b,
                                       index_t b_step, T* c, index_t c_step, bool add) {
  using P = simd::pack<T>;
  P acc[Rows][Vectors];
  simd::unroll<Rows * Vectors>(
      [&](auto e) SSMLIB_LAMBDA_INLINE { acc[e / Vectors][e % Vectors] = P(T(0)); });
  for (index_t k = 0; k < left.k; ++k) {
    P x[Rows];
    simd::unroll<Rows>([&](auto i) SSMLIB_LAMBDA_INLINE {
      x[i] = P(left.a[i * left.row_step + k * left.k_step]);
    });
    simd::unroll<Vectors>([&](auto v) SSMLIB_LAMBDA_INLINE {
      const P y = P::load(b + k * b_step + v * P::width);
      simd::unroll<Rows>([&](auto i)
                             SSMLIB_LAMBDA_INLINE { acc[i][v] = simd::fma(x[i], y, acc[i][v]); });
    });
  }
  simd::unroll<Rows * Vectors>([&](auto e) SSMLIB_LAMBDA_INLINE {
    constexpr int i = decltype(e)::value / Vectors, v = decltype(e)::value % Vectors;
    T* to = c + i * c_step + v * P::width;
    (add ? acc[i][v] + P::load(to) : acc[i][v]).store(to);
  });
}

/// Columns [j, end) of a product with few rows, Vectors registers at once, then fewer.
template <Real T, int Rows, int Vectors>
void multiply_columns(const left_panel<T>& left, const T* b, index_t b_step, T* c, index_t c_step,
                      bool add, index_t j, index_t end) {
  constexpr index_t step = Vectors * simd::pack<T>::width;
  for (; j + step <= end; j += step)
    multiply_few_rows<T, Rows, Vectors>(left, b + j, b_step, c + j, c_step, add);
  if constexpr (Vectors > 1) {
    if (j < end) {
      constexpr int fewer = Vectors > 8 ? 8 : Vectors > 4 ? 4 : Vectors > 2 ? 2 : 1;
      multiply_columns<T, Rows, fewer>(left, b, b_step, c, c_step, add, j, end);
    }
  }
}

inline constexpr index_t few_rows = 4;
/// c = left b, or c += left b, for up to few_rows rows and columns [j, end), whole register tiles.
template <Real T>
void multiply_few_rows(index_t rows, const left_panel<T>& left, const T* b, index_t b_step, T* c,
                       index_t c_step, bool add, index_t j, index_t end) {
  if (rows == 1) return multiply_columns<T, 1, 12>(left, b, b_step, c, c_step, add, j, end);
  if (rows == 2) return multiply_columns<T, 2, 6>(left, b, b_step, c, c_step, add, j, end);
  if (rows == 3) return multiply_columns<T, 3, 4>(left, b, b_step, c, c_step, add, j, end);
  multiply_columns<T, few_rows, 3>(left, b, b_step, c, c_step, add, j, end);
}

/// s (rows x columns of a tile) = q k^T where the bounds want it. q is (rows x depth), `right`
/// (depth x ld), s has rows `attention_tile` long.
template <Real T>
void tile_scores(const tile_bounds& bounds, const T* q, index_t q_step, index_t depth,
                 const T* right, index_t ld, T* s) {
  constexpr index_t cols = attention_cols<T>;
  if (bounds.rows <= few_rows) {
    const index_t begin = bounds.begin[0] / cols * cols, end = round_up(bounds.end[0], cols);
    return multiply_few_rows<T>(bounds.rows, {q, q_step, 1, depth}, right, ld, s, attention_tile,
                                false, begin, end);
  }
  for (index_t j = 0; j < ld; j += cols) {
    for (index_t b = 0; b < bounds.blocks; ++b) {
      if (bounds.begin[b] >= j + cols || bounds.end[b] <= j) continue;
      const index_t i = b * bounds.rows_a_block;
      tile_function_for<T>(bounds.rows_of(b), false)({q + i * q_step, q_step, 1, depth}, {},
                                                     right + j, ld,
                                                     {s + i * attention_tile + j, attention_tile});
    }
  }
}

/// out (rows x width) += p right: p as tile_scores leaves it, `right` (columns x width).
template <Real T>
void add_tile_product(const tile_bounds& bounds, const T* p, const T* right, index_t width,
                      T* out) {
  if (bounds.rows <= few_rows) {
    const index_t begin = bounds.begin[0], terms = bounds.end[0] - begin;
    return multiply_few_rows<T>(bounds.rows, {p + begin, attention_tile, 1, terms},
                                right + begin * width, width, out, width, true, 0, width);
  }
  for (index_t j = 0; j < width; j += attention_cols<T>) {
    for (index_t b = 0; b < bounds.blocks; ++b) {
      const index_t begin = bounds.begin[b], terms = bounds.end[b] - begin;
      if (terms <= 0) continue;
      const index_t i = b * bounds.rows_a_block;
      tile_function_for<T>(bounds.rows_of(b), false)(
          {p + i * attention_tile + begin, attention_tile, 1, terms}, {}, right + begin * width + j,
          width, {out + i * width + j, width, T(1), T(1)});
    }
  }
}

/// out (columns x width) += p^T right: `right` (rows x width). Rows of p are zero outside their
/// keys wherever the bounds reach.
template <Real T>
void add_transposed_product(const tile_bounds& bounds, const T* p, const T* right, index_t width,
                            index_t columns, T* out) {
  constexpr index_t step = gemm_tile<T>::rows;
  for (index_t c = 0; c < columns; c += step) {
    const index_t c_end = std::min(columns, c + step);
    index_t first = 0, last = bounds.blocks;
    while (first < last && (bounds.end[first] <= c || bounds.begin[first] >= c_end))
      ++first;
    while (last > first && (bounds.end[last - 1] <= c || bounds.begin[last - 1] >= c_end))
      --last;
    const index_t begin = first * bounds.rows_a_block;
    const index_t terms = std::min(bounds.rows, last * bounds.rows_a_block) - begin;
    if (terms <= 0) continue;
    const auto function = tile_function_for<T>(static_cast<int>(c_end - c), true);
    for (index_t j = 0; j < width; j += attention_cols<T>) {
      function({p + begin * attention_tile + c, 1, attention_tile, terms}, {},
               right + begin * width + j, width, {out + c * width + j, width, T(1), T(1)});
    }
  }
}

}  // namespace detail
}  // namespace ssm::kernels
