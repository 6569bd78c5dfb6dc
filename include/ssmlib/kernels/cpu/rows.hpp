#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/reduce.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>

/// @file
/// What kernels over token rows share: loops over packs, the division into tasks, column sums.

namespace ssm::kernels {

namespace detail {

/// f(i, count) for the packs of [0, n); `count` is the pack's width but for the last one.
template <Real T, class F>
SSMLIB_ALWAYS_INLINE void for_packs(index_t n, F f) {
  constexpr index_t w = simd::pack<T>::width;
  index_t i = 0;
  for (; i + w <= n; i += w)
    f(i, w);
  if (i < n) f(i, n - i);
}

template <Real T>
SSMLIB_ALWAYS_INLINE void store_up_to(T* p, index_t count, simd::pack<T> x) {
  if (count == simd::pack<T>::width) {
    x.store(p);
  } else {
    x.store_part(p, count);
  }
}

/// 1 in the first `count` lanes, 0 in the others.
template <Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> lanes_below(index_t count) {
  T lanes[simd::pack<T>::width] = {};
  std::fill_n(lanes, count, T(1));
  return simd::pack<T>::load(lanes);
}

/// p[0 .. count) += x.
template <Real T>
SSMLIB_ALWAYS_INLINE void add_up_to(T* p, index_t count, simd::pack<T> x) {
  store_up_to(p, count, load_up_to(p, count) + x);
}

}  // namespace detail

/// The number of tasks for `rows` rows of `width` elements each: tens of microseconds a task. It
/// depends on the sizes alone, so that sums over the rows of a task do too.
[[nodiscard]] inline index_t row_pieces(index_t rows, index_t width) {
  return std::min(rows, std::clamp<index_t>(rows * width / 16384, 1, 32));
}

/// f(piece, begin, end) for the pieces of [0, rows), in parallel.
template <class F>
void for_each_piece(const cpu::context& ctx, index_t rows, index_t pieces, F f) {
  ctx.parallel_for(pieces, [&](index_t p) { f(p, rows * p / pieces, rows * (p + 1) / pieces); });
}

/// out[j] += the sum of rows[0, j], rows[1, j], ..., in an order fixed by the number of rows.
template <Real T>
void add_column_sums(const cpu::context& ctx, view<const T, 2> rows, T* out) {
  constexpr index_t block = 64;  // rows a running sum takes before it joins the total
  const index_t n = rows.extent(0);
  ctx.parallel_ranges(rows.extent(1), row_pieces(rows.extent(1), n), 64,
                      [&](index_t begin, index_t end) {
                        const index_t width = end - begin;
                        const scratch<T> sum(width);
                        for (index_t r0 = 0; r0 < n; r0 += block) {
                          std::fill_n(sum.data(), width, T(0));
                          for (index_t r = r0; r < std::min(n, r0 + block); ++r) {
                            axpy(width, T(1), rows.data + r * rows.stride(0) + begin, sum.data());
                          }
                          axpy(width, T(1), sum.data(), out + begin);
                        }
                      });
}

/// out[j] += parts[0][j] + parts[1][j] + ... for `count` parts of n elements each; the first part
/// is left with the sum.
template <Real T>
void add_parts(index_t count, index_t n, T* parts, T* out) {
  for (index_t p = 1; p < count; ++p)
    axpy(n, T(1), parts + p * n, parts);
  if (count > 0) axpy(n, T(1), parts, out);
}

#define SSMLIB_DETAIL_LIST(T) \
  SSMLIB_INSTANTIATE(layers, void add_column_sums<T>(const cpu::context&, view<const T, 2>, T*))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
