#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cpu/pack.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <concepts>
#include <optional>
#include <string>
#include <type_traits>

/// @file
/// Products of few rows with a large weight matrix, as in decoding: the time is that of reading
/// the weights once.

namespace ssm::kernels {

namespace detail {

/// acc[i * Cols + j] += the packs of x[i] w[j] over k, for Rows x Cols dot products that share
/// their loads. Each has one running pack: its bits do not depend on Rows, Cols or where k is cut
/// (at multiples of the width). With Ahead, asks for what lies `ahead` elements beyond in w.
template <int Rows, int Cols, bool Ahead, Real T, class W>
SSMLIB_NOINLINE void accumulate_dots(index_t k, const T* SSMLIB_RESTRICT x, index_t x_step,
                                     const W* SSMLIB_RESTRICT w, index_t w_step,
                                     simd::pack<T>* SSMLIB_RESTRICT running, index_t ahead) {
  using P = simd::pack<T>;
  constexpr index_t width = P::width, line = 64 / static_cast<index_t>(sizeof(W));
  P acc[Rows * Cols];
  simd::unroll<Rows * Cols>([&](auto e) SSMLIB_LAMBDA_INLINE { acc[e] = running[e]; });
  const auto add = [&](const P(&v)[Cols], auto load) SSMLIB_LAMBDA_INLINE {
    simd::unroll<Rows>([&](auto i) SSMLIB_LAMBDA_INLINE {
      P u = load(x + i * x_step);
      if constexpr (Rows * Cols > 4) simd::keep_in_register(u);
      simd::unroll<Cols>([&](auto j) SSMLIB_LAMBDA_INLINE {
        acc[i * Cols + j] = simd::fma(u, v[j], acc[i * Cols + j]);
      });
    });
  };
  index_t p = 0;
  const auto step = [&]() SSMLIB_LAMBDA_INLINE {
    P v[Cols];
    simd::unroll<Cols>([&](auto j)
                           SSMLIB_LAMBDA_INLINE { v[j] = simd::load_widened(w + j * w_step + p); });
    add(v, [&](const T* row) SSMLIB_LAMBDA_INLINE { return P::load(row + p); });
    p += width;
  };
  while (p + line <= k) {
    if constexpr (Ahead) {
      simd::unroll<Cols>([&](auto j) SSMLIB_LAMBDA_INLINE {
        __builtin_prefetch(w + j * w_step + p + ahead, 0, 2);
      });
    }
    simd::unroll<line / width>([&](auto) SSMLIB_LAMBDA_INLINE { step(); });
  }
  while (p + width <= k)
    step();
  if (p < k) {
    P v[Cols];
    simd::unroll<Cols>([&](auto j) SSMLIB_LAMBDA_INLINE {
      v[j] = simd::load_widened_part(w + j * w_step + p, k - p);
    });
    add(v, [&](const T* row) SSMLIB_LAMBDA_INLINE { return P::load_part(row + p, k - p); });
  }
  simd::unroll<Rows * Cols>([&](auto e) SSMLIB_LAMBDA_INLINE { running[e] = acc[e]; });
}

template <Real T, class W>
struct skinny_product {
  view<const T, 2> x;
  view<const W, 2> w;
  view<T, 2> y;
  view<const T, 1> bias;
  T beta;

  static constexpr index_t chunk = 32;  // rows of x at a time

  /// The columns [j_begin, j_end) of y.
  void columns(index_t j_begin, index_t j_end) const {
    // Twelve running packs: three rows by four weight rows, or four by three.
    const index_t m = x.extents[0];
    for (index_t i = 0; i < m; i += chunk) {
      const index_t count = std::min(chunk, m - i);
      count <= 3 ? panels<4>(i, count, j_begin, j_end) : panels<3>(i, count, j_begin, j_end);
    }
  }

 private:
  /// By panels of weight rows: within one, a range of k short enough for x to stay in the
  /// first-level cache is used for all its weight rows before the next.
  template <int Cols>
  void panels(index_t i, index_t count, index_t j_begin, index_t j_end) const {
    using P = simd::pack<T>;
    constexpr index_t panel = 4 * Cols;
    constexpr index_t cached = 16384 / static_cast<index_t>(sizeof(T));
    const index_t k = x.extents[1];
    const index_t depth = count <= 2 ? k : std::max<index_t>(256, cached / count / 64 * 64);
    P running[chunk * panel];
    for (index_t j0 = j_begin; j0 < j_end; j0 += panel) {
      const index_t cols = std::min(panel, j_end - j0);
      std::fill_n(running, count * cols, P(T(0)));
      for (index_t p = 0; p < k; p += depth) {
        const index_t length = std::min(depth, k - p);
        index_t j = 0;
        for (; j + Cols <= cols; j += Cols) {
          blocks<Cols>(i, count, j0 + j, p, length, running + j * count);
        }
        for (; j < cols; ++j)
          blocks<1>(i, count, j0 + j, p, length, running + j * count);
      }
      const index_t whole = cols / Cols * Cols;
      for (index_t r = 0; r < count; ++r) {
        for (index_t j = 0; j < cols; ++j) {
          const index_t group = j < whole ? j / Cols * Cols : j, step = j < whole ? Cols : 1;
          const P sum = running[group * count + r * step + j - group];
          finish(y(i + r, j0 + j), j0 + j, simd::horizontal_sum(sum));
        }
      }
    }
  }

  /// A chunk's rows by Cols weight rows over [p, p + k): the first block reads w from memory.
  template <int Cols>
  void blocks(index_t i0, index_t count, index_t j, index_t p, index_t k,
              simd::pack<T>* running) const {
    const W* weights = w.data + j * w.strides[0] + p;
    const index_t w_step = w.strides[0], x_step = x.strides[0], ahead = Cols * w_step;
    const auto block = [&](auto rows, auto first, index_t i) {
      accumulate_dots<decltype(rows)::value, Cols, decltype(first)::value>(
          k, x.data + (i0 + i) * x_step + p, x_step, weights, w_step, running + i * Cols, ahead);
    };
    constexpr std::true_type first;
    constexpr std::false_type later;
    constexpr std::integral_constant<int, 4> four;
    const auto up_to_three = [&](auto which, index_t i) {
      if (count - i == 3) block(std::integral_constant<int, 3>{}, which, i);
      if (count - i == 2) block(std::integral_constant<int, 2>{}, which, i);
      if (count - i == 1) block(std::integral_constant<int, 1>{}, which, i);
    };
    if (count < 4) return up_to_three(first, 0);
    block(four, first, 0);
    index_t i = 4;
    for (; i + 4 <= count; i += 4)
      block(four, later, i);
    up_to_three(later, i);
  }

  void finish(T& out, index_t j, T value) const {
    if (bias) value += bias(j);
    if (beta != T(0)) value = simd::fma(beta, out, value);
    out = value;
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
  // Rows of x a multiple of 4 KiB apart would share one set of the first-level cache.
  const index_t padded = k + 64 / static_cast<index_t>(sizeof(T));
  std::optional<scratch<T>> copy;
  if (m > 1) {
    copy.emplace(m * padded);
    for (index_t i = 0; i < m; ++i) {
      std::copy_n(x.data + i * x.strides[0], k, copy->data() + i * padded);
    }
    x = {copy->data(), {m, k}, {padded, 1}};
  }
  const detail::skinny_product<T, W> product{x, w, y, bias, beta};
  // About 20 us a task: 256 KiB from memory, or as much arithmetic.
  const index_t work = n * k * std::max<index_t>(static_cast<index_t>(sizeof(W)), m);
  const index_t pieces = std::clamp<index_t>(work / (256 * 1024), 1, 16 * ctx.threads());
  if (pieces == 1 || ctx.threads() == 1) return product.columns(0, n);
  const index_t panel = m <= 3 ? 16 : 12;
  ctx.parallel_ranges(n, pieces, panel,
                      [&](index_t begin, index_t end) { product.columns(begin, end); });
}
template <Real T, class W>
requires(!std::is_const_v<W>) void rows_times_transposed(
    const cpu::context& ctx, std::type_identity_t<view<const T, 2>> x, view<W, 2> w, view<T, 2> y,
    std::type_identity_t<view<const T, 1>> bias = {}, std::type_identity_t<T> beta = 0) {
  rows_times_transposed<T, W>(ctx, x, view<const W, 2>(w), y, bias, beta);
}

#define SSMLIB_DETAIL_LIST(T, W)                                                               \
  SSMLIB_INSTANTIATE(                                                                          \
      gemm, void rows_times_transposed<T, W>(                                                  \
                const cpu::context&, std::type_identity_t<view<const T, 2>>, view<const W, 2>, \
                view<T, 2>, std::type_identity_t<view<const T, 1>>, std::type_identity_t<T>))
SSMLIB_DETAIL_LIST(float, float);
SSMLIB_DETAIL_LIST(float, bf16);
SSMLIB_DETAIL_LIST(double, double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
