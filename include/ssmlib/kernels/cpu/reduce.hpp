#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/kernels/cpu/pack.hpp>

/// @file
/// Sums and updates over raw contiguous memory. The order of every sum is fixed by its length
/// alone, so results do not depend on alignment, neighbours or threads.

namespace ssm::kernels {

namespace detail {

/// Sum of f(i, count) over packs: four running packs by turns, then a fixed tree. f gives the pack
/// of terms at i, with zeros beyond `count` lanes.
template <Real T, class F>
SSMLIB_ALWAYS_INLINE T sum_packs(index_t n, F f) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  P acc[4] = {P(T(0)), P(T(0)), P(T(0)), P(T(0))};
  index_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    simd::unroll<4>([&](auto u) SSMLIB_LAMBDA_INLINE { acc[u] = f(i + u * w, w, acc[u]); });
  }
  for (; i + w <= n; i += w)
    acc[0] = f(i, w, acc[0]);
  if (i < n) acc[1] = f(i, n - i, acc[1]);
  return simd::horizontal_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> load_up_to(const T* p, index_t count) {
  using P = simd::pack<T>;
  return count == P::width ? P::load(p) : P::load_part(p, count);
}

}  // namespace detail

/// Sum of a[i] b[i].
template <Real T>
[[nodiscard]] inline T dot(index_t n, const T* a, const T* b) {
  using P = simd::pack<T>;
  return detail::sum_packs<T>(n, [=](index_t i, index_t count, P acc) SSMLIB_LAMBDA_INLINE {
    return simd::fma(detail::load_up_to(a + i, count), detail::load_up_to(b + i, count), acc);
  });
}

/// Sum of a[i].
template <Real T>
[[nodiscard]] inline T sum(index_t n, const T* a) {
  using P = simd::pack<T>;
  return detail::sum_packs<T>(n, [=](index_t i, index_t count, P acc) SSMLIB_LAMBDA_INLINE {
    return detail::load_up_to(a + i, count) + acc;
  });
}

/// Sum of a[i]^2.
template <Real T>
[[nodiscard]] inline T sum_of_squares(index_t n, const T* a) {
  using P = simd::pack<T>;
  return detail::sum_packs<T>(n, [=](index_t i, index_t count, P acc) SSMLIB_LAMBDA_INLINE {
    const P x = detail::load_up_to(a + i, count);
    return simd::fma(x, x, acc);
  });
}

/// y[i] += alpha x[i].
template <Real T>
inline void axpy(index_t n, T alpha, const T* x, T* y) {
  using P = simd::pack<T>;
  simd::map(n, x, y, y, [=](P u, P v) SSMLIB_LAMBDA_INLINE { return simd::fma(P(alpha), u, v); });
}

/// x[i] *= alpha.
template <Real T>
inline void scale(index_t n, T alpha, T* x) {
  using P = simd::pack<T>;
  simd::map(n, x, x, [=](P u) SSMLIB_LAMBDA_INLINE { return P(alpha) * u; });
}

/// c[i, :] *= s[i] for an (m x n) matrix with rows ldc apart.
template <Real T>
inline void scale_rows(index_t m, index_t n, const T* s, T* c, index_t ldc) {
  for (index_t i = 0; i < m; ++i)
    scale(n, s[i], c + i * ldc);
}

/// h += x b^T: h (m x n) with rows ldh apart, x of m, b of n.
template <Real T>
inline void rank1_update(index_t m, index_t n, const T* x, const T* b, T* h, index_t ldh) {
  for (index_t i = 0; i < m; ++i)
    axpy(n, x[i], b, h + i * ldh);
}

/// h = a h + x b^T: one step of a linear recurrence with a scalar decay.
template <Real T>
inline void decayed_rank1_update(index_t m, index_t n, T a, const T* x, const T* b, T* h,
                                 index_t ldh) {
  using P = simd::pack<T>;
  for (index_t i = 0; i < m; ++i) {
    T* row = h + i * ldh;
    simd::map(n, b, row, row,
              [=](P u, P v) SSMLIB_LAMBDA_INLINE { return simd::fma(P(a), v, P(x[i]) * u); });
  }
}

/// y = h x: h (m x n) with rows ldh apart.
template <Real T>
inline void matrix_vector(index_t m, index_t n, const T* h, index_t ldh, const T* x, T* y) {
  for (index_t i = 0; i < m; ++i)
    y[i] = dot(n, h + i * ldh, x);
}

/// y = h^T c: h (m x n) with rows ldh apart, c of m, y of n. Sums over rows in ascending order.
template <Real T>
inline void transposed_matrix_vector(index_t m, index_t n, const T* h, index_t ldh, const T* c,
                                     T* y) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  index_t j = 0;
  for (; j + 4 * w <= n; j += 4 * w) {  // four chains hide the latency of the additions
    P acc[4] = {P(T(0)), P(T(0)), P(T(0)), P(T(0))};
    for (index_t i = 0; i < m; ++i) {
      simd::unroll<4>([&](auto u) SSMLIB_LAMBDA_INLINE {
        acc[u] = simd::fma(P(c[i]), P::load(h + i * ldh + j + u * w), acc[u]);
      });
    }
    simd::unroll<4>([&](auto u) SSMLIB_LAMBDA_INLINE { acc[u].store(y + j + u * w); });
  }
  for (; j < n; j += w) {
    const index_t count = n - j < w ? n - j : w;
    P acc(T(0));
    for (index_t i = 0; i < m; ++i) {
      acc = simd::fma(P(c[i]), detail::load_up_to(h + i * ldh + j, count), acc);
    }
    acc.store_part(y + j, count);
  }
}

}  // namespace ssm::kernels
