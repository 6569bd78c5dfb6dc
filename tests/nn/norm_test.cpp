#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/norm.hpp>

namespace {

using namespace ssm;
using ssm_test::flat;

double silu(double x) {
  return x / (1 + std::exp(-x));
}

/// The definition, in double.
tensor<double, 3> norm_by_definition(gate_order order, const tensor<double, 3>& x,
                                     const tensor<double, 3>& gate, const tensor<double, 1>& weight,
                                     double eps, index_t group) {
  tensor<double, 3> y(x.extents());
  for (index_t i = 0; i < x.extent(0); ++i) {
    for (index_t t = 0; t < x.extent(1); ++t) {
      for (index_t c = 0; c < x.extent(2); ++c) {
        const auto input = [&](index_t f) {
          return order == gate_order::gate_first ? x(i, t, f) * silu(gate(i, t, f)) : x(i, t, f);
        };
        double squares = 0;
        for (index_t f = c / group * group; f < (c / group + 1) * group; ++f) {
          squares += input(f) * input(f) / static_cast<double>(group);
        }
        y(i, t, c) = input(c) / std::sqrt(squares + eps) * weight(c % weight.size());
        if (order == gate_order::norm_first) y(i, t, c) *= silu(gate(i, t, c));
      }
    }
  }
  return y;
}

TEST_CASE("nn/norm: RMSNorm, plain, gated and grouped, is its definition", "[nn][norm]") {
  const auto order = GENERATE(gate_order::none, gate_order::norm_first, gate_order::gate_first);
  const index_t group = GENERATE(30, 10, 3, 1);
  const bool shared = GENERATE(false, true);
  CAPTURE(static_cast<int>(order), group, shared);
  const auto x = uniform<double, 3>({2, 3, 30}, -2, 2, 1);
  const auto gate = uniform<double, 3>({2, 3, 30}, -3, 3, 2);
  const auto weight = uniform<double, 1>({shared ? group : 30}, 0.5, 1.5, 3);
  const norm_options options{.eps = 1e-3, .group = group};
  const auto y = order == gate_order::none
                     ? op::rms_norm(pass<double>{}, x, weight, options)
                     : op::gated_rms_norm(pass<double>{}, x, gate, weight, order, options);
  const auto expected = norm_by_definition(order, x, gate, weight, 1e-3, group);
  CHECK(ssm_test::relative_error(y, expected) < 1e-14);
  const auto y32 = order == gate_order::none
                       ? op::rms_norm(pass<float>{}, cast<float>(x), cast<float>(weight), options)
                       : op::gated_rms_norm(pass<float>{}, cast<float>(x), cast<float>(gate),
                                            cast<float>(weight), order, options);
  CHECK(ssm_test::relative_error(y32, expected) < 1e-6);
}

TEST_CASE("nn/norm: RMSNorm's gradients are those of differences", "[nn][norm]") {
  const auto order = GENERATE(gate_order::none, gate_order::norm_first, gate_order::gate_first);
  const index_t group = GENERATE(30, 10, 3);
  const bool shared = GENERATE(false, true);
  CAPTURE(static_cast<int>(order), group, shared);
  // x and the gate are slices of one projection, as in Mamba-2.
  const auto wide = uniform<double, 3>({2, 5, 63}, -2, 2, 1);
  const auto weight = uniform<double, 1>({shared ? group : 30}, 0.5, 1.5, 3);
  const norm_options options{.eps = 1e-3, .group = group};
  CHECK(ssm_test::gradient_error({flat(wide), flat(weight)}, [&](const pass<double>& p) {
          const auto x = wide.slice(2, 1, 31), gate = wide.slice(2, 33, 63);
          return std::vector{flat(order == gate_order::none
                                      ? op::rms_norm(p, x, weight, options)
                                      : op::gated_rms_norm(p, x, gate, weight, order, options))};
        }) < 1e-7);
}

TEST_CASE("nn/norm: LayerNorm is its definition", "[nn][norm]") {
  const index_t width = GENERATE(1, 7, 8, 30, 64);
  CAPTURE(width);
  const auto x = uniform<double, 3>({1, 4, width}, 1, 3, 1);
  const auto weight = uniform<double, 1>({width}, 0.5, 1.5, 3),
             bias = uniform<double, 1>({width}, -1, 1, 4);
  tensor<double, 3> expected(x.extents());
  for (index_t t = 0; t < 4; ++t) {
    double mean = 0, variance = 0;
    for (index_t c = 0; c < width; ++c)
      mean += x(0, t, c) / static_cast<double>(width);
    for (index_t c = 0; c < width; ++c) {
      variance += (x(0, t, c) - mean) * (x(0, t, c) - mean) / static_cast<double>(width);
    }
    for (index_t c = 0; c < width; ++c) {
      expected(0, t, c) = (x(0, t, c) - mean) / std::sqrt(variance + 1e-5) * weight(c) + bias(c);
    }
  }
  CHECK(ssm_test::relative_error(op::layer_norm(pass<double>{}, x, weight, bias), expected) <
        1e-13);
  // The mean is about 4 deviations: its rounding is that many times larger in the result.
  CHECK(ssm_test::relative_error(
            op::layer_norm(pass<float>{}, cast<float>(x), cast<float>(weight), cast<float>(bias)),
            expected) < 2e-6);
}

TEST_CASE("nn/norm: LayerNorm's gradients are those of differences", "[nn][norm]") {
  const bool with_bias = GENERATE(false, true);
  const index_t width = GENERATE(30, 8);
  const auto wide = uniform<double, 3>({2, 5, 41}, -2, 2, 1);
  const auto weight = uniform<double, 1>({width}, 0.5, 1.5, 3);
  const auto bias = with_bias ? uniform<double, 1>({width}, -1, 1, 4) : tensor<double, 1>{};
  std::vector<tensor<double, 1>> inputs{flat(wide), flat(weight)};
  if (with_bias) inputs.push_back(bias);
  CHECK(ssm_test::gradient_error(inputs, [&](const pass<double>& p) {
          return std::vector{flat(op::layer_norm(p, wide.slice(2, 5, 5 + width), weight, bias))};
        }) < 1e-7);
}

TEST_CASE("nn/norm: a token has the same bits among any tokens", "[nn][norm]") {
  const auto x = uniform<float, 3>({1, 9, 75}, -2, 2, 1),
             gate = uniform<float, 3>({1, 9, 75}, -2, 2, 2);
  const auto norm = gated_rms_norm<float>::make(75, gate_order::gate_first, {.group = 25});
  const auto layer = layer_norm<float>::make(75);
  const auto gated = norm(pass<float>{}, x, gate), centered = layer(pass<float>{}, x);
  for (index_t t = 0; t < 9; ++t) {
    const auto xt = x.slice(1, t, t + 1), zt = gate.slice(1, t, t + 1);
    CHECK(ssm_test::same_bits(norm(pass<float>{}, xt, zt), gated.slice(1, t, t + 1)));
    CHECK(ssm_test::same_bits(layer(pass<float>{}, xt), centered.slice(1, t, t + 1)));
  }
}

TEST_CASE("nn/norm: outputs and gradients have the same bits with any number of threads",
          "[nn][norm][threads]") {
  const auto x = uniform<float, 3>({2, 400, 96}, -2, 2, 1),
             gate = uniform<float, 3>({2, 400, 96}, -2, 2, 2);
  const auto norm = gated_rms_norm<float>::make(96, gate_order::norm_first, {.group = 32});
  const auto layer = layer_norm<float>::make(96);
  std::vector<tensor<float, 1>> first;
  for (const int threads : {1, 2, 3}) {
    const cpu::context ctx(threads);
    tape<float> tape;
    for (const auto& t : {x, gate})
      tape.watch(t);
    for (const auto& t : {norm.weight, layer.weight, layer.bias})
      tape.watch(t);
    const pass<float> p{ctx, &tape};
    const auto y = layer(p, norm(p, x, gate));
    tape.gradient(y).copy_from(uniform<float, 3>(y.extents(), -1, 1, 3));
    tape.backward();
    std::vector<tensor<float, 1>> all{flat(y), flat(tape.gradient(x)), flat(tape.gradient(gate))};
    for (const auto& t : {norm.weight, layer.weight, layer.bias})
      all.push_back(tape.gradient(t));
    if (first.empty()) {
      for (const auto& t : all)
        first.push_back(t.clone());
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      CHECK(ssm_test::same_bits(all[i], first[i]));
  }
}

TEST_CASE("nn/norm: sizes that do not fit are refused by shape", "[nn][norm][error]") {
  const auto x = tensor<float, 3>::zeros(1, 2, 6);
  const auto weight = tensor<float, 1>::zeros(6);
  CHECK_THROWS_WITH(op::rms_norm(pass<float>{}, x, weight, {.group = 4}),
                    ssm_test::contains("groups of 4 features do not divide 6 features"));
  CHECK_THROWS_WITH(op::rms_norm(pass<float>{}, x, tensor<float, 1>::zeros(5)),
                    ssm_test::contains("the weight is (5), wanted (6)"));
  CHECK_THROWS_WITH(op::gated_rms_norm(pass<float>{}, x, tensor<float, 3>::zeros(1, 3, 6), weight,
                                       gate_order::gate_first),
                    ssm_test::contains("x is (1 x 2 x 6), the gate is (1 x 3 x 6)"));
  CHECK_THROWS_AS(op::gated_rms_norm(pass<float>{}, x, x, weight, gate_order::none), value_error);
  CHECK_THROWS_WITH(op::layer_norm(pass<float>{}, x, weight, tensor<float, 1>::zeros(2)),
                    ssm_test::contains("the bias is (2), wanted (6)"));
}

}  // namespace
