#include "harness.hpp"

#include <memory>

namespace cuda_bench {

using namespace ssm;

namespace {

/// A model and a batch: forward and backward as train() does them, with bf16 copies of the weights
/// that the optimizer keeps up to date; and the optimizer's step if wanted.
class training {
 public:
  training(const model_config& config, index_t batch, index_t length, bool with_optimizer)
      : model_(config, 1), ids_(batch, length), targets_(batch, length) {
    philox random(3);
    for (index_t i = 0; i < ids_.size(); ++i) {
      ids_.data()[i] = static_cast<std::int32_t>(random.below(config.vocabulary));
      targets_.data()[i] = static_cast<std::int32_t>(random.below(config.vocabulary));
    }
    if (with_optimizer) optimizer_ = std::make_unique<adamw<bf16, cuda>>(model_.parameters());
    for (const auto& p : model_.parameters())
      tape_.watch(p.value);
  }
  void step(const cuda::context& ctx) {
    tape_.zero_gradients();
    const pass<bf16, cuda> p{.ctx = ctx, .tape = &tape_, .weights = &weights_};
    const auto loss = lm_cross_entropy(p, model_.hidden(p, ids_), model_.head(), targets_);
    tape_.gradient(loss.loss).fill(1.0f);
    tape_.backward();
    if (optimizer_) optimizer_->step(tape_, 1e-5, 1.0 / ids_.size(), ctx, &weights_);
  }

 private:
  language_model<bf16, cuda> model_;
  tensor<std::int32_t, 2> ids_, targets_;
  std::unique_ptr<adamw<bf16, cuda>> optimizer_;
  ssm::tape<bf16, cuda> tape_;
  weight_cache<bf16, cuda> weights_;
};

/// Floating-point operations of a token's forward and backward pass: 6 a weight of every product,
/// 3.5 times the mixers' forward count. (b, T) enters through attention's pairs only.
double training_flops(const model_config& c, index_t length) {
  const double d = static_cast<double>(c.width);
  const double vocabulary = static_cast<double>(c.vocabulary);
  double weights = vocabulary * d, mixers = 0;
  for (const char letter : c.pattern) {
    if (letter == 'M') {
      const double h = static_cast<double>(c.mamba2.heads), n = static_cast<double>(c.mamba2.state),
                   p = static_cast<double>(c.mamba2.head_dim),
                   g = static_cast<double>(c.mamba2.groups);
      weights += d * (2 * h * p + 2 * g * n + h) + h * p * d;
      mixers += 64 * n * g + h * (64 * p + 4 * n * p);
    } else if (letter == '*') {
      const double q = static_cast<double>(
          c.attention.head_dim > 0 ? c.attention.heads * c.attention.head_dim : c.width);
      const double kv =
          q *
          static_cast<double>(c.attention.kv_heads > 0 ? c.attention.kv_heads : c.attention.heads) /
          static_cast<double>(c.attention.heads);
      weights += d * (2 * q + 2 * kv);
      mixers += 2 * q * static_cast<double>(length);
    } else {
      weights += (c.mlp == mlp_kind::swiglu ? 3 : 2) * d * static_cast<double>(c.mlp_width());
    }
  }
  return 6 * weights + 3.5 * mixers;
}

void add_training(std::vector<row>& rows, const std::string& name, const model_config& config,
                  index_t batch, index_t length, bool with_optimizer, const cuda::context& ctx,
                  std::optional<double> peer = {}, std::optional<double> goal = {}) {
  const double flops = training_flops(config, length) * static_cast<double>(batch * length);
  rows.push_back({name,
                  made_first(ctx,
                             [=, &ctx] {
                               const auto t = std::make_shared<training>(config, batch, length,
                                                                         with_optimizer);
                               return std::function<void()>([t, &ctx] { t->step(ctx); });
                             }),
                  0, flops, peer, goal});
}

}  // namespace

// The shares of the GEMM's rate in the rows with AdamW are the model-FLOPs utilisation.
void add_training_rows(std::vector<row>& rows, const cuda::context& ctx) {
  constexpr index_t layers = 8, length = 2048;
  model_config mamba;
  mamba.vocabulary = 32000;
  mamba.width = 768;
  mamba.pattern = std::string(layers, 'M');
  mamba.mamba2.heads = 24;
  add_training(rows, "training step Mamba-2, 8 layers, d 768, b8 T2048", mamba, 8, length, false,
               ctx, 32.4, 22.0);
  add_training(rows, "the same with AdamW", mamba, 8, length, true, ctx);
  model_config transformer;
  transformer.vocabulary = 32000;
  transformer.width = 768;
  transformer.pattern = "*-*-*-*-*-*-*-*-";
  transformer.attention.heads = 12;
  add_training(rows, "training step Transformer, 8 layers, d 768, b8 T2048", transformer, 8, length,
               false, ctx, 26.7);
  model_config large;
  large.vocabulary = 50288;
  large.width = 2048;
  large.pattern = std::string(48, 'M');
  large.mamba2.heads = 64;
  add_training(rows, "training Mamba-2 1.3B with AdamW, b4 T2048", large, 4, length, true, ctx);
  add_training(rows, "training hybrid 1.7B with AdamW, b4 T2048", hybrid_config(), 4, length, true,
               ctx);
}

}  // namespace cuda_bench
