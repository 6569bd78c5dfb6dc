#include "../support/catch.hpp"
#include <ssmlib/kernels/cpu/reduce.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace ssm;

namespace {

const index_t lengths[] = {0, 1, 3, 7, 8, 9, 31, 32, 33, 64, 100, 257};

template <class T>
std::vector<T> uniform(index_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<T> draw(-1, 1);
  std::vector<T> values(static_cast<std::size_t>(n));
  for (T& x : values)
    x = draw(engine);
  return values;
}

/// |value - expected| over eps times `size`, the sum of the terms' magnitudes.
template <class T>
double error(T value, double expected, double size) {
  return std::abs(double(value) - expected) /
         (double(std::numeric_limits<T>::epsilon()) * (size + 1e-30));
}

}  // namespace

TEMPLATE_TEST_CASE("kernels/reduce: sums equal those in a wider type", "[kernels][reduce][cpu]",
                   float, double) {
  for (const index_t n : lengths) {
    CAPTURE(n);
    const auto a = uniform<TestType>(n, 1), b = uniform<TestType>(n, 2);
    long double sum = 0, size = 0, squares = 0, dot = 0, dot_size = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      sum += a[i];
      size += std::abs(a[i]);
      squares += static_cast<long double>(a[i]) * a[i];
      dot += static_cast<long double>(a[i]) * b[i];
      dot_size += std::abs(static_cast<long double>(a[i]) * b[i]);
    }
    const double bound = 2 + 0.5 * double(n);
    CHECK(error(kernels::sum(n, a.data()), double(sum), double(size)) <= bound);
    CHECK(error(kernels::sum_of_squares(n, a.data()), double(squares), double(squares)) <= bound);
    CHECK(error(kernels::dot(n, a.data(), b.data()), double(dot), double(dot_size)) <= bound);
  }
}

TEMPLATE_TEST_CASE("kernels/reduce: a dot product has the same bits at any alignment",
                   "[kernels][reduce][cpu]", float, double) {
  const index_t n = 101;
  const auto a = uniform<TestType>(n + 16, 1), b = uniform<TestType>(n, 2);
  const TestType expected = kernels::dot(n, a.data() + 1, b.data());
  for (std::size_t shift = 0; shift < 16; ++shift) {
    std::vector<TestType> moved(a.size() + 16);
    std::memcpy(moved.data() + shift, a.data() + 1, std::size_t(n) * sizeof(TestType));
    CHECK(kernels::dot(n, moved.data() + shift, b.data()) == expected);
  }
}

TEMPLATE_TEST_CASE("kernels/reduce: axpy and scale touch n elements and no more",
                   "[kernels][reduce][cpu]", float, double) {
  for (const index_t n : lengths) {
    CAPTURE(n);
    const auto x = uniform<TestType>(n, 1);
    auto y = uniform<TestType>(n + 1, 2);
    const auto old = y;
    kernels::axpy(n, TestType(0.5), x.data(), y.data());
    double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      worst = std::max(worst, error(y[i], double(old[i]) + 0.5 * double(x[i]), 1.5));
    }
    CHECK(worst <= 1);
    CHECK(y.back() == old.back());
    kernels::scale(n, TestType(-2), y.data());
    CHECK(y.back() == old.back());
    if (n > 0) CHECK(y[0] == -2 * (old[0] + x[0] / 2));
  }
}

TEMPLATE_TEST_CASE("kernels/reduce: state updates and products equal their formulas",
                   "[kernels][reduce][cpu]", float, double) {
  const index_t m = 13, n = GENERATE(1, 5, 16, 47, 64), ld = n + 3;
  const auto x = uniform<TestType>(m, 1), b = uniform<TestType>(n, 2),
             h0 = uniform<TestType>(m * ld, 3);
  auto h = h0, g = h0;
  kernels::rank1_update(m, n, x.data(), b.data(), h.data(), ld);
  kernels::decayed_rank1_update(m, n, TestType(0.25), x.data(), b.data(), g.data(), ld);
  std::vector<TestType> y(std::size_t(n), std::numeric_limits<TestType>::quiet_NaN());
  std::vector<TestType> z(std::size_t(m), std::numeric_limits<TestType>::quiet_NaN());
  kernels::transposed_matrix_vector(m, n, h0.data(), ld, x.data(), y.data());
  kernels::matrix_vector(m, n, h0.data(), ld, b.data(), z.data());
  double updates = 0, products = 0, gaps = 0;
  for (index_t i = 0; i < m; ++i) {
    double dot = 0;
    for (index_t j = 0; j < ld; ++j) {
      const auto e = std::size_t(i * ld + j);
      if (j >= n) {
        gaps += h[e] != h0[e] || g[e] != h0[e];
        continue;
      }
      const double outer = double(x[std::size_t(i)]) * double(b[std::size_t(j)]);
      updates = std::max(updates, error(h[e], double(h0[e]) + outer, 2));
      updates = std::max(updates, error(g[e], 0.25 * double(h0[e]) + outer, 2));
      dot += double(h0[e]) * double(b[std::size_t(j)]);
    }
    products = std::max(products, error(z[std::size_t(i)], dot, double(n)));
  }
  for (index_t j = 0; j < n; ++j) {
    double dot = 0;
    for (index_t i = 0; i < m; ++i) {
      dot += double(h0[std::size_t(i * ld + j)]) * double(x[std::size_t(i)]);
    }
    const double e = error(y[std::size_t(j)], dot, double(m));
    if (!(e <= products)) products = e;
  }
  CHECK(updates <= 1);
  CHECK(products <= 2);
  CHECK(gaps == 0);
}

TEST_CASE("kernels/reduce: scale_rows multiplies each row by its factor",
          "[kernels][reduce][cpu]") {
  std::vector<float> c{1, 2, 9, 3, 4, 9};
  const std::vector<float> s{2, -1};
  kernels::scale_rows(2, 2, s.data(), c.data(), 3);
  CHECK(c == std::vector<float>{2, 4, 9, -3, -4, 9});
}
