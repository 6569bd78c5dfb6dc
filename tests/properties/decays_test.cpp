#include "mixers.hpp"
#include <ssmlib/nn/discretize.hpp>

#include <limits>
#include <vector>

namespace {

using namespace properties;

template <class T, int R>
bool finite(const tensor<T, R>& t) {
  bool all = true;
  t.zip_with(t, [&](const T& v, const T&) { all = all && std::isfinite(v); });
  return all;
}

/// Every element replaced by the next of a list, over and over, with strides that mix them.
template <class T, int R>
void fill_from(const tensor<T, R>& t, const std::vector<double>& values) {
  std::size_t i = 0;
  t.zip_with(t, [&](T& v, const T&) { v = static_cast<T>(values[i++ * 7 % values.size()]); });
}

template <class T>
void check_against_dense(const operands<T>& o) {
  const double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
  o.for_each_recurrent([&](std::string_view mixer, const auto& e) {
    CAPTURE(mixer);
    const auto expected = definition_of(e);
    REQUIRE(finite(expected));
    for_each_algorithm(e, [&](const auto& product) {
      CHECK(ssm_test::relative_error(product_of(product), expected) < bound);
      const auto g = ssm::vjp(product, product.x);
      std::remove_cvref_t<decltype(g)>::operands(
          g, [&](std::string_view name, const auto& gradient, operand) {
            CAPTURE(name);
            CHECK(finite(gradient));
          });
    });
  });
}

TEMPLATE_TEST_CASE("properties/decays: decays near 0 and exact resets give right, finite results",
                   "[properties][decays]", float, double) {
  operands<TestType> o({.batch = 1, .length = 70, .heads = 2});
  const double reset = -std::numeric_limits<double>::infinity();
  fill_from(o.log_decay, {-1e-3, -80, -1e4, -0.5, -700, reset, 0, -1e-8, -20});
  fill_from(o.log_gate, {-1e-3, -80, -1e4, -0.5, -700, reset, 0, -1e-8, -20, -0.1, -3});
  fill_from(o.a, {-1e4, -16, -1e-6});
  fill_from(o.gamma, {1e-30, 1e-3});
  check_against_dense(o);
}

TEMPLATE_TEST_CASE("properties/decays: decays near 1 give right, finite results",
                   "[properties][decays]", float, double) {
  operands<TestType> o({.batch = 1, .length = 70, .heads = 2});
  fill_from(o.log_decay, {-1e-8, 0, -1e-5, -1e-30, -1e-12});
  fill_from(o.log_gate, {-1e-8, 0, -1e-5, -1e-30, -1e-12, -1e-7, -1e-3});
  fill_from(o.a, {-1e-8, -1e-30, -1e-4});
  fill_from(o.gamma, {1, 1 - 0x1p-24});
  check_against_dense(o);
}

TEMPLATE_TEST_CASE("properties/decays: step sizes at their extremes give no NaN",
                   "[properties][decays]", float, double) {
  using ssm::pass;
  operands<TestType> o({.batch = 1, .length = 70, .heads = 2});
  tensor<TestType, 3> dt(o.log_decay.extents());
  fill_from(dt, {-1e30, -1e4, -104, -88, -20, 0, 1e-30, 19.9, 20.1, 88, 89, 1e4, 1e12});
  for (const double slope : {-1e-6, -1.0, -16.0, -1e4}) {
    for (const bool limited : {false, true}) {
      CAPTURE(slope, limited);
      const auto a = tensor<TestType, 1>::full({2}, static_cast<TestType>(slope));
      const auto bias = tensor<TestType, 1>::full({2}, TestType(-4));
      ssm::step_limits limits;
      if (limited) limits = {1e-3, 0.1};
      ssm::tape<TestType> tape;
      tape.watch(dt);
      tape.watch(a);
      tape.watch(bias);
      const auto steps = ssm::discretize(pass<TestType>{.tape = &tape}, dt, a, bias, limits);
      CHECK(finite(steps.delta));
      CHECK(finite(steps.log_a));
      o.log_decay = steps.log_a;
      o.step = steps.delta;
      o.a.fill(static_cast<TestType>(slope));
      const auto compare = [&](std::string_view mixer, const auto& e) {
        CAPTURE(mixer);
        const auto expected = definition_of(e);
        for_each_algorithm(e, [&](const auto& product) {
          CHECK(ssm_test::relative_error(product_of(product), expected) <
                (sizeof(TestType) == 8 ? 1e-12 : 1e-5));
          const auto g = ssm::vjp(product, product.x);
          std::remove_cvref_t<decltype(g)>::operands(
              g, [&](std::string_view name, const auto& gradient, operand) {
                CAPTURE(name);
                CHECK(finite(gradient));
              });
        });
      };
      compare("mamba2", o.mamba2());
      compare("selective scan", o.selective_scan());
      tape.gradient(steps.delta).fill(TestType(1));
      tape.gradient(steps.log_a).fill(TestType(1));
      tape.backward();
      CHECK(finite(tape.gradient(dt)));
      CHECK(finite(tape.gradient(a)));
      CHECK(finite(tape.gradient(bias)));
    }
  }
}

}  // namespace
