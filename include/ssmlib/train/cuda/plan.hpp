#pragma once

#include <ssmlib/model/cuda/plan.hpp>
#include <ssmlib/train/cuda/losses.hpp>
#include <ssmlib/train/cuda/optimizer.hpp>
#include <ssmlib/train/next_token.hpp>
#include <ssmlib/train/trainer.hpp>

#include <cstddef>
#include <vector>

namespace ssm {

/// What training is planned for, beside the batch.
struct training_plan_options {
  /// Sequences that pass through the model at once; 0: all of the batch.
  index_t micro_batch = 0;
  adamw_options optimizer = {};
};

namespace detail {

/// Batches of zeros, for what depends on their sizes only.
class zero_loader {
 public:
  explicit zero_loader(index_t length) : length_(length) {}
  [[nodiscard]] token_batch next(index_t sequences) const {
    return {tensor<std::int32_t, 2>::zeros(sequences, length_),
            tensor<std::int32_t, 2>::zeros(sequences, length_)};
  }
  [[nodiscard]] index_t state() const { return 0; }
  void restore(index_t) const {}
  [[nodiscard]] index_t sequence_length() const { return length_; }

 private:
  index_t length_;
};

/// Two steps, because the first one finds no gradients yet.
inline constexpr auto plan_training_of = [](index_t batch, index_t tokens,
                                            const training_plan_options& o) {
  return [=](const cuda_dry_run& dry, const auto& model, memory_plan plan) {
    using T = typename std::remove_cvref_t<decltype(model)>::value_type;
    const std::size_t before = dry.in_use();
    adamw<T, cuda> optimizer(model.parameters(), o.optimizer);
    plan.optimizer = dry.in_use() - before;
    plan.gradients = plan.weights;  // each parameter has one
    zero_loader loader(tokens);
    train(
        optimizer, loader,
        [&](const pass<T, cuda>& p, const token_batch& b) { return next_token_loss(model, p, b); },
        {.steps = 2,
         .tokens_per_step = batch * tokens,
         .learning_rate = 0,
         .micro_batch = o.micro_batch},
        {}, dry.context());
    return plan;
  };
};

}  // namespace detail

/// Training with AdamW on next tokens, `batch` sequences of `tokens` targets a step, as train()
/// does it. A model that recomputes its activations (set_checkpointing) is planned so.
template <LanguageModel M>
requires std::same_as<typename M::backend, cuda>
[[nodiscard]] memory_plan plan_training(const M& model, index_t batch, index_t tokens,
                                        const training_plan_options& options = {}) {
  return detail::plan_model(model, detail::plan_training_of(batch, tokens, options));
}
/// The same for a model that there is not yet: plan_training<bf16>(config, batch, tokens).
template <Floating T>
[[nodiscard]] memory_plan plan_training(const model_config& config, index_t batch, index_t tokens,
                                        const training_plan_options& options = {},
                                        const std::vector<own_layer<T, cuda>>& own = {}) {
  return detail::plan_config<T>(config, own, detail::plan_training_of(batch, tokens, options));
}

}  // namespace ssm
