#include "mixers/recurrent_checks.hpp"
#include <ssmlib/lower/gated_linear.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

struct gated_case {
  index_t q_heads = 3, k_heads = 3, gate_heads = 3, x_heads = 3, keys = 8, features = 9;
  double lowest_gate = -1.0;

  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto q = uniform<T, 4>({batch, length, q_heads, keys}, -1, 1, 1);
    const auto k = uniform<T, 4>({batch, length, k_heads, keys}, -1, 1, 2);
    const auto gate = uniform<T, 4>({batch, length, gate_heads, keys}, lowest_gate, 0, 3);
    const auto x = uniform<T, 4>({batch, length, x_heads, features}, -1, 1, 4);
    return gated(gate, q * transpose(k) * 0.5) * x;
  }
};

constexpr gated_case plain{};
constexpr gated_case grouped{
    .q_heads = 6, .k_heads = 2, .gate_heads = 2, .x_heads = 2, .keys = 5, .features = 3};
constexpr gated_case wide{
    .q_heads = 1, .k_heads = 1, .gate_heads = 2, .x_heads = 4, .keys = 19, .features = 33};
constexpr gated_case strong{.keys = 8, .lowest_gate = -30.0};

}  // namespace

TEST_CASE("mixers/gated_linear: every algorithm multiplies by dense()", "[mixers][gated_linear]") {
  const index_t length = GENERATE(1, 2, 15, 16, 17, 70);
  for (const gated_case& make : {plain, grouped, wide, strong}) {
    CAPTURE(make.keys, make.lowest_gate);
    check_forward(make, 2, length, alg::chunked{});
    check_forward(make, 2, length, alg::chunked{7});
    check_forward(make, 2, length, alg::recurrent{});
    check_forward(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/gated_linear: gradients are those of finite differences",
          "[mixers][gated_linear]") {
  const index_t length = GENERATE(1, 16, 53);
  for (const gated_case& make : {plain, grouped, wide, strong}) {
    CAPTURE(make.keys, make.lowest_gate);
    check_vjp(make, 2, length, alg::chunked{});
    check_vjp(make, 2, length, alg::chunked{5});
    check_vjp(make, 2, length, alg::recurrent{});
    check_vjp(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/gated_linear: gradients pass through kept and recomputed states",
          "[mixers][gated_linear]") {
  check_vjp(plain, 1, 75, alg::chunked{2});
  check_vjp(plain, 1, 600, alg::chunked{});
}

TEST_CASE("mixers/gated_linear: packed sequences have the bits that each has alone",
          "[mixers][gated_linear]") {
  for (const gated_case& make : {plain, wide}) {
    check_packed(make, {5, 0, 1, 64, 33, 7}, alg::chunked{});
    check_packed(make, {5, 0, 1, 64, 33, 7}, alg::recurrent{});
    check_packed(make, {5, 0, 1, 9}, alg::quadratic{});
  }
}

TEST_CASE("mixers/gated_linear: a cut sequence continues from its state",
          "[mixers][gated_linear]") {
  for (const gated_case& make : {plain, grouped}) {
    check_split(make, 41, alg::chunked{});
    check_split(make, 41, alg::recurrent{});
    check_split(make, 41, alg::quadratic{});
  }
}

TEST_CASE("mixers/gated_linear: results do not depend on the number of threads",
          "[mixers][gated_linear][threads]") {
  check_threads(grouped, 3, 50, alg::chunked{});
  check_threads(wide, 1, 50, alg::recurrent{});
}

TEST_CASE("mixers/gated_linear: snapshots are the states before the last tokens",
          "[mixers][gated_linear]") {
  check_snapshots(plain, 11, 4);
  check_snapshots(wide, 3, 5);
}

TEST_CASE("mixers/gated_linear: resets forget everything before them", "[mixers][gated_linear]") {
  const float reset = GENERATE(-1e4f, -std::numeric_limits<float>::infinity());
  const auto algorithm_independent = [&](auto algorithm) {
    CAPTURE(reset, algorithm.name);
    const auto e = plain.operator()<float>(1, 40).with(algorithm);
    for (const index_t t : {index_t{3}, index_t{16}, index_t{17}, index_t{30}}) {
      e.mixer.log_gate.slice(1, t, t + 1).fill(reset);
    }
    const auto y = eval(e);
    CHECK(relative_error(y, dense_product(e)) < 1e-5);
    const auto g = vjp(e, y);
    CHECK(std::isfinite(relative_error(g.mixer.log_gate, g.mixer.log_gate)));
    for (index_t n = 0; n < 8; ++n)
      CHECK(g.mixer.log_gate(0, 16, 0, n) == 0.0f);
  };
  algorithm_independent(alg::chunked{});
  algorithm_independent(alg::recurrent{});
  algorithm_independent(alg::quadratic{});
}

TEST_CASE("mixers/gated_linear: gates of one make linear attention", "[mixers][gated_linear]") {
  gated_case make;
  make.lowest_gate = -0.0;
  check_forward(make, 1, 50, alg::chunked{});
  check_forward(make, 1, 50, alg::recurrent{});
}

TEST_CASE("mixers/gated_linear: a hundred thousand tokens stay within rounding",
          "[mixers][gated_linear][slow]") {
  // Gates of e^-0.005 on average: a state is a sum over some 200 tokens, and so is its rounding.
  const gated_case make{.q_heads = 1,
                        .k_heads = 1,
                        .gate_heads = 1,
                        .x_heads = 1,
                        .keys = 4,
                        .features = 4,
                        .lowest_gate = -0.01};
  const auto exact = eval(make.operator()<double>(1, 100000));
  const auto single = make.operator()<float>(1, 100000);
  CHECK(relative_error(eval(single.with(alg::recurrent{})), exact) < 1e-5);
  CHECK(relative_error(eval(single.with(alg::chunked{})), exact) < 1e-5);
}

TEST_CASE("mixers/gated_linear: absent gradients are skipped", "[mixers][gated_linear]") {
  const auto e = plain.operator()<double>(2, 20);
  const auto dy = uniform<double, 4>(e.extents(), -1, 1, 6);
  const auto all = vjp(e, dy);
  auto some = e;
  std::remove_cvref_t<decltype(some)>::operands(some,
                                                [](std::string_view, auto& t, operand) { t = {}; });
  some.mixer.kernel.k = tensor<double, 4>::zeros(e.mixer.kernel.k.extents());
  vjp_into(e, dy, some, carry_gradient<double>{});
  CHECK(same_bits(some.mixer.kernel.k, all.mixer.kernel.k));
}

TEST_CASE("mixers/gated_linear: sizes that do not fit are refused",
          "[mixers][gated_linear][error]") {
  const tensor<float, 4> q(2, 7, 3, 8);
  CHECK_THROWS_WITH(gated(tensor<float, 4>(2, 7, 3, 9), q * transpose(q)),
                    contains("wanted a gate for every feature"));
  CHECK_THROWS_WITH(gated(tensor<float, 4>(2, 7, 2, 8), q * transpose(q)), contains("heads"));
}
