#pragma once

#include <ssmlib/kernels/cpu/reduce.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/lower/elementwise.hpp>

#include <algorithm>
#include <array>
#include <string>

/// @file
/// Sums, means and maxima over rows (the last axis) or over everything, and softmax of rows, with
/// their vector-Jacobian products, which add to dx. Orders of summation depend on the shapes only;
/// sums of more than 256 elements are accumulated in double.

namespace ssm {

namespace detail {

template <int R>
inline constexpr int reduced_rank = R == 1 ? 1 : R - 1;

/// The extents without the last axis; of a vector: (1).
template <std::size_t R>
[[nodiscard]] auto without_rows(const std::array<index_t, R>& extents) {
  std::array<index_t, R == 1 ? 1 : R - 1> out{};
  out[0] = 1;
  std::copy(extents.begin(), extents.end() - 1, out.begin());
  return out;
}

/// Row r of a tensor, counted over its leading axes.
template <Real T, int R>
[[nodiscard]] T* row_of(const tensor<T, R>& t, index_t r) {
  index_t offset = 0;
  for (int d = R - 2; d >= 0; --d) {
    offset += r % t.extent(d) * t.strides()[static_cast<std::size_t>(d)];
    r /= t.extent(d);
  }
  return t.data() + offset;
}

/// f(row, length) for the rows of a tensor, in parallel.
template <Real T, int R, class F>
void for_each_row(const tensor<T, R>& t, const cpu::context& ctx, F&& f) {
  const index_t n = t.extent(R - 1);
  index_t rows = 1;
  for (int d = 0; d + 1 < R; ++d)
    rows *= t.extent(d);
  if (rows == 0) return;
  const index_t pieces = std::max<index_t>(1, rows * n / stream_walk<1>::task_elements);
  ctx.parallel_ranges(rows, pieces, 1, [&](index_t begin, index_t end) {
    for (index_t r = begin; r < end; ++r)
      f(r, n);
  });
}

template <Real T>
[[nodiscard]] double long_sum(const T* p, index_t n) {
  double total = 0;
  for (index_t i = 0; i < n; i += 256) {
    total += static_cast<double>(kernels::sum(std::min<index_t>(256, n - i), p + i));
  }
  return total;
}
/// The place of the largest element, the first of equals; a NaN counts as largest.
template <Real T>
[[nodiscard]] index_t largest_at(const T* p, index_t n) {
  index_t best = 0;
  for (index_t i = 1; i < n; ++i) {
    if (!(p[i] <= p[best]) && p[best] == p[best]) best = i;
  }
  return best;
}

/// A tensor as rows that tasks can share: itself, or one long row cut in pieces.
template <Real T, int R>
[[nodiscard]] double sum_of(const tensor<T, R>& x, const cpu::context& ctx) {
  const tensor<T, R> dense = x.contiguous();
  constexpr index_t piece = stream_walk<1>::task_elements;
  const index_t pieces = (dense.size() + piece - 1) / piece;
  const scratch<double> sums(std::max<index_t>(pieces, 1));
  ctx.parallel_for(pieces, [&](index_t i) {
    sums[i] = long_sum(dense.data() + i * piece, std::min(piece, dense.size() - i * piece));
  });
  double total = 0;
  for (index_t i = 0; i < pieces; ++i)
    total += sums[i];
  return total;
}

template <Real T, int R>
void refuse_empty_rows(const char* operation, const tensor<T, R>& x) {
  if (x.extent(R - 1) == 0) {
    throw shape_error("ssm: " + std::string(operation) + " of " + to_string<R>(x.extents()) +
                      ": rows without elements have no such value");
  }
}

/// dx[row] += scale * dy, the same number for the whole row.
template <Real T, int R>
void add_to_rows(const tensor<T, reduced_rank<R>>& dy, double scale, const tensor<T, R>& dx,
                 const cpu::context& ctx) {
  if (!dx || dx.size() == 0) return;
  const auto dense = dy.contiguous();
  const index_t step = dx.strides()[R - 1];
  for_each_row(dx, ctx, [&](index_t r, index_t n) {
    const T d = static_cast<T>(scale * static_cast<double>(dense.data()[r]));
    T* row = row_of(dx, r);
    for (index_t i = 0; i < n; ++i)
      row[i * step] += d;
  });
}

}  // namespace detail

/// The sum of each row. @return x's shape without the last axis; of a vector: (1).
template <Real T, int R>
[[nodiscard]] tensor<T, detail::reduced_rank<R>> sum_rows(
    const tensor<T, R>& x, const cpu::context& ctx = default_context<cpu>()) {
  tensor<T, detail::reduced_rank<R>> y(detail::without_rows(x.extents()));
  const tensor<T, R> dense = x.contiguous();
  detail::for_each_row(dense, ctx, [&](index_t r, index_t n) {
    y.data()[r] = static_cast<T>(detail::long_sum(dense.data() + r * n, n));
  });
  return y;
}
template <Real T, int R>
void sum_rows_vjp(const tensor<T, detail::reduced_rank<R>>& dy, const tensor<T, R>& dx,
                  const cpu::context& ctx = default_context<cpu>()) {
  detail::add_to_rows<T, R>(dy, 1.0, dx, ctx);
}

/// The mean of each row. @throws shape_error  rows without elements.
template <Real T, int R>
[[nodiscard]] tensor<T, detail::reduced_rank<R>> mean_rows(
    const tensor<T, R>& x, const cpu::context& ctx = default_context<cpu>()) {
  detail::refuse_empty_rows("mean_rows", x);
  tensor<T, detail::reduced_rank<R>> y(detail::without_rows(x.extents()));
  const tensor<T, R> dense = x.contiguous();
  detail::for_each_row(dense, ctx, [&](index_t r, index_t n) {
    y.data()[r] =
        static_cast<T>(detail::long_sum(dense.data() + r * n, n) / static_cast<double>(n));
  });
  return y;
}
template <Real T, int R>
void mean_rows_vjp(const tensor<T, detail::reduced_rank<R>>& dy, const tensor<T, R>& dx,
                   const cpu::context& ctx = default_context<cpu>()) {
  if (dx) detail::add_to_rows<T, R>(dy, 1.0 / static_cast<double>(dx.extent(R - 1)), dx, ctx);
}

/// The largest element of each row; NaN where there is one.
/// @throws shape_error  rows without elements.
template <Real T, int R>
[[nodiscard]] tensor<T, detail::reduced_rank<R>> max_rows(
    const tensor<T, R>& x, const cpu::context& ctx = default_context<cpu>()) {
  detail::refuse_empty_rows("max_rows", x);
  tensor<T, detail::reduced_rank<R>> y(detail::without_rows(x.extents()));
  const tensor<T, R> dense = x.contiguous();
  detail::for_each_row(dense, ctx, [&](index_t r, index_t n) {
    const T* row = dense.data() + r * n;
    y.data()[r] = row[detail::largest_at(row, n)];
  });
  return y;
}
/// The gradient goes to the first of equal elements.
template <Real T, int R>
void max_rows_vjp(const tensor<T, R>& x, const tensor<T, detail::reduced_rank<R>>& dy,
                  const tensor<T, R>& dx, const cpu::context& ctx = default_context<cpu>()) {
  if (!dx) return;
  const tensor<T, R> dense = x.contiguous();
  const auto gradient = dy.contiguous();
  const index_t step = dx.strides()[R - 1];
  detail::for_each_row(dense, ctx, [&](index_t r, index_t n) {
    const index_t i = detail::largest_at(dense.data() + r * n, n);
    detail::row_of(dx, r)[i * step] += gradient.data()[r];
  });
}

/// The sum of all elements. @return (1)
template <Real T, int R>
[[nodiscard]] tensor<T, 1> sum(const tensor<T, R>& x,
                               const cpu::context& ctx = default_context<cpu>()) {
  return tensor<T, 1>::full({1}, static_cast<T>(detail::sum_of(x, ctx)));
}
template <Real T, int R>
void sum_vjp(const tensor<T, 1>& dy, const tensor<T, R>& dx,
             const cpu::context& = default_context<cpu>()) {
  const T d = dy(0);
  if (dx) dx.zip_with(dx, [d](T& g, const T&) { g += d; });
}
/// The mean of all elements. @return (1) @throws shape_error  there are none.
template <Real T, int R>
[[nodiscard]] tensor<T, 1> mean(const tensor<T, R>& x,
                                const cpu::context& ctx = default_context<cpu>()) {
  if (x.size() == 0) {
    throw shape_error("ssm: mean of " + to_string<R>(x.extents()) + ": there is no element");
  }
  const double n = static_cast<double>(x.size());
  return tensor<T, 1>::full({1}, static_cast<T>(detail::sum_of(x, ctx) / n));
}
template <Real T, int R>
void mean_vjp(const tensor<T, 1>& dy, const tensor<T, R>& dx,
              const cpu::context& = default_context<cpu>()) {
  if (!dx || dx.size() == 0) return;
  const T d = static_cast<T>(static_cast<double>(dy(0)) / static_cast<double>(dx.size()));
  dx.zip_with(dx, [d](T& g, const T&) { g += d; });
}
/// The largest of all elements; NaN where there is one. @return (1) @throws shape_error  no
/// element.
template <Real T, int R>
[[nodiscard]] tensor<T, 1> max(const tensor<T, R>& x,
                               const cpu::context& ctx = default_context<cpu>()) {
  if (x.size() == 0) {
    throw shape_error("ssm: max of " + to_string<R>(x.extents()) + ": there is no element");
  }
  return max_rows(x.contiguous().reshape(x.size()), ctx);
}

/// exp(x - largest of the row), divided by the row's sum. Entries of -infinity become 0.
template <Real T, int R>
[[nodiscard]] tensor<T, R> softmax_rows(const tensor<T, R>& x,
                                        const cpu::context& ctx = default_context<cpu>()) {
  using P = simd::pack<T>;
  tensor<T, R> y(x.extents());
  const tensor<T, R> dense = x.contiguous();
  detail::for_each_row(dense, ctx, [&](index_t r, index_t n) {
    if (n == 0) return;
    const T* from = dense.data() + r * n;
    T* to = y.data() + r * n;
    const P largest(from[detail::largest_at(from, n)]);
    simd::map(n, from, to, [=](P v) SSMLIB_LAMBDA_INLINE { return simd::exp(v - largest); });
    kernels::scale(n, static_cast<T>(1.0 / detail::long_sum(to, n)), to);
  });
  return y;
}
/// dx += y (dy - y . dy), row by row. @param y  the forward pass's result
template <Real T, int R>
void softmax_rows_vjp(const tensor<T, R>& y, const tensor<T, R>& dy, const tensor<T, R>& dx,
                      const cpu::context& ctx = default_context<cpu>()) {
  if (!dx) return;
  const tensor<T, R> value = y.contiguous(), gradient = dy.contiguous();
  const index_t step = dx.strides()[R - 1];
  detail::for_each_row(value, ctx, [&](index_t r, index_t n) {
    const T *p = value.data() + r * n, *d = gradient.data() + r * n;
    const T mean = kernels::dot(n, p, d);
    T* to = detail::row_of(dx, r);
    for (index_t i = 0; i < n; ++i)
      to[i * step] += p[i] * (d[i] - mean);
  });
}

}  // namespace ssm
