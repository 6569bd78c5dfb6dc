#include "mixers/stateless_checks.hpp"
#include <ssmlib/lower/gram.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

struct gram_case {
  index_t q_heads = 2, k_heads = 2, x_heads = 2, keys = 5, features = 6, window = 0;

  template <class T>
  auto gram_of(index_t batch, index_t length) const {
    const auto q = normal<T, 4>({batch, length, q_heads, keys}, 1, 2);
    const auto k = normal<T, 4>({batch, length, k_heads, keys}, 1, 3);
    return q * transpose(k) * 0.7;
  }
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    return gram_of<T>(batch, length) * normal<T, 4>({batch, length, x_heads, features}, 1, 4);
  }
};
struct mapped_case {
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto q = normal<T, 4>({batch, length, 4, 3}, 1, 2);
    const auto k = normal<T, 4>({batch, length, 2, 3}, 1, 3);
    return with_features(feature::elu_plus_one{}, q * transpose(k)) *
           normal<T, 4>({batch, length, 1, 7}, 1, 4);
  }
};
struct window_case {
  index_t size = 3;
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const gram_case g{.q_heads = 4, .k_heads = 1, .x_heads = 2};
    return hadamard(window(size), g.gram_of<T>(batch, length)) *
           normal<T, 4>({batch, length, 2, 6}, 1, 4);
  }
};

constexpr gram_case cases[] = {
    {},
    {.q_heads = 1, .k_heads = 4, .x_heads = 2, .keys = 1, .features = 1},
    {.q_heads = 6, .k_heads = 2, .x_heads = 3, .keys = 17, .features = 33}};

template <class F>
void for_both(F f) {
  f(alg::associative{});
  f(alg::quadratic{});
}

TEST_CASE("mixers/gram: both algorithms equal dense()", "[mixers][gram]") {
  for_both([&](auto algorithm) {
    for (const index_t length : {1, 2, 127, 129}) {
      for (const gram_case& make : cases)
        check_forward(make, 2, length, algorithm);
      check_forward(mapped_case{}, 2, length, algorithm);
    }
    check_forward(cases[0], 1, 513, algorithm);
  });
}

TEST_CASE("mixers/gram: gradients equal finite differences", "[mixers][gram]") {
  for_both([&](auto algorithm) {
    for (const index_t length : {1, 6, 131}) {
      for (const gram_case& make : cases)
        check_stateless_vjp(make, 2, length, algorithm);
      check_stateless_vjp(mapped_case{}, 2, length, algorithm);
    }
    check_stateless_vjp(cases[0], 1, 514, algorithm);
  });
}

TEST_CASE("mixers/gram: a window keeps the last tokens, with gradients", "[mixers][gram]") {
  for (const index_t size : {1, 3, 128, 200}) {
    const window_case make{size};
    for (const index_t length : {1, 3, 140, 300}) {
      check_forward(make, 2, length, alg::quadratic{});
    }
    check_stateless_vjp(make, 2, 140, alg::quadratic{});
  }
}

TEST_CASE("mixers/gram: packed sequences have the bits that they have alone", "[mixers][gram]") {
  for_both([&](auto algorithm) {
    check_stateless_packed(cases[2], {7, 0, 1, 600, 130}, algorithm);
  });
  check_stateless_packed(window_case{5}, {7, 0, 1, 300, 130}, alg::quadratic{});
}

TEST_CASE("mixers/gram: results do not depend on the number of threads",
          "[mixers][gram][threads]") {
  for_both([&](auto algorithm) { check_stateless_threads(cases[2], 2, 1100, algorithm); });
  check_stateless_threads(window_case{50}, 2, 500, alg::quadratic{});
}

TEST_CASE("mixers/gram: low_rank is the same node", "[mixers][gram]") {
  const auto u = normal<double, 3>({20, 2, 4}, 1, 1), v = normal<double, 3>({20, 2, 4}, 1, 2);
  const auto x = normal<double, 3>({20, 2, 3}, 1, 3);
  CHECK(same_bits(eval(low_rank(u, v) * x), eval(u * transpose(v) * x)));
}

TEST_CASE("mixers/gram: alg::automatic is one of the two", "[mixers][gram]") {
  for (const index_t length : {2, 300}) {
    const auto e = cases[0].operator()<float>(1, length);
    const auto y = eval(e.with(alg::automatic{}));
    CHECK((same_bits(y, eval(e.with(alg::associative{}))) ||
           same_bits(y, eval(e.with(alg::quadratic{})))));
  }
}

}  // namespace
