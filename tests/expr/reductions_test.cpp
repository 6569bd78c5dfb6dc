#include <ssmlib/grad/operations.hpp>
#include <ssmlib/tensor/random.hpp>

#include <cmath>
#include <limits>
#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::contains;

template <class T, int R>
double relative_error(const tensor<T, R>& a, const tensor<double, R>& b) {
  REQUIRE(a.extents() == b.extents());
  double difference = 0, norm = 0;
  cast<double>(a).zip_with(b, [&](const double& x, const double& y) {
    difference += (x - y) * (x - y);
    norm += y * y;
  });
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}
template <class T, int R>
bool same_bits(const tensor<T, R>& a, const tensor<T, R>& b) {
  bool same = a.extents() == b.extents();
  if (same) {
    a.zip_with(b,
               [&](const T& x, const T& y) { same = same && std::memcmp(&x, &y, sizeof(T)) == 0; });
  }
  return same;
}

/// The gradient of sum(w * f(x)) by the tape, and by central differences of f in double.
template <class T, int R, class F>
void check_gradient(const tensor<double, R>& at, F f) {
  const auto x = cast<T>(at);
  tape<T> t;
  t.watch(x);
  const auto y = f(x, &t);
  constexpr int ry = std::remove_cvref_t<decltype(y)>::rank;
  const auto w = normal<double, ry>(y.extents(), 1.0, 77);
  t.gradient(y).copy_from(cast<T>(w));
  t.backward();

  const auto probe = cast<double>(x);
  tensor<double, R> expected(x.extents());
  const auto value = [&] {
    double total = 0;
    f(probe, static_cast<tape<double>*>(nullptr))
        .zip_with(w, [&](const double& a, const double& b) { total += a * b; });
    return total;
  };
  for (index_t i = 0; i < x.size(); ++i) {
    const double saved = probe.data()[i], h = 1e-6;
    probe.data()[i] = saved + h;
    const double above = value();
    probe.data()[i] = saved - h;
    expected.data()[i] = (above - value()) / (2 * h);
    probe.data()[i] = saved;
  }
  CHECK(relative_error(t.gradient(x), expected) < (sizeof(T) == 4 ? 3e-6 : 1e-8));
}

TEMPLATE_TEST_CASE("expr/reductions: gradients equal finite differences", "[expr][reductions]",
                   float, double) {
  using T = TestType;
  const auto x = normal<double, 3>({2, 3, 19}, 1.0, 1);
  check_gradient<T>(x, [](const auto& v, auto* t) { return sum_rows(v, t); });
  check_gradient<T>(x, [](const auto& v, auto* t) { return mean_rows(v, t); });
  check_gradient<T>(x, [](const auto& v, auto* t) { return max_rows(v, t); });
  check_gradient<T>(x, [](const auto& v, auto* t) { return softmax_rows(v, t); });
  check_gradient<T>(x, [](const auto& v, auto* t) { return sum(v, t); });
  check_gradient<T>(x, [](const auto& v, auto* t) { return mean(v, t); });
}

TEMPLATE_TEST_CASE("expr/reductions: sums of many elements stay exact to the last digits",
                   "[expr][reductions]", float, double) {
  using T = TestType;
  const index_t n = GENERATE(1, 15, 257, 300001);
  const auto x = uniform<T, 1>({n}, 0.0, 1.0, 2);
  long double total = 0;  // the reference must not lose what it checks
  double largest = 0;
  for (index_t i = 0; i < n; ++i) {
    total += static_cast<long double>(x(i));
    largest = std::max(largest, static_cast<double>(x(i)));
  }
  const double tolerance = sizeof(T) == 4 ? 2e-7 : 1e-14, exact = static_cast<double>(total);
  CHECK(std::abs(static_cast<double>(sum(x)(0)) / exact - 1) < tolerance);
  CHECK(std::abs(static_cast<double>(sum_rows(x)(0)) / exact - 1) < tolerance);
  CHECK(std::abs(static_cast<double>(mean(x)(0)) * static_cast<double>(n) / exact - 1) < tolerance);
  CHECK(static_cast<double>(max(x)(0)) == largest);
}

TEST_CASE("expr/reductions: results do not depend on the number of threads",
          "[expr][reductions][threads]") {
  const auto x = normal<float, 2>({1000, 90}, 1.0, 3);
  const cpu::context one(1), three(3);
  CHECK(same_bits(sum(x, one), sum(x, three)));
  CHECK(same_bits(sum_rows(x, one), sum_rows(x, three)));
  CHECK(same_bits(softmax_rows(x, one), softmax_rows(x, three)));
}

TEST_CASE("expr/reductions: softmax of huge and of masked logits is finite", "[expr][reductions]") {
  const float inf = std::numeric_limits<float>::infinity();
  const auto x = tensor<float, 2>::full({1, 20}, 3e38f);
  x(0, 3) = -inf;
  x(0, 4) = -3e38f;
  const auto y = softmax_rows(x);
  CHECK(y(0, 3) == 0.0f);
  CHECK(y(0, 4) == 0.0f);
  CHECK(y(0, 0) == ssm_test::approx(1.0 / 18));
}

TEST_CASE("expr/reductions: a strided part is reduced like its copy", "[expr][reductions]") {
  const auto part = normal<double, 3>({4, 6, 30}, 1.0, 4).slice(2, 3, 17).slice(1, 2, 5);
  CHECK(same_bits(sum(part), sum(part.clone())));
  CHECK(same_bits(softmax_rows(part), softmax_rows(part.clone())));
  CHECK(same_bits(max_rows(part), max_rows(part.clone())));
}

TEST_CASE("expr/reductions: what has no value is refused", "[expr][reductions][error]") {
  CHECK_THROWS_WITH(max(tensor<float, 2>::zeros(0, 3)), contains("max of (0 x 3)"));
  CHECK_THROWS_WITH(mean_rows(tensor<float, 2>::zeros(3, 0)), contains("mean_rows of (3 x 0)"));
  CHECK(sum(tensor<float, 2>::zeros(0, 3))(0) == 0.0f);
}

/// Entry (i, j) of the matrix `index` of a product, in double.
template <class T, int RA, int RB>
tensor<double, RA> naive_product(const tensor<T, RA>& a, const tensor<T, RB>& b, matmul_options o,
                                 const shape<RA>& extents) {
  tensor<double, RA> y(extents);
  for (index_t m = 0; m < detail::matrix_count(a); ++m) {
    const auto left = detail::matrix_at(a, m, o.transpose_a);
    const auto right = detail::matrix_at(b, RB == 2 ? 0 : m, o.transpose_b);
    const auto out = detail::matrix_at(y, m, false);
    for (index_t i = 0; i < out.extent(0); ++i) {
      for (index_t j = 0; j < out.extent(1); ++j) {
        out(i, j) = 0;
        for (index_t k = 0; k < left.extent(1); ++k) {
          out(i, j) += static_cast<double>(left(i, k)) * static_cast<double>(right(k, j));
        }
      }
    }
  }
  return y;
}

template <class T, int RA, int RB>
void check_matmul(const shape<RA>& na, const shape<RB>& nb, const shape<RA>& ny,
                  matmul_options options) {
  CAPTURE(to_string<RA>(na), to_string<RB>(nb), options.transpose_a, options.transpose_b);
  const auto a = normal<double, RA>(na, 1.0, 5);
  const auto b = normal<double, RB>(nb, 1.0, 6);
  const auto y = matmul(cast<T>(a), cast<T>(b), options);
  REQUIRE(y.extents() == ny);
  CHECK(relative_error(y, naive_product(a, b, options, ny)) < (sizeof(T) == 4 ? 1e-6 : 1e-14));
  check_gradient<T>(a, [&](const auto& v, auto* t) {
    return matmul(v, cast<typename std::remove_cvref_t<decltype(v)>::value_type>(b), t, options);
  });
  check_gradient<T>(b, [&](const auto& v, auto* t) {
    return matmul(cast<typename std::remove_cvref_t<decltype(v)>::value_type>(a), v, t, options);
  });
}

TEMPLATE_TEST_CASE("expr/matmul: values and gradients for every rank and transpose",
                   "[expr][matmul]", float, double) {
  using T = TestType;
  check_matmul<T, 2, 2>({5, 7}, {7, 3}, {5, 3}, {});
  check_matmul<T, 2, 2>({7, 5}, {7, 3}, {5, 3}, {.transpose_a = true});
  check_matmul<T, 2, 2>({5, 7}, {3, 7}, {5, 3}, {.transpose_b = true});
  check_matmul<T, 2, 2>({7, 5}, {3, 7}, {5, 3}, {.transpose_a = true, .transpose_b = true});
  check_matmul<T, 3, 3>({2, 5, 7}, {2, 7, 3}, {2, 5, 3}, {});
  check_matmul<T, 4, 4>({2, 3, 1, 7}, {2, 3, 4, 7}, {2, 3, 1, 4}, {.transpose_b = true});
  check_matmul<T, 3, 2>({2, 5, 7}, {7, 3}, {2, 5, 3}, {});
  check_matmul<T, 4, 2>({2, 3, 7, 5}, {3, 7}, {2, 3, 5, 3},
                        {.transpose_a = true, .transpose_b = true});
}

TEST_CASE("expr/matmul: strided operands multiply like their copies", "[expr][matmul]") {
  const auto whole = normal<double, 3>({2, 9, 20}, 1.0, 7);
  const auto a = whole.slice(2, 0, 8), b = whole.slice(2, 8, 20);
  CHECK(same_bits(matmul(a, b, {.transpose_a = true}),
                  matmul(a.clone(), b.clone(), {.transpose_a = true})));
}

TEST_CASE("expr/matmul: sizes that do not fit are refused", "[expr][matmul][error]") {
  CHECK_THROWS_WITH(matmul(tensor<float, 2>::zeros(2, 3), tensor<float, 2>::zeros(2, 3)),
                    contains("a is (2 x 3), b is (2 x 3)"));
  CHECK_THROWS_AS(matmul(tensor<float, 3>::zeros(2, 2, 3), tensor<float, 3>::zeros(1, 3, 3)),
                  shape_error);
}

}  // namespace
