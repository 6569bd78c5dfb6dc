#pragma once

#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/matmul.hpp>
#include <ssmlib/lower/reductions.hpp>

/// @file
/// Reductions and matrix products on a tape: the same functions with a tape after the operands. A
/// null tape records nothing.

namespace ssm {

namespace detail {

/// Records `back(dx)` for y = f(x), if x's gradient is wanted.
template <Real T, int R, int R2, class F>
void record_unary(tape<T>* t, const tensor<T, R>& x, const tensor<T, R2>& y, F back) {
  if (t == nullptr || !t->wants(x)) return;
  t->record(y, [t, x, y, back] { back(t->gradient(y), t->gradient(x)); });
}

template <Real T, int R>
void add_everywhere(const tensor<T, R>& dx, T d) {
  dx.zip_with(dx, [d](T& g, const T&) { g += d; });
}

}  // namespace detail

template <Real T, int R>
[[nodiscard]] auto sum_rows(const tensor<T, R>& x, tape<T>* t,
                            const cpu::context& ctx = default_context<cpu>()) {
  auto y = sum_rows(x, ctx);
  detail::record_unary(t, x, y,
                       [&ctx](const auto& dy, const auto& dx) { sum_rows_vjp<T, R>(dy, dx, ctx); });
  return y;
}
template <Real T, int R>
[[nodiscard]] auto mean_rows(const tensor<T, R>& x, tape<T>* t,
                             const cpu::context& ctx = default_context<cpu>()) {
  auto y = mean_rows(x, ctx);
  detail::record_unary(
      t, x, y, [&ctx](const auto& dy, const auto& dx) { mean_rows_vjp<T, R>(dy, dx, ctx); });
  return y;
}
template <Real T, int R>
[[nodiscard]] auto max_rows(const tensor<T, R>& x, tape<T>* t,
                            const cpu::context& ctx = default_context<cpu>()) {
  auto y = max_rows(x, ctx);
  detail::record_unary(
      t, x, y, [&ctx, x](const auto& dy, const auto& dx) { max_rows_vjp<T, R>(x, dy, dx, ctx); });
  return y;
}
template <Real T, int R>
[[nodiscard]] tensor<T, 1> sum(const tensor<T, R>& x, tape<T>* t,
                               const cpu::context& ctx = default_context<cpu>()) {
  auto y = sum(x, ctx);
  detail::record_unary(t, x, y,
                       [](const auto& dy, const auto& dx) { detail::add_everywhere(dx, dy(0)); });
  return y;
}
template <Real T, int R>
[[nodiscard]] tensor<T, 1> mean(const tensor<T, R>& x, tape<T>* t,
                                const cpu::context& ctx = default_context<cpu>()) {
  auto y = mean(x, ctx);
  detail::record_unary(t, x, y, [](const auto& dy, const auto& dx) {
    detail::add_everywhere(
        dx, static_cast<T>(static_cast<double>(dy(0)) / static_cast<double>(dx.size())));
  });
  return y;
}
template <Real T, int R>
[[nodiscard]] tensor<T, R> softmax_rows(const tensor<T, R>& x, tape<T>* t,
                                        const cpu::context& ctx = default_context<cpu>()) {
  auto y = softmax_rows(x, ctx);
  detail::record_unary(
      t, x, y, [&ctx, y](const auto& dy, const auto& dx) { softmax_rows_vjp(y, dy, dx, ctx); });
  return y;
}
template <Real T, int RA, int RB>
[[nodiscard]] tensor<T, RA> matmul(const tensor<T, RA>& a, const tensor<T, RB>& b, tape<T>* t,
                                   matmul_options options = {},
                                   const cpu::context& ctx = default_context<cpu>()) {
  auto y = matmul(a, b, options, ctx);
  if (t != nullptr && (t->wants(a) || t->wants(b))) {
    t->record(y, [t, a, b, y, options, &ctx] {
      matmul_vjp(a, b, t->gradient(y), t->gradient(a), t->gradient(b), options, ctx);
    });
  }
  return y;
}

}  // namespace ssm
