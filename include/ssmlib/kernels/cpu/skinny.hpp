#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cpu/pack.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <string>
#include <type_traits>

/// @file
/// Products of few rows with a large weight matrix, as in decoding: the time is that of reading
/// the weights once.

namespace ssm::kernels {

namespace detail {

/// out[i][j] = x[i] . w[j] for Rows x Cols dot products that share their loads. Every dot product
/// is one running pack over k, then a fixed tree: its bits do not depend on Rows and Cols.
template <int Rows, int Cols, Real T, class W>
SSMLIB_ALWAYS_INLINE void dot_block(index_t k, const T* x, index_t x_step, const W* w,
                                    index_t w_step, T (&out)[Rows][Cols]) {
  using P = simd::pack<T>;
  P acc[Rows][Cols];
  simd::unroll<Rows * Cols>([&](auto e)
                                SSMLIB_LAMBDA_INLINE { acc[e / Cols][e % Cols] = P(T(0)); });
  const auto add = [&](const P(&u)[Rows], const P(&v)[Cols]) SSMLIB_LAMBDA_INLINE {
    simd::unroll<Rows * Cols>([&](auto e) SSMLIB_LAMBDA_INLINE {
      constexpr int i = decltype(e)::value / Cols, j = decltype(e)::value % Cols;
      acc[i][j] = simd::fma(u[i], v[j], acc[i][j]);
    });
  };
  P u[Rows], v[Cols];
  index_t p = 0;
  for (; p + P::width <= k; p += P::width) {
    simd::unroll<Cols>([&](auto j)
                           SSMLIB_LAMBDA_INLINE { v[j] = simd::load_widened(w + j * w_step + p); });
    simd::unroll<Rows>([&](auto i) SSMLIB_LAMBDA_INLINE { u[i] = P::load(x + i * x_step + p); });
    add(u, v);
  }
  if (p < k) {
    simd::unroll<Cols>([&](auto j) SSMLIB_LAMBDA_INLINE {
      v[j] = simd::load_widened_part(w + j * w_step + p, k - p);
    });
    simd::unroll<Rows>(
        [&](auto i) SSMLIB_LAMBDA_INLINE { u[i] = P::load_part(x + i * x_step + p, k - p); });
    add(u, v);
  }
  simd::unroll<Rows * Cols>([&](auto e) SSMLIB_LAMBDA_INLINE {
    out[e / Cols][e % Cols] = simd::horizontal_sum(acc[e / Cols][e % Cols]);
  });
}

template <Real T, class W>
struct skinny_product {
  view<const T, 2> x;
  view<const W, 2> w;
  view<T, 2> y;
  view<const T, 1> bias;
  T beta;

  /// The columns [j_begin, j_end) of y: groups of weight rows, each used for all rows of x while
  /// it is in the cache.
  void columns(index_t j_begin, index_t j_end) const {
    constexpr int group = 4;
    index_t j = j_begin;
    for (; j + group <= j_end; j += group)
      rows<group>(j);
    for (; j < j_end; ++j)
      rows<1>(j);
  }

 private:
  template <int Cols>
  void rows(index_t j) const {
    const index_t m = x.extents[0];
    index_t i = 0;
    for (; i + 3 <= m && i + 4 != m; i += 3)
      block<3, Cols>(i, j);
    for (; i + 2 <= m; i += 2)
      block<2, Cols>(i, j);
    if (i < m) block<1, Cols>(i, j);
  }
  template <int Rows, int Cols>
  SSMLIB_NOINLINE void block(index_t i0, index_t j0) const {
    T sums[Rows][Cols];
    dot_block<Rows, Cols>(x.extents[1], x.data + i0 * x.strides[0], x.strides[0],
                          w.data + j0 * w.strides[0], w.strides[0], sums);
    for (index_t i = 0; i < Rows; ++i) {
      for (index_t j = 0; j < Cols; ++j) {
        T& out = y(i0 + i, j0 + j);
        T value = sums[i][j];
        if (bias) value += bias(j0 + j);
        if (beta != T(0)) value = simd::fma(beta, out, value);
        out = value;
      }
    }
  }
};

template <Real T, class W>
void check_skinny(view<const T, 2> x, view<const W, 2> w, view<T, 2> y, view<const T, 1> bias) {
  if (x.extents[1] != w.extents[1] || x.extents[0] != y.extents[0] ||
      w.extents[0] != y.extents[1] || (bias && bias.extents[0] != w.extents[0])) {
    throw shape_error("ssm: rows_times_transposed: x is " + to_string<2>(x.extents) + ", w is " +
                      to_string<2>(w.extents) + ", y is " + to_string<2>(y.extents) +
                      (bias ? ", bias is " + to_string<1>(bias.extents) : std::string()) +
                      "; wanted (m x k), (n x k), (m x n) and a bias of n");
  }
  if ((x.strides[1] != 1 || w.strides[1] != 1) && x.extents[1] > 1) {
    throw shape_error("ssm: rows_times_transposed: the rows of x and w have strides " +
                      std::to_string(x.strides[1]) + " and " + std::to_string(w.strides[1]) +
                      "; wanted 1, call contiguous() first");
  }
}

}  // namespace detail

/// y = x w^T + bias + beta y, for few rows of x: y[i, j] is the dot product of two rows.
///
/// Every y[i, j] has the same bits whatever the other rows and columns, the number of rows and the
/// number of threads: text decoded one token at a time equals text verified several at a time.
/// @param x     (m x k), rows of unit stride
/// @param w     (n x k), rows of unit stride; bf16 is widened exactly and summed in float
/// @param y     (m x n), overlaps nothing; not read when beta is 0
/// @param bias  (n), or none
/// @throws shape_error  the sizes do not fit, or a row is strided.
/// @cost   2 m n k flops; reads w once from memory for every m.
template <Real T, class W>
requires(
    std::same_as<W, T> ||
    (std::same_as<W, bf16> &&
     std::same_as<T, float>)) void rows_times_transposed(const cpu::context& ctx,
                                                         std::type_identity_t<view<const T, 2>> x,
                                                         view<const W, 2> w, view<T, 2> y,
                                                         std::type_identity_t<view<const T, 1>>
                                                             bias = {},
                                                         std::type_identity_t<T> beta = 0) {
  detail::check_skinny<T, W>(x, w, y, bias);
  const index_t m = x.extents[0], n = w.extents[0], k = x.extents[1];
  if (m == 0 || n == 0) return;
  const detail::skinny_product<T, W> product{x, w, y, bias, beta};
  // About 20 us a task: 256 KiB from memory, or as much arithmetic.
  const index_t work = n * k * std::max<index_t>(static_cast<index_t>(sizeof(W)), m);
  const index_t pieces = std::clamp<index_t>(work / (256 * 1024), 1, 16 * ctx.threads());
  if (pieces == 1 || ctx.threads() == 1) return product.columns(0, n);
  ctx.parallel_ranges(n, pieces, 4,
                      [&](index_t begin, index_t end) { product.columns(begin, end); });
}
template <Real T, class W>
requires(!std::is_const_v<W>) void rows_times_transposed(
    const cpu::context& ctx, std::type_identity_t<view<const T, 2>> x, view<W, 2> w, view<T, 2> y,
    std::type_identity_t<view<const T, 1>> bias = {}, std::type_identity_t<T> beta = 0) {
  rows_times_transposed<T, W>(ctx, x, view<const W, 2>(w), y, bias, beta);
}

}  // namespace ssm::kernels
