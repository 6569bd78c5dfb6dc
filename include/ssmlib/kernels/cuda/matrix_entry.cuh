#pragma once

#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/matrix_distance.hpp>

/// @file
/// One entry of a tile: what it needs of its row, of its column, and the formulas.

namespace ssm::kernels::cuda::detail {

SSMLIB_DEVICE float exponential(float x) {
  return expf(x);
}
SSMLIB_DEVICE double exponential(double x) {
  return exp(x);
}
/// The head of `groups` that serves head h of `heads`.
SSMLIB_DEVICE int head_of(int h, int heads, int groups) {
  return groups == heads ? h : h * groups / heads;
}

/// What the entries of a row or a column of one head have in common.
template <class R>
struct line_values {
  double sum = 0;  ///< of log decays; of a softmax row, where it is set, of gradients times entries
  std::int32_t resets = 0;
  R number = 1;  ///< a row's log_sum, a column's weight
};

/// A tile seen from one head. Rows t and columns s count from the first token of the sequence.
template <class R>
struct head_tile {
  const matrix_tile<R>& m;
  int head, mask_head;
  index_t first;      // token of the sequence
  const R* products;  // of the place's row 0, column 0

  SSMLIB_DEVICE head_tile(const matrix_tile<R>& tile, index_t sequence, index_t first_token, int h)
      : m(tile),
        head(h),
        mask_head(head_of(h, tile.heads, tile.decay_heads)),
        first(first_token),
        products(tile.products + sequence * tile.strides[0] +
                 head_of(h, tile.heads, tile.product_heads) * tile.strides[1]) {}

  SSMLIB_DEVICE line_values<R> row(int t) const {
    line_values<R> v = decay_at(t);
    if (m.form == matrix_form::softmax) v.number = m.log_sum[head * m.tokens + first + t];
    return v;
  }
  SSMLIB_DEVICE line_values<R> column(int s) const {
    line_values<R> v = decay_at(s);
    if (m.weight.data) {
      v.number = m.weight.data[(first + s) * m.weight.strides[0] + mask_head * m.weight.strides[1]];
    }
    return v;
  }
  /// Products of one of the place's rows.
  SSMLIB_DEVICE const R* line(int row) const { return products + row * m.strides[2]; }
  SSMLIB_DEVICE bool keeps(int t, int s) const {
    if (m.form == matrix_form::plain) return true;
    if (m.form == matrix_form::semiseparable) return s <= t;
    return !m.causal || (s <= t && (m.window == 0 || s > t - m.window));
  }
  /// alpha a[t, s], 0 for s > t.
  SSMLIB_DEVICE R factor(const line_values<R>& row, const line_values<R>& column, int t,
                         int s) const {
    if (s > t) return R(0);
    if (!m.decay) return m.alpha;
    return row.resets == column.resets ? m.alpha * exponential(static_cast<R>(row.sum - column.sum))
                                       : R(0);
  }
  SSMLIB_DEVICE R diagonal() const {
    return m.diagonal ? m.diagonal[head_of(head, m.heads, m.diagonal_heads)] : R(0);
  }
  /// The entry of a product; a decay of 0 hides one that is not finite.
  SSMLIB_DEVICE R entry(R product, const line_values<R>& row, const line_values<R>& column, int t,
                        int s) const {
    if (m.form == matrix_form::plain) return product;
    if (m.form == matrix_form::softmax) {
      return keeps(t, s) ? exponential(m.alpha * product - row.number) : R(0);
    }
    return entry_of_factor(factor(row, column, t, s), product, column, t, s);
  }
  /// The same of a semiseparable tile, its factor known.
  SSMLIB_DEVICE R entry_of_factor(R factor, R product, const line_values<R>& column, int t,
                                  int s) const {
    const R value = factor == R(0) ? R(0) : factor * product * column.number;
    return s == t ? value + diagonal() : value;
  }

 private:
  SSMLIB_DEVICE line_values<R> decay_at(int t) const {
    line_values<R> v;
    if (m.form != matrix_form::semiseparable || !m.decay) return v;
    const index_t at = (first + t) * m.decay_heads + mask_head;
    v.sum = m.decay[at];
    v.resets = m.resets[at];
    return v;
  }
};

}  // namespace ssm::kernels::cuda::detail
