#pragma once

#include <ssmlib/kernels/cuda/gemm.hpp>
#include <ssmlib/lower/matmul.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

namespace ssm {

namespace detail {

/// Whether the matrices of a tensor of rank 4 are one batch, equally far apart.
template <Floating T, int R>
[[nodiscard]] bool is_one_batch(const tensor<T, R, cuda>& t) {
  if constexpr (R == 4) {
    return t.extent(0) <= 1 || t.extent(1) <= 1 || t.strides()[0] == t.strides()[1] * t.extent(1);
  } else {
    return true;
  }
}
/// The i-th of `parts` batches of matrices, (batch, rows, columns). A single matrix serves all.
template <Floating T, int R>
[[nodiscard]] view<T, 3> matrices(const tensor<T, R, cuda>& t, index_t i, index_t parts,
                                  index_t batch, bool transpose) {
  view<T, 3> v{t.data(),
               {batch, t.extent(R - 2), t.extent(R - 1)},
               {0, t.strides()[R - 2], t.strides()[R - 1]}};
  if constexpr (R == 3) {
    v.strides[0] = t.strides()[0];
  } else if constexpr (R == 4) {
    v.strides[0] = parts == 1 && t.extent(1) <= 1 ? t.strides()[0] : t.strides()[1];
    if (parts > 1) v.data += i * t.strides()[0];
  }
  return transpose ? kernels::cuda::exchanged(v) : v;
}

/// f(part, parts, batch): one product where all three tensors are one batch, else one for each
/// index of the first axis.
template <int R, Floating T, int RB, class F>
void for_each_batch(const tensor<T, R, cuda>& a, const tensor<T, RB, cuda>& b,
                    const tensor<T, R, cuda>& c, F f) {
  index_t count = 1;
  for (int d = 0; d + 2 < R; ++d)
    count *= a.extent(d);
  if (count == 0) return;
  const bool one = is_one_batch(a) && is_one_batch(b) && is_one_batch(c);
  const index_t parts = one ? 1 : a.extent(0);
  for (index_t i = 0; i < parts; ++i)
    f(i, parts, count / parts);
}

template <Floating T>
void multiply_into(const cuda::context& ctx, const view<T, 3>& a, const view<T, 3>& b, double beta,
                   const view<T, 3>& c) {
  kernels::cuda::gemm(ctx, kernels::cuda::gemm_problem<T, T>{a, b, c, nullptr, 1.0, beta});
}

}  // namespace detail

/// The product of matrices, as on the CPU, through cuBLASLt; bf16 with sums in float.
/// @throws shape_error  the extents do not fit.
template <Floating T, int RA, int RB>
[[nodiscard]] tensor<T, RA, cuda> matmul(const tensor<T, RA, cuda>& a, const tensor<T, RB, cuda>& b,
                                         matmul_options options = {},
                                         const cuda::context& ctx = default_context<cuda>()) {
  const cuda::scope scope(ctx);
  tensor<T, RA, cuda> y(detail::matmul_extents(a, b, options));
  if constexpr (RA > 2 && RB == 2) {
    if (a.is_contiguous() && !options.transpose_a && a.size() > 0) {  // one tall product
      const index_t rows = a.size() / a.extent(RA - 1);
      detail::multiply_into(ctx, kernels::cuda::single(a.reshape(rows, a.extent(RA - 1)).view()),
                            detail::matrices(b, 0, 1, 1, options.transpose_b), 0.0,
                            kernels::cuda::single(y.reshape(rows, y.extent(RA - 1)).view()));
      return y;
    }
  }
  detail::for_each_batch(a, b, y, [&](index_t i, index_t parts, index_t batch) {
    detail::multiply_into(ctx, detail::matrices(a, i, parts, batch, options.transpose_a),
                          detail::matrices(b, i, parts, batch, options.transpose_b), 0.0,
                          detail::matrices(y, i, parts, batch, false));
  });
  return y;
}

/// da += dy b^T, db += a^T dy, with the transposes of `options` undone; absent ones are skipped.
template <Floating T, int RA, int RB>
void matmul_vjp(const tensor<T, RA, cuda>& a, const tensor<T, RB, cuda>& b,
                const tensor<T, RA, cuda>& dy, const tensor<T, RA, cuda>& da,
                const tensor<T, RB, cuda>& db, matmul_options options = {},
                const cuda::context& ctx = default_context<cuda>()) {
  using detail::matrices;
  if (dy.extents() != detail::matmul_extents(a, b, options)) {
    throw shape_error("ssm: matmul_vjp: dy is " + to_string<RA>(dy.extents()) + ", the product " +
                      to_string<RA>(detail::matmul_extents(a, b, options)));
  }
  const cuda::scope scope(ctx);
  if (da) {
    detail::for_each_batch(dy, b, da, [&](index_t i, index_t parts, index_t batch) {
      detail::multiply_into(ctx, matrices(dy, i, parts, batch, false),
                            matrices(b, i, parts, batch, !options.transpose_b), 1.0,
                            matrices(da, i, parts, batch, options.transpose_a));
    });
  }
  if (!db) return;
  if constexpr (RB == RA) {
    detail::for_each_batch(a, db, dy, [&](index_t i, index_t parts, index_t batch) {
      detail::multiply_into(ctx, matrices(a, i, parts, batch, !options.transpose_a),
                            matrices(dy, i, parts, batch, false), 1.0,
                            matrices(db, i, parts, batch, options.transpose_b));
    });
  } else if (a.is_contiguous() && dy.is_contiguous() && !options.transpose_a) {
    if (a.size() == 0 || dy.size() == 0) return;
    const index_t rows = dy.size() / dy.extent(RA - 1);
    detail::multiply_into(
        ctx,
        kernels::cuda::exchanged(kernels::cuda::single(a.reshape(rows, a.extent(RA - 1)).view())),
        kernels::cuda::single(dy.reshape(rows, dy.extent(RA - 1)).view()), 1.0,
        matrices(db, 0, 1, 1, options.transpose_b));
  } else {  // one matrix for all: the products are added in order
    const tensor<T, RA, cuda> from = a.contiguous(), gradient = dy.contiguous();
    index_t count = 1;
    for (int d = 0; d + 2 < RA; ++d)
      count *= a.extent(d);
    const shape<3> of_a{count, a.extent(RA - 2), a.extent(RA - 1)},
        of_dy{count, dy.extent(RA - 2), dy.extent(RA - 1)};
    for (index_t i = 0; i < count; ++i) {
      detail::multiply_into(
          ctx,
          matrices(from.template reshape<3>(of_a).slice(0, i, i + 1), 0, 1, 1,
                   !options.transpose_a),
          matrices(gradient.template reshape<3>(of_dy).slice(0, i, i + 1), 0, 1, 1, false), 1.0,
          matrices(db, 0, 1, 1, options.transpose_b));
    }
  }
}

}  // namespace ssm
