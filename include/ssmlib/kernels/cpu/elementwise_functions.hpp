#pragma once

#include <ssmlib/expr/elementwise.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>

/// @file
/// Values and slopes of the elementwise functions on packs. apply(tag, x) is the value; slope(tag,
/// x, y) is dy/dx with y the value. Slopes are finite wherever the true one is, also at infinity.

namespace ssm::kernels::elementwise_functions {

namespace tag = ssm::elementwise;
using simd::pack;

/// Keeps infinity out of products with zero; beyond the bound the functions have saturated.
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> bounded(pack<T> x, double bound) {
  return simd::min(simd::max(x, pack<T>(static_cast<T>(-bound))), pack<T>(static_cast<T>(bound)));
}

template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> number(double x) {
  return pack<T>(static_cast<T>(x));
}

// ---- values
// --------------------------------------------------------------------------------------

// clang-format off
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::negate, pack<T> x) { return -x; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::exponential, pack<T> x) { return simd::exp(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::logarithm, pack<T> x) { return simd::log(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::square_root, pack<T> x) { return simd::sqrt(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::reciprocal_square_root, pack<T> x) { return number<T>(1) / simd::sqrt(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::square, pack<T> x) { return x * x; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::absolute, pack<T> x) { return simd::abs(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::sigmoid, pack<T> x) { return simd::sigmoid(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::silu, pack<T> x) { return simd::silu(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::relu, pack<T> x) { return simd::max(x, number<T>(0)); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::gelu, pack<T> x) { return simd::gelu(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::gelu_tanh, pack<T> x) { return simd::gelu_tanh(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::hyperbolic_tangent, pack<T> x) { return simd::tanh(x); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::softplus, pack<T> x) { return simd::softplus(x); }
// clang-format on
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> apply(tag::elu f, pack<T> x) {
  const pack<T> negative = number<T>(f.alpha) * simd::expm1(simd::min(x, number<T>(0)));
  return simd::select(x > number<T>(0), x, negative);
}
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> apply(tag::clamp f, pack<T> x) {
  return simd::min(simd::max(x, number<T>(f.low)), number<T>(f.high));
}

// clang-format off
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::add, pack<T> a, pack<T> b) { return a + b; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::subtract, pack<T> a, pack<T> b) { return a - b; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::multiply, pack<T> a, pack<T> b) { return a * b; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::divide, pack<T> a, pack<T> b) { return a / b; }
// The packs' own min and max keep a NaN of the first operand only.
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::minimum, pack<T> a, pack<T> b) { return simd::select(b == b, simd::min(a, b), b); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> apply(tag::maximum, pack<T> a, pack<T> b) { return simd::select(b == b, simd::max(a, b), b); }
// clang-format on

// ---- slopes
// --------------------------------------------------------------------------------------

// clang-format off
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::negate, pack<T>, pack<T>) { return number<T>(-1); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::exponential, pack<T>, pack<T> y) { return y; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::logarithm, pack<T> x, pack<T>) { return number<T>(1) / x; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::square_root, pack<T>, pack<T> y) { return number<T>(0.5) / y; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::reciprocal_square_root, pack<T>, pack<T> y) { return number<T>(-0.5) * y * y * y; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::square, pack<T> x, pack<T>) { return x + x; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::sigmoid, pack<T>, pack<T> y) { return y * (number<T>(1) - y); }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::hyperbolic_tangent, pack<T>, pack<T> y) { return number<T>(1) - y * y; }
template <Real T> SSMLIB_ALWAYS_INLINE pack<T> slope(tag::softplus, pack<T> x, pack<T>) { return simd::sigmoid(x); }
// clang-format on
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> slope(tag::absolute, pack<T> x, pack<T>) {
  const pack<T> one = simd::copysign(number<T>(1), x);
  return simd::select(x == number<T>(0), x, one);
}
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> slope(tag::silu, pack<T> x, pack<T>) {
  const pack<T> s = simd::sigmoid(x), one = number<T>(1);
  return s * (one + bounded(x, 800) * (one - s));
}
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> slope(tag::relu, pack<T> x, pack<T>) {
  return simd::select(x > number<T>(0), number<T>(1), number<T>(0));
}
/// Phi(x) + x phi(x)
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> slope(tag::gelu, pack<T> x, pack<T>) {
  const pack<T> z = bounded(x, 40), half = number<T>(0.5);
  const pack<T> density = number<T>(0.39894228040143267794) * simd::exp(-(half * z * z));
  return half + half * simd::erf(z * number<T>(0.70710678118654752440)) + z * density;
}
/// y = x s with s = sigmoid(2 u): s + x s (1 - s) 2 u'
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> slope(tag::gelu_tanh, pack<T> x, pack<T>) {
  const pack<T> z = bounded(x, 30), twice = number<T>(1.59576912160573071176);  // 2 sqrt(2 / pi)
  const pack<T> square = z * z, one = number<T>(1), cubic = number<T>(0.044715);
  const pack<T> s = simd::sigmoid(twice * z * simd::fma(square, cubic, one));
  return s + z * s * (one - s) * twice * simd::fma(square, number<T>(3 * 0.044715), one);
}
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> slope(tag::elu f, pack<T> x, pack<T> y) {
  return simd::select(x > number<T>(0), number<T>(1), y + number<T>(f.alpha));
}
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> slope(tag::clamp f, pack<T> x, pack<T>) {
  const auto inside = (x >= number<T>(f.low)) & (x <= number<T>(f.high));
  return simd::select(inside, number<T>(1), number<T>(0));
}

template <Real T>
struct pair_of_gradients {
  pack<T> a, b;
};

// clang-format off
template <Real T> SSMLIB_ALWAYS_INLINE pair_of_gradients<T> pull(tag::add, pack<T>, pack<T>, pack<T> d) { return {d, d}; }
template <Real T> SSMLIB_ALWAYS_INLINE pair_of_gradients<T> pull(tag::subtract, pack<T>, pack<T>, pack<T> d) { return {d, -d}; }
template <Real T> SSMLIB_ALWAYS_INLINE pair_of_gradients<T> pull(tag::multiply, pack<T> a, pack<T> b, pack<T> d) { return {d * b, d * a}; }
// clang-format on
template <Real T>
SSMLIB_ALWAYS_INLINE pair_of_gradients<T> pull(tag::divide, pack<T> a, pack<T> b, pack<T> d) {
  const pack<T> da = d / b;
  return {da, -(da * (a / b))};
}
template <Real T>
SSMLIB_ALWAYS_INLINE pair_of_gradients<T> pull(tag::minimum, pack<T> a, pack<T> b, pack<T> d) {
  const auto first = a <= b;
  return {simd::select(first, d, number<T>(0)), simd::select(first, number<T>(0), d)};
}
template <Real T>
SSMLIB_ALWAYS_INLINE pair_of_gradients<T> pull(tag::maximum, pack<T> a, pack<T> b, pack<T> d) {
  const auto first = a >= b;
  return {simd::select(first, d, number<T>(0)), simd::select(first, number<T>(0), d)};
}

}  // namespace ssm::kernels::elementwise_functions
