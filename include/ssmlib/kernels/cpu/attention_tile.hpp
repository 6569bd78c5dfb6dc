#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/kernels/cpu/gemm_kernel.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <limits>
#include <numeric>

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

[[nodiscard]] inline index_t round_up(index_t n, index_t step) {
  return (n + step - 1) / step * step;
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

/// s (rows x columns of a tile) = q k^T where the bounds want it. q is (rows x depth), `right`
/// (depth x ld), s has rows `attention_tile` long.
template <Real T>
void tile_scores(const tile_bounds& bounds, const T* q, index_t q_step, index_t depth,
                 const T* right, index_t ld, T* s) {
  constexpr index_t cols = attention_cols<T>;
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
