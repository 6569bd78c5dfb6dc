#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <concepts>
#include <string>
#include <utility>

namespace ssm::kernels::cuda {

/// C = alpha A B + beta C + bias for each index of the batch, with rows of C along its last axis.
/// A and B are transposed by exchanging the strides of their last two axes; one of those is 1 for
/// the fast path.
template <class In, class Out>
struct gemm_problem {
  static_assert(std::same_as<In, Out> || (std::same_as<In, bf16> && std::same_as<Out, float>),
                "ssm: products are of float, of double, or of bf16 with a result of bf16 or float");
  using real = accum_t<In>;

  view<const In, 3> a;        // (batch, m, k)
  view<const In, 3> b;        // (batch, k, n)
  view<Out, 3> c;             // (batch, m, n); overlaps a and b nowhere
  const Out* bias = nullptr;  // (n), added to each row; or absent
  double alpha = 1, beta = 0;
};

/// One matrix as a batch of one.
template <class T>
[[nodiscard]] view<T, 3> single(const view<T, 2>& v) {
  return {v.data, {1, v.extent(0), v.extent(1)}, {0, v.stride(0), v.stride(1)}};
}
template <class T>
[[nodiscard]] view<T, 2> exchanged(const view<T, 2>& v) {
  return {v.data, {v.extent(1), v.extent(0)}, {v.stride(1), v.stride(0)}};
}
template <class T>
[[nodiscard]] view<T, 3> exchanged(const view<T, 3>& v) {
  return {v.data, {v.extent(0), v.extent(2), v.extent(1)}, {v.stride(0), v.stride(2), v.stride(1)}};
}

/// Multiplies by cuBLASLt, with sums in float (double for double); float factors are rounded to
/// TF32 only where ctx.allow_tf32(). What cuBLASLt refuses goes to gemm_general. The algorithm
/// depends on sizes, strides and alignment to 16 bytes only and is kept by the context.
///
/// The context's first product makes a cuBLASLt handle and 32 MiB of workspace: it must not be
/// inside a graph capture (see prepare_gemm). After that nothing is allocated.
/// @throws shape_error    sizes that do not fit together.
/// @throws backend_error  cuBLASLt fails, or the first product is inside a capture.
/// @cost   2 m n k flops a matrix.
template <class In, class Out>
void gemm(const ssm::cuda::context& ctx, const gemm_problem<In, Out>& p);

/// Makes what the context needs for products, so that a capture may begin with one.
void prepare_gemm(const ssm::cuda::context& ctx);

/// The same product by a plain kernel, for any strides and sizes.
template <class In, class Out>
void gemm_general(cudaStream_t stream, const gemm_problem<In, Out>& p);

namespace detail {

enum class product_type { bf16_to_bf16, bf16_to_float, in_float, in_double };

/// A matrix as cuBLASLt reads it: columns of `rows` neighbours, `step` apart.
struct column_matrix {
  const void* data = nullptr;
  index_t rows = 0, columns = 0, step = 0, batch_step = 0;
  bool transposed = false;

  /// The transpose of a row-major matrix (rows and columns here are of what lies in memory).
  /// @return false if neither of the last two strides is 1, or rows overlap.
  template <class T>
  [[nodiscard]] bool read(const view<T, 3>& v) {
    data = v.data;
    batch_step = v.stride(0);
    if (v.stride(2) == 1 || v.extent(2) <= 1) {
      transposed = false, rows = v.extent(2), columns = v.extent(1), step = v.stride(1);
    } else if (v.stride(1) == 1 || v.extent(1) <= 1) {
      transposed = true, rows = v.extent(1), columns = v.extent(2), step = v.stride(2);
    } else {
      return false;
    }
    if (columns <= 1) step = std::max(step, rows);
    return step >= rows && batch_step >= 0;
  }
};

struct library_product {
  product_type type;
  index_t m, n, k, batch;
  column_matrix a, b, c;
  const void* bias;
  double alpha, beta;
};

/// Multiplies by cuBLASLt. @return false if it refuses.
[[nodiscard]] bool multiply_by_library(const ssm::cuda::context& ctx, const library_product& p);

template <class In, class Out>
constexpr product_type product_type_of = std::same_as<In, double>  ? product_type::in_double
                                         : std::same_as<In, float> ? product_type::in_float
                                         : std::same_as<Out, bf16> ? product_type::bf16_to_bf16
                                                                   : product_type::bf16_to_float;

template <class In, class Out>
[[nodiscard]] bool try_library(const ssm::cuda::context& ctx, const gemm_problem<In, Out>& p) {
  library_product q{product_type_of<In, Out>,
                    p.c.extent(1),
                    p.c.extent(2),
                    p.a.extent(2),
                    p.c.extent(0),
                    {},
                    {},
                    {},
                    p.bias,
                    p.alpha,
                    p.beta};
  return q.a.read(p.a) && q.b.read(p.b) && q.c.read(p.c) && !q.c.transposed &&
         multiply_by_library(ctx, q);
}

template <class In, class Out>
void check_gemm(const gemm_problem<In, Out>& p) {
  const index_t batch = p.c.extent(0);
  if (p.a.extent(0) != batch || p.b.extent(0) != batch || p.a.extent(1) != p.c.extent(1) ||
      p.b.extent(2) != p.c.extent(2) || p.a.extent(2) != p.b.extent(1)) {
    throw shape_error("ssm: gemm: a is " + to_string(p.a.extents) + ", b is " +
                      to_string(p.b.extents) + ", c is " + to_string(p.c.extents) +
                      "; wanted (batch x m x k), (batch x k x n) and (batch x m x n)");
  }
}

}  // namespace detail

template <class In, class Out>
void gemm(const ssm::cuda::context& ctx, const gemm_problem<In, Out>& p) {
  detail::check_gemm(p);
  if (p.c.size() == 0) return;
  const bool rows = p.c.stride(2) == 1 || p.c.extent(2) == 1;
  if (!rows && !p.bias && p.c.stride(1) == 1) {
    return gemm(ctx, gemm_problem<In, Out>{exchanged(p.b), exchanged(p.a), exchanged(p.c), nullptr,
                                           p.alpha, p.beta});
  }
  if (p.a.extent(2) > 0 && detail::try_library(ctx, p)) return;
  if (p.a.extent(2) > 0 && p.bias != nullptr && p.beta == 0) {  // the bias goes ahead
    gemm_problem<In, Out> q = p;
    q.bias = nullptr;
    q.beta = 1;
    const ssm::cuda::scope scope(ctx);
    const shape<4> n{1, p.c.extent(0), p.c.extent(1), p.c.extent(2)};
    ssm::detail::elements<ssm::cuda>::copy(p.c.data,
                                           {n, {0, p.c.stride(0), p.c.stride(1), p.c.stride(2)}},
                                           p.bias, {n, {0, 0, 0, 1}}, sizeof(Out));
    if (detail::try_library(ctx, q)) return;
  }
  gemm_general(ctx.stream(), p);
}

}  // namespace ssm::kernels::cuda

#ifndef SSMLIB_COMPILED
#include <ssmlib/kernels/cuda/gemm_impl.hpp>
#endif
#ifdef __CUDACC__
#include <ssmlib/kernels/cuda/gemm.cuh>
#endif
