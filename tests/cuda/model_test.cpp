#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <cmath>
#include <string>
#include <vector>

namespace {

using namespace ssm;

// Small sizes that no vector width divides where the models allow it.
model_config config_of(const std::string& pattern) {
  model_config c{.vocabulary = 61, .width = 48, .pattern = pattern};
  c.attention.heads = 4;
  c.attention.kv_heads = 2;
  c.attention.rope = rope_options{};
  c.mamba2.heads = 4;
  c.mamba2.head_dim = 24;
  c.mamba2.state = 16;
  c.mamba2.groups = 2;
  c.mamba1.state = 8;
  c.discrete_mamba2.heads = 4;
  c.discrete_mamba2.head_dim = 12;
  c.discrete_mamba2.state = 16;
  c.retention.heads = 3;
  c.retention.head_dim = 16;
  c.retention.value_dim = 32;
  c.linear_attention.heads = 4;
  c.gated_delta_net.heads = 3;
  c.gated_delta_net.qk_heads = 3;
  return c;
}

tensor<std::int32_t, 2> tokens(index_t b, index_t t) {
  tensor<std::int32_t, 2> ids(b, t);
  philox random(11);
  for (index_t i = 0; i < ids.size(); ++i)
    ids.data()[i] = static_cast<std::int32_t>(random.below(61));
  return ids;
}

struct outcome {
  tensor<double, 3> hidden;
  std::vector<tensor<double, 1>> gradients;
  std::vector<std::string> names;
};

template <class T, int R, class B>
tensor<double, R> exact(const tensor<T, R, B>& t) {
  return cast<double>(ssm::detail::on_host(t));
}

// The hidden states and every parameter's gradient of sum(dy * hidden).
template <class T, class B>
outcome run(const model_config& c, const tensor<std::int32_t, 2>& ids,
            const sequence_layout& layout) {
  const language_model<T, B> model(c, 5);
  tape<T, B> t;
  const auto parameters = model.parameters();
  for (const auto& p : parameters)
    t.watch(p.value);
  const pass<T, B> p{.tape = &t};
  const auto hidden = model.hidden(p, ids, layout);
  const auto dy = normal<float, 3>(hidden.extents(), 1.0, 9);
  if constexpr (std::same_as<T, double>) {
    t.gradient(hidden).copy_from(ssm::detail::on_backend<B>(cast<double>(dy)));
  } else if constexpr (std::same_as<T, float>) {
    t.gradient(hidden).copy_from(ssm::detail::on_backend<B>(dy));
  } else {
    t.gradient(hidden).copy_from(ssm::detail::on_backend<B>(cast<bf16>(dy)));
  }
  t.backward();
  outcome r{exact(hidden), {}, {}};
  for (const auto& parameter : parameters) {
    r.gradients.push_back(exact(t.gradient(parameter.value)));
    r.names.push_back(parameter.name);
  }
  return r;
}

template <int R>
double distance(const tensor<double, R>& a, const tensor<double, R>& wanted) {
  double difference = 0, size = 0;
  a.zip_with(wanted, [&](const double& x, const double& y) {
    difference += (x - y) * (x - y);
    size += y * y;
  });
  return std::sqrt(difference / std::max(size, 1e-300));
}

template <class T>
void compare(const std::string& pattern, double bound, double gradient_bound) {
  const model_config c = config_of(pattern);
  INFO("pattern " << pattern);
  for (const bool packed : {false, true}) {
    const auto ids = packed ? tokens(1, 97) : tokens(2, 41);
    const auto layout =
        packed ? sequence_layout::from_lengths({5, 70, 0, 1, 21}) : sequence_layout{};
    const outcome here = run<T, cuda>(c, ids, layout), wanted = run<double, cpu>(c, ids, layout);
    INFO((packed ? "packed" : "rectangular"));
    CHECK(distance(here.hidden, wanted.hidden) < bound);
    REQUIRE(here.names == wanted.names);
    for (std::size_t i = 0; i < here.names.size(); ++i) {
      INFO("gradient of " << here.names[i]);
      CHECK(distance(here.gradients[i], wanted.gradients[i]) < gradient_bound);
    }
  }
}

}  // namespace

// Bounds: f32 rounds about 30 times on the way through a layer and the sums are of 80 tokens; a
// gradient that cancels (A_log, dt_bias) loses a digit. bf16 rounds each activation to 2^-9, which
// a norm and a gate pass on: 2 % after two layers, twice that for gradients.
TEST_CASE("cuda/model: every kind of layer equals the CPU in double, in float", "[cuda][model]") {
  for (const char letter : std::string("*MmDRLGPp-")) {
    compare<float>(std::string(1, letter), 1e-5, 1e-4);
  }
}

TEST_CASE("cuda/model: every kind of layer equals the CPU in double, in bf16", "[cuda][model]") {
  for (const char letter : std::string("*MmDRLGPp-")) {
    compare<bf16>(std::string(1, letter), 2e-2, 6e-2);
  }
}

TEST_CASE("cuda/model: a hybrid equals the CPU in double", "[cuda][model]") {
  compare<float>("M-M*-", 1e-5, 1e-4);
  compare<double>("M-M*-", 1e-12, 1e-11);
}

TEST_CASE("cuda/model: repeats give the same bits", "[cuda][model]") {
  const model_config c = config_of("M*-");
  const auto ids = tokens(2, 130);
  const outcome first = run<bf16, cuda>(c, ids, {}), second = run<bf16, cuda>(c, ids, {});
  CHECK(distance(first.hidden, second.hidden) == 0);
  for (std::size_t i = 0; i < first.gradients.size(); ++i) {
    INFO("gradient of " << first.names[i]);
    CHECK(distance(first.gradients[i], second.gradients[i]) == 0);
  }
}
