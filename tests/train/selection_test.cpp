#include "bigram_model.hpp"
#include <ssmlib/train/selection.hpp>

#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::contains;

std::vector<parameter<float>> small_model() {
  std::vector<parameter<float>> all;
  const auto add = [&](const std::string& name, index_t n, parameter_kind kind) {
    all.push_back({name, tensor<float, 1>::zeros(n), {n}, kind});
  };
  add("embedding.weight", 100, parameter_kind::matrix);
  for (const char* layer : {"0", "1", "2", "5"}) {
    const std::string prefix = "layers." + std::string(layer) + ".";
    add(prefix + "mixer.in_proj.weight", 24, parameter_kind::matrix);
    add(prefix + "mixer.A_log", 3, parameter_kind::decay);
    add(prefix + "mlp.weight", 40, parameter_kind::matrix);
  }
  return all;
}

}  // namespace

TEST_CASE("train/selection: a star stands for any characters", "[train][selection]") {
  CHECK(matches("*", ""));
  CHECK(matches("layers.*.mixer.*", "layers.12.mixer.in_proj.weight"));
  CHECK(matches("*A_log", "layers.1.mixer.A_log"));
  CHECK(matches("a*b*c", "a.b.b.xc"));
  CHECK_FALSE(matches("a*b*c", "a.b.b.x"));
  CHECK_FALSE(matches("layers.*.mixer", "layers.1.mixer.A_log"));
  CHECK_FALSE(matches("", "a"));
}

TEST_CASE("train/selection: every parameter trains or is frozen, in order", "[train][selection]") {
  const auto all = small_model();
  const auto s = select_parameters(all, any_of_patterns{{"*.mixer.*", "embedding.*"}});
  REQUIRE(s.trained.size() == 9);
  REQUIRE(s.frozen.size() == 4);
  CHECK(s.trained[0].name == "embedding.weight");
  CHECK(s.trained[8].name == "layers.5.mixer.A_log");
  CHECK(s.frozen[3].name == "layers.5.mlp.weight");
}

TEST_CASE("train/selection: the table counts what trains and what is frozen",
          "[train][selection]") {
  const auto s = select_parameters(small_model(), any_of_patterns{{"*.mixer.*"}});
  CHECK(to_string(s) ==
        "parameter                            tensors  values  decay\n"
        "trains\n"
        "  layers.0-2,5.mixer.in_proj.weight        4      96    yes\n"
        "  layers.0-2,5.mixer.A_log                 4      12     no\n"
        "frozen\n"
        "  embedding.weight                         1     100      -\n"
        "  layers.0-2,5.mlp.weight                  4     160      -\n"
        "108 of 368 values train (29.3 %)\n");
}

TEST_CASE("train/selection: a selection of nothing is refused", "[train][selection][error]") {
  CHECK_THROWS_WITH(select_parameters(small_model(), any_of_patterns{{"mixer"}}),
                    contains("0 of 13 parameters are selected, the first is 'embedding.weight'"));
}

TEST_CASE("train/selection: training leaves frozen parameters alone and without gradients",
          "[train][selection]") {
  const ssm_test::bigram_model<double> model(8);
  const auto s = select_parameters(parameters_of<double>(model), any_of_patterns{{"bias"}});
  tape<double> t;
  t.watch(model.table);
  s.watch(t);
  CHECK_FALSE(t.wants(model.table));
  CHECK(t.wants(model.bias));

  const auto table = model.table.clone();
  const auto bias = model.bias.clone();
  const auto tokens = ssm_test::chain_tokens(100, 8, 1);
  data_loader loader(ssm_test::one_shard(tokens), {.sequence_length = 8});
  adamw<double> optimizer(s.trained);
  train(optimizer, loader,
        [&](const pass<double>& p, const token_batch& b) { return model.loss(p, b); },
        {.steps = 3, .tokens_per_step = 16, .learning_rate = 0.1});
  CHECK(ssm_test::same_bits(table, model.table));
  CHECK_FALSE(ssm_test::same_bits(bias, model.bias));
}
