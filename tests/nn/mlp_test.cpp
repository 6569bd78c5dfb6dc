#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/mlp.hpp>

namespace {

using namespace ssm;
using ssm_test::flat;

TEST_CASE("nn/mlp: swiglu of two slices is silu(gate) * up", "[nn][mlp]") {
  const auto both = uniform<double, 3>({2, 3, 26}, -4, 4, 1);
  const auto y = op::swiglu(pass<double>{}, both.slice(2, 0, 13), both.slice(2, 13, 26));
  for (index_t i = 0; i < 2; ++i) {
    for (index_t t = 0; t < 3; ++t) {
      for (index_t f = 0; f < 13; ++f) {
        const double g = both(i, t, f);
        CHECK(std::abs(y(i, t, f) - g / (1 + std::exp(-g)) * both(i, t, 13 + f)) < 1e-14);
      }
    }
  }
}

TEST_CASE("nn/mlp: gelu_tanh is its definition", "[nn][mlp]") {
  const auto x = uniform<double, 3>({1, 3, 29}, -5, 5, 1);
  const auto y = op::gelu_tanh(pass<double>{}, x);
  const double c = std::sqrt(2 / std::numbers::pi);
  for (index_t t = 0; t < 3; ++t) {
    for (index_t f = 0; f < 29; ++f) {
      const double v = x(0, t, f);
      CHECK(std::abs(y(0, t, f) - 0.5 * v * (1 + std::tanh(c * (v + 0.044715 * v * v * v)))) <
            1e-14);
    }
  }
}

TEST_CASE("nn/mlp: gradients of a SwiGLU MLP are those of differences", "[nn][mlp]") {
  const auto layer = swiglu_mlp<double>::make(5, 11, {.bias = true, .seed = 2});
  const auto x = uniform<double, 3>({2, 4, 5}, -3, 3, 1);
  std::vector<tensor<double, 1>> inputs{flat(x)};
  for (const auto& q : parameters_of<double>(layer))
    inputs.push_back(q.value);
  REQUIRE(inputs.size() == 7);
  CHECK(ssm_test::gradient_error(
            inputs, [&](const pass<double>& p) { return std::vector{flat(layer(p, x))}; }) < 1e-7);
}

TEST_CASE("nn/mlp: gradients of a GELU MLP are those of differences", "[nn][mlp]") {
  const auto layer = gelu_mlp<double>::make(5, 11, {.bias = true, .seed = 2});
  const auto x = uniform<double, 3>({2, 4, 5}, -3, 3, 1);
  std::vector<tensor<double, 1>> inputs{flat(x)};
  for (const auto& q : parameters_of<double>(layer))
    inputs.push_back(q.value);
  REQUIRE(inputs.size() == 5);
  CHECK(ssm_test::gradient_error(
            inputs, [&](const pass<double>& p) { return std::vector{flat(layer(p, x))}; }) < 1e-7);
}

TEST_CASE("nn/mlp: gradients of slices of one projection are those of differences", "[nn][mlp]") {
  const auto both = uniform<double, 3>({2, 3, 26}, -4, 4, 1);
  CHECK(ssm_test::gradient_error({flat(both)}, [&](const pass<double>& p) {
          return std::vector{flat(op::swiglu(p, both.slice(2, 0, 13), both.slice(2, 13, 26))),
                             flat(op::gelu_tanh(p, both.slice(2, 4, 15)))};
        }) < 1e-7);
}

TEST_CASE("nn/mlp: activations and slopes are right at the extremes", "[nn][mlp]") {
  const bool gelu = GENERATE(false, true);
  const float inputs[] = {-1e30f, -200.0f, 200.0f, 1e30f};
  const float values[] = {0.0f, 0.0f, 200.0f, 1e30f}, slopes[] = {0.0f, 0.0f, 1.0f, 1.0f};
  tensor<float, 3> x(1, 1, 4);
  std::copy_n(inputs, 4, x.data());
  const auto ones = tensor<float, 3>::full({1, 1, 4}, 1.0f);
  tape<float> tape;
  tape.watch(x);
  const pass<float> p{.tape = &tape};
  const auto y = gelu ? op::gelu_tanh(p, x) : op::swiglu(p, x, ones);
  tape.gradient(y).fill(1.0f);
  tape.backward();
  for (index_t i = 0; i < 4; ++i) {
    CHECK(std::abs(y(0, 0, i) - values[i]) <= 1e-6f * values[i]);
    CHECK(std::abs(tape.gradient(x)(0, 0, i) - slopes[i]) < 1e-6f);
  }
}

TEST_CASE("nn/mlp: parameters have the names of Llama and Phi checkpoints", "[nn][mlp]") {
  std::string names;
  for (const auto& q : parameters_of<float>(swiglu_mlp<float>::make(2, 3), "mlp")) {
    names += q.name + " ";
  }
  for (const auto& q : parameters_of<float>(gelu_mlp<float>::make(2, 3, {.bias = true}))) {
    names += q.name + " ";
  }
  CHECK(names ==
        "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight "
        "fc1.weight fc1.bias fc2.weight fc2.bias ");
}

TEST_CASE("nn/mlp: the output scale shrinks the output projection only", "[nn][mlp]") {
  const auto plain = swiglu_mlp<double>::make(4, 6, {.seed = 1});
  const auto scaled = swiglu_mlp<double>::make(4, 6, {.seed = 1, .output_scale = 0.25});
  CHECK(ssm_test::same_bits(plain.up_proj.weight, scaled.up_proj.weight));
  CHECK(scaled.down_proj.weight(1, 2) == 0.25 * plain.down_proj.weight(1, 2));
}

}  // namespace
