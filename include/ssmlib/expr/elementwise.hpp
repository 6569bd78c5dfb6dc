#pragma once

#include <ssmlib/expr/concepts.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

/// @file
/// Elementwise expressions: `silu(gate) * up + bias` is a node that owns its operands, checked when
/// it is built and computed in one pass when it is evaluated (lower/elementwise.hpp).
///
/// Shapes are aligned at their last axes; an axis that is missing or of extent 1 is repeated: (F)
/// fits (b, T, F), and (H, 1) fits (b, T, H, P).

namespace ssm {

/// What the nodes compute. Tags; the arithmetic is in kernels/cpu/elementwise_functions.hpp.
namespace elementwise {

struct negate {};
struct exponential {};
struct logarithm {};
struct square_root {};
struct reciprocal_square_root {};
struct square {};
struct absolute {};
struct sigmoid {};
struct silu {};
struct relu {};
struct gelu {};
struct gelu_tanh {};
struct hyperbolic_tangent {};
struct softplus {};
struct elu {
  double alpha;
};
struct clamp {
  double low, high;
};
struct add {};
struct subtract {};
struct multiply {};
struct divide {};
struct minimum {};
struct maximum {};

}  // namespace elementwise

/// A number in an elementwise expression; it takes the expression's type.
struct constant {
  double value;
};

template <class Op, class A>
struct unary_expression;
template <class Op, class A, class B>
struct binary_expression;

namespace detail {

template <class E>
inline constexpr bool is_elementwise_node = false;
template <class Op, class A>
inline constexpr bool is_elementwise_node<unary_expression<Op, A>> = true;
template <class Op, class A, class B>
inline constexpr bool is_elementwise_node<binary_expression<Op, A, B>> = true;

template <class E>
struct elementwise_traits {
  using value_type = typename E::value_type;
  using backend = typename E::backend;
  static constexpr int rank = E::rank, leaves = E::leaves;
};
template <Element T, int R, Backend B>
struct elementwise_traits<tensor<T, R, B>> {
  using value_type = accum_t<T>;
  using backend = B;
  static constexpr int rank = R, leaves = 1;
};
template <>
struct elementwise_traits<constant> {
  using value_type = void;
  using backend = void;
  static constexpr int rank = 0, leaves = 0;
};

template <class E>
inline constexpr bool is_number_tensor = false;
template <class T, int R, class B>
inline constexpr bool is_number_tensor<tensor<T, R, B>> = Real<T> || std::same_as<T, bf16>;

}  // namespace detail

/// A lazy elementwise node: not a tensor, to be evaluated.
template <class E>
concept ElementwiseExpression = detail::is_elementwise_node<E>;

/// What the nodes take: an expression, or a tensor of float, double or bf16 (widened to float).
template <class E>
concept ElementwiseOperand = ElementwiseExpression<E> || detail::is_number_tensor<E>;

namespace detail {

template <class E>
[[nodiscard]] auto extents_of(const E& e) {
  if constexpr (std::same_as<E, constant>) {
    return std::array<index_t, 0>{};
  } else {
    return e.extents();
  }
}

/// The common shape. @throws shape_error  an axis has two extents, neither of them 1.
template <std::size_t R1, std::size_t R2>
[[nodiscard]] std::array<index_t, std::max(R1, R2)> broadcast(const std::array<index_t, R1>& a,
                                                              const std::array<index_t, R2>& b) {
  constexpr std::size_t r = std::max(R1, R2);
  std::array<index_t, r> out{};
  for (std::size_t d = 0; d < r; ++d) {
    const index_t x = d + R1 < r ? 1 : a[d + R1 - r], y = d + R2 < r ? 1 : b[d + R2 - r];
    if (x != y && x != 1 && y != 1) {
      throw shape_error("ssm: elementwise: one operand is " +
                        to_string(std::span<const index_t>(a)) + ", the other " +
                        to_string(std::span<const index_t>(b)) +
                        "; aligned at the last axis, extents must be equal or 1");
    }
    out[d] = x == 1 ? y : x;
  }
  return out;
}

/// f(tensor) for each tensor of an expression, from left to right.
template <class E, class F>
void for_each_leaf(E& e, F& f) {
  if constexpr (std::same_as<std::remove_const_t<E>, constant>) {
  } else if constexpr (ElementwiseExpression<std::remove_const_t<E>>) {
    for_each_leaf(e.a, f);
    if constexpr (requires { e.b; }) for_each_leaf(e.b, f);
  } else {
    f(e);
  }
}
template <class E, class F>
void visit_operands(E& e, F& f) {
  auto leaf = [&f](auto& t) { f(std::string_view("x"), t, operand::per_token); };
  for_each_leaf(e, leaf);
}

}  // namespace detail

/// op(a), element by element. Part of an expression; made by the functions below.
template <class Op, class A>
struct unary_expression {
  using traits = detail::elementwise_traits<A>;
  using value_type = typename traits::value_type;
  using backend = typename traits::backend;
  static constexpr int rank = traits::rank, leaves = traits::leaves;

  Op op;
  A a;

  [[nodiscard]] shape<rank> extents() const { return a.extents(); }
  /// f(name, tensor&, operand) for each tensor in the expression.
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    detail::visit_operands(self, f);
  }
};

/// op(a, b), element by element; a or b may be a constant.
template <class Op, class A, class B>
struct binary_expression {
  using left = detail::elementwise_traits<A>;
  using right = detail::elementwise_traits<B>;
  template <class X, class Y>
  using unless_constant = std::conditional_t<std::is_void_v<X>, Y, X>;
  using value_type = unless_constant<typename left::value_type, typename right::value_type>;
  using backend = unless_constant<typename left::backend, typename right::backend>;
  static constexpr int rank = std::max(left::rank, right::rank);
  static constexpr int leaves = left::leaves + right::leaves;

  static_assert(std::same_as<backend, unless_constant<typename right::backend, backend>>,
                "ssm: an elementwise expression mixes two backends; copy one operand with "
                "to<backend>(...)");
  static_assert(std::same_as<value_type, unless_constant<typename right::value_type, value_type>>,
                "ssm: an elementwise expression mixes two element types; convert one with "
                "cast<T>(...)");
  static_assert(leaves <= 16,
                "ssm: an elementwise expression has more than 16 tensors; eval a part of it first");

  Op op;
  A a;
  B b;
  shape<rank> result = detail::broadcast(detail::extents_of(a), detail::extents_of(b));

  [[nodiscard]] const shape<rank>& extents() const { return result; }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    detail::visit_operands(self, f);
  }
};

// ---- functions of one operand
// --------------------------------------------------------------------

// One definition per function; the tag is its name in namespace elementwise.
#define SSMLIB_DETAIL_UNARY(function, tag)                            \
  template <ElementwiseOperand A>                                     \
  [[nodiscard]] unary_expression<elementwise::tag, A> function(A a) { \
    return {{}, std::move(a)};                                        \
  }

SSMLIB_DETAIL_UNARY(operator-, negate)
SSMLIB_DETAIL_UNARY(exp, exponential)
SSMLIB_DETAIL_UNARY(log, logarithm)
SSMLIB_DETAIL_UNARY(sqrt, square_root)
/// 1 / sqrt(x)
SSMLIB_DETAIL_UNARY(rsqrt, reciprocal_square_root)
SSMLIB_DETAIL_UNARY(square, square)
/// |x|; its slope at 0 is 0.
SSMLIB_DETAIL_UNARY(abs, absolute)
/// 1 / (1 + e^-x)
SSMLIB_DETAIL_UNARY(sigmoid, sigmoid)
/// x sigmoid(x)
SSMLIB_DETAIL_UNARY(silu, silu)
/// max(x, 0); its slope at 0 is 0.
SSMLIB_DETAIL_UNARY(relu, relu)
/// x Phi(x) with the normal distribution's Phi: GELU with erf.
SSMLIB_DETAIL_UNARY(gelu, gelu)
/// GELU by tanh: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), "gelu_new" in many models.
SSMLIB_DETAIL_UNARY(gelu_tanh, gelu_tanh)
SSMLIB_DETAIL_UNARY(tanh, hyperbolic_tangent)
/// log(1 + e^x)
SSMLIB_DETAIL_UNARY(softplus, softplus)
#undef SSMLIB_DETAIL_UNARY

/// x where x > 0, else alpha (e^x - 1).
template <ElementwiseOperand A>
[[nodiscard]] unary_expression<elementwise::elu, A> elu(A a, double alpha = 1.0) {
  return {{alpha}, std::move(a)};
}
/// min(max(x, low), high); the gradient passes where low <= x <= high.
/// @throws value_error  low > high.
template <ElementwiseOperand A>
[[nodiscard]] unary_expression<elementwise::clamp, A> clamp(A a, double low, double high) {
  if (!(low <= high)) {
    throw value_error("ssm: clamp(x, " + std::to_string(low) + ", " + std::to_string(high) +
                      "): wanted low <= high");
  }
  return {{low, high}, std::move(a)};
}

// ---- functions of two operands
// -------------------------------------------------------------------

#define SSMLIB_DETAIL_BINARY(function, tag)                                           \
  template <ElementwiseOperand A, ElementwiseOperand B>                               \
  [[nodiscard]] binary_expression<elementwise::tag, A, B> function(A a, B b) {        \
    return {{}, std::move(a), std::move(b)};                                          \
  }                                                                                   \
  template <ElementwiseOperand A, class S>                                            \
  requires std::is_arithmetic_v<S>                                                    \
  [[nodiscard]] binary_expression<elementwise::tag, A, constant> function(A a, S s) { \
    return {{}, std::move(a), constant{static_cast<double>(s)}};                      \
  }                                                                                   \
  template <class S, ElementwiseOperand B>                                            \
  requires std::is_arithmetic_v<S>                                                    \
  [[nodiscard]] binary_expression<elementwise::tag, constant, B> function(S s, B b) { \
    return {{}, constant{static_cast<double>(s)}, std::move(b)};                      \
  }

SSMLIB_DETAIL_BINARY(operator+, add)
SSMLIB_DETAIL_BINARY(operator-, subtract)
SSMLIB_DETAIL_BINARY(operator*, multiply)
SSMLIB_DETAIL_BINARY(operator/, divide)
/// The smaller of each pair, NaN where either is; where both are equal, the gradient goes to a.
SSMLIB_DETAIL_BINARY(min, minimum)
/// The larger of each pair, NaN where either is; where both are equal, the gradient goes to a.
SSMLIB_DETAIL_BINARY(max, maximum)
#undef SSMLIB_DETAIL_BINARY

}  // namespace ssm
