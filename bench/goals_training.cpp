#include "../examples/distill/settings.hpp"
#include "goals.hpp"
#include "products.hpp"
#include <ssmlib/model/language_model.hpp>
#include <ssmlib/train/next_token.hpp>
#include <ssmlib/train/trainer.hpp>

#include <memory>
#include <span>

namespace bench {

namespace {

using model = ssm::language_model<float>;

/// A model, its optimizer and data, to take one step after another.
struct training {
  explicit training(const demo::settings& s)
      : model(demo::config_of(s, s.teacher), 1),
        optimizer(model.parameters(), {.weight_decay = 0.1}),
        text(random_bytes(200'000)),
        loader(ssm::token_spans{std::span<const std::uint8_t>(text)},
               {.sequence_length = s.sequence_length, .seed = 1}),
        tokens(s.tokens_per_step) {}

  void step(const ssm::cpu::context& ctx) {
    ssm::train(
        optimizer, loader,
        [this](const ssm::pass<float>& p, const ssm::token_batch& b) {
          return ssm::next_token_loss(model, p, b);
        },
        {.steps = optimizer.steps() + 1, .tokens_per_step = tokens, .learning_rate = 1e-4}, {},
        ctx);
  }

  static std::vector<std::uint8_t> random_bytes(std::size_t n) {
    std::vector<std::uint8_t> bytes(n);
    ssm::philox random(1);
    for (auto& b : bytes)
      b = static_cast<std::uint8_t>(random.below(256));
    return bytes;
  }

  bench::model model;
  ssm::adamw<float> optimizer;
  std::vector<std::uint8_t> text;
  ssm::data_loader<ssm::token_spans<std::uint8_t>> loader;
  index_t tokens;
};

/// 6 x parameters x tokens, and the mixers forward and backward.
double step_flops(const demo::settings& s, index_t parameters) {
  const auto layers = static_cast<double>(std::count(s.teacher.begin(), s.teacher.end(), '*'));
  const auto tokens = static_cast<double>(s.tokens_per_step);
  const double sequences = tokens / static_cast<double>(s.sequence_length);
  return 6 * static_cast<double>(parameters) * tokens +
         3.5 * layers * sequences * attention_flops(s.sequence_length, s.heads, s.width / s.heads);
}

}  // namespace

goal_report add_training_goals(session& s) {
  const demo::settings settings;
  const index_t parameters =
      ssm::parameter_count(model(demo::config_of(settings, settings.teacher), 1).parameters());
  const auto add = [&](const std::string& name, const ssm::cpu::context& ctx) {
    s.add({.name = name,
           .work = {step_flops(settings, parameters), unit::flops},
           .prepare =
               [settings, &ctx] {
                 const auto t = std::make_shared<training>(settings);
                 return [t, &ctx] { t->step(ctx); };
               },
           .repetitions = s.options().repetitions + 2,
           .seconds = 0.12,
           .minimum_time = 0.1});
  };
  add("goal/training", s.context());
  add("goal/training/threads1", s.context(1));
  return [](const session& done, const ceilings& c, std::vector<goal_row>& rows) {
    rows.push_back(at_least("training step of the demo's teacher", ">= 40 %", 0.40,
                            share_of(done, c, "goal/training"),
                            share_text(done, c, "goal/training")));
    rows.push_back(scaling_row(done, c, "training step, all threads against 1", "goal/training"));
  };
}

}  // namespace bench
