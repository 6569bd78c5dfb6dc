#include "check.cuh"
#include <ssmlib/lower/cuda/elementwise.hpp>
#include <ssmlib/tensor/random.hpp>
#include <ssmlib/tensor/transfer.hpp>

#include <cmath>

/// @file
/// Every elementwise function on the device, value and gradients, against the C++ library in
/// double: the forms that only nvcc can compile. Slopes are compared with central differences,
/// whose error of about 1e-10 the bound of 1e-7 has room for; float is held to 2e-6 of the largest
/// value.

using namespace ssm;

namespace {

constexpr index_t size = 4099;

/// The largest error of f's value and of its gradients at x, y in `low` .. `high`.
template <class T, class F, class G>
void check(const char* name, double low, double high, F on_device, G reference) {
  const auto x = cast<T>(uniform<double, 1>({size}, low, high, 1));
  const auto y = cast<T>(uniform<double, 1>({size}, low, high, 2));
  const auto dx = to<cuda>(x), dy = to<cuda>(y);
  const auto e = on_device(dx, dy);
  const auto value = to<cpu>(eval(e));
  const auto ones = to<cuda>(tensor<T, 1>::full({size}, T(1)));
  const auto gx = tensor<T, 1, cuda>::zeros(size), gy = tensor<T, 1, cuda>::zeros(size);
  vjp_into(e, ones, on_device(gx, gy));
  const auto x_slopes = to<cpu>(gx), y_slopes = to<cpu>(gy);
  double largest[3] = {1e-300, 1e-300, 1e-300}, error[3] = {};
  const double step = 1e-6;
  for (index_t i = 0; i < size; ++i) {
    const double a = x(i), b = y(i);
    const double wanted[3] = {reference(a, b),
                              (reference(a + step, b) - reference(a - step, b)) / (2 * step),
                              (reference(a, b + step) - reference(a, b - step)) / (2 * step)};
    const double found[3] = {static_cast<double>(value(i)), static_cast<double>(x_slopes(i)),
                             static_cast<double>(y_slopes(i))};
    for (int k = 0; k < 3; ++k) {
      largest[k] = std::max({largest[k], std::abs(wanted[k]), k == 0 ? 0.0 : 1e-2});
      const double d = std::abs(found[k] - wanted[k]);
      error[k] = std::isnan(d) ? 1e300 : std::max(error[k], d);
    }
  }
  const bool is_double = sizeof(T) == 8;
  const bool passed = error[0] < (is_double ? 1e-14 : 2e-6) * largest[0] &&
                      error[1] < (is_double ? 1e-7 : 4e-6) * largest[1] &&
                      error[2] < (is_double ? 1e-7 : 4e-6) * largest[2];
  if (!passed) cuda_check::failed = true;
  std::printf("%-8s %-10s value %8.1e  slopes %8.1e %8.1e  %s\n", is_double ? "double" : "float",
              name, error[0] / largest[0], error[1] / largest[1], error[2] / largest[2],
              passed ? "ok" : "FAILED");
}

double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}

template <class T>
void check_all() {
#define CHECK_FUNCTION(name, low, high, expression, ...)                        \
  check<T>(                                                                     \
      name, low, high, [](const auto& x, const auto& y) { return expression; }, \
      [](double x, double y) { return __VA_ARGS__ + 0 * y; })
  CHECK_FUNCTION("-", -3, 3, -(x * y), -(x * y));
  CHECK_FUNCTION("exp", -3, 3, exp(x) * y, std::exp(x) * y);
  CHECK_FUNCTION("log", 0.1, 3, log(x) * y, std::log(x) * y);
  CHECK_FUNCTION("sqrt", 0.1, 3, sqrt(x) * y, std::sqrt(x) * y);
  CHECK_FUNCTION("rsqrt", 0.1, 3, rsqrt(x) * y, 1 / std::sqrt(x) * y);
  CHECK_FUNCTION("square", -3, 3, square(x) * y, x * x * y);
  CHECK_FUNCTION("abs", 0.1, 3, abs(-x) * abs(y), std::abs(x) * std::abs(y));
  CHECK_FUNCTION("sigmoid", -9, 9, sigmoid(x) * y, logistic(x) * y);
  CHECK_FUNCTION("silu", -9, 9, silu(x) * y, x * logistic(x) * y);
  CHECK_FUNCTION("relu", 0.1, 3, relu(x) + relu(-y), x);
  CHECK_FUNCTION("gelu", -6, 6, gelu(x) * y, 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))) * y);
  CHECK_FUNCTION(
      "gelu_tanh", -6, 6, gelu_tanh(x) * y,
      0.5 * x * (1 + std::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x))) * y);
  CHECK_FUNCTION("tanh", -3, 3, tanh(x) * y, std::tanh(x) * y);
  CHECK_FUNCTION("softplus", -9, 9, softplus(x) * y, std::log1p(std::exp(x)) * y);
  CHECK_FUNCTION("elu", 0.1, 3, elu(-x, 0.7) + elu(y, 0.7), 0.7 * std::expm1(-x) + y);
  CHECK_FUNCTION("clamp", 0.1, 3, clamp(x, 0.0, 4.0) + clamp(y, 4.0, 5.0), x + 4);
  // y / x stays away from 3.
  CHECK_FUNCTION("+ - * /", 1.5, 3, (x + y) * (x - 2) / (3 - (y / x)) + x,
                 (x + y) * (x - 2) / (3 - y / x) * 1.0 + x);
  CHECK_FUNCTION("min max", 0.5, 3, min(x, y + 4) * max(x + 4, y), x * (x + 4));
#undef CHECK_FUNCTION
}

}  // namespace

int main() {
  if (!cuda_check::have_device()) return 2;
  check_all<double>();
  check_all<float>();
  return cuda_check::finish();
}
