#include "../support/catch.hpp"
#include <ssmlib/kernels/cpu/skinny.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace ssm;

namespace {

template <class T>
std::vector<T> uniform(index_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> draw(-1, 1);
  std::vector<T> values(static_cast<std::size_t>(n));
  for (T& x : values)
    x = T(draw(engine));
  return values;
}

template <class T, class W>
struct problem {
  problem(index_t rows, index_t outputs, index_t features)
      : m(rows),
        n(outputs),
        k(features),
        x(uniform<T>(m * k, 1)),
        w(uniform<W>(n * k, 2)),
        bias(uniform<T>(n, 3)),
        y(static_cast<std::size_t>(m * n), std::numeric_limits<T>::quiet_NaN()) {}
  view<const T, 2> rows(index_t first, index_t count) const {
    return {x.data() + first * k, {count, k}, {k, 1}};
  }
  view<const W, 2> weights() const { return {w.data(), {n, k}, {k, 1}}; }
  view<const T, 1> biases() const { return {bias.data(), {n}, {1}}; }
  view<T, 2> out() { return {y.data(), {m, n}, {n, 1}}; }

  index_t m, n, k;
  std::vector<T> x;
  std::vector<W> w;
  std::vector<T> bias, y;
};

/// The largest error over eps times the sum of the terms' magnitudes; NaN stays NaN.
template <class T, class W>
double scaled_error(const problem<T, W>& p, bool with_bias, double beta, double old) {
  double worst = 0;
  for (index_t i = 0; i < p.m; ++i) {
    for (index_t j = 0; j < p.n; ++j) {
      double sum = with_bias ? double(p.bias[std::size_t(j)]) : 0;
      sum += beta * old;
      double size = std::abs(sum) + std::abs(beta * old) + 1e-30;
      for (index_t q = 0; q < p.k; ++q) {
        const double term =
            double(p.x[std::size_t(i * p.k + q)]) * double(T(p.w[std::size_t(j * p.k + q)]));
        sum += term;
        size += std::abs(term);
      }
      const double error = std::abs(double(p.y[std::size_t(i * p.n + j)]) - sum) /
                           (size * double(std::numeric_limits<T>::epsilon()));
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

template <class T, class W>
double worst_over_sizes() {
  const cpu::context ctx(2);
  double worst = 0;
  for (const index_t m : {1, 2, 3, 4, 5, 7, 8, 16, 17}) {
    for (const index_t n : {1, 3, 4, 65}) {
      for (const index_t k : {1, 7, 8, 64, 130}) {
        problem<T, W> p(m, n, k);
        kernels::rows_times_transposed(ctx, p.rows(0, m), p.weights(), p.out());
        const double error = scaled_error(p, false, 0, 0) / (2 + 0.5 * double(k));
        if (!(error <= worst)) worst = error;
      }
    }
  }
  return worst;
}

/// Whether rows computed alone, or some at a time, equal those of all rows at once bit for bit.
template <class T, class W>
bool invariant(index_t k) {
  const index_t rows = 19, n = 301;
  problem<T, W> p(rows, n, k);
  kernels::rows_times_transposed(cpu::context(1), p.rows(0, rows), p.weights(), p.out(),
                                 p.biases());
  for (const int threads : {1, 2, 5}) {
    const cpu::context ctx(threads);
    for (const index_t m : {1, 2, 3, 4, 5, 6, 7, 11, 16}) {
      std::vector<T> part(static_cast<std::size_t>(m * n));
      kernels::rows_times_transposed(ctx, p.rows(rows - m, m), p.weights(),
                                     view<T, 2>{part.data(), {m, n}, {n, 1}}, p.biases());
      const T* expected = p.y.data() + (rows - m) * n;
      if (std::memcmp(part.data(), expected, part.size() * sizeof(T)) != 0) return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("kernels/skinny: equals the double loop for any sizes", "[kernels][skinny][cpu]") {
  CHECK(worst_over_sizes<float, float>() <= 1);
  CHECK(worst_over_sizes<double, double>() <= 1);
  CHECK(worst_over_sizes<float, bf16>() <= 1);
}

TEST_CASE("kernels/skinny: bias and the former y are added", "[kernels][skinny][cpu]") {
  const cpu::context ctx(2);
  problem<float, float> p(3, 37, 50);
  p.y.assign(p.y.size(), 0.75f);
  kernels::rows_times_transposed(ctx, p.rows(0, 3), p.weights(), p.out(), p.biases(), -2.0f);
  CHECK(scaled_error(p, true, -2, 0.75) <= 27);
}

TEST_CASE("kernels/skinny: a row has the same bits in any number of rows and threads",
          "[kernels][skinny][cpu]") {
  const index_t k = GENERATE(1024, 1001);
  CHECK(invariant<float, float>(k));
  CHECK(invariant<double, double>(k));
  CHECK(invariant<float, bf16>(k));
}

TEST_CASE("kernels/skinny: sizes that do not fit are refused", "[kernels][skinny][error]") {
  problem<float, float> p(2, 3, 4);
  const view<const float, 2> x{p.x.data(), {2, 3}, {4, 1}};
  CHECK_THROWS_WITH(kernels::rows_times_transposed(cpu::context(1), x, p.weights(), p.out()),
                    ssm_test::contains("x is (2 x 3), w is (3 x 4), y is (2 x 3)"));
}

TEST_CASE("kernels/skinny: strided rows are refused", "[kernels][skinny][error]") {
  problem<float, float> p(2, 3, 4);
  const view<const float, 2> x{p.x.data(), {2, 4}, {1, 2}};
  CHECK_THROWS_WITH(kernels::rows_times_transposed(cpu::context(1), x, p.weights(), p.out()),
                    ssm_test::contains("call contiguous() first"));
}
