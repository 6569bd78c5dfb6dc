#include "mixers/stateless_checks.hpp"
#include <ssmlib/lower/toeplitz.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

/// toeplitz(kernel) * X.
struct bare_case {
  index_t kernel_heads = 2, x_heads = 2, features = 5;

  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto kernel = normal<T, 2>({kernel_heads, 700}, 1, 1);
    return toeplitz(kernel) * normal<T, 4>({batch, length, x_heads, features}, 1, 2);
  }
};
/// hadamard(toeplitz(kernel), Q * transpose(K)) * X.
struct gram_case {
  index_t kernel_heads = 2, q_heads = 2, k_heads = 2, x_heads = 2, keys = 5, features = 6;

  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto kernel = normal<T, 2>({kernel_heads, 700}, 1, 1);
    const auto q = normal<T, 4>({batch, length, q_heads, keys}, 1, 2);
    const auto k = normal<T, 4>({batch, length, k_heads, keys}, 1, 3);
    return hadamard(toeplitz(kernel), q * transpose(k) * 0.7) *
           normal<T, 4>({batch, length, x_heads, features}, 1, 4);
  }
};
struct mapped_case {
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto kernel = normal<T, 2>({1, 700}, 1, 1);
    const auto q = normal<T, 4>({batch, length, 2, 4}, 1, 2);
    const auto k = normal<T, 4>({batch, length, 1, 4}, 1, 3);
    return hadamard(toeplitz(kernel), with_features(feature::elu_plus_one{}, q * transpose(k))) *
           normal<T, 4>({batch, length, 2, 3}, 1, 4);
  }
};

constexpr bare_case bare_cases[] = {{},
                                    {.kernel_heads = 1, .x_heads = 3, .features = 1},
                                    {.kernel_heads = 6, .x_heads = 2, .features = 37},
                                    {.kernel_heads = 1, .x_heads = 1, .features = 64}};
constexpr gram_case gram_cases[] = {
    {},
    {.kernel_heads = 1, .q_heads = 4, .k_heads = 2, .x_heads = 1, .keys = 1, .features = 1},
    {.kernel_heads = 6, .q_heads = 2, .k_heads = 1, .x_heads = 3, .keys = 8, .features = 9},
    {.kernel_heads = 1, .q_heads = 1, .k_heads = 1, .x_heads = 1, .keys = 4, .features = 33}};

template <class F>
void for_both(F f) {
  f(alg::structured{});
  f(alg::quadratic{});
}

TEST_CASE("mixers/toeplitz: both algorithms equal dense()", "[mixers][toeplitz]") {
  for (const bare_case& make : bare_cases) {
    for_both([&](auto algorithm) {
      for (const index_t length : {1, 2, 3, 4, 5, 17, 31, 128, 129}) {
        check_forward(make, 2, length, algorithm);
      }
    });
  }
}
TEST_CASE("mixers/toeplitz: over a gram matrix both algorithms equal dense()",
          "[mixers][toeplitz]") {
  for (const gram_case& make : gram_cases) {
    for_both([&](auto algorithm) {
      for (const index_t length : {1, 2, 5, 31, 130})
        check_forward(make, 2, length, algorithm);
    });
  }
  for_both([&](auto algorithm) { check_forward(mapped_case{}, 2, 21, algorithm); });
}

TEST_CASE("mixers/toeplitz: gradients equal finite differences", "[mixers][toeplitz]") {
  for (const bare_case& make : bare_cases) {
    for_both([&](auto algorithm) {
      for (const index_t length : {1, 6, 133})
        check_stateless_vjp(make, 2, length, algorithm);
    });
  }
}
TEST_CASE("mixers/toeplitz: over a gram matrix gradients equal finite differences",
          "[mixers][toeplitz]") {
  for (const gram_case& make : gram_cases) {
    for_both([&](auto algorithm) {
      for (const index_t length : {1, 6, 133})
        check_stateless_vjp(make, 2, length, algorithm);
    });
  }
  for_both([&](auto algorithm) { check_stateless_vjp(mapped_case{}, 2, 21, algorithm); });
}

TEST_CASE("mixers/toeplitz: packed sequences have the bits that they have alone",
          "[mixers][toeplitz]") {
  for_both([&](auto algorithm) {
    check_stateless_packed(bare_case{}, {7, 7, 0, 1, 150, 31, 31}, algorithm);
    check_stateless_packed(gram_cases[2], {7, 7, 0, 1, 150, 31, 31}, algorithm);
  });
}

TEST_CASE("mixers/toeplitz: results do not depend on the number of threads",
          "[mixers][toeplitz][threads]") {
  for_both([&](auto algorithm) {
    check_stateless_threads(bare_cases[2], 3, 300, algorithm);
    check_stateless_threads(gram_cases[2], 3, 300, algorithm);
  });
}

TEST_CASE("mixers/toeplitz: a later token does not change an earlier output",
          "[mixers][toeplitz]") {
  const auto e = bare_case{}.operator()<float>(1, 300);
  auto changed = e;
  changed.x = e.x.clone();
  for (index_t p = 0; p < 5; ++p)
    changed.x(0, 200, 1, p) += 1.0f;
  const auto before = [](const auto& y) { return y.slice(1, 0, 200).clone(); };
  const auto y = eval(e.with(alg::quadratic{}));
  CHECK(same_bits(before(eval(changed.with(alg::quadratic{}))), before(y)));
  // The transforms round relative to the whole column.
  CHECK(relative_error(before(eval(changed.with(alg::structured{}))), before(y)) < 1e-6);
}

TEST_CASE("mixers/toeplitz: two axes, batches of none and a strided X are all products",
          "[mixers][toeplitz]") {
  const auto kernel = normal<double, 1>({40}, 1, 1);
  const auto wide = normal<double, 2>({40, 12}, 1, 2);
  const auto part = wide.slice(1, 3, 10);
  const auto y = eval(toeplitz(kernel) * part);
  for (index_t t = 0; t < 40; t += 13) {
    double sum = 0;
    for (index_t s = 0; s <= t; ++s)
      sum += kernel(t - s) * part(s, 2);
    CHECK(y(t, 2) == approx(sum));
  }
  CHECK(eval(toeplitz(kernel) * tensor<double, 4>::zeros(0, 5, 2, 3)).size() == 0);
  CHECK(eval(toeplitz(kernel) * tensor<double, 4>::zeros(2, 0, 2, 3)).size() == 0);
}

TEST_CASE("mixers/toeplitz: alg::automatic takes blocks for short sequences, transforms for long",
          "[mixers][toeplitz]") {
  const auto check = [](const auto& make) {
    const auto few = make.template operator()<float>(1, 40);
    const auto many = make.template operator()<float>(1, 600);
    CHECK(same_bits(eval(few.with(alg::automatic{})), eval(few.with(alg::quadratic{}))));
    CHECK(same_bits(eval(many.with(alg::automatic{})), eval(many.with(alg::structured{}))));
  };
  check(bare_case{});
  check(gram_cases[0]);
}

TEST_CASE("mixers/toeplitz: a kernel shorter than the sequence is refused",
          "[mixers][toeplitz][error]") {
  const auto mask = toeplitz(tensor<float, 2>::zeros(2, 9));
  const auto x = tensor<float, 4>::zeros(1, 10, 2, 3);
  CHECK_THROWS_WITH(mask * x, contains("the kernel is (2 x 9), (head x distance), the longest "
                                       "sequence has 10 tokens"));
  CHECK_THROWS_AS(hadamard(mask, x * transpose(x)), shape_error);
  CHECK_THROWS_AS(packed(sequence_layout::from_lengths({10}), mask), shape_error);
}

TEST_CASE(
    "mixers/toeplitz: a kernel shorter than a packed batch but not than its sequences is taken",
    "[mixers][toeplitz]") {
  const auto layout = sequence_layout::from_lengths({9, 1});
  const auto mask = toeplitz(tensor<float, 2>::full({2, 9}, 1.0f));
  const auto x = normal<float, 4>({1, 10, 2, 3}, 1, 1);
  const auto e = hadamard(mask, packed(layout, x * transpose(x))) * x;
  CHECK(relative_error(eval(e), eval(e.with(alg::quadratic{}))) < 1e-5);
  CHECK_THROWS_AS(packed(sequence_layout::from_lengths({10}), e.mixer), shape_error);
  CHECK_THROWS_AS(e.packed(sequence_layout::from_lengths({10})), shape_error);
  CHECK_THROWS_AS(packed(sequence_layout::from_lengths({10}), normalize_rows(e.mixer)),
                  shape_error);
}

TEST_CASE("mixers/toeplitz: a long product is right and its memory linear",
          "[mixers][toeplitz][slow]") {
  const index_t length = 20000;
  const auto kernel = normal<float, 2>({1, length}, 1, 1);
  const auto x = normal<float, 4>({1, length, 1, 16}, 1, 2);
  const auto e = toeplitz(kernel) * x;
  auto& pool = cpu_memory_pool::instance();
  pool.reset_peak();
  const auto before = pool.stats().in_use;
  const auto fast = eval(e), slow = eval(e.with(alg::quadratic{}));
  CHECK(relative_error(fast, slow) < 1e-5);
  CHECK(pool.stats().peak - before < std::size_t{16} << 20);
}

}  // namespace
