#pragma once

#include "../support/gradient_check.hpp"
#include <ssmlib/tensor/transfer.hpp>

#include <concepts>

/// @file
/// What the tests of operations on CUDA tensors share. Both sides start from the same numbers: made
/// in double from a seed, rounded once to the type under test; the reference computes from the
/// rounded numbers in double on the CPU.

namespace ssm_test {

/// The elements rounded to T, in double.
template <class T, int R>
ssm::tensor<double, R> rounded(const ssm::tensor<double, R>& t) {
  return ssm::cast<double>(ssm::cast<T>(t));
}
template <class T, int R>
ssm::tensor<T, R, ssm::cuda> on_device(const ssm::tensor<double, R>& t) {
  return ssm::to<ssm::cuda>(ssm::cast<T>(t));
}
template <class T, int R>
ssm::tensor<double, R> on_cpu(const ssm::tensor<T, R, ssm::cuda>& t) {
  return ssm::cast<double>(ssm::to<ssm::cpu>(t));
}

/// Of results of type T, in norm. Rounding a result to bf16 once errs by at most 2^-9 of it: twice
/// that. Float: some rounding errors of 6e-8 each, and sums in float of up to some thousand terms.
template <class T>
inline constexpr double tolerance = std::same_as<T, double>  ? 1e-10
                                    : std::same_as<T, float> ? 1e-5
                                                             : 0x1p-8;

/// The error of a device's result of type T against the reference; NaN where anything is.
template <class T, int R>
double error_of(const ssm::tensor<T, R, ssm::cuda>& actual,
                const ssm::tensor<double, R>& expected) {
  return relative_error(on_cpu(actual), expected);
}

}  // namespace ssm_test
