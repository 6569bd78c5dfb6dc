#pragma once

#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/matmul.hpp>
#include <ssmlib/lower/reductions.hpp>

/// @file
/// Reductions and matrix products on a tape: the same functions with a tape after the operands. A
/// null tape records nothing.

namespace ssm {

namespace detail {

/// Records `back(dy, dx)` for y = f(x), if x's gradient is wanted.
template <Floating T, int R, int R2, Backend B, class F>
void record_unary(tape<T, B>* t, const tensor<T, R, B>& x, const tensor<T, R2, B>& y, F back) {
  if (t == nullptr || !t->wants(x)) return;
  t->record(y, [t, x, y, back] { back(t->gradient(y), t->gradient(x)); });
}

}  // namespace detail

template <Floating T, int R, Backend B>
[[nodiscard]] auto sum_rows(const tensor<T, R, B>& x, tape<T, B>* t,
                            const typename B::context& ctx = default_context<B>()) {
  auto y = sum_rows(x, ctx);
  detail::record_unary(t, x, y,
                       [&ctx](const auto& dy, const auto& dx) { sum_rows_vjp<T, R>(dy, dx, ctx); });
  return y;
}
template <Floating T, int R, Backend B>
[[nodiscard]] auto mean_rows(const tensor<T, R, B>& x, tape<T, B>* t,
                             const typename B::context& ctx = default_context<B>()) {
  auto y = mean_rows(x, ctx);
  detail::record_unary(
      t, x, y, [&ctx](const auto& dy, const auto& dx) { mean_rows_vjp<T, R>(dy, dx, ctx); });
  return y;
}
template <Floating T, int R, Backend B>
[[nodiscard]] auto max_rows(const tensor<T, R, B>& x, tape<T, B>* t,
                            const typename B::context& ctx = default_context<B>()) {
  auto y = max_rows(x, ctx);
  detail::record_unary(
      t, x, y, [&ctx, x](const auto& dy, const auto& dx) { max_rows_vjp<T, R>(x, dy, dx, ctx); });
  return y;
}
template <Floating T, int R, Backend B>
[[nodiscard]] tensor<T, 1, B> sum(const tensor<T, R, B>& x, tape<T, B>* t,
                                  const typename B::context& ctx = default_context<B>()) {
  auto y = sum(x, ctx);
  detail::record_unary(t, x, y, [&ctx](const auto& dy, const auto& dx) { sum_vjp(dy, dx, ctx); });
  return y;
}
template <Floating T, int R, Backend B>
[[nodiscard]] tensor<T, 1, B> mean(const tensor<T, R, B>& x, tape<T, B>* t,
                                   const typename B::context& ctx = default_context<B>()) {
  auto y = mean(x, ctx);
  detail::record_unary(t, x, y, [&ctx](const auto& dy, const auto& dx) { mean_vjp(dy, dx, ctx); });
  return y;
}
template <Floating T, int R, Backend B>
[[nodiscard]] tensor<T, R, B> softmax_rows(const tensor<T, R, B>& x, tape<T, B>* t,
                                           const typename B::context& ctx = default_context<B>()) {
  auto y = softmax_rows(x, ctx);
  detail::record_unary(
      t, x, y, [&ctx, y](const auto& dy, const auto& dx) { softmax_rows_vjp(y, dy, dx, ctx); });
  return y;
}
template <Floating T, int RA, int RB, Backend B>
[[nodiscard]] tensor<T, RA, B> matmul(const tensor<T, RA, B>& a, const tensor<T, RB, B>& b,
                                      tape<T, B>* t, matmul_options options = {},
                                      const typename B::context& ctx = default_context<B>()) {
  auto y = matmul(a, b, options, ctx);
  if (t != nullptr && (t->wants(a) || t->wants(b))) {
    t->record(y, [t, a, b, y, options, &ctx] {
      matmul_vjp(a, b, t->gradient(y), t->gradient(a), t->gradient(b), options, ctx);
    });
  }
  return y;
}

}  // namespace ssm
