#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/model/language_model.hpp>
#include <ssmlib/train/next_token.hpp>

#include <algorithm>
#include <string>
#include <vector>

using namespace ssm;
using ssm_test::largest_difference;
using ssm_test::random_ids;
using ssm_test::small_config;

namespace {

// One layer of each kind, a stack, and sliding windows that are shorter than the sequences.
model_config any_config() {
  struct choice {
    std::string pattern;
    index_t window;
  };
  const auto c = GENERATE(values<choice>({{"*", 0},
                                          {"M", 0},
                                          {"m", 0},
                                          {"D", 0},
                                          {"R", 0},
                                          {"L", 0},
                                          {"G", 0},
                                          {"P", 0},
                                          {"p", 0},
                                          {"-", 0},
                                          {"M-M*-", 0},
                                          {"*", 7},
                                          {"*", 1},
                                          {"P-*M", 20}}));
  auto config = small_config(c.pattern);
  config.attention.window = c.window;
  return config;
}

template <class T>
tensor<T, 3> in_pieces(const language_model<T>& m, model_state& state,
                       const tensor<std::int32_t, 2>& ids, const std::vector<index_t>& sizes) {
  tensor<T, 3> all(ids.extent(0), ids.extent(1), m.config().width);
  std::size_t i = 0;
  for (index_t begin = 0; begin < ids.extent(1);) {
    const index_t end = std::min(ids.extent(1), begin + sizes[i++ % sizes.size()]);
    all.slice(1, begin, end).copy_from(m.advance({}, state, ids.slice(1, begin, end).contiguous()));
    begin = end;
  }
  return all;
}

}  // namespace

TEST_CASE("model/language_model: pieces from a state equal one pass", "[model][language_model]") {
  const model_config config = any_config();
  CAPTURE(config.pattern, config.attention.window);
  const language_model<double> m(config, 1);
  const auto ids = random_ids(2, 70, 2);
  const auto whole = m.hidden({}, ids);
  auto state = m.initial_state(2);
  const auto pieces = in_pieces(m, state, ids, {1, 20, 16, 3, 17});
  CHECK(largest_difference(pieces, whole) < 1e-11);
  CHECK(state.position(0) == 70);
}

TEST_CASE("model/language_model: small steps have the same bits whatever the split and the batch",
          "[model][language_model]") {
  const model_config config = any_config();
  CAPTURE(config.pattern, config.attention.window);
  const language_model<float> m(config, 1);
  const auto ids = random_ids(3, 33, 3);
  auto by_one = m.initial_state(3), by_many = m.initial_state(3);
  const auto ones = in_pieces(m, by_one, ids, {1});
  const auto many = in_pieces(m, by_many, ids, {16, 2, 9});
  CHECK(largest_difference(ones, many) == 0.0);
  CHECK(by_one == by_many);
  auto alone = m.initial_state(1);
  const auto one = in_pieces(m, alone, ids.slice(0, 1, 2).contiguous(), {5});
  CHECK(largest_difference(one, ones.slice(0, 1, 2)) == 0.0);
}

TEST_CASE("model/language_model: rollback restores the state, per sequence, to the bit",
          "[model][language_model]") {
  const model_config config = any_config();
  CAPTURE(config.pattern, config.attention.window);
  const language_model<float> m(config, 1);
  const auto ids = random_ids(2, 40, 4);
  auto state = m.initial_state(2, 4);
  (void)m.advance({}, state, ids.slice(1, 0, 30).contiguous());
  const auto fork = state;
  (void)m.advance({}, state, ids.slice(1, 30, 34).contiguous());
  const index_t back[] = {4, 1};
  state.rollback(back);
  CHECK(state.position(0) == 30);
  CHECK(state.position(1) == 33);
  // The first sequence goes on from 30, the second from 33.
  const auto layout = sequence_layout::from_lengths({6, 3});
  tensor<std::int32_t, 2> fresh(1, 9);
  for (index_t i = 0; i < 6; ++i)
    fresh(0, i) = ids(0, 30 + i);
  for (index_t i = 0; i < 3; ++i)
    fresh(0, 6 + i) = ids(1, 33 + i);
  const auto after = m.advance({}, state, fresh, layout);
  auto again = fork;
  const auto straight = m.advance({}, again, ids.slice(1, 30, 36).contiguous());
  CHECK(largest_difference(after.slice(1, 0, 6), straight.slice(0, 0, 1)) == 0.0);
  CHECK(largest_difference(after.slice(1, 6, 9), straight.slice(0, 1, 2).slice(1, 3, 6)) == 0.0);
  CHECK(state == again);
}

TEST_CASE("model/language_model: more than max_rollback is refused and changes nothing",
          "[model][language_model][error]") {
  const language_model<float> m(small_config("M*"), 1);
  auto state = m.initial_state(1, 2);
  (void)m.advance({}, state, random_ids(1, 5, 5));
  const auto before = state;
  CHECK_THROWS_WITH(state.rollback(3), ssm_test::contains("rollback(3)"));
  CHECK(state == before);
  state.rollback(2);
  CHECK(state.position(0) == 3);
}

TEST_CASE("model/language_model: a packed batch equals its sequences, to the bit",
          "[model][language_model]") {
  const model_config config = any_config();
  CAPTURE(config.pattern, config.attention.window);
  const language_model<float> m(config, 1);
  const std::vector<index_t> lengths = {17, 0, 1, 70, 4};
  const auto layout = sequence_layout::from_lengths(lengths);
  const auto ids = random_ids(1, layout.tokens(), 6);
  const auto packed = m.hidden({}, ids, layout);
  for (index_t i = 0; i < layout.sequences(); ++i) {
    if (layout.length(i) == 0) continue;
    const auto alone = m.hidden({}, ids.slice(1, layout.begin(i), layout.end(i)).contiguous());
    CHECK(largest_difference(packed.slice(1, layout.begin(i), layout.end(i)), alone) == 0.0);
  }
}

TEST_CASE("model/language_model: gradients of every parameter equal finite differences",
          "[model][language_model][slow]") {
  const model_config config = any_config();
  const language_model<double> m(config, 1);
  const auto ids = random_ids(2, 21, 7);
  const token_batch batch{ids.slice(1, 0, 20).contiguous(), ids.slice(1, 1, 21).contiguous()};
  tape<double> t;
  const auto parameters = m.parameters();
  for (const auto& p : parameters)
    t.watch(p.value);
  const auto loss = next_token_loss(m, pass<double>{.tape = &t}, batch);
  t.gradient(loss.sum).fill(1);
  t.backward();
  const auto value = [&] { return next_token_loss(m, pass<double>{}, batch).sum(0); };
  for (const auto& p : parameters) {
    CAPTURE(config.pattern, config.attention.window, p.name);
    const auto gradient = t.gradient(p.value);
    const auto direction = normal<double, 1>(p.value.extents(), 1, 8);
    const auto original = p.value.clone();
    double inner = 0, square = 0;
    for (index_t i = 0; i < original.size(); ++i) {
      inner += gradient(i) * direction(i);
      square += gradient(i) * gradient(i);
    }
    const double step = 1e-5 / std::sqrt(static_cast<double>(original.size()));
    const auto moved = [&](double sign) {
      for (index_t i = 0; i < original.size(); ++i) {
        p.value(i) = original(i) + sign * step * direction(i);
      }
      return value();
    };
    const double difference = (moved(1) - moved(-1)) / (2 * step);
    p.value.copy_from(original);
    // Truncation and rounding of the difference are below 1e-7 of the gradient's norm.
    CHECK(std::abs(inner - difference) <
          1e-5 * std::max({std::abs(difference), std::sqrt(square), 1e-2}));
  }
}

TEST_CASE("model/language_model: checkpointing changes no bit of the gradient",
          "[model][language_model]") {
  language_model<float> m(small_config("M-*-"), 1);
  const auto ids = random_ids(2, 21, 7);
  const token_batch batch{ids.slice(1, 0, 20).contiguous(), ids.slice(1, 1, 21).contiguous()};
  std::vector<tensor<float, 1>> first;
  for (const bool on : {false, true}) {
    m.set_checkpointing(on);
    tape<float> t;
    for (const auto& p : m.parameters())
      t.watch(p.value);
    const auto loss = next_token_loss(m, pass<float>{.tape = &t}, batch);
    t.gradient(loss.sum).fill(1);
    t.backward();
    std::size_t i = 0;
    for (const auto& p : m.parameters()) {
      const auto g = t.gradient(p.value);
      if (!on) {
        first.push_back(g.clone());
      } else {
        CAPTURE(p.name);
        CHECK(detail::equal_elements(g, first[i++]));
      }
    }
  }
}

TEST_CASE("model/language_model: results do not depend on the number of threads",
          "[model][language_model][threads]") {
  const model_config config = any_config();
  CAPTURE(config.pattern, config.attention.window);
  const language_model<float> m(config, 1);
  const auto ids = random_ids(2, 65, 9);
  const cpu::context one(1), three(3);
  CHECK(largest_difference(m.hidden({.ctx = one}, ids), m.hidden({.ctx = three}, ids)) == 0.0);
}

TEST_CASE("model/language_model: decay parameters, norms and biases are never decayed",
          "[model][language_model]") {
  const language_model<float> m(small_config("M*-mDG"), 1);
  index_t decayed = 0;
  for (const auto& p : m.parameters()) {
    const bool special = p.name.find("A_log") != std::string::npos ||
                         p.name.find("dt_bias") != std::string::npos || p.name.ends_with(".D") ||
                         p.name.find("norm") != std::string::npos || p.name.ends_with("bias");
    CAPTURE(p.name);
    CHECK(p.decays() == !special);
    decayed += p.decays();
  }
  CHECK(decayed > 10);
}

TEST_CASE("model/language_model: a clone has its own parameters", "[model][language_model]") {
  const language_model<float> m(small_config("M-"), 1);
  const auto copy = m.clone();
  const auto ids = random_ids(1, 9, 1);
  CHECK(largest_difference(m.hidden({}, ids), copy.hidden({}, ids)) == 0.0);
  copy.parameters()[0].value.fill(0.25f);
  CHECK(largest_difference(m.hidden({}, ids), copy.hidden({}, ids)) > 0.0);
}

TEST_CASE("model/language_model: a bad pattern, id or layout is one sentence",
          "[model][language_model][error]") {
  CHECK_THROWS_WITH(language_model<float>(small_config("M-x"), 1),
                    ssm_test::contains("'x' at place 2"));
  CHECK_THROWS_WITH(language_model<float>(small_config(""), 1), ssm_test::contains("empty"));
  const language_model<float> m(small_config("M"), 1);
  auto ids = random_ids(1, 4, 1);
  CHECK_THROWS_AS((void)m.hidden({}, ids, sequence_layout::from_lengths({5})), shape_error);
  ids(0, 2) = 19;
  CHECK_THROWS_WITH((void)m.hidden({}, ids), ssm_test::contains("19"));
  auto state = m.initial_state(2);
  CHECK_THROWS_AS((void)m.advance({}, state, random_ids(3, 1, 1)), shape_error);
}

TEST_CASE("model/language_model: a state of another model is refused, and stays as it was",
          "[model][language_model][error]") {
  struct pair {
    std::string state, model, says;
  };
  const auto [from, to, says] = GENERATE(
      values<pair>({{"M-", "M-M-", "layer 2 of the state is no layer, of the model Mamba-2 ('M')"},
                    {"M-M-", "M-", "layer 2 of the state is Mamba-2 ('M'), of the model no layer"},
                    {"M-", "*-", "is Mamba-2 ('M'), of the model softmax attention ('*')"},
                    {"L", "R", "linear attention ('L'), of the model retention ('R')"}}));
  const language_model<float> own(small_config(from), 1), other(small_config(to), 1);
  auto state = own.initial_state(2);
  const auto before = state;
  const auto ids = random_ids(2, 3, 5);
  CHECK_THROWS_WITH(
      other.advance({}, state, ids),
      ssm_test::contains("of a model \"" + from + "\", this model is \"" + to + "\"") &&
          ssm_test::contains(says));
  CHECK_THROWS_AS(other.advance({}, state, ids), value_error);
  CHECK(state == before);
}

TEST_CASE("model/language_model: a state of other sizes is refused before any layer advances",
          "[model][language_model][error]") {
  const std::string kind = GENERATE(as<std::string>{}, "*", "M", "m", "D", "R", "L", "G", "P", "p");
  CAPTURE(kind);
  // The first layers agree.
  auto config = small_config("-M" + kind);
  const language_model<float> model(config, 1);
  if (kind != "M") {
    config.attention.kv_heads = 1;
    config.discrete_mamba2.state = 6;
    config.mamba1.state = 4;
    config.retention.value_dim = 6;
    config.linear_attention.kv_heads = 1;
    config.gated_delta_net.value_dim = 6;
    config.linear_attention.heads = 3;
  } else {
    config.mamba2.state = 6;
  }
  auto state = language_model<float>(config, 1).initial_state(1);
  const auto before = state;
  CHECK_THROWS_WITH(
      model.advance({}, state, random_ids(1, 3, 5)),
      ssm_test::contains(kind == "M" ? "layer 1 of the model" : "layer 2 of the model"));
  CHECK(state == before);
}

TEST_CASE("model/language_model: a state of another element type is refused",
          "[model][language_model][error]") {
  const language_model<float> narrow(small_config("*-"), 1);
  auto state = language_model<double>(small_config("*-"), 1).initial_state(1);
  CHECK_THROWS_WITH(narrow.advance({}, state, random_ids(1, 3, 5)),
                    ssm_test::contains("differ in element type"));
}

TEST_CASE("model/language_model: a state that was moved from is refused",
          "[model][language_model][error]") {
  const language_model<float> m(small_config("*M-"), 1);
  const auto ids = random_ids(1, 3, 5);
  auto state = m.initial_state(1);
  auto taken = std::move(state);
  CHECK_THROWS_WITH(m.advance({}, state, ids), ssm_test::contains("moved from"));
  CHECK_THROWS_AS(m.advance({}, state, tensor<std::int32_t, 2>(0, 3)), value_error);
  const auto layer = std::move(taken.layers()[1]);
  CHECK_THROWS_WITH(m.advance({}, taken, ids), ssm_test::contains("moved from"));
}

TEST_CASE("model/language_model: a clone goes on from a state of its original",
          "[model][language_model]") {
  const language_model<float> m(small_config("*M-"), 1);
  const auto ids = random_ids(2, 5, 5);
  auto one = m.initial_state(2), two = m.initial_state(2);
  (void)m.advance({}, one, ids);
  (void)m.clone().advance({}, two, ids);
  CHECK(one == two);
  // So does a model of the same config that shares nothing with it.
  const auto y = language_model<float>(small_config("*M-"), 1).advance({}, two, ids);
  CHECK(largest_difference(y, m.advance({}, one, ids)) == 0.0);
}
