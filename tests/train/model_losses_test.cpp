#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/train/model_losses.hpp>
#include <ssmlib/train/trainer.hpp>

#include <cmath>
#include <string>
#include <vector>

using namespace ssm;
using ssm_test::approx;
using ssm_test::random_ids;
using ssm_test::small_config;

namespace {

// Another class than language_model that models LanguageModel: its hidden states are doubled.
struct doubled_model {
  using value_type = double;
  using backend = cpu;
  using state_type = model_state;
  language_model<double> inner;

  tensor<double, 3> hidden(const pass<double>& p, const tensor<std::int32_t, 2>& ids,
                           const sequence_layout& layout) const {
    return eval(inner.hidden(p, ids, layout) * 2.0, p.tape, p.ctx);
  }
  tensor<double, 3> advance(const pass<double>& p, model_state& state,
                            const tensor<std::int32_t, 2>& ids,
                            const sequence_layout& layout) const {
    return eval(inner.advance(p, state, ids, layout) * 2.0, p.ctx);
  }
  model_state initial_state(index_t n, index_t max_rollback) const {
    return inner.initial_state(n, max_rollback);
  }
  const linear<double>& head() const { return inner.head(); }
  std::vector<parameter<double>> parameters() const { return inner.parameters(); }
};
static_assert(LanguageModel<doubled_model>);

token_batch batch_of(index_t b, index_t n, std::uint64_t seed) {
  const auto ids = random_ids(b, n + 1, seed);
  return {ids.slice(1, 0, n).contiguous(), ids.slice(1, 1, n + 1).contiguous(), {}};
}

// The derivative of loss() along a direction of all parameters of a model, by the tape and by
// differences.
template <class M, class F>
void check_gradient(const M& model, F loss) {
  tape<double> t;
  const auto parameters = model.parameters();
  for (const auto& p : parameters)
    t.watch(p.value);
  const auto l = loss(pass<double>{.tape = &t});
  t.gradient(l.sum).fill(1);
  t.backward();
  double inner = 0;
  std::vector<tensor<double, 1>> originals, directions;
  for (const auto& p : parameters) {
    originals.push_back(p.value.clone());
    directions.push_back(normal<double, 1>(p.value.extents(), 1, originals.size()));
    const auto g = t.gradient(p.value);
    for (index_t i = 0; i < g.size(); ++i)
      inner += g(i) * directions.back()(i);
  }
  const auto moved = [&](double step) {
    for (std::size_t k = 0; k < parameters.size(); ++k) {
      for (index_t i = 0; i < originals[k].size(); ++i)
        parameters[k].value(i) = originals[k](i) + step * directions[k](i);
    }
    return loss(pass<double>{}).sum(0);
  };
  const double step = 1e-6;
  const double difference = (moved(step) - moved(-step)) / (2 * step);
  (void)moved(0);
  CAPTURE(inner, difference);
  CHECK(std::abs(inner - difference) < 1e-5 * std::max(1.0, std::abs(difference)));
}

}  // namespace

TEST_CASE("train/model_losses: distillation_loss is the divergence of the models' logits",
          "[train][losses]") {
  const doubled_model teacher{language_model<double>(small_config("*-"), 1)};
  const language_model<double> student(small_config("M-"), 2);
  token_batch batch = batch_of(2, 9, 3);
  batch.targets(0, 4) = batch.targets(1, 8) = no_target;
  auto mask = tensor<std::int32_t, 2>::full({2, 9}, 1);
  mask(0, 4) = mask(1, 8) = 0;
  const pass<double> p;
  const auto expected = kl_divergence(p, student.head()(p, student.hidden(p, batch.inputs)),
                                      teacher.head()(p, teacher.hidden(p, batch.inputs, {})), mask,
                                      {.temperature = 2});
  const auto loss = distillation_loss(teacher, student, p, batch, {.temperature = 2});
  CHECK(loss.count == 16);
  CHECK(loss.sum(0) / 16 == approx(expected.loss(0)).epsilon(1e-12));
  const auto by_batch = distillation_loss(teacher, student, p, batch,
                                          {.temperature = 2, .divisor = kl_divisor::batch});
  CHECK(by_batch.count == 2);
  CHECK(by_batch.sum(0) == loss.sum(0));
  batch.targets = {};
  CHECK(distillation_loss(teacher, student, p, batch).count == 18);
}

TEST_CASE(
    "train/model_losses: distillation_loss's gradient is that of differences, the teacher "
    "has none",
    "[train][losses]") {
  const language_model<double> teacher(small_config("*-"), 1);
  const doubled_model student{language_model<double>(small_config("M-"), 2)};
  const token_batch batch = batch_of(2, 9, 3);
  check_gradient(student, [&](const pass<double>& p) {
    return distillation_loss(teacher, student, p, batch, {.temperature = 2});
  });
  tape<double> t;
  for (const auto& p : teacher.parameters())
    t.watch(p.value);
  const auto loss = distillation_loss(teacher, student, pass<double>{.tape = &t}, batch);
  CHECK_FALSE(t.wants(loss.sum));
}

TEST_CASE("train/model_losses: dpo_loss of models is that of their log probabilities",
          "[train][losses]") {
  const language_model<double> policy(small_config("M-"), 1);
  const doubled_model reference{language_model<double>(small_config("*-"), 2)};
  token_batch chosen = batch_of(3, 9, 3), rejected = batch_of(3, 7, 4);
  for (index_t i = 0; i < 3; ++i)
    chosen.targets(i, 0) = rejected.targets(i, 0) = no_target;  // the prompt
  const pass<double> p;
  const auto score = [&](const auto& m, const token_batch& b) {
    return sequence_log_probability(p, m.hidden(p, b.inputs, {}), m.head(), b.targets);
  };
  const auto expected = dpo_loss(p, score(policy, chosen), score(policy, rejected),
                                 score(reference, chosen), score(reference, rejected), 0.2);
  const auto loss = dpo_loss(policy, reference, p, chosen, rejected, 0.2);
  CHECK(loss.count == 3);
  CHECK(loss.sum(0) == approx(3 * expected.loss(0)).epsilon(1e-13));
  CHECK(loss.accuracy() == expected.accuracy());
  CHECK(loss.mean_margin() == expected.mean_margin());
  CHECK(std::abs(loss.mean_margin()) > 1e-3);
}

TEST_CASE("train/model_losses: dpo_loss's gradient for the policy is that of differences",
          "[train][losses]") {
  const doubled_model policy{language_model<double>(small_config("M-"), 1)};
  const language_model<double> reference(small_config("*-"), 2);
  const token_batch chosen = batch_of(3, 9, 3), rejected = batch_of(3, 7, 4);
  check_gradient(policy, [&](const pass<double>& p) -> loss_sum<double> {
    return dpo_loss(policy, reference, p, chosen, rejected, 0.2);
  });
}

TEST_CASE("train/model_losses: train() takes both, and lowers them", "[train][losses]") {
  auto config = small_config("M-");
  config.tie_embeddings = false;  // tied, all models repeat the last token before they are trained
  const language_model<float> reference(config, 1);
  const auto text = [] {
    std::vector<std::int32_t> ids(600);
    philox random(5);
    for (auto& id : ids)
      id = static_cast<std::int32_t>(random.below(19));
    return ids;
  }();
  const token_spans source{std::span<const std::int32_t>(text)};
  config.pattern = "*-";
  const language_model<float> teacher(config, 3);
  std::vector<double> losses;
  const training_callbacks note{.on_step = [&](const step_info& i) { losses.push_back(i.loss); }};
  const training_options options{
      .steps = 30, .tokens_per_step = 40, .learning_rate = 1e-2, .micro_batch = 2};
  {
    const auto student = reference.clone();
    data_loader loader(source, {.sequence_length = 10});
    adamw<float> optimizer(student.parameters());
    train(
        optimizer, loader,
        [&](const pass<float>& p, const token_batch& b) {
          return distillation_loss(teacher, student, p, b);
        },
        options, note);
    CHECK(losses.back() < 0.9 * losses.front());
  }
  losses.clear();
  const auto policy = reference.clone();
  data_loader loader(source, {.sequence_length = 10});
  adamw<float> optimizer(policy.parameters());
  train(
      optimizer, loader,
      [&](const pass<float>& p, const token_batch& b) {
        token_batch reversed = b;  // answers that repeat one token are worse
        reversed.targets = tensor<std::int32_t, 2>::full(b.targets.extents(), 7);
        return dpo_loss(policy, reference, p, b, reversed);
      },
      options, note);
  CHECK(losses.front() == approx(std::log(2.0)).epsilon(1e-5));
  CHECK(losses.back() < 0.9 * losses.front());
}

TEST_CASE("train/model_losses: a divisor or pairs that do not fit are one sentence",
          "[train][losses][error]") {
  const language_model<double> m(small_config("M"), 1);
  const token_batch two = batch_of(2, 5, 1), three = batch_of(3, 5, 2);
  CHECK_THROWS_WITH(distillation_loss(m, m, {}, two, {.divide_by = 4}),
                    ssm_test::contains("distillation_loss: divide_by is 4"));
  CHECK_THROWS_WITH(dpo_loss(m, m, {}, two, three),
                    ssm_test::contains("2 chosen answers and 3 rejected ones"));
  CHECK_THROWS_AS(dpo_loss(m, m, {}, two, two, 0.0), value_error);
}
