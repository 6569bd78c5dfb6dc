#include "support/catch.hpp"
#include "support/gradient_check.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

// Working copies of bf16 models' parameters: made once, and never older than the parameters.

namespace {

using namespace ssm;
using ssm::detail::on_host;

using model_type = language_model<bf16, cuda>;

model_config config() {
  model_config c{.vocabulary = 61, .width = 48, .pattern = "M*-"};
  c.attention.heads = 4;
  c.mamba2.heads = 4;
  c.mamba2.head_dim = 24;
  c.mamba2.state = 16;
  return c;
}

tensor<std::int32_t, 2> some_ids(index_t b, index_t t, std::uint64_t seed) {
  tensor<std::int32_t, 2> ids(b, t);
  philox random(seed);
  for (index_t i = 0; i < ids.size(); ++i)
    ids.data()[i] = static_cast<std::int32_t>(random.below(61));
  return ids;
}

/// A model with its tape, optimiser and, perhaps, working copies.
struct run {
  explicit run(bool with_copies) : copies(with_copies ? &weights : nullptr) {
    for (const auto& p : parameters)
      t.watch(p.value);
  }
  double gradients() {
    t.zero_gradients();
    const pass<bf16, cuda> p{.tape = &t, .weights = copies};
    const auto loss = lm_cross_entropy(p, model.hidden(p, ids), model.head(), targets);
    t.gradient(loss.loss).fill(1.0f);
    t.backward();
    return loss.sum();
  }
  void update() { optimizer.step(t, 1e-2, 1.0, default_context<cuda>(), copies); }

  model_type model{config(), 1};
  tensor<std::int32_t, 2> ids = some_ids(3, 33, 1), targets = some_ids(3, 33, 2);
  std::vector<parameter<bf16, cuda>> parameters = model.parameters();
  tape<bf16, cuda> t;
  adamw<bf16, cuda> optimizer{parameters};
  weight_cache<bf16, cuda> weights;
  weight_cache<bf16, cuda>* copies;
};

bool same_gradients(run& a, run& b) {
  bool same = true;
  for (std::size_t i = 0; i < a.parameters.size(); ++i) {
    same = same && ssm_test::same_bits(on_host(a.t.gradient(a.parameters[i].value)),
                                       on_host(b.t.gradient(b.parameters[i].value)));
  }
  return same;
}

}  // namespace

TEST_CASE("cuda/weights: a copy is the parameter rounded, made once", "[cuda][weights]") {
  const auto& ctx = default_context<cuda>();
  const auto host = uniform<float, 2>({6, 40}, -1, 1, 3);
  const auto parameter = ssm::detail::on_backend<cuda>(host);
  weight_cache<bf16, cuda> weights;
  const auto copy = weights.get(ctx, parameter);
  CHECK(ssm_test::same_bits(on_host(copy), cast<bf16>(host)));
  CHECK(weights.get(ctx, parameter).data() == copy.data());
  CHECK(weights.bytes() == 6 * 40 * 2);
  const auto part = weights.get(ctx, parameter.slice(1, 8, 24));
  CHECK(ssm_test::same_bits(on_host(part), cast<bf16>(host.slice(1, 8, 24))));
  CHECK(weights.size() == 2);
  weights.clear();
  CHECK(weights.size() == 0);
  CHECK(ssm_test::same_bits(on_host(copy), cast<bf16>(host)));  // who has one keeps it
}

TEST_CASE("cuda/weights: float parameters have no copies", "[cuda][weights]") {
  weight_cache<float, cuda> weights;
  const auto parameter = tensor<float, 2, cuda>::full({4, 4}, 1);
  CHECK(weights.get(default_context<cuda>(), parameter).data() == parameter.data());
  CHECK(weights.size() == 0);
}

TEST_CASE("cuda/weights: a new parameter at the address of an old one has its own copy",
          "[cuda][weights]") {
  weight_cache<bf16, cuda> weights;
  for (int i = 0; i < 4; ++i) {
    const auto parameter = tensor<float, 2, cuda>::full({64, 64}, static_cast<float>(i));
    const auto copy = cast<float>(on_host(weights.get(default_context<cuda>(), parameter)));
    CHECK(copy(63, 63) == static_cast<float>(i));
  }
  CHECK(weights.size() == 4);
}

TEST_CASE("cuda/weights: copies change no bit of losses and gradients, and AdamW keeps them new",
          "[cuda][weights]") {
  run with(true), without(false);
  index_t copies = 0;
  for (int step = 0; step < 4; ++step) {
    CAPTURE(step);
    CHECK(with.gradients() == without.gradients());
    CHECK(same_gradients(with, without));
    if (step == 0) copies = with.weights.size();
    CHECK(copies > 0);
    CHECK(with.weights.size() == copies);  // none is made again
    with.update();
    without.update();
  }
}

TEST_CASE("cuda/weights: what AdamW does not hold as one dense parameter is converted again",
          "[cuda][weights]") {
  run with(true);
  const auto& ctx = default_context<cuda>();
  const auto& value = with.parameters[0].value;
  const auto table = value.reshape(61, 48);
  (void)with.gradients();
  const auto before = cast<float>(on_host(with.weights.get(ctx, table.slice(1, 0, 8))));
  with.update();
  const auto after = cast<float>(on_host(with.weights.get(ctx, table.slice(1, 0, 8))));
  CHECK_FALSE(ssm_test::same_bits(before, after));
  CHECK(ssm_test::same_bits(after, cast<float>(cast<bf16>(on_host(table).slice(1, 0, 8)))));
}

TEST_CASE("cuda/weights: train() reads parameters that a callback has changed", "[cuda][weights]") {
  // Once by train(), once step by step without copies: the callback's change shows in both.
  const std::vector<std::int32_t> tokens = [] {
    const auto ids = some_ids(1, 600, 5);
    return std::vector<std::int32_t>(ids.data(), ids.data() + ids.size());
  }();
  const token_spans<std::int32_t> spans{std::span<const std::int32_t>(tokens)};
  const training_options options{
      .steps = 5, .tokens_per_step = 4 * 17, .learning_rate = 1e-2, .micro_batch = 2};
  const auto change = [](const run& r, index_t step) {
    if (step == 2) r.parameters[0].value.fill(0.25f);
    if (step == 3) r.parameters.back().value.copy_from(r.parameters.back().value.clone());
  };
  std::vector<double> losses;
  run trained(false);
  data_loader<token_spans<std::int32_t>> loader{spans, {.sequence_length = 17, .seed = 2}};
  train(trained.optimizer, loader,
        [&](const pass<bf16, cuda>& p, const token_batch& b) {
          CHECK(p.weights != nullptr);
          return next_token_loss(trained.model, p, b);
        },
        options, {.on_step = [&](const step_info& i) {
          losses.push_back(i.loss);
          change(trained, i.step);
        }});

  run plain(false);
  data_loader<token_spans<std::int32_t>> again{spans, {.sequence_length = 17, .seed = 2}};
  for (index_t step = 0; step < options.steps; ++step) {
    gradient_accumulator<bf16, cuda> sum(plain.t);
    const pass<bf16, cuda> p{.tape = &plain.t};
    for (int half = 0; half < 2; ++half)
      sum.add(next_token_loss(plain.model, p, again.next(2)));
    const double norm = gradient_norm(plain.t, plain.parameters, sum.scale());
    CHECK(sum.mean_loss() == losses[static_cast<std::size_t>(step)]);
    plain.optimizer.step(plain.t, options.learning_rate,
                         sum.scale() * clip_factor(norm, options.clip));
    change(plain, step);
  }
  for (std::size_t i = 0; i < plain.parameters.size(); ++i) {
    CHECK(ssm_test::same_bits(on_host(plain.parameters[i].value),
                              on_host(trained.parameters[i].value)));
  }
}
