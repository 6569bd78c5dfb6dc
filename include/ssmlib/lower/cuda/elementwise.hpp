#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/kernels/cuda/elementwise.hpp>
#include <ssmlib/lower/cuda/elements.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/streams.hpp>

#include <array>
#include <concepts>
#include <type_traits>

/// @file
/// Elementwise expressions over tensors of the CUDA backend, asynchronous on the context's stream:
/// one kernel forward; one backward, and one more for each operand that is repeated.
///
/// A kernel is compiled where nvcc sees the expression. The library has those that its own layers
/// evaluate (the list in kernels/cuda/elementwise.hpp); others are refused at compile time by any
/// other compiler, with the advice to compile that source file with nvcc.

namespace ssm {

namespace detail {

/// The expression without its tensors.
template <class E>
[[nodiscard]] auto form_of(const E& e) {
  namespace form = kernels::cuda::form;
  if constexpr (std::same_as<E, constant>) {
    return e;
  } else if constexpr (!ElementwiseExpression<E>) {
    return form::leaf<typename E::value_type>{};
  } else if constexpr (requires { e.b; }) {
    const auto a = form_of(e.a);
    const auto b = form_of(e.b);
    return form::binary<std::remove_cvref_t<decltype(e.op)>, std::remove_const_t<decltype(a)>,
                        std::remove_const_t<decltype(b)>>{e.op, a, b};
  } else {
    const auto a = form_of(e.a);
    return form::unary<std::remove_cvref_t<decltype(e.op)>, std::remove_const_t<decltype(a)>>{e.op,
                                                                                              a};
  }
}
template <class E>
using form_t = decltype(form_of(std::declval<const E&>()));

template <class F, class To>
constexpr void require_kernel() {
#ifndef __CUDACC__
  static_assert(kernels::cuda::detail::form_is_compiled<F, To>,
                "ssm: this elementwise expression is not among those that the library compiles for "
                "CUDA; compile the source file that evaluates it with nvcc");
#endif
}

template <ElementwiseExpression E, Floating To>
void evaluate_to(const E& e, const tensor<To, E::rank, cuda>& out, const cuda::context& ctx) {
  using F = form_t<E>;
  require_kernel<F, To>();
  if (out.size() == 0) return;
  constexpr std::size_t n = kernels::cuda::elementwise_operands<F>::leaves;
  kernels::cuda::elementwise_problem<F, To> p{};
  p.in.formula = form_of(e);
  stream_walk<n + 1> walk;
  walk.extents = aligned_extents(out.extents());
  walk.strides[n] = aligned_strides(out);
  std::size_t k = 0;
  auto leaf = [&](const auto& t) {
    walk.strides[k] = aligned_strides(t);
    p.in.data[k++] = t.data();
  };
  for_each_leaf(e, leaf);
  walk.merge();
  p.in.extents = walk.extents;
  std::copy_n(walk.strides.begin(), n, p.in.strides.begin());
  p.y = out.data();
  p.y_strides = walk.strides[n];
  kernels::cuda::elementwise_forward(ctx.stream(), p);
}

/// Whether the gradients of an expression overlap in no other way than as the very same elements,
/// so that one kernel may add to all of them.
template <class E>
[[nodiscard]] bool cuda_gradients_are_separate(const E& gradients) {
  bool separate = true;
  std::size_t i = 0;
  auto outer = [&](const auto& a) {
    std::size_t j = 0;
    auto inner = [&](const auto& b) {
      if (i < j && a && b && !same_elements(a, b) && may_overlap(a, b)) separate = false;
      ++j;
    };
    for_each_leaf(gradients, inner);
    ++i;
  };
  for_each_leaf(gradients, outer);
  return separate;
}

/// gradients += the vector-Jacobian product, kernel by kernel.
template <class E, class F, Floating To>
void run_gradients(const E& gradients, kernels::cuda::elementwise_gradient_problem<F, To> p,
                   const cuda::context& ctx) {
  constexpr std::size_t n = kernels::cuda::elementwise_operands<F>::leaves;
  const auto wanted = p.gradients;
  std::array<bool, n> repeated{};
  bool any = false;
  for (std::size_t k = 0; k < n; ++k) {
    if (wanted[k] == nullptr) continue;
    for (std::size_t d = 0; d < 4; ++d)
      repeated[k] = repeated[k] || (p.in.extents[d] > 1 && p.gradient_strides[k][d] == 0);
    if (repeated[k]) p.gradients[k] = nullptr;
    any = any || !repeated[k];
  }
  if (any && cuda_gradients_are_separate(gradients)) {
    kernels::cuda::elementwise_backward(ctx.stream(), p);
  } else if (any) {  // one after the other, so that none loses what another adds
    for (std::size_t k = 0; k < n; ++k) {
      if (wanted[k] == nullptr || repeated[k]) continue;
      p.gradients = {};
      p.gradients[k] = wanted[k];
      kernels::cuda::elementwise_backward(ctx.stream(), p);
    }
  }
  p.gradients = wanted;
  for (std::size_t k = 0; k < n; ++k) {
    if (!repeated[k]) continue;
    const cuda_workspace workspace(ctx, kernels::cuda::elementwise_reduction_bytes(p, k));
    kernels::cuda::elementwise_reduction(ctx.stream(), p, k, workspace.data());
  }
}

}  // namespace detail

/// Evaluates an elementwise expression in one kernel, rounded to an element type.
/// @return its value, a new dense tensor.
/// @cost   one read of every operand, one write.
template <Floating To, ElementwiseExpression E>
requires std::same_as<typename E::backend, cuda>
[[nodiscard]] tensor<To, E::rank, cuda> eval_as(
    const E& e, const cuda::context& ctx = default_context<cuda>()) {
  const cuda::scope scope(ctx);
  tensor<To, E::rank, cuda> out(e.extents());
  detail::evaluate_to(e, out, ctx);
  return out;
}
/// The same; float for operands of bf16.
template <ElementwiseExpression E>
requires std::same_as<typename E::backend, cuda>
[[nodiscard]] tensor<typename E::value_type, E::rank, cuda> eval(
    const E& e, const cuda::context& ctx = default_context<cuda>()) {
  return eval_as<typename E::value_type>(e, ctx);
}

/// Evaluates into a given tensor, which may be an operand: `assign(x, x * scale + bias)`. Where it
/// overlaps an operand at other places, the result is computed aside and copied.
/// @throws shape_error  the destination has another shape.
template <Floating To, ElementwiseExpression E>
requires std::same_as<typename E::backend, cuda>
void assign(const tensor<To, E::rank, cuda>& out, const E& e,
            const cuda::context& ctx = default_context<cuda>()) {
  if (out.extents() != e.extents()) {
    throw shape_error("ssm: assign: the expression is " + to_string<E::rank>(e.extents()) +
                      ", the destination is " + to_string<E::rank>(out.extents()) +
                      "; wanted the same");
  }
  bool safe = true;
  auto leaf = [&](const auto& t) {
    safe = safe && (detail::same_elements(t, out) || !detail::may_overlap(t, out));
  };
  detail::for_each_leaf(e, leaf);
  const cuda::scope scope(ctx);
  if (safe) {
    detail::evaluate_to(e, out, ctx);
  } else {
    out.copy_from(eval_as<To>(e, ctx));
  }
}

/// Adds the vector-Jacobian product of an elementwise expression to `gradients`, an expression of
/// the same type whose tensors are gradients; absent tensors are not computed. The gradient of a
/// repeated operand is summed over its repetitions in double, in an order that depends on the
/// shapes only.
/// @pre no gradient overlaps an operand or dy.
/// @throws shape_error  dy is not of the result's shape.
template <ElementwiseExpression E, Floating To>
requires std::same_as<typename E::backend, cuda>
void vjp_into(const E& e, const tensor<To, E::rank, cuda>& dy, const E& gradients,
              const cuda::context& ctx = default_context<cuda>()) {
  using F = detail::form_t<E>;
  detail::require_kernel<F, To>();
  if (dy.extents() != e.extents()) {
    throw shape_error("ssm: vjp: the expression is " + to_string<E::rank>(e.extents()) +
                      ", dy is " + to_string<E::rank>(dy.extents()) + "; wanted the same");
  }
  if (dy.size() == 0) return;
  constexpr std::size_t n = kernels::cuda::elementwise_operands<F>::leaves;
  kernels::cuda::elementwise_gradient_problem<F, To> p{};
  p.in.formula = detail::form_of(e);
  detail::stream_walk<2 * n + 1> walk;
  walk.extents = detail::aligned_extents(e.extents());
  walk.strides[2 * n] = detail::aligned_strides(dy);
  std::size_t k = 0;
  auto operand = [&](const auto& t) {
    walk.strides[k] = detail::aligned_strides(t);
    p.in.data[k++] = t.data();
  };
  detail::for_each_leaf(e, operand);
  k = 0;
  auto gradient = [&](const auto& t) {
    if (t) walk.strides[n + k] = detail::aligned_strides(t);
    p.gradients[k++] = t.data();
  };
  detail::for_each_leaf(gradients, gradient);
  walk.merge();
  p.in.extents = walk.extents;
  std::copy_n(walk.strides.begin(), n, p.in.strides.begin());
  std::copy_n(walk.strides.begin() + n, n, p.gradient_strides.begin());
  p.dy = dy.data();
  p.dy_strides = walk.strides[2 * n];
  detail::run_gradients(gradients, p, ctx);
}

/// The vector-Jacobian product: an expression of the same type whose tensors are the gradients of
/// sum(dy * e), for example `g.a` and `g.b`.
template <ElementwiseExpression E, Floating To>
requires std::same_as<typename E::backend, cuda>
[[nodiscard]] E vjp(const E& e, const tensor<To, E::rank, cuda>& dy,
                    const cuda::context& ctx = default_context<cuda>()) {
  const cuda::scope scope(ctx);
  E gradients = zeros_like(e);
  vjp_into(e, dy, gradients, ctx);
  return gradients;
}

}  // namespace ssm
