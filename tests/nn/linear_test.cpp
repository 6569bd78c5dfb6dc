#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/linear.hpp>

namespace {

using namespace ssm;
using ssm_test::flat;

TEST_CASE("nn/linear: every element is a dot product plus the bias", "[nn][linear]") {
  const auto layer = linear<double>::make(5, 7, {.bias = true, .seed = 3});
  const auto x = uniform<double, 3>({2, 3, 5}, -1, 1, 1);
  const auto y = layer(pass<double>{}, x);
  REQUIRE(y.extents() == shape<3>{2, 3, 7});
  for (index_t i = 0; i < 2; ++i) {
    for (index_t t = 0; t < 3; ++t) {
      for (index_t o = 0; o < 7; ++o) {
        double sum = layer.bias(o);
        for (index_t f = 0; f < 5; ++f)
          sum += layer.weight(o, f) * x(i, t, f);
        CHECK(std::abs(y(i, t, o) - sum) < 1e-14);
      }
    }
  }
}

TEST_CASE("nn/linear: gradients of a feature slice, weight and bias are those of differences",
          "[nn][linear]") {
  const bool with_bias = GENERATE(false, true);
  auto layer = linear<double>::make(5, 7, {.bias = with_bias, .seed = 3});
  const auto wide = uniform<double, 3>({2, 9, 11}, -1, 1, 1);
  std::vector<tensor<double, 1>> inputs{flat(wide), flat(layer.weight)};
  if (with_bias) inputs.push_back(flat(layer.bias));
  CHECK(ssm_test::gradient_error(inputs, [&](const pass<double>& p) {
          return std::vector{flat(layer(p, wide.slice(2, 3, 8)))};
        }) < 1e-7);
}

TEST_CASE("nn/linear: with fixed_order a token has the same bits among any number of tokens",
          "[nn][linear]") {
  const auto layer = linear<float>::make(67, 45, {.bias = true, .seed = 3});
  const auto x = uniform<float, 3>({1, 16, 67}, -1, 1, 1);
  const pass<float> p{.fixed_order = true};
  const auto together = layer(p, x);
  const index_t piece = GENERATE(1, 2, 3, 5, 8);
  for (index_t t = 0; t < 16; t += piece) {
    const index_t end = std::min<index_t>(16, t + piece);
    CHECK(ssm_test::same_bits(layer(p, x.slice(1, t, end)), together.slice(1, t, end)));
  }
}

TEST_CASE("nn/linear: fixed_order agrees with the fastest order within rounding", "[nn][linear]") {
  const auto layer = linear<float>::make(67, 45, {.bias = true, .seed = 3});
  const auto x = uniform<float, 3>({1, 16, 67}, -1, 1, 1);
  CHECK(ssm_test::relative_error(layer(pass<float>{.fixed_order = true}, x),
                                 layer(pass<float>{}, x)) < 1e-6);
}

TEST_CASE("nn/linear: outputs and gradients have the same bits with any number of threads",
          "[nn][linear][threads]") {
  const auto layer = linear<float>::make(96, 160, {.bias = true, .seed = 3});
  const auto x = uniform<float, 3>({2, 300, 96}, -1, 1, 1);
  std::vector<tensor<float, 1>> first;
  for (const int threads : {1, 2, 3}) {
    const cpu::context ctx(threads);
    tape<float> tape;
    tape.watch(x);
    tape.watch(layer.weight);
    tape.watch(layer.bias);
    const auto y = layer(pass<float>{ctx, &tape}, x);
    tape.gradient(y).copy_from(uniform<float, 3>(y.extents(), -1, 1, 2));
    tape.backward();
    std::vector all{flat(y), flat(tape.gradient(x)), flat(tape.gradient(layer.weight)),
                    flat(tape.gradient(layer.bias))};
    if (first.empty()) {
      for (const auto& t : all)
        first.push_back(t.clone());
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      CHECK(ssm_test::same_bits(all[i], first[i]));
  }
}

TEST_CASE("nn/linear: nothing is recorded without a wanted gradient", "[nn][linear]") {
  const auto layer = linear<float>::make(3, 4);
  tape<float> tape;
  (void)layer(pass<float>{.tape = &tape}, tensor<float, 3>::zeros(1, 2, 3));
  CHECK(tape.mark() == 0);
}

TEST_CASE("nn/linear: initial weights lie within 1 / sqrt(in), scaled", "[nn][linear]") {
  const auto layer = linear<double>::make(16, 500, {.bias = true, .seed = 1, .scale = 0.5});
  double largest = 0, largest_bias = 0;
  for (index_t i = 0; i < layer.weight.size(); ++i) {
    largest = std::max(largest, std::abs(layer.weight.data()[i]));
  }
  for (index_t i = 0; i < layer.bias.size(); ++i) {
    largest_bias = std::max(largest_bias, std::abs(layer.bias(i)));
  }
  CHECK((largest <= 0.125 && largest > 0.124));
  CHECK((largest_bias <= 0.25 && largest_bias > 0.24));
}

TEST_CASE("nn/linear: sizes that do not fit are refused by shape", "[nn][linear][error]") {
  const auto layer = linear<float>::make(3, 4);
  CHECK_THROWS_WITH(layer(pass<float>{}, tensor<float, 3>::zeros(1, 2, 5)),
                    ssm_test::contains("the input has 5 features, the weight is (4 x 3)"));
  CHECK_THROWS_WITH(op::linear(pass<float>{}, tensor<float, 3>::zeros(1, 2, 3), layer.weight,
                               tensor<float, 1>::zeros(3)),
                    ssm_test::contains("the bias is (3), wanted (4)"));
}

TEST_CASE("nn/linear: the parameters are named as in PyTorch, the absent bias is not listed",
          "[nn][linear]") {
  const auto plain = parameters_of<float>(linear<float>::make(3, 4), "proj");
  REQUIRE(plain.size() == 1);
  CHECK(plain[0].name == "proj.weight");
  CHECK(plain[0].decays());
  const auto biased = parameters_of<float>(linear<float>::make(3, 4, {.bias = true}));
  REQUIRE(biased.size() == 2);
  CHECK(biased[1].name == "bias");
  CHECK_FALSE(biased[1].decays());
}

}  // namespace
