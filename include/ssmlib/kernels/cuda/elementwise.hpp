#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/expr/elementwise.hpp>

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <type_traits>

/// @file
/// Elementwise expressions on the device. A kernel is compiled for the form of an expression, which
/// is the expression without its tensors: their ranks, strides and addresses are arguments.

namespace ssm::kernels::cuda {

namespace form {

/// A tensor of T; computed with as accum_t<T>.
template <Floating T>
struct leaf {};
template <class Op, class A>
struct unary {
  Op op;
  A a;
};
template <class Op, class A, class B>
struct binary {
  Op op;
  A a;
  B b;
};

/// leaves: the number of tensors. real: what the form is computed in. bytes: of the smallest
/// element.
template <class F>
struct traits;
template <Floating T>
struct traits<leaf<T>> {
  using real = accum_t<T>;
  static constexpr std::size_t leaves = 1, bytes = sizeof(T);
};
template <>
struct traits<constant> {
  using real = void;
  static constexpr std::size_t leaves = 0, bytes = sizeof(double);
};
template <class Op, class A>
struct traits<unary<Op, A>> : traits<A> {};
template <class Op, class A, class B>
struct traits<binary<Op, A, B>> {
  using real = std::conditional_t<traits<A>::leaves == 0, typename traits<B>::real,
                                  typename traits<A>::real>;
  static constexpr std::size_t leaves = traits<A>::leaves + traits<B>::leaves,
                               bytes = std::min(traits<A>::bytes, traits<B>::bytes);
};

}  // namespace form

/// The tensors of a form over the axes of its result, from left to right.
template <class F>
struct elementwise_operands {
  static constexpr std::size_t leaves = form::traits<F>::leaves;

  F formula;
  shape<4> extents{1, 1, 1, 1};            // of the result; neighbouring axes merged
  std::array<const void*, leaves> data{};  // device memory
  std::array<shape<4>, leaves> strides{};  // in elements; 0 along repeated axes
};

/// y = form(operands), rounded to To.
template <class F, Floating To>
struct elementwise_problem {
  elementwise_operands<F> in;
  To* y = nullptr;  // may be an operand: the same elements in the same places
  shape<4> y_strides{};
};

/// gradients += the vector-Jacobian product with dy.
template <class F, Floating To>
struct elementwise_gradient_problem {
  elementwise_operands<F> in;
  const To* dy = nullptr;
  shape<4> dy_strides{};
  std::array<void*, elementwise_operands<F>::leaves>
      gradients{};  // types as the operands'; or null
  std::array<shape<4>, elementwise_operands<F>::leaves> gradient_strides{};
};

/// One kernel: each operand is read once, in accesses of 16 bytes where addresses and strides allow
/// it.
template <class F, Floating To>
void elementwise_forward(cudaStream_t stream, const elementwise_problem<F, To>& p);

/// Adds to the gradients that are given, in one kernel. @pre none of them is repeated along an
/// axis, and two that overlap are the same elements in the same places.
template <class F, Floating To>
void elementwise_backward(cudaStream_t stream, const elementwise_gradient_problem<F, To>& p);

/// Adds to the gradient of one operand, the `leaf`-th, which is repeated along some axes: its sums
/// over them are accumulated in double, in an order that depends on the shapes only.
/// @param workspace  elementwise_reduction_bytes(p, leaf) bytes, aligned to 8
template <class F, Floating To>
void elementwise_reduction(cudaStream_t stream, const elementwise_gradient_problem<F, To>& p,
                           std::size_t leaf, void* workspace);

namespace detail {

/// How a sum over repeated axes is cut: blocks of 256 threads, `kept_lanes` sums of neighbouring
/// elements at a time, and each sum in pieces.
struct reduction_plan {
  shape<4> kept{1, 1, 1, 1}, repeated{1, 1, 1, 1};  // the extents, 1 on the other's axes
  index_t sums = 1, terms = 1, tiles = 1, pieces = 1;
  int kept_lanes = 1;
  bool kept_innermost = false;  // whether neighbouring threads have neighbouring sums

  reduction_plan(const shape<4>& extents, const shape<4>& strides) {
    for (std::size_t d = 0; d < 4; ++d)
      (strides[d] == 0 ? repeated : kept)[d] = extents[d];
    sums = element_count(kept);
    terms = element_count(repeated);
    kept_innermost = kept[3] > 1;
    int lanes = 1;  // a power of two
    const index_t most = kept_innermost ? 32 : 256, wanted = kept_innermost ? kept[3] : terms;
    while (lanes < most && lanes < wanted)
      lanes *= 2;
    kept_lanes = kept_innermost ? lanes : 256 / lanes;
    tiles = (sums + kept_lanes - 1) / kept_lanes;
    const index_t lanes_a_sum = 256 / kept_lanes;
    pieces = std::clamp<index_t>(1056 / tiles, 1, std::max<index_t>(1, terms / (8 * lanes_a_sum)));
  }
};

}  // namespace detail

template <class F, Floating To>
[[nodiscard]] std::size_t elementwise_reduction_bytes(const elementwise_gradient_problem<F, To>& p,
                                                      std::size_t leaf) {
  const detail::reduction_plan plan(p.in.extents, p.gradient_strides[leaf]);
  return plan.pieces == 1 ? 0 : static_cast<std::size_t>(plan.pieces * plan.sums) * sizeof(double);
}

// ---- the forms that the library itself evaluates, compiled once ---------------------------------

namespace form {
template <class A, class B>
using sum = binary<elementwise::add, A, B>;
template <class A, class B>
using product = binary<elementwise::multiply, A, B>;
template <class A>
using negated = unary<elementwise::negate, A>;
template <class A>
using exponential = unary<elementwise::exponential, A>;
template <class A>
using silu = unary<elementwise::silu, A>;
template <class A>
using sigmoid = unary<elementwise::sigmoid, A>;
template <class A>
using softplus = unary<elementwise::softplus, A>;
}  // namespace form

// X(element type of the result, form): x + y, x + a + b, y * silu(gate), y * silu(gate + bias),
// softplus(x), -softplus(a), sigmoid(x), -(exp(a) * softplus(x + bias)); parameters are of P.
#define SSMLIB_DETAIL_LAYER_FORMS(X, T, P)                                                \
  X(T, form::sum<form::leaf<T>, form::leaf<T>>)                                           \
  X(T, form::sum<form::sum<form::leaf<T>, form::leaf<T>>, form::leaf<T>>)                 \
  X(T, form::product<form::leaf<T>, form::silu<form::leaf<T>>>)                           \
  X(T, form::product<form::leaf<T>, form::silu<form::sum<form::leaf<T>, form::leaf<P>>>>) \
  X(T, form::softplus<form::leaf<T>>)                                                     \
  X(P, form::negated<form::softplus<form::leaf<T>>>)                                      \
  X(P, form::sigmoid<form::leaf<T>>)                                                      \
  X(P, form::negated<form::product<form::exponential<form::leaf<P>>,                      \
                                   form::softplus<form::sum<form::leaf<T>, form::leaf<P>>>>>)
// -exp(a), x * number, x + y * number
#define SSMLIB_DETAIL_PARAMETER_FORMS(X, P)             \
  X(P, form::negated<form::exponential<form::leaf<P>>>) \
  X(P, form::product<form::leaf<P>, constant>)          \
  X(P, form::sum<form::leaf<P>, form::product<form::leaf<P>, constant>>)
#define SSMLIB_DETAIL_FORMS(X)                 \
  SSMLIB_DETAIL_LAYER_FORMS(X, bf16, float)    \
  SSMLIB_DETAIL_LAYER_FORMS(X, float, float)   \
  SSMLIB_DETAIL_LAYER_FORMS(X, double, double) \
  SSMLIB_DETAIL_PARAMETER_FORMS(X, float)      \
  SSMLIB_DETAIL_PARAMETER_FORMS(X, double)     \
  X(bf16, form::sum<form::leaf<bf16>, form::leaf<float>>) /* the gradient of a bias */

namespace detail {
template <class F, Floating To>
inline constexpr bool form_is_compiled = false;
#define SSMLIB_DETAIL_LISTED(To, ...) \
  template <>                         \
  inline constexpr bool form_is_compiled<__VA_ARGS__, To> = true;
SSMLIB_DETAIL_FORMS(SSMLIB_DETAIL_LISTED)
#undef SSMLIB_DETAIL_LISTED
}  // namespace detail

}  // namespace ssm::kernels::cuda

#ifdef __CUDACC__
#include <ssmlib/kernels/cuda/elementwise.cuh>
#endif
