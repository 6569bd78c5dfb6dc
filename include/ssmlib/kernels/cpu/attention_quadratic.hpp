#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/attention.hpp>
#include <ssmlib/kernels/cpu/gemm.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>

/// @file
/// Softmax attention with the whole (length x length) matrix of a sequence and head in memory.

namespace ssm::kernels {

namespace detail {

template <class T>
[[nodiscard]] view<T, 2> head_span(view<T, 3> t, index_t head, index_t begin, index_t end) {
  return {t.data + begin * t.strides[0] + head * t.strides[1],
          {end - begin, t.extents[2]},
          {t.strides[0], t.strides[2]}};
}

/// p (n x n) = softmax(scale q k^T + mask), row by row.
template <Real T>
void attention_matrix(const attention_options& options, view<const T, 2> q, view<const T, 2> k,
                      view<T, 2> p) {
  const index_t n = q.extents[0];
  gemm<T>(static_cast<T>(options.scale), q, transposed(k), T(0), p);
  for (index_t t = 0; t < n; ++t) {
    T* row = p.data + t * p.strides[0];
    const auto [begin, end] = keys_of(options, t, n);
    const T largest = *std::max_element(row + begin, row + end);
    T sum = 0;
    for (index_t s = begin; s < end; ++s) {
      row[s] = std::exp(row[s] - largest);
      sum += row[s];
    }
    for (index_t s = begin; s < end; ++s)
      row[s] /= sum;
    std::fill(row, row + begin, T(0));
    std::fill(row + end, row + n, T(0));
  }
}

}  // namespace detail

/// attention_forward's result by the definition. @cost O(length^2) memory a thread.
template <Real T>
void attention_quadratic(const cpu::context& ctx, const attention_options& options,
                         view<const T, 3> q, view<const T, 3> k, view<const T, 3> v, view<T, 3> y,
                         const index_t* offsets, index_t sequences) {
  using namespace detail;
  const attention_heads heads(y.extents[1], q.extents[1], k.extents[1], v.extents[1]);
  ctx.parallel_for(sequences * heads.heads, [&](index_t task) {
    const index_t i = task / heads.heads, h = task % heads.heads;
    const index_t begin = offsets[i], end = offsets[i + 1], n = end - begin;
    if (n == 0) return;
    const scratch<T> memory(n * n);
    const view<T, 2> p{memory.data(), {n, n}, {n, 1}};
    attention_matrix<T>(options, head_span(q, heads.q_head(h), begin, end),
                        head_span(k, heads.k_head(h), begin, end), p);
    gemm<T>(T(1), p, head_span(v, heads.v_head(h), begin, end), T(0), head_span(y, h, begin, end));
  });
}

/// Adds the gradients of sum(dy * y) to dq, dk, dv; absent ones are skipped.
template <Real T>
void attention_quadratic_vjp(const cpu::context& ctx, const attention_options& options,
                             view<const T, 3> q, view<const T, 3> k, view<const T, 3> v,
                             view<const T, 3> dy, view<T, 3> dq, view<T, 3> dk, view<T, 3> dv,
                             const index_t* offsets, index_t sequences) {
  using namespace detail;
  const attention_heads heads(dy.extents[1], q.extents[1], k.extents[1], v.extents[1]);
  // Heads of one unit share operands with each other only, so units may run at once; within one,
  // heads go in ascending order.
  const index_t units = std::gcd(std::gcd(heads.q_heads, heads.k_heads), heads.v_heads);
  const index_t heads_a_unit = heads.heads / units;
  const T scale = static_cast<T>(options.scale);
  ctx.parallel_for(sequences * units, [&](index_t task) {
    const index_t i = task / units, begin = offsets[i], end = offsets[i + 1], n = end - begin;
    if (n == 0) return;
    const scratch<T> memory(2 * n * n);
    const view<T, 2> p{memory.data(), {n, n}, {n, 1}}, ds{memory.data() + n * n, {n, n}, {n, 1}};
    for (index_t u = 0; u < heads_a_unit; ++u) {
      const index_t h = task % units * heads_a_unit + u;
      const index_t hq = heads.q_head(h), hk = heads.k_head(h), hv = heads.v_head(h);
      const auto q_h = head_span(q, hq, begin, end), k_h = head_span(k, hk, begin, end);
      const auto dy_h = head_span(dy, h, begin, end);
      attention_matrix<T>(options, q_h, k_h, p);
      if (dv) {
        gemm<T>(T(1), transposed(view<const T, 2>(p)), dy_h, T(1), head_span(dv, hv, begin, end));
      }
      if (!dq && !dk) continue;
      gemm<T>(T(1), dy_h, transposed(head_span(v, hv, begin, end)), T(0), ds);
      for (index_t t = 0; t < n; ++t) {
        T mean = 0;
        for (index_t s = 0; s < n; ++s)
          mean += p(t, s) * ds(t, s);
        for (index_t s = 0; s < n; ++s)
          ds(t, s) = p(t, s) * (ds(t, s) - mean);
      }
      if (dq) gemm<T>(scale, ds, k_h, T(1), head_span(dq, hq, begin, end));
      if (dk) {
        gemm<T>(scale, transposed(view<const T, 2>(ds)), q_h, T(1), head_span(dk, hk, begin, end));
      }
    }
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      attention, void attention_quadratic<T>(const cpu::context&, const attention_options&,        \
                                             view<const T, 3>, view<const T, 3>, view<const T, 3>, \
                                             view<T, 3>, const index_t*, index_t));                \
  SSMLIB_INSTANTIATE(                                                                              \
      attention, void attention_quadratic_vjp<T>(const cpu::context&, const attention_options&,    \
                                                 view<const T, 3>, view<const T, 3>,               \
                                                 view<const T, 3>, view<const T, 3>, view<T, 3>,   \
                                                 view<T, 3>, view<T, 3>, const index_t*, index_t))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
