#pragma once

#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/tensor/tensor.hpp>

namespace ssm {

/// Which operands of matmul are transposed (their last two axes).
struct matmul_options {
  bool transpose_a = false, transpose_b = false;
};

namespace detail {

/// The matrices of a tensor: one for each index of its leading axes.
template <Real T, int R>
[[nodiscard]] index_t matrix_count(const tensor<T, R>& t) {
  index_t n = 1;
  for (int d = 0; d + 2 < R; ++d)
    n *= t.extent(d);
  return n;
}
template <Real T, int R>
[[nodiscard]] view<T, 2> matrix_at(const tensor<T, R>& t, index_t i, bool transpose) {
  index_t offset = 0;
  for (int d = R - 3; d >= 0; --d) {
    offset += i % t.extent(d) * t.strides()[static_cast<std::size_t>(d)];
    i /= t.extent(d);
  }
  const view<T, 2> m{t.data() + offset,
                     {t.extent(R - 2), t.extent(R - 1)},
                     {t.strides()[R - 2], t.strides()[R - 1]}};
  return transpose ? transposed(m) : m;
}

template <int RA, int RB, Floating T, Backend B>
[[nodiscard]] shape<RA> matmul_extents(const tensor<T, RA, B>& a, const tensor<T, RB, B>& b,
                                       matmul_options o) {
  static_assert(RA >= 2 && (RB == RA || RB == 2),
                "ssm: matmul takes two tensors of one rank (2 to 4), or a matrix on the right");
  shape<RA> out = a.extents();
  bool fits =
      a.extent(o.transpose_a ? RA - 2 : RA - 1) == b.extent(o.transpose_b ? RB - 1 : RB - 2);
  for (int d = 0; RB == RA && d + 2 < RA; ++d)
    fits = fits && a.extent(d) == b.extent(d);
  if (!fits) {
    throw shape_error("ssm: matmul: a is " + to_string<RA>(a.extents()) +
                      (o.transpose_a ? " transposed" : "") + ", b is " +
                      to_string<RB>(b.extents()) + (o.transpose_b ? " transposed" : "") +
                      "; wanted (.. x m x k) and (.. x k x n)");
  }
  out[RA - 2] = a.extent(o.transpose_a ? RA - 1 : RA - 2);
  out[RA - 1] = b.extent(o.transpose_b ? RB - 2 : RB - 1);
  return out;
}

/// f(context or null, i) for each matrix: many are shared among tasks, few are shared inside. A
/// product's bits are the same either way.
template <class F>
void for_each_matrix(const cpu::context& ctx, index_t count, F&& f) {
  if (count < ctx.threads()) {
    for (index_t i = 0; i < count; ++i)
      f(&ctx, i);
  } else {
    ctx.parallel_for(count, [&](index_t i) { f(nullptr, i); });
  }
}
template <Real T>
void multiply(const cpu::context* ctx, view<const T, 2> a, view<const T, 2> b, T beta,
              view<T, 2> c) {
  if (ctx != nullptr) {
    kernels::gemm<T>(*ctx, T(1), a, b, beta, c);
  } else {
    kernels::gemm<T>(T(1), a, b, beta, c);
  }
}

}  // namespace detail

/// The product of matrices: (m, k) by (k, n); the same for each index of leading axes that both
/// have; or all rows of a by one matrix, (b, T, k) by (k, n).
/// @throws shape_error  the extents do not fit.
/// @cost   2 m k n flops a matrix.
template <Real T, int RA, int RB>
[[nodiscard]] tensor<T, RA> matmul(const tensor<T, RA>& a, const tensor<T, RB>& b,
                                   matmul_options options = {},
                                   const cpu::context& ctx = default_context<cpu>()) {
  tensor<T, RA> y(detail::matmul_extents(a, b, options));
  if constexpr (RA > 2 && RB == 2) {
    if (a.is_contiguous() && !options.transpose_a) {  // one tall product
      const index_t rows = detail::matrix_count(a) * a.extent(RA - 2);
      kernels::gemm<T>(ctx, T(1), a.reshape(rows, a.extent(RA - 1)).view(),
                       detail::matrix_at(b, 0, options.transpose_b), T(0),
                       y.reshape(rows, y.extent(RA - 1)).view());
      return y;
    }
  }
  detail::for_each_matrix(ctx, detail::matrix_count(a), [&](const cpu::context* inside, index_t i) {
    detail::multiply<T>(inside, detail::matrix_at(a, i, options.transpose_a),
                        detail::matrix_at(b, RB == 2 ? 0 : i, options.transpose_b), T(0),
                        detail::matrix_at(y, i, false));
  });
  return y;
}

/// da += dy b^T, db += a^T dy, with the transposes of `options` undone; absent ones are skipped.
template <Real T, int RA, int RB>
void matmul_vjp(const tensor<T, RA>& a, const tensor<T, RB>& b, const tensor<T, RA>& dy,
                const tensor<T, RA>& da, const tensor<T, RB>& db, matmul_options options = {},
                const cpu::context& ctx = default_context<cpu>()) {
  if (dy.extents() != detail::matmul_extents(a, b, options)) {
    throw shape_error("ssm: matmul_vjp: dy is " + to_string<RA>(dy.extents()) + ", the product " +
                      to_string<RA>(detail::matmul_extents(a, b, options)));
  }
  const index_t count = detail::matrix_count(a);
  if (da) {
    detail::for_each_matrix(ctx, count, [&](const cpu::context* inside, index_t i) {
      detail::multiply<T>(inside, detail::matrix_at(dy, i, false),
                          detail::matrix_at(b, RB == 2 ? 0 : i, !options.transpose_b), T(1),
                          detail::matrix_at(da, i, options.transpose_a));
    });
  }
  if (!db) return;
  if constexpr (RB == RA) {
    detail::for_each_matrix(ctx, count, [&](const cpu::context* inside, index_t i) {
      detail::multiply<T>(inside, detail::matrix_at(a, i, !options.transpose_a),
                          detail::matrix_at(dy, i, false), T(1),
                          detail::matrix_at(db, i, options.transpose_b));
    });
  } else {  // one matrix for all: the products are added in order
    for (index_t i = 0; i < count; ++i) {
      detail::multiply<T>(&ctx, detail::matrix_at(a, i, !options.transpose_a),
                          detail::matrix_at(dy, i, false), T(1),
                          detail::matrix_at(db, 0, options.transpose_b));
    }
  }
}

}  // namespace ssm
