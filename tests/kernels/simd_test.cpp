#include "../support/catch.hpp"
#include <ssmlib/kernels/cpu/simd.hpp>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

using namespace ssm;

namespace {

// float is checked against double, double against long double.
template <class T>
using wider_t = std::conditional_t<std::is_same_v<T, float>, double, long double>;

template <class T>
long double spacing(T x) {
  x = std::abs(x);
  if (x < std::numeric_limits<T>::min()) return std::numeric_limits<T>::denorm_min();
  return std::ldexp(1.0L, std::ilogb(x) - std::numeric_limits<T>::digits + 1);
}

/// The largest error of f in ulp; an absolute error of at most `floor` counts as none. A NaN or an
/// infinity that only one side has counts as infinitely wrong.
template <class T, class F, class G>
class comparison {
 public:
  comparison(F f, G exact, long double floor) : f_(f), exact_(exact), floor_(floor) {}

  void at(T x) {
    const T y = f_(simd::pack<T>(x))[simd::pack<T>::width - 1];
    const wider_t<T> wide = exact_(wider_t<T>(x));
    const T expected = static_cast<T>(wide);
    if (std::isnan(expected) && std::isnan(y)) return;
    if (expected == y) return;  // the nearest number, or the same infinity
    const long double error = std::abs(static_cast<long double>(y) - wide);
    if (error <= floor_) return;
    const long double ulps = std::isfinite(expected) ? error / spacing(expected) : INFINITY;
    if (!(ulps <= worst)) {
      worst = static_cast<double>(ulps);
      where = static_cast<double>(x);
    }
  }

  double worst = 0, where = 0;

 private:
  F f_;
  G exact_;
  long double floor_;
};

/// Over special values, evenly over [low, high], and over all exponents of both signs.
template <class T, class F, class G>
void check_ulps(double bound, T low, T high, F f, G exact, long double floor = 0) {
  using limits = std::numeric_limits<T>;
  comparison<T, F, G> compare(f, exact, floor);
  for (const T x : {T(0), T(1), limits::infinity(), limits::quiet_NaN(), limits::max(),
                    limits::min(), limits::denorm_min(), T(87), T(88.8), T(104), T(200), T(1e10)}) {
    compare.at(x);
    compare.at(-x);
  }
  const int steps = 40000;
  for (int i = 0; i <= steps; ++i)
    compare.at(low + (high - low) * T(i) / T(steps));
  using bits = typename simd::pack<T>::traits::bits;
  const bits end = std::bit_cast<bits>(limits::infinity());
  for (bits b = 1; b < end; b += end / 40001) {
    compare.at(std::bit_cast<T>(b));
    compare.at(-std::bit_cast<T>(b));
  }
  CAPTURE(compare.where);
  CHECK(compare.worst <= bound);
}

template <class D>
D sigmoid(D x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}
template <class D>
D silu(D x) {
  return x < -12000 ? D(0) : x * sigmoid(x);
}

}  // namespace

TEMPLATE_TEST_CASE("kernels/simd: exp is within 1.1 ulp", "[kernels][simd][cpu]", float, double) {
  check_ulps<TestType>(
      1.1, -105, 90, [](auto x) { return simd::exp(x); }, [](auto x) { return std::exp(x); });
}
TEMPLATE_TEST_CASE("kernels/simd: exp far below the range is zero and not NaN",
                   "[kernels][simd][cpu]", float, double) {
  using pack = simd::pack<TestType>;
  CHECK(simd::exp(pack(-std::numeric_limits<TestType>::infinity()))[0] == 0);
  CHECK(simd::exp(pack(TestType(-2000)))[0] == 0);
  CHECK((simd::exp(pack(TestType(-200)))[0] == 0) == (sizeof(TestType) == 4));
}
TEMPLATE_TEST_CASE("kernels/simd: expm1 is within 2 ulp", "[kernels][simd][cpu]", float, double) {
  check_ulps<TestType>(
      2, -2, 2, [](auto x) { return simd::expm1(x); }, [](auto x) { return std::expm1(x); });
}
TEMPLATE_TEST_CASE("kernels/simd: log is within 1 ulp", "[kernels][simd][cpu]", float, double) {
  check_ulps<TestType>(
      1, TestType(0.3), 3, [](auto x) { return simd::log(x); }, [](auto x) { return std::log(x); });
}
TEMPLATE_TEST_CASE("kernels/simd: log1p is within 2 ulp", "[kernels][simd][cpu]", float, double) {
  check_ulps<TestType>(
      2, -1, 3, [](auto x) { return simd::log1p(x); }, [](auto x) { return std::log1p(x); });
}
TEMPLATE_TEST_CASE("kernels/simd: tanh is within 3 ulp", "[kernels][simd][cpu]", float, double) {
  check_ulps<TestType>(
      3, -12, 12, [](auto x) { return simd::tanh(x); }, [](auto x) { return std::tanh(x); });
}
TEMPLATE_TEST_CASE("kernels/simd: sigmoid is within 3 ulp", "[kernels][simd][cpu]", float, double) {
  check_ulps<TestType>(
      3, -105, 20, [](auto x) { return simd::sigmoid(x); }, [](auto x) { return sigmoid(x); });
}
TEMPLATE_TEST_CASE("kernels/simd: silu is within 3 ulp above the subnormal numbers",
                   "[kernels][simd][cpu]", float, double) {
  // There e^x itself has few bits left: half a subnormal spacing, times |x|.
  const long double floor =
      750 * static_cast<long double>(std::numeric_limits<TestType>::denorm_min());
  check_ulps<TestType>(
      3, -85, 20, [](auto x) { return simd::silu(x); }, [](auto x) { return silu(x); }, floor);
}
TEMPLATE_TEST_CASE("kernels/simd: softplus is within 3 ulp", "[kernels][simd][cpu]", float,
                   double) {
  check_ulps<TestType>(
      3, -105, 20, [](auto x) { return simd::softplus(x); },
      [](auto x) {
        return std::isnan(x) ? x : std::max(x, decltype(x)(0)) + std::log1p(std::exp(-std::abs(x)));
      });
}
TEMPLATE_TEST_CASE("kernels/simd: erf is within 3 ulp", "[kernels][simd][cpu]", float, double) {
  check_ulps<TestType>(
      3, -5, 5, [](auto x) { return simd::erf(x); }, [](auto x) { return std::erf(x); });
}
TEST_CASE("kernels/simd: gelu is within 4 ulp above the subnormal numbers",
          "[kernels][simd][cpu]") {
  check_ulps<float>(
      4, -13, 6, [](auto x) { return simd::gelu(x); },
      [](double x) { return x < -40 ? 0.0 : 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }, 1e-42L);
}
TEMPLATE_TEST_CASE("kernels/simd: gelu_tanh is within 4 ulp or one epsilon", "[kernels][simd][cpu]",
                   float, double) {
  // The rounding of the exponent 2 u is multiplied by |2 u| <= 17 over [-5, 5].
  const auto exact = [](auto x) {
    using D = decltype(x);
    if (x < -40) return D(0);
    return x * sigmoid(2 * std::sqrt(2 / D(3.14159265358979323846264L)) *
                       (x + D(0.044715L) * x * x * x));
  };
  const long double eps = std::numeric_limits<TestType>::epsilon();
  check_ulps<TestType>(
      4, -5, 5, [](auto x) { return simd::gelu_tanh(x); }, exact, eps);
}

TEMPLATE_TEST_CASE("kernels/simd: map covers every length and no element beyond",
                   "[kernels][simd][cpu]", float, double) {
  for (index_t n = 0; n < 70; ++n) {
    std::vector<TestType> in(std::size_t(n + 1)), out(std::size_t(n + 1), TestType(-7));
    for (std::size_t i = 0; i < in.size(); ++i)
      in[i] = TestType(i);
    simd::map(n, in.data(), out.data(), [](auto x) { return x + decltype(x)(TestType(1)); });
    bool right = out.back() == TestType(-7);
    for (std::size_t i = 0; i < std::size_t(n); ++i)
      right = right && out[i] == in[i] + 1;
    CAPTURE(n);
    CHECK(right);
  }
}

TEST_CASE("kernels/simd: bf16 is widened exactly", "[kernels][simd][cpu]") {
  constexpr int width = simd::pack<float>::width;
  bf16 values[width];
  for (int i = 0; i < width; ++i)
    values[i] = bf16(static_cast<float>(i) * -0.3125f);
  const auto wide = simd::load_widened(values);
  for (int i = 0; i < width; ++i)
    CHECK(wide[i] == static_cast<float>(values[i]));
}

TEMPLATE_TEST_CASE("kernels/simd: clamping keeps NaN", "[kernels][simd][cpu]", float, double) {
  using pack = simd::pack<TestType>;
  const pack nan(std::numeric_limits<TestType>::quiet_NaN());
  CHECK(std::isnan(min(nan, pack(TestType(1)))[0]));
  CHECK(std::isnan(max(nan, pack(TestType(1)))[0]));
}
