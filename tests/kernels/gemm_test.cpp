#include "../support/catch.hpp"
#include <ssmlib/kernels/cpu/gemm.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace ssm;

namespace {

enum class order { rows, cols, strided };

/// A matrix in one of three storage orders; the strided one has gaps on both axes.
template <class T>
struct matrix {
  matrix(index_t m, index_t n, order o, unsigned seed) {
    const index_t rs = o == order::rows ? n : o == order::cols ? 1 : 2 * n + 3;
    const index_t cs = o == order::rows ? 1 : o == order::cols ? m : 2;
    values.resize(static_cast<std::size_t>((m - 1) * rs + (n - 1) * cs + 1));
    std::mt19937 engine(seed);
    std::uniform_real_distribution<T> uniform(-1, 1);
    for (T& x : values)
      x = uniform(engine);
    view = {values.data(), {m, n}, {rs, cs}};
  }
  void poison() {
    for (T& x : values)
      x = std::numeric_limits<T>::quiet_NaN();
  }
  std::vector<T> values;
  ssm::view<T, 2> view;
};

/// The largest |c - expected| over eps times the sum of the terms' magnitudes; NaN stays NaN.
template <class T>
double scaled_error(T alpha, view<const T, 2> a, view<const T, 2> b, T beta,
                    view<const T, 2> before, view<const T, 2> c) {
  double worst = 0;
  for (index_t i = 0; i < c.extent(0); ++i) {
    for (index_t j = 0; j < c.extent(1); ++j) {
      double sum = 0, size = 1e-30;
      for (index_t k = 0; k < a.extent(1); ++k) {
        const double term = double(alpha) * double(a(i, k)) * double(b(k, j));
        sum += term;
        size += std::abs(term);
      }
      if (beta != T(0)) {
        sum += double(beta) * double(before(i, j));
        size += std::abs(double(beta) * double(before(i, j)));
      }
      const double error =
          std::abs(double(c(i, j)) - sum) / (size * double(std::numeric_limits<T>::epsilon()));
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

template <class T>
bool same_bits(view<const T, 2> a, view<const T, 2> b) {
  for (index_t i = 0; i < a.extent(0); ++i) {
    for (index_t j = 0; j < a.extent(1); ++j) {
      const T x = a(i, j), y = b(i, j);
      if (std::memcmp(&x, &y, sizeof(T)) != 0) return false;
    }
  }
  return true;
}

// Each of k additions rounds by at most eps / 2 of what is summed so far.
double bound(index_t k) {
  return 2 + 0.5 * double(k);
}

}  // namespace

TEMPLATE_TEST_CASE("kernels/gemm: equals the double loop for any sizes and strides",
                   "[kernels][gemm][cpu]", float, double) {
  const index_t sizes[] = {1, 5, 17, 63, 64, 65, 130};
  const order orders[] = {order::rows, order::cols, order::strided};
  double worst = 0;
  unsigned turn = 0;
  for (const index_t m : sizes) {
    for (const index_t n : sizes) {
      for (const index_t k : sizes) {
        // All 27 layouts come up many times over the 343 sizes.
        const order oa = orders[turn % 3], ob = orders[turn / 3 % 3], oc = orders[turn / 9 % 3];
        ++turn;
        matrix<TestType> a(m, k, oa, turn), b(k, n, ob, turn + 1), c(m, n, oc, turn + 2);
        c.poison();
        kernels::gemm(TestType(1), a.view, b.view, TestType(0), c.view);
        const double error =
            scaled_error<TestType>(1, a.view, b.view, 0, c.view, c.view) / bound(k);
        if (!(error <= worst)) worst = error;
      }
    }
  }
  CHECK(worst <= 1);
}

TEMPLATE_TEST_CASE("kernels/gemm: equals the double loop beyond one pass and one block",
                   "[kernels][gemm][cpu]", float, double) {
  const cpu::context two(2);
  const order oa = GENERATE(order::rows, order::cols, order::strided);
  const order ob = GENERATE(order::rows, order::cols, order::strided);
  const order oc = GENERATE(order::rows, order::cols, order::strided);
  const index_t m = 131, n = 197, k = 520;
  matrix<TestType> a(m, k, oa, 1), b(k, n, ob, 2), c(m, n, oc, 3);
  const matrix<TestType> before = c;
  const view<const TestType, 2> old{before.values.data(), c.view.extents, c.view.strides};
  kernels::gemm(two, TestType(0.75), a.view, b.view, TestType(-1.5), c.view);
  CHECK(scaled_error<TestType>(TestType(0.75), a.view, b.view, TestType(-1.5), old, c.view) <=
        bound(k));
}

TEMPLATE_TEST_CASE("kernels/gemm: a column block wider than the cache block is complete",
                   "[kernels][gemm][cpu]", float, double) {
  matrix<TestType> a(7, 3, order::rows, 1), b(3, 6301, order::cols, 2), c(7, 6301, order::rows, 3);
  c.poison();
  kernels::gemm(TestType(1), a.view, b.view, TestType(0), c.view);
  CHECK(scaled_error<TestType>(1, a.view, b.view, 0, c.view, c.view) <= bound(3));
}

TEST_CASE("kernels/gemm: alpha and beta of every kind are honoured", "[kernels][gemm][cpu]") {
  const float alpha = GENERATE(0.0f, 1.0f, -0.5f), beta = GENERATE(0.0f, 1.0f, 2.5f);
  const order oc = GENERATE(order::rows, order::cols, order::strided);
  matrix<float> a(19, 33, order::rows, 1), b(33, 21, order::rows, 2), c(19, 21, oc, 3);
  const matrix<float> before = c;
  const view<const float, 2> old{before.values.data(), c.view.extents, c.view.strides};
  if (beta == 0) c.poison();
  kernels::gemm(alpha, a.view, b.view, beta, c.view);
  CHECK(scaled_error<float>(alpha, a.view, b.view, beta, old, c.view) <= bound(33));
}

TEST_CASE("kernels/gemm: no terms leave beta times c", "[kernels][gemm][cpu]") {
  matrix<float> c(3, 4, order::strided, 1);
  const float old = c.view(2, 3);
  const view<const float, 2> a{c.values.data(), {3, 0}, {1, 1}};
  const view<const float, 2> b{c.values.data(), {0, 4}, {4, 1}};
  kernels::gemm(1.0f, a, b, 2.0f, c.view);
  CHECK(c.view(2, 3) == 2 * old);
  c.poison();
  kernels::gemm(1.0f, a, b, 0.0f, c.view);
  CHECK(c.view(2, 3) == 0.0f);
}

TEMPLATE_TEST_CASE("kernels/gemm: a row has the same bits in any number of rows",
                   "[kernels][gemm][cpu]", float, double) {
  const order oa = GENERATE(order::rows, order::cols);
  const order ob = GENERATE(order::rows, order::cols);
  const index_t rows = 200, n = GENERATE(40, 150), k = 300;
  matrix<TestType> a(rows, k, oa, 1), b(k, n, ob, 2), whole(rows, n, order::rows, 3);
  kernels::gemm(TestType(1.25), a.view, b.view, TestType(0), whole.view);
  bool same = true;
  for (const index_t m : {1, 2, 3, 5, 6, 7, 15, 64, 130}) {
    const index_t first = rows - m;
    matrix<TestType> part(m, n, order::rows, 4);
    const view<const TestType, 2> a_part{
        a.view.data + first * a.view.strides[0], {m, k}, a.view.strides};
    kernels::gemm(TestType(1.25), a_part, b.view, TestType(0), part.view);
    const view<const TestType, 2> expected{whole.view.data + first * n, {m, n}, {n, 1}};
    same = same && same_bits<TestType>(part.view, expected);
  }
  CHECK(same);
}

TEMPLATE_TEST_CASE("kernels/gemm: a column has the same bits in any number of columns",
                   "[kernels][gemm][cpu]", float, double) {
  const order ob = GENERATE(order::rows, order::cols);
  const index_t m = 70, cols = 150, k = 300;
  matrix<TestType> a(m, k, order::rows, 1), b(k, cols, ob, 2), whole(m, cols, order::rows, 3);
  matrix<TestType> across(m, cols, order::cols, 3);
  kernels::gemm(TestType(1), a.view, b.view, TestType(0), whole.view);
  kernels::gemm(TestType(1), a.view, b.view, TestType(0), across.view);
  bool same = same_bits<TestType>(whole.view, across.view);
  for (const index_t n : {1, 3, 8, 17, 33, 149}) {
    matrix<TestType> part(m, n, order::rows, 4);
    const view<const TestType, 2> b_part{b.view.data, {k, n}, b.view.strides};
    kernels::gemm(TestType(1), a.view, b_part, TestType(0), part.view);
    const view<const TestType, 2> expected{whole.view.data, {m, n}, {cols, 1}};
    same = same && same_bits<TestType>(part.view, expected);
  }
  CHECK(same);
}

TEMPLATE_TEST_CASE("kernels/gemm: the bits do not depend on the number of threads",
                   "[kernels][gemm][cpu]", float, double) {
  const order ob = GENERATE(order::rows, order::cols);
  const index_t m = GENERATE(5, 64, 259), n = 230, k = 270;
  matrix<TestType> a(m, k, order::rows, 1), b(k, n, ob, 2), serial(m, n, order::rows, 3);
  kernels::gemm(TestType(1), a.view, b.view, TestType(0), serial.view);
  bool same = true;
  for (const int threads : {1, 2, 3, 8}) {
    const cpu::context ctx(threads);
    matrix<TestType> c(m, n, order::rows, 4);
    kernels::gemm(ctx, TestType(1), a.view, b.view, TestType(0), c.view);
    same = same && same_bits<TestType>(c.view, serial.view);
  }
  CHECK(same);
}

TEMPLATE_TEST_CASE("kernels/gemm: gemm_lower gives the lower triangle and leaves far tiles alone",
                   "[kernels][gemm][cpu]", float, double) {
  const index_t n = GENERATE(1, 17, 64, 130), k = 33;
  const order oc = GENERATE(order::rows, order::cols);
  const cpu::context two(2);
  matrix<TestType> a(n, k, order::rows, 1), b(k, n, order::cols, 2);
  matrix<TestType> full(n, n, order::rows, 3), lower(n, n, oc, 4), parallel(n, n, oc, 4);
  kernels::gemm(TestType(1), a.view, b.view, TestType(0), full.view);
  lower.poison();
  parallel.poison();
  kernels::gemm_lower(TestType(1), a.view, b.view, TestType(0), lower.view);
  kernels::gemm_lower(two, TestType(1), a.view, b.view, TestType(0), parallel.view);
  bool same = true, untouched = true;
  for (index_t i = 0; i < n; ++i) {
    for (index_t j = 0; j < n; ++j) {
      if (j <= i) {
        same = same && lower.view(i, j) == full.view(i, j);
        same = same && parallel.view(i, j) == full.view(i, j);
      } else if (j >= i + 48) {
        untouched = untouched && std::isnan(lower.view(i, j));
      }
    }
  }
  CHECK(same);
  CHECK(untouched);
}

TEMPLATE_TEST_CASE("kernels/gemm: a triangular left operand is not used on its other side",
                   "[kernels][gemm][cpu]", float, double) {
  const index_t m = GENERATE(1, 6, 64, 130, 300), n = GENERATE(5, 64);
  const order oa = GENERATE(order::rows, order::cols);
  const bool upper = GENERATE(false, true);
  matrix<TestType> a(m, m, oa, 1), zeroed = a, b(m, n, order::rows, 2), c(m, n, order::rows, 3);
  const view<TestType, 2> z{zeroed.values.data(), a.view.extents, a.view.strides};
  for (index_t i = 0; i < m; ++i) {
    for (index_t j = 0; j < m; ++j) {
      if (upper ? j < i : j > i) {
        a.view(i, j) = std::numeric_limits<TestType>::quiet_NaN();
        z(i, j) = 0;
      }
    }
  }
  const matrix<TestType> before = c;
  const view<const TestType, 2> old{before.values.data(), c.view.extents, c.view.strides};
  if (upper) {
    kernels::gemm_upper_left(TestType(0.5), a.view, b.view, TestType(1), c.view);
  } else {
    kernels::gemm_lower_left(TestType(0.5), a.view, b.view, TestType(1), c.view);
  }
  CHECK(scaled_error<TestType>(TestType(0.5), z, b.view, 1, old, c.view) <= bound(m));
}

TEST_CASE("kernels/gemm: sizes that do not fit are refused with all three shapes",
          "[kernels][gemm][error]") {
  matrix<float> a(2, 3, order::rows, 1), b(4, 5, order::rows, 2), c(2, 5, order::rows, 3);
  CHECK_THROWS_WITH(kernels::gemm(1.0f, a.view, b.view, 0.0f, c.view),
                    ssm_test::contains("a is (2 x 3), b is (4 x 5), c is (2 x 5)"));
}
