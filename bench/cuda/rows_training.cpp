#include "harness.hpp"

#include <memory>

namespace cuda_bench {

using namespace ssm;

namespace {

/// A model and a batch: forward and backward as in training, without the optimizer.
struct training {
  training(const model_config& config, index_t batch, index_t length)
      : model(config, 1), ids(batch, length), targets(batch, length) {
    philox random(3);
    for (index_t i = 0; i < ids.size(); ++i) {
      ids.data()[i] = static_cast<std::int32_t>(random.below(config.vocabulary));
      targets.data()[i] = static_cast<std::int32_t>(random.below(config.vocabulary));
    }
    parameters = model.parameters();
    for (const auto& p : parameters)
      tape.watch(p.value);
  }
  void step(const cuda::context& ctx) {
    tape.zero_gradients();
    const pass<bf16, cuda> p{ctx, &tape};
    const auto hidden = model.hidden(p, ids);
    const auto loss = lm_cross_entropy(p, hidden, model.head(), targets);
    tape.gradient(loss.loss).fill(1.0f);
    tape.backward();
  }

  language_model<bf16, cuda> model;
  tensor<std::int32_t, 2> ids, targets;
  std::vector<parameter<bf16, cuda>> parameters;
  ssm::tape<bf16, cuda> tape;
};

double training_flops(const training& t, index_t layers, double mixer_flops_a_token) {
  const double tokens = static_cast<double>(t.ids.size());
  return 6 * static_cast<double>(parameter_count(t.parameters)) * tokens +
         3.5 * static_cast<double>(layers) * mixer_flops_a_token * tokens;
}

}  // namespace

void add_training_rows(std::vector<row>& rows, const cuda::context& ctx) {
  constexpr index_t layers = 8, width = 768, length = 2048, batch = 8;
  const cuda::scope scope(ctx);
  model_config mamba{.vocabulary = 32000, .width = width, .pattern = std::string(layers, 'M')};
  mamba.mamba2.heads = 24;
  mamba.mamba2.head_dim = 64;
  mamba.mamba2.state = 128;
  const auto m = std::make_shared<training>(mamba, batch, length);
  const double ssd = 64.0 * 128 + 24 * (64.0 * 64 + 4.0 * 128 * 64);
  rows.push_back({"training step Mamba-2, 8 layers, d 768, b8 T2048", [=, &ctx] { m->step(ctx); },
                  0, training_flops(*m, layers, ssd), 32.4, 22.0});
  model_config transformer{.vocabulary = 32000, .width = width, .pattern = "*-*-*-*-*-*-*-*-"};
  transformer.attention.heads = 12;
  const auto t = std::make_shared<training>(transformer, batch, length);
  const double attention = 2.0 * width * length;
  rows.push_back({"training step Transformer, 8 layers, d 768, b8 T2048",
                  [=, &ctx] { t->step(ctx); }, 0, training_flops(*t, layers, attention), 26.7,
                  std::nullopt});
}

}  // namespace cuda_bench
