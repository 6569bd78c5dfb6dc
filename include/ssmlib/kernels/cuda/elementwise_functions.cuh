#pragma once

#include <ssmlib/expr/elementwise.hpp>
#include <ssmlib/kernels/cuda/device.cuh>

#include <cmath>

/// @file
/// Values and slopes of the elementwise functions on the device: apply(tag, x) is the value,
/// slope(tag, x, y) is dy/dx with y the value. As on the CPU, NaN stays NaN and slopes are finite
/// wherever the true one is, also at infinity. Float functions are CUDA's own, within 2 ulp: the
/// kernels wait for memory. They are written with `::`, since ssm::exp and the like make nodes.

namespace ssm::kernels::cuda::elementwise_functions {

namespace tag = ssm::elementwise;

/// Keeps infinity out of products with zero; beyond the bound the functions have saturated.
template <class R>
SSMLIB_DEVICE R bounded(R x, double bound) {
  const R b = static_cast<R>(bound);
  return x > b ? b : x < -b ? -b : x;
}
/// 1 / (1 + e^-x)
template <class R>
SSMLIB_DEVICE R logistic(R x) {
  return R(1) / (R(1) + ::exp(-x));
}

// clang-format off
template <class R> SSMLIB_DEVICE R apply(tag::negate, R x) { return -x; }
template <class R> SSMLIB_DEVICE R apply(tag::exponential, R x) { return ::exp(x); }
template <class R> SSMLIB_DEVICE R apply(tag::logarithm, R x) { return ::log(x); }
template <class R> SSMLIB_DEVICE R apply(tag::square_root, R x) { return ::sqrt(x); }
template <class R> SSMLIB_DEVICE R apply(tag::reciprocal_square_root, R x) { return R(1) / ::sqrt(x); }
template <class R> SSMLIB_DEVICE R apply(tag::square, R x) { return x * x; }
template <class R> SSMLIB_DEVICE R apply(tag::absolute, R x) { return ::fabs(x); }
template <class R> SSMLIB_DEVICE R apply(tag::sigmoid, R x) { return logistic(x); }
template <class R> SSMLIB_DEVICE R apply(tag::silu, R x) { return (x < R(-800) ? R(-800) : x) * logistic(x); }
template <class R> SSMLIB_DEVICE R apply(tag::relu, R x) { return x < R(0) ? R(0) : x; }
template <class R> SSMLIB_DEVICE R apply(tag::gelu, R x) { return (x < R(-40) ? R(-40) : x) * (R(0.5) * ::erfc(x * R(-0.70710678118654752440))); }
template <class R> SSMLIB_DEVICE R apply(tag::hyperbolic_tangent, R x) { return ::tanh(x); }
template <class R> SSMLIB_DEVICE R apply(tag::softplus, R x) { return (x < R(0) ? R(0) : x) + ::log1p(::exp(-::fabs(x))); }
template <class R> SSMLIB_DEVICE R apply(tag::elu f, R x) { return x > R(0) ? x : static_cast<R>(f.alpha) * ::expm1(x); }
template <class R> SSMLIB_DEVICE R apply(tag::clamp f, R x) { return x < static_cast<R>(f.low) ? static_cast<R>(f.low) : x > static_cast<R>(f.high) ? static_cast<R>(f.high) : x; }

template <class R> SSMLIB_DEVICE R apply(tag::add, R a, R b) { return a + b; }
template <class R> SSMLIB_DEVICE R apply(tag::subtract, R a, R b) { return a - b; }
template <class R> SSMLIB_DEVICE R apply(tag::multiply, R a, R b) { return a * b; }
template <class R> SSMLIB_DEVICE R apply(tag::divide, R a, R b) { return a / b; }
template <class R> SSMLIB_DEVICE R apply(tag::minimum, R a, R b) { return a <= b || a != a ? a : b; }
template <class R> SSMLIB_DEVICE R apply(tag::maximum, R a, R b) { return a >= b || a != a ? a : b; }
// clang-format on
template <class R>
SSMLIB_DEVICE R apply(tag::gelu_tanh, R x) {
  const R z = bounded(x, 30);
  return (x < R(-30) ? R(-30) : x) *
         logistic(R(1.59576912160573071176) * z * (R(1) + R(0.044715) * z * z));
}

// clang-format off
template <class R> SSMLIB_DEVICE R slope(tag::negate, R, R) { return R(-1); }
template <class R> SSMLIB_DEVICE R slope(tag::exponential, R, R y) { return y; }
template <class R> SSMLIB_DEVICE R slope(tag::logarithm, R x, R) { return R(1) / x; }
template <class R> SSMLIB_DEVICE R slope(tag::square_root, R, R y) { return R(0.5) / y; }
template <class R> SSMLIB_DEVICE R slope(tag::reciprocal_square_root, R, R y) { return R(-0.5) * y * y * y; }
template <class R> SSMLIB_DEVICE R slope(tag::square, R x, R) { return x + x; }
template <class R> SSMLIB_DEVICE R slope(tag::absolute, R x, R) { return x == R(0) ? x : ::copysign(R(1), x); }
template <class R> SSMLIB_DEVICE R slope(tag::sigmoid, R, R y) { return y * (R(1) - y); }
template <class R> SSMLIB_DEVICE R slope(tag::relu, R x, R) { return x > R(0) ? R(1) : R(0); }
template <class R> SSMLIB_DEVICE R slope(tag::hyperbolic_tangent, R, R y) { return R(1) - y * y; }
template <class R> SSMLIB_DEVICE R slope(tag::softplus, R x, R) { return logistic(x); }
template <class R> SSMLIB_DEVICE R slope(tag::elu f, R x, R y) { return x > R(0) ? R(1) : y + static_cast<R>(f.alpha); }
template <class R> SSMLIB_DEVICE R slope(tag::clamp f, R x, R) { return x >= static_cast<R>(f.low) && x <= static_cast<R>(f.high) ? R(1) : R(0); }
// clang-format on
template <class R>
SSMLIB_DEVICE R slope(tag::silu, R x, R) {
  const R s = logistic(x);
  return s * (R(1) + bounded(x, 800) * (R(1) - s));
}
/// Phi(x) + x phi(x)
template <class R>
SSMLIB_DEVICE R slope(tag::gelu, R x, R) {
  const R z = bounded(x, 40);
  return R(0.5) * ::erfc(z * R(-0.70710678118654752440)) +
         z * (R(0.39894228040143267794) * ::exp(R(-0.5) * z * z));
}
/// y = x s with s = sigmoid(2 u): s + x s (1 - s) 2 u'
template <class R>
SSMLIB_DEVICE R slope(tag::gelu_tanh, R x, R) {
  const R z = bounded(x, 30), twice = R(1.59576912160573071176);  // 2 ::sqrt(2 / pi)
  const R s = logistic(twice * z * (R(1) + R(0.044715) * z * z));
  return s + z * s * (R(1) - s) * twice * (R(1) + R(3 * 0.044715) * z * z);
}

template <class R>
struct pair_of_gradients {
  R a, b;
};
// clang-format off
template <class R> SSMLIB_DEVICE pair_of_gradients<R> pull(tag::add, R, R, R d) { return {d, d}; }
template <class R> SSMLIB_DEVICE pair_of_gradients<R> pull(tag::subtract, R, R, R d) { return {d, -d}; }
template <class R> SSMLIB_DEVICE pair_of_gradients<R> pull(tag::multiply, R a, R b, R d) { return {d * b, d * a}; }
template <class R> SSMLIB_DEVICE pair_of_gradients<R> pull(tag::divide, R a, R b, R d) { return {d / b, -(d / b * (a / b))}; }
template <class R> SSMLIB_DEVICE pair_of_gradients<R> pull(tag::minimum, R a, R b, R d) { return {a <= b ? d : R(0), a <= b ? R(0) : d}; }
template <class R> SSMLIB_DEVICE pair_of_gradients<R> pull(tag::maximum, R a, R b, R d) { return {a >= b ? d : R(0), a >= b ? R(0) : d}; }
// clang-format on

}  // namespace ssm::kernels::cuda::elementwise_functions
