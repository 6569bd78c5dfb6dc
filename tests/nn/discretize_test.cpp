#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/discretize.hpp>

namespace {

using namespace ssm;
using ssm_test::flat;

TEST_CASE("nn/discretize: step sizes and log decays are their definition", "[nn][discretize]") {
  const index_t heads = GENERATE(1, 4, 11);
  const auto dt = uniform<double, 3>({2, 5, heads}, -6, 25, 1);
  const auto a = uniform<double, 1>({heads}, -16, -1, 2);
  const auto bias = uniform<double, 1>({heads}, -1, 1, 3);
  const step_limits limits{.low = 0.01, .high = 22};
  const auto r = discretize(pass<double>{}, dt, a, bias, limits);
  const auto r32 =
      discretize(pass<float>{}, cast<float>(dt), cast<float>(a), cast<float>(bias), limits);
  tensor<double, 3> delta(dt.extents()), log_a(dt.extents());
  for (index_t i = 0; i < dt.size(); ++i) {
    const double x = dt.data()[i] + bias(i % heads);
    delta.data()[i] = std::clamp(x > 20 ? x : std::log1p(std::exp(x)), 0.01, 22.0);
    log_a.data()[i] = delta.data()[i] * a(i % heads);
  }
  CHECK(ssm_test::relative_error(r.delta, delta) < 1e-14);
  CHECK(ssm_test::relative_error(r.log_a, log_a) < 1e-14);
  CHECK(ssm_test::relative_error(r32.delta, delta) < 1e-6);
  CHECK(ssm_test::relative_error(r32.log_a, log_a) < 1e-6);
}

TEST_CASE("nn/discretize: gradients are those of differences, through either output or both",
          "[nn][discretize]") {
  const index_t tokens = GENERATE(3, 700);
  const bool has_bias = GENERATE(false, true);
  const int outputs = GENERATE(1, 2, 3);  // delta, log_a, both
  const auto projection = uniform<double, 3>({1, tokens, 9}, -3, 3, 1);
  const auto a = uniform<double, 1>({5}, -4, -1, 2);
  const auto bias = has_bias ? uniform<double, 1>({5}, -1, 1, 3) : tensor<double, 1>{};
  std::vector<tensor<double, 1>> inputs{flat(projection)};
  if (outputs != 1) inputs.push_back(a);
  if (has_bias) inputs.push_back(bias);
  const double error = ssm_test::gradient_error(inputs, [&](const pass<double>& p) {
    const auto r = discretize(p, projection.slice(2, 3, 8), a, bias);
    std::vector<tensor<double, 1>> results;
    if (outputs & 1) results.push_back(flat(r.delta));
    if (outputs & 2) results.push_back(flat(r.log_a));
    return results;
  });
  CHECK(error < 1e-7);
}

TEST_CASE("nn/discretize: outside the limits dt has no gradient, inside it has",
          "[nn][discretize]") {
  tensor<double, 3> dt(1, 3, 1);
  dt(0, 0, 0) = -9;
  dt(0, 1, 0) = 0.5;
  dt(0, 2, 0) = 3;
  const auto a = tensor<double, 1>::full({1}, -2.0);
  tape<double> t;
  t.watch(dt);
  const auto r = discretize(pass<double>{.tape = &t}, dt, a, {}, {.low = 0.01, .high = 2});
  t.gradient(r.log_a).fill(1);
  t.backward();
  CHECK(t.gradient(dt)(0, 0, 0) == 0.0);
  CHECK(t.gradient(dt)(0, 1, 0) == ssm_test::approx(-2 / (1 + std::exp(-0.5))));
  CHECK(t.gradient(dt)(0, 2, 0) == 0.0);
}

TEST_CASE("nn/discretize: the extremes of dt give no NaN", "[nn][discretize]") {
  const float values[] = {-1e30f, -1e4f, -104.f, 0.f, 20.f, 21.f, 89.f, 1e4f, 1e30f};
  tensor<float, 3> dt(1, 9, 1);
  std::copy(std::begin(values), std::end(values), dt.data());
  const auto a = tensor<float, 1>::full({1}, -1.0f);
  tape<float> t;
  t.watch(dt);
  t.watch(a);
  const auto r = discretize(pass<float>{.tape = &t}, dt, a);
  t.gradient(r.delta).fill(1e-6f);
  t.gradient(r.log_a).fill(1e-6f);
  t.backward();
  for (index_t i = 0; i < 9; ++i) {
    CAPTURE(values[i]);
    CHECK(std::isfinite(r.delta(0, i, 0)));
    CHECK(std::isfinite(r.log_a(0, i, 0)));
    CHECK(r.delta(0, i, 0) >= 0.0f);
    CHECK(std::isfinite(t.gradient(dt)(0, i, 0)));
  }
  CHECK(std::isfinite(t.gradient(a)(0)));
}

TEST_CASE("nn/discretize: sizes and limits that do not fit are refused",
          "[nn][discretize][error]") {
  const auto dt = tensor<float, 3>::zeros(1, 2, 3);
  const auto a = tensor<float, 1>::zeros(3);
  CHECK_THROWS_WITH(discretize(pass<float>{}, dt, tensor<float, 1>::zeros(2)),
                    ssm_test::contains("A is (2), wanted (3)"));
  CHECK_THROWS_WITH(discretize(pass<float>{}, dt, a, {}, {.low = 2, .high = 1}),
                    ssm_test::contains("wanted low <= high"));
}

TEST_CASE("grad/tape: an entry of several outputs runs once if any of them has a gradient",
          "[grad][tape]") {
  const index_t used = GENERATE(0, 1, 2);
  tape<double> t;
  const tensor<double, 1> x(1), u(1), v(1);
  t.watch(x);
  int runs = 0;
  t.record_outputs(
      [&] {
        ++runs;
        t.gradient(x)(0) += t.gradient(u)(0) + 10 * t.gradient(v)(0);
      },
      u, v);
  if (used == 1) t.gradient(u)(0) = 1;
  if (used == 2) t.gradient(v)(0) = 1;
  t.backward();
  CHECK(runs == (used == 0 ? 0 : 1));
  CHECK(t.gradient(x)(0) == (used == 0 ? 0.0 : used == 1 ? 1.0 : 10.0));
}

}  // namespace
