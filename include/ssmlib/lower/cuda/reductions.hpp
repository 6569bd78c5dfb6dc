#pragma once

#include <ssmlib/kernels/cuda/reduce.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/reductions.hpp>

#include <string>

/// @file
/// Sums, means and maxima over rows (the last axis) or over everything, and softmax of rows, with
/// their vector-Jacobian products, on CUDA: see lower/reductions.hpp. Operands are read once, but
/// for long rows of softmax; sums are accumulated in double and rounded once, to bf16 too. An
/// operand whose rows do not lie one after another is copied first.

namespace ssm {

namespace detail {

/// A tensor's rows as the kernels take them, with what they point to.
template <Floating T, int R>
struct cuda_rows {
  explicit cuda_rows(const tensor<T, R, cuda>& t) : dense(t.contiguous()) {
    p.x = dense.data();
    p.length = dense.extent(R - 1);
    p.rows = p.length == 0 ? element_count(without_rows(dense.extents())) : dense.size() / p.length;
  }
  /// All elements as one row.
  [[nodiscard]] kernels::cuda::row_problem<T> all() const { return {p.x, 1, dense.size()}; }

  tensor<T, R, cuda> dense;
  kernels::cuda::row_problem<T> p;
};

/// A tensor with missing axes on the left.
template <Floating T, int R>
[[nodiscard]] view<T, 4> four_axes(const tensor<T, R, cuda>& t) {
  const strided_axes axes = t.axes();
  return {t.data(), axes.extents, axes.strides};
}

template <Floating T>
[[nodiscard]] cuda_workspace row_workspace(const cuda::context& ctx,
                                           const kernels::cuda::row_problem<T>& p) {
  return {ctx, kernels::cuda::row_workspace_bytes(p.rows, p.length)};
}

template <Floating T, int R>
void refuse_empty_cuda_rows(const char* operation, const tensor<T, R, cuda>& x) {
  if (x.extent(R - 1) == 0) {
    throw shape_error("ssm: " + std::string(operation) + " of " + to_string<R>(x.extents()) +
                      ": rows without elements have no such value");
  }
}
template <Floating T, int R>
void refuse_no_element(const char* operation, const tensor<T, R, cuda>& x) {
  if (x.size() == 0) {
    throw shape_error("ssm: " + std::string(operation) + " of " + to_string<R>(x.extents()) +
                      ": there is no element");
  }
}

template <Floating T, int R>
[[nodiscard]] tensor<T, reduced_rank<R>, cuda> cuda_row_sums(const tensor<T, R, cuda>& x,
                                                             double scale,
                                                             const cuda::context& ctx) {
  const cuda::scope scope(ctx);
  const tensor<T, reduced_rank<R>, cuda> y(without_rows(x.extents()));
  const cuda_rows<T, R> rows(x);
  kernels::cuda::sum_rows<T>(ctx.stream(), rows.p, scale, y.data(),
                             row_workspace(ctx, rows.p).data());
  return y;
}
template <Floating T, int R>
[[nodiscard]] tensor<T, 1, cuda> cuda_sum(const tensor<T, R, cuda>& x, double scale,
                                          const cuda::context& ctx) {
  const cuda::scope scope(ctx);
  const tensor<T, 1, cuda> y(1);
  const cuda_rows<T, R> rows(x);
  kernels::cuda::sum_rows<T>(ctx.stream(), rows.all(), scale, y.data(),
                             row_workspace(ctx, rows.all()).data());
  return y;
}

/// dx[row] += scale * dy, the same number for the whole row.
template <Floating T, int R>
void add_to_cuda_rows(const tensor<T, reduced_rank<R>, cuda>& dy, double scale,
                      const tensor<T, R, cuda>& dx, const cuda::context& ctx) {
  if (!dx || dx.size() == 0) return;
  const cuda::scope scope(ctx);
  const auto dense = dy.contiguous();
  kernels::cuda::add_to_rows<T>(ctx.stream(), dense.data(), scale, four_axes(dx));
}
/// dx += scale * dy, one number for all.
template <Floating T, int R>
void add_everywhere(const tensor<T, 1, cuda>& dy, double scale, const tensor<T, R, cuda>& dx,
                    const cuda::context& ctx) {
  if (!dx || dx.size() == 0) return;
  if (dx.is_contiguous()) {
    kernels::cuda::add_to_rows<T>(
        ctx.stream(), dy.data(), scale,
        {dx.data(), {1, 1, 1, dx.size()}, {dx.size(), dx.size(), dx.size(), 1}});
    return;
  }
  const cuda::scope scope(ctx);
  const tensor<T, 1, cuda> rows(dx.size() / dx.extent(R - 1));
  elements<cuda>::copy(rows.data(), rows.axes(), dy.data(), {rows.axes().extents, {}}, sizeof(T));
  kernels::cuda::add_to_rows<T>(ctx.stream(), rows.data(), scale, four_axes(dx));
}

}  // namespace detail

/// The sum of each row. @return x's shape without the last axis; of a vector: (1).
template <Floating T, int R>
[[nodiscard]] tensor<T, detail::reduced_rank<R>, cuda> sum_rows(
    const tensor<T, R, cuda>& x, const cuda::context& ctx = default_context<cuda>()) {
  return detail::cuda_row_sums(x, 1.0, ctx);
}
template <Floating T, int R>
void sum_rows_vjp(const tensor<T, detail::reduced_rank<R>, cuda>& dy, const tensor<T, R, cuda>& dx,
                  const cuda::context& ctx = default_context<cuda>()) {
  detail::add_to_cuda_rows<T, R>(dy, 1.0, dx, ctx);
}

/// The mean of each row. @throws shape_error  rows without elements.
template <Floating T, int R>
[[nodiscard]] tensor<T, detail::reduced_rank<R>, cuda> mean_rows(
    const tensor<T, R, cuda>& x, const cuda::context& ctx = default_context<cuda>()) {
  detail::refuse_empty_cuda_rows("mean_rows", x);
  return detail::cuda_row_sums(x, 1.0 / static_cast<double>(x.extent(R - 1)), ctx);
}
template <Floating T, int R>
void mean_rows_vjp(const tensor<T, detail::reduced_rank<R>, cuda>& dy, const tensor<T, R, cuda>& dx,
                   const cuda::context& ctx = default_context<cuda>()) {
  if (!dx || dx.size() == 0) return;
  detail::add_to_cuda_rows<T, R>(dy, 1.0 / static_cast<double>(dx.extent(R - 1)), dx, ctx);
}

/// The largest element of each row; NaN where there is one.
/// @throws shape_error  rows without elements.
template <Floating T, int R>
[[nodiscard]] tensor<T, detail::reduced_rank<R>, cuda> max_rows(
    const tensor<T, R, cuda>& x, const cuda::context& ctx = default_context<cuda>()) {
  detail::refuse_empty_cuda_rows("max_rows", x);
  const cuda::scope scope(ctx);
  const tensor<T, detail::reduced_rank<R>, cuda> y(detail::without_rows(x.extents()));
  const detail::cuda_rows<T, R> rows(x);
  kernels::cuda::max_rows<T>(ctx.stream(), rows.p, y.data(),
                             detail::row_workspace(ctx, rows.p).data());
  return y;
}
/// The gradient goes to the first of equal elements.
template <Floating T, int R>
void max_rows_vjp(const tensor<T, R, cuda>& x, const tensor<T, detail::reduced_rank<R>, cuda>& dy,
                  const tensor<T, R, cuda>& dx,
                  const cuda::context& ctx = default_context<cuda>()) {
  if (!dx || dx.size() == 0) return;
  const cuda::scope scope(ctx);
  const detail::cuda_rows<T, R> rows(x);
  const auto gradient = dy.contiguous();
  kernels::cuda::max_rows_vjp<T>(ctx.stream(), rows.p, gradient.data(), detail::four_axes(dx),
                                 detail::row_workspace(ctx, rows.p).data());
}

/// The sum of all elements. @return (1)
template <Floating T, int R>
[[nodiscard]] tensor<T, 1, cuda> sum(const tensor<T, R, cuda>& x,
                                     const cuda::context& ctx = default_context<cuda>()) {
  return detail::cuda_sum(x, 1.0, ctx);
}
template <Floating T, int R>
void sum_vjp(const tensor<T, 1, cuda>& dy, const tensor<T, R, cuda>& dx,
             const cuda::context& ctx = default_context<cuda>()) {
  detail::add_everywhere(dy, 1.0, dx, ctx);
}
/// The mean of all elements. @return (1) @throws shape_error  there are none.
template <Floating T, int R>
[[nodiscard]] tensor<T, 1, cuda> mean(const tensor<T, R, cuda>& x,
                                      const cuda::context& ctx = default_context<cuda>()) {
  detail::refuse_no_element("mean", x);
  return detail::cuda_sum(x, 1.0 / static_cast<double>(x.size()), ctx);
}
template <Floating T, int R>
void mean_vjp(const tensor<T, 1, cuda>& dy, const tensor<T, R, cuda>& dx,
              const cuda::context& ctx = default_context<cuda>()) {
  if (!dx || dx.size() == 0) return;
  detail::add_everywhere(dy, 1.0 / static_cast<double>(dx.size()), dx, ctx);
}
/// The largest of all elements; NaN where there is one. @return (1) @throws shape_error  no
/// element.
template <Floating T, int R>
[[nodiscard]] tensor<T, 1, cuda> max(const tensor<T, R, cuda>& x,
                                     const cuda::context& ctx = default_context<cuda>()) {
  detail::refuse_no_element("max", x);
  const cuda::scope scope(ctx);
  return max_rows(x.contiguous().reshape(x.size()), ctx);
}

/// exp(x - largest of the row), divided by the row's sum. Entries of -infinity become 0.
template <Floating T, int R>
[[nodiscard]] tensor<T, R, cuda> softmax_rows(const tensor<T, R, cuda>& x,
                                              const cuda::context& ctx = default_context<cuda>()) {
  const cuda::scope scope(ctx);
  const tensor<T, R, cuda> y(x.extents());
  const detail::cuda_rows<T, R> rows(x);
  kernels::cuda::softmax_rows<T>(ctx.stream(), rows.p, y.data(),
                                 detail::row_workspace(ctx, rows.p).data());
  return y;
}
/// dx += y (dy - y . dy), row by row. @param y  the forward pass's result
template <Floating T, int R>
void softmax_rows_vjp(const tensor<T, R, cuda>& y, const tensor<T, R, cuda>& dy,
                      const tensor<T, R, cuda>& dx,
                      const cuda::context& ctx = default_context<cuda>()) {
  if (!dx || dx.size() == 0) return;
  const cuda::scope scope(ctx);
  const detail::cuda_rows<T, R> rows(y);
  const tensor<T, R, cuda> gradient = dy.contiguous();
  kernels::cuda::softmax_rows_vjp<T>(ctx.stream(), rows.p, gradient.data(), detail::four_axes(dx),
                                     detail::row_workspace(ctx, rows.p).data());
}

}  // namespace ssm
