#include "mixers/recurrent_checks.hpp"
#include <ssmlib/lower/delta_rule.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

/// Keys of length 1, as the rule wants them.
template <class T>
tensor<T, 4> unit_keys(const shape<4>& extents) {
  const auto k = uniform<T, 4>(extents, -1, 1, 2);
  const index_t n = extents[3];
  for (index_t i = 0; n > 0 && i < k.size(); i += n) {
    double squares = 0;
    for (index_t j = 0; j < n; ++j)
      squares += static_cast<double>(k.data()[i + j] * k.data()[i + j]);
    for (index_t j = 0; j < n; ++j)
      k.data()[i + j] /= static_cast<T>(std::sqrt(squares));
  }
  return k;
}

struct delta_case {
  index_t q_heads = 3, k_heads = 3, gate_heads = 3, beta_heads = 3, x_heads = 3, keys = 8,
          features = 9;
  double lowest_gate = -0.5;

  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto q = uniform<T, 4>({batch, length, q_heads, keys}, -1, 1, 1);
    const auto k = unit_keys<T>({batch, length, k_heads, keys});
    const auto gate = uniform<T, 3>({batch, length, gate_heads}, lowest_gate, 0, 3);
    const auto beta = uniform<T, 3>({batch, length, beta_heads}, 0, 1, 5);
    const auto x = uniform<T, 4>({batch, length, x_heads, features}, -1, 1, 4);
    return delta_rule(gate, beta, q * transpose(k) * 0.5) * x;
  }
};

constexpr delta_case plain{};
constexpr delta_case grouped{.q_heads = 6,
                             .k_heads = 2,
                             .gate_heads = 2,
                             .beta_heads = 6,
                             .x_heads = 2,
                             .keys = 5,
                             .features = 3};
constexpr delta_case wide{.q_heads = 1,
                          .k_heads = 1,
                          .gate_heads = 2,
                          .beta_heads = 1,
                          .x_heads = 4,
                          .keys = 19,
                          .features = 33};
constexpr delta_case strong{.lowest_gate = -30.0};

struct undecayed : delta_case {
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    auto e = delta_case::operator()<T>(batch, length);
    e.mixer.log_decay.fill(T(0));
    for (index_t i = 0; i < e.mixer.beta.size(); ++i)
      e.mixer.beta.data()[i] *= T(2);
    return e;
  }
};

}  // namespace

TEST_CASE("mixers/delta_rule: every algorithm multiplies by dense()", "[mixers][delta_rule]") {
  const index_t length = GENERATE(1, 2, 15, 16, 17, 63, 64, 65, 150);
  for (const delta_case& make : {plain, grouped, wide, strong}) {
    CAPTURE(make.keys, make.lowest_gate);
    check_forward(make, 2, length, alg::chunked{});
    check_forward(make, 2, length, alg::chunked{24});
    check_forward(make, 2, length, alg::recurrent{});
    check_forward(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/delta_rule: gradients are those of finite differences", "[mixers][delta_rule]") {
  const index_t length = GENERATE(1, 16, 64, 90);
  for (const delta_case& make : {plain, grouped, wide, strong}) {
    CAPTURE(make.keys, make.lowest_gate);
    check_vjp(make, 2, length, alg::chunked{});
    check_vjp(make, 2, length, alg::chunked{20});
    check_vjp(make, 2, length, alg::recurrent{});
    check_vjp(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/delta_rule: gradients pass through many chunks", "[mixers][delta_rule]") {
  check_vjp(plain, 1, 75, alg::chunked{2});
  check_vjp(plain, 1, 600, alg::chunked{});
}

TEST_CASE("mixers/delta_rule: packed sequences have the bits that each has alone",
          "[mixers][delta_rule]") {
  for (const delta_case& make : {plain, wide}) {
    check_packed(make, {5, 0, 1, 64, 33, 7}, alg::chunked{});
    check_packed(make, {5, 0, 1, 64, 33, 7}, alg::recurrent{});
    check_packed(make, {5, 0, 1, 9}, alg::quadratic{});
  }
}

TEST_CASE("mixers/delta_rule: a cut sequence continues from its state", "[mixers][delta_rule]") {
  for (const delta_case& make : {plain, grouped}) {
    check_split(make, 41, alg::chunked{});
    check_split(make, 41, alg::recurrent{});
    check_split(make, 41, alg::quadratic{});
  }
}

TEST_CASE("mixers/delta_rule: results do not depend on the number of threads",
          "[mixers][delta_rule][threads]") {
  check_threads(grouped, 3, 50, alg::chunked{});
  check_threads(wide, 1, 50, alg::recurrent{});
}

TEST_CASE("mixers/delta_rule: snapshots are the states before the last tokens",
          "[mixers][delta_rule]") {
  check_snapshots(plain, 11, 4);
  check_snapshots(wide, 3, 5);
}

TEST_CASE("mixers/delta_rule: resets forget everything before them", "[mixers][delta_rule]") {
  const float reset = GENERATE(-1e4f, -std::numeric_limits<float>::infinity());
  const auto algorithm_independent = [&](auto algorithm) {
    CAPTURE(reset, algorithm.name);
    const auto e = plain.operator()<float>(1, 40).with(algorithm);
    for (const index_t t : {index_t{3}, index_t{16}, index_t{17}, index_t{30}}) {
      e.mixer.log_decay.slice(1, t, t + 1).fill(reset);
    }
    const auto y = eval(e);
    CHECK(relative_error(y, dense_product(e)) < 1e-5);
    const auto g = vjp(e, y);
    CHECK(std::isfinite(relative_error(g.mixer.log_decay, g.mixer.log_decay)));
    CHECK(g.mixer.log_decay(0, 16, 0) == 0.0f);
  };
  algorithm_independent(alg::chunked{});
  algorithm_independent(alg::recurrent{});
  algorithm_independent(alg::quadratic{});
}

TEST_CASE("mixers/delta_rule: without decay it is DeltaNet, with beta up to 2",
          "[mixers][delta_rule]") {
  check_forward(undecayed{}, 1, 100, alg::chunked{});
  check_forward(undecayed{}, 1, 100, alg::recurrent{});
  check_vjp(undecayed{}, 1, 100, alg::chunked{});
}

TEST_CASE("mixers/delta_rule: equal keys overwrite each other", "[mixers][delta_rule]") {
  // The worst case of the triangular system: every entry below its diagonal is beta.
  auto e = plain.operator()<float>(1, 128);
  e.mixer.kernel.k.copy_from(
      tensor<float, 4>::full(e.mixer.kernel.k.extents(), 1 / std::sqrt(8.0f)));
  e.mixer.beta.fill(1.0f);
  e.mixer.log_decay.fill(0.0f);
  CHECK(relative_error(eval(e), dense_product(e)) < 1e-5);
}

TEST_CASE("mixers/delta_rule: a hundred thousand tokens stay within rounding",
          "[mixers][delta_rule][slow]") {
  // Decays of e^-0.005 on average: a state is a sum over some 200 tokens, and so is its rounding.
  const delta_case make{.q_heads = 1,
                        .k_heads = 1,
                        .gate_heads = 1,
                        .beta_heads = 1,
                        .x_heads = 1,
                        .keys = 4,
                        .features = 4,
                        .lowest_gate = -0.01};
  const auto exact = eval(make.operator()<double>(1, 100000));
  const auto single = make.operator()<float>(1, 100000);
  CHECK(relative_error(eval(single.with(alg::recurrent{})), exact) < 1e-5);
  CHECK(relative_error(eval(single.with(alg::chunked{})), exact) < 1e-5);
}

TEST_CASE("mixers/delta_rule: absent gradients are skipped", "[mixers][delta_rule]") {
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

TEST_CASE("mixers/delta_rule: sizes that do not fit are refused", "[mixers][delta_rule][error]") {
  const tensor<float, 4> q(2, 7, 3, 8);
  const tensor<float, 3> good(2, 7, 3), two(2, 7, 2), late(2, 8, 3);
  CHECK_THROWS_WITH(delta_rule(good, two, q * transpose(q)), contains("heads"));
  CHECK_THROWS_WITH(delta_rule(late, good, q * transpose(q)), contains("time 8"));
}
