#pragma once

#include <ssmlib/backend/cuda_dry_run.hpp>
#include <ssmlib/model/language_model.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace ssm {

/// @file
/// How much memory of the device a model's work takes, before anything is allocated: the work
/// itself in a dry run (backend/cuda_dry_run.hpp, where its limits stand), so that what layers do
/// is what is counted.

/// Bytes in use at the moment when they are most. The pool's peak of the real work is total().
struct memory_plan {
  std::size_t weights = 0;      ///< the model's parameters
  std::size_t copies = 0;       ///< of them in bf16, that a weight_cache keeps
  std::size_t gradients = 0;    ///< of the parameters; training
  std::size_t optimizer = 0;    ///< moments; training
  std::size_t states = 0;       ///< what decoding keeps of the tokens that it has seen
  std::size_t activations = 0;  ///< all other tensors
  std::size_t workspace = 0;    ///< working memory of kernels, that of matrix products included

  [[nodiscard]] std::size_t total() const {
    return weights + copies + gradients + optimizer + states + activations + workspace;
  }
};

namespace detail {

/// Tensors of this thread are made for their sizes only, on the context of a dry run.
class planning_scope {
 public:
  explicit planning_scope(const cuda_dry_run& dry)
      : scope_(dry.context()), before_(std::exchange(only_sizes_matter, true)) {}
  ~planning_scope() { only_sizes_matter = before_; }
  planning_scope(const planning_scope&) = delete;
  planning_scope& operator=(const planning_scope&) = delete;

 private:
  cuda::scope scope_;
  bool before_;
};

/// The peak of a dry run, of which `plan` has the parts that last; the weights count apart where
/// they are not of the dry run.
[[nodiscard]] inline memory_plan with_peak(const cuda_dry_run& dry, memory_plan plan,
                                           bool has_weights) {
  plan.workspace = dry.workspace_at_peak();
  const std::size_t named = plan.copies + plan.gradients + plan.optimizer + plan.states;
  plan.activations = dry.peak() - plan.workspace - named - (has_weights ? plan.weights : 0);
  return plan;
}

template <LanguageModel M>
[[nodiscard]] std::size_t parameter_bytes(const M& model) {
  std::size_t bytes = 0;
  for (const auto& p : model.parameters())
    bytes += static_cast<std::size_t>(p.value.size()) * sizeof(*p.value.data());
  return bytes;
}

/// f(model, plan with its weights) with a model that was made in the dry run.
template <Floating T, class F>
[[nodiscard]] memory_plan plan_config(const model_config& config,
                                      const std::vector<own_layer<T, cuda>>& own, F f) {
  const cuda_dry_run dry(cuda::current().device());
  const planning_scope scope(dry);
  const language_model<T, cuda> model(config, 0, own);
  return with_peak(dry, f(dry, model, memory_plan{.weights = dry.in_use()}), true);
}
/// The same with a model that there is.
template <LanguageModel M, class F>
[[nodiscard]] memory_plan plan_model(const M& model, F f) {
  const cuda_dry_run dry(cuda::current().device());
  const planning_scope scope(dry);
  return with_peak(dry, f(dry, model, memory_plan{.weights = parameter_bytes(model)}), false);
}

/// Logits of the last of n tokens of each sequence.
template <LanguageModel M>
void last_logits(const M& model, const pass<typename M::value_type, cuda>& p,
                 const tensor<typename M::value_type, 3, cuda>& hidden) {
  const index_t n = hidden.extent(1);
  (void)model.head()(p, hidden.slice(1, n - 1, n));
}

inline constexpr auto plan_inference_of = [](index_t batch, index_t tokens) {
  return [batch, tokens](const cuda_dry_run& dry, const auto& model, memory_plan plan) {
    using T = typename std::remove_cvref_t<decltype(model)>::value_type;
    const auto ids = tensor<std::int32_t, 2>::zeros(batch, tokens);
    weight_cache<T, cuda> weights;
    const pass<T, cuda> p{.ctx = dry.context(), .weights = &weights};
    last_logits(model, p, model.hidden(p, ids));
    plan.copies = weights.bytes();
    return plan;
  };
};

inline constexpr auto plan_decoding_of = [](index_t batch, index_t tokens, index_t max_rollback) {
  return [=](const cuda_dry_run& dry, const auto& model, memory_plan plan) {
    using T = typename std::remove_cvref_t<decltype(model)>::value_type;
    weight_cache<T, cuda> weights;
    const pass<T, cuda> p{.ctx = dry.context(), .weights = &weights};
    const std::size_t before = dry.in_use() - dry.workspace();
    auto state = model.initial_state(batch, max_rollback);
    for (const index_t n : {tokens - 1, index_t{1}}) {
      if (n == 0) continue;
      const auto ids = tensor<std::int32_t, 2>::zeros(batch, n);
      last_logits(model, p, model.advance(p, state, ids));
    }
    plan.copies = weights.bytes();
    plan.states = dry.in_use() - dry.workspace() - before - plan.copies;
    return plan;
  };
};

}  // namespace detail

/// Inference: hidden states of `batch` sequences of `tokens` tokens each, and logits of their last
/// ones, with a weight_cache.
/// @throws value_error, shape_error  what the model itself throws. @throws backend_error  no device
/// @cost   the host's part of the work: a few milliseconds
template <LanguageModel M>
requires std::same_as<typename M::backend, cuda>
[[nodiscard]] memory_plan plan(const M& model, index_t batch, index_t tokens) {
  return detail::plan_model(model, detail::plan_inference_of(batch, tokens));
}
/// The same for a model that there is not yet: plan<bf16>(config, batch, tokens).
/// @cost  zeros on the host for one parameter after the other, and the host's part of the work
template <Floating T>
[[nodiscard]] memory_plan plan(const model_config& config, index_t batch, index_t tokens,
                               const std::vector<own_layer<T, cuda>>& own = {}) {
  return detail::plan_config<T>(config, own, detail::plan_inference_of(batch, tokens));
}

/// Decoding with a weight_cache: a state that takes tokens - 1 tokens at once and then one more.
/// @param max_rollback  of the state
template <LanguageModel M>
requires std::same_as<typename M::backend, cuda>
[[nodiscard]] memory_plan plan_decoding(const M& model, index_t batch, index_t tokens,
                                        index_t max_rollback = 0) {
  return detail::plan_model(model, detail::plan_decoding_of(batch, tokens, max_rollback));
}
template <Floating T>
[[nodiscard]] memory_plan plan_decoding(const model_config& config, index_t batch, index_t tokens,
                                        index_t max_rollback = 0,
                                        const std::vector<own_layer<T, cuda>>& own = {}) {
  return detail::plan_config<T>(config, own, detail::plan_decoding_of(batch, tokens, max_rollback));
}

}  // namespace ssm
