#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/model/block.hpp>
#include <ssmlib/model/config.hpp>
#include <ssmlib/model/make_block.hpp>
#include <ssmlib/model/model_state.hpp>
#include <ssmlib/nn/embedding.hpp>
#include <ssmlib/nn/linear.hpp>
#include <ssmlib/nn/norm.hpp>

#include <concepts>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace ssm {

/// What training, distillation and decoding ask of a model.
///
///   hidden(p, ids, layout)           (b, T) ids -> (b, T, d), after the final norm
///   advance(p, state, ids, layout)   the same for new tokens from a state
///   head()                           linear: logits = head()(p, hidden)
///   parameters()                     every trainable tensor, named
template <class M>
concept LanguageModel = requires(const M& m, const pass<typename M::value_type>& p,
                                 const tensor<std::int32_t, 2>& ids, const sequence_layout& layout,
                                 typename M::state_type& state) {
  { m.hidden(p, ids, layout) } -> std::same_as<tensor<typename M::value_type, 3>>;
  { m.advance(p, state, ids, layout) } -> std::same_as<tensor<typename M::value_type, 3>>;
  { m.initial_state(index_t{1}, index_t{0}) } -> std::same_as<typename M::state_type>;
  { m.head() } -> std::convertible_to<const linear<typename M::value_type>&>;
  { m.parameters() } -> std::same_as<std::vector<parameter<typename M::value_type>>>;
};

/// A layer of the caller's own: where the pattern has `letter`, the model has what `make` returns,
/// often mixer_layer<...>(config, options, seed). It trains, distils and decodes as the others do.
/// @tparam T  of the model
template <Real T>
struct own_layer {
  char letter;  ///< none of layer_letters
  std::function<std::shared_ptr<any_block<T>>(const model_config&, std::uint64_t seed)> make;
};

/// A language model as a run-time list of layers: Transformer, Mamba, Mamba-2 and hybrids are one
/// class, told apart by a pattern. Copying shares the parameters; clone() copies them.
template <Real T>
class language_model {
 public:
  using value_type = T;
  using state_type = model_state;

  language_model() = default;
  /// Freshly initialised.
  /// @param own  layers for further letters of the pattern
  /// @throws value_error, shape_error  a config that does not fit together.
  language_model(const model_config& config, std::uint64_t seed,
                 const std::vector<own_layer<T>>& own = {});

  [[nodiscard]] const model_config& config() const { return config_; }
  [[nodiscard]] index_t layers() const { return static_cast<index_t>(blocks_.size()); }
  [[nodiscard]] const any_block<T>& block(index_t i) const {
    return *blocks_[static_cast<std::size_t>(i)];
  }
  /// hidden -> logits; with tied embeddings its weight is the embedding.
  [[nodiscard]] const linear<T>& head() const { return head_; }

  /// Recompute each layer's activations in the backward pass instead of keeping them.
  void set_checkpointing(bool on) { checkpointing_ = on; }

  /// ids (b, T) -> (b, T, d), the residual stream before layer 0.
  [[nodiscard]] tensor<T, 3> embed(const pass<T>& p, const tensor<std::int32_t, 2>& ids) const {
    return embedding_(p, ids);
  }
  [[nodiscard]] tensor<T, 3> final_norm(const pass<T>& p, const tensor<T, 3>& x) const {
    return std::visit([&](const auto& norm) { return norm(p, x); }, norm_);
  }

  /// @param ids     (b, T), or (1, tokens) with a layout of packed sequences
  /// @return        (b, T, d), after the final norm
  [[nodiscard]] tensor<T, 3> hidden(const pass<T>& p, const tensor<std::int32_t, 2>& ids,
                                    const sequence_layout& layout = {}) const;

  /// An empty state. @param max_rollback  the most tokens that rollback() must be able to undo
  [[nodiscard]] model_state initial_state(index_t sequences, index_t max_rollback = 0) const {
    return {pattern_, sequences, max_rollback, layer_states(sequences, max_rollback)};
  }

  /// New tokens from any position: prefill, chunks and single steps are this one call.
  ///
  /// @param ids     (b, n): n new tokens of each of the state's b sequences; or (1, tokens) with a
  ///                layout of one (possibly empty) piece a sequence
  /// @return        (b, n, d), after the final norm, as one pass over everything would give it;
  ///                for pieces of at most 16 tokens the same bits whatever the split and the batch
  /// @throws value_error  the state is of another model; shape_error: other sizes or another number
  ///                      of sequences. Nothing has changed then.
  [[nodiscard]] tensor<T, 3> advance(const pass<T>& p, model_state& state,
                                     const tensor<std::int32_t, 2>& ids,
                                     const sequence_layout& layout = {}) const;

  /// Every trainable tensor; a tied head is listed once, as the embedding.
  [[nodiscard]] std::vector<parameter<T>> parameters() const;

  /// A model of the same config with its own copy of the parameters.
  [[nodiscard]] language_model clone() const;

 private:
  [[nodiscard]] static sequence_layout whole(const tensor<std::int32_t, 2>& ids,
                                             const sequence_layout& layout) {
    if (!layout) return sequence_layout::rectangular(ids.extent(0), ids.extent(1));
    if (layout.tokens() != ids.size()) {
      throw shape_error("ssm: the layout has " + std::to_string(layout.tokens()) +
                        " tokens, ids are " + to_string<2>(ids.extents()) + "; wanted as many");
    }
    return layout;
  }

  [[nodiscard]] std::vector<any_state> layer_states(index_t sequences, index_t max_rollback) const {
    std::vector<any_state> layers;
    for (const auto& b : blocks_)
      layers.push_back(b->initial_state(sequences, max_rollback));
    return layers;
  }
  [[nodiscard]] static std::shared_ptr<any_block<T>> make_block(
      const model_config& c, char letter, std::uint64_t seed, const std::vector<own_layer<T>>& own);

  model_config config_;
  embedding<T> embedding_;
  std::vector<std::shared_ptr<any_block<T>>> blocks_;
  std::shared_ptr<const std::string> pattern_;  // the config's; a state that shares it fits
  std::variant<rms_norm<T>, layer_norm<T>> norm_;
  linear<T> head_;
  bool checkpointing_ = false;
};

template <Real T>
tensor<T, 3> language_model<T>::hidden(const pass<T>& p, const tensor<std::int32_t, 2>& ids,
                                       const sequence_layout& layout) const {
  const sequence_layout all = whole(ids, layout);
  tensor<T, 3> x = embed(p, ids);
  for (const auto& b : blocks_) {
    if (checkpointing_ && p.tape != nullptr) {
      x = checkpoint(x, p.tape, [&ctx = p.ctx, b, all](const tensor<T, 3>& in, tape<T>* t) {
        return b->forward({ctx, t, false}, in, all);
      });
    } else {
      x = b->forward(p, x, all);
    }
  }
  return final_norm(p, x);
}

template <Real T>
tensor<T, 3> language_model<T>::advance(const pass<T>& p, model_state& state,
                                        const tensor<std::int32_t, 2>& ids,
                                        const sequence_layout& layout) const {
  const sequence_layout pieces = whole(ids, layout);
  if (!state.is_of(pattern_)) state.check_model(config_.pattern, layer_states(0, 0));
  state.positions().check_layout(pieces);
  const sequence_layout placed = pieces.at_positions(state.positions().all());
  const pass<T> step{p.ctx, nullptr, pieces.max_length() <= max_fixed_step};
  tensor<T, 3> x = embed(step, ids);
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    x = blocks_[i]->advance(step, state.layers()[i], x, placed);
  }
  for (index_t i = 0; i < pieces.sequences(); ++i) {
    state.positions().advance(i, pieces.length(i));
  }
  return final_norm(step, x);
}

template <Real T>
std::vector<parameter<T>> language_model<T>::parameters() const {
  std::vector<parameter<T>> list = parameters_of<T>(embedding_, "embedding");
  const auto append = [&](std::vector<parameter<T>> more) {
    for (auto& p : more)
      list.push_back(std::move(p));
  };
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    append(blocks_[i]->parameters("layers." + std::to_string(i)));
  }
  std::visit([&](const auto& norm) { append(parameters_of<T>(norm, "final_norm")); }, norm_);
  if (!config_.tie_embeddings) {
    append(parameters_of<T>(head_, "lm_head"));
  } else if (head_.bias) {
    list.push_back({"lm_head.bias", head_.bias, {head_.bias.size()}, parameter_kind::bias});
  }
  return list;
}

template <Real T>
language_model<T> language_model<T>::clone() const {
  language_model copy = *this;
  copy.embedding_ = with_own_parameters(embedding_);
  for (auto& b : copy.blocks_)
    b = b->clone();
  std::visit([](auto& norm) { norm = with_own_parameters(norm); }, copy.norm_);
  copy.head_ = with_own_parameters(head_);
  if (config_.tie_embeddings) copy.head_.weight = copy.embedding_.weight;
  return copy;
}

template <Real T>
std::shared_ptr<any_block<T>> language_model<T>::make_block(const model_config& c, char letter,
                                                            std::uint64_t seed,
                                                            const std::vector<own_layer<T>>& own) {
  for (const own_layer<T>& layer : own) {
    if (layer.letter != letter) continue;
    if (auto block = layer.make ? layer.make(c, seed) : nullptr) return block;
    throw value_error("ssm: the own layer '" + std::string(1, letter) +
                      "' made no block; wanted a function that returns one, see mixer_layer");
  }
  switch (letter) {
    case '*':
      return detail::make_mixer_block<attention<T>, T>(c, c.attention, seed);
    case 'M':
      return detail::make_mixer_block<mamba2<T>, T>(c, c.mamba2, seed);
    case 'm':
      return detail::make_mixer_block<mamba1<T>, T>(c, c.mamba1, seed);
    case 'D':
      return detail::make_mixer_block<discrete_mamba2<T>, T>(c, c.discrete_mamba2, seed);
    case 'R':
      return detail::make_mixer_block<retention<T>, T>(c, c.retention, seed);
    case 'L':
      return detail::make_mixer_block<linear_attention<T>, T>(c, c.linear_attention, seed);
    case 'G':
      return detail::make_mixer_block<gated_delta_net<T>, T>(c, c.gated_delta_net, seed);
    case 'P':
      return detail::make_parallel_block<attention<T>, T>(c, c.attention, seed);
    case 'p':
      return detail::make_parallel_block<discrete_mamba2<T>, T>(c, c.discrete_mamba2, seed);
    default:
      return detail::make_mlp_block<T>(c, seed);
  }
}

template <Real T>
language_model<T>::language_model(const model_config& config, std::uint64_t seed,
                                  const std::vector<own_layer<T>>& own)
    : config_(config) {
  std::string own_letters;
  for (const own_layer<T>& layer : own)
    own_letters += layer.letter;
  check_config(config, own_letters);
  // Seeds of different parts are far apart, so that no two tensors start alike.
  const auto part = [&](std::size_t i) { return (seed * 4096 + i) * 1024; };
  embedding_ =
      embedding<T>::make(config.vocabulary, config.width, part(0), config.embedding_deviation);
  for (std::size_t i = 0; i < config.pattern.size(); ++i) {
    blocks_.push_back(make_block(config, config.pattern[i], part(i + 1), own));
  }
  pattern_ = std::make_shared<const std::string>(config.pattern);
  detail::with_norm<T>(config, [&](auto norm) { norm_ = std::move(norm); });
  if (config.tie_embeddings) {
    head_.weight = embedding_.weight;
  } else {
    head_ = linear<T>::make(config.width, config.vocabulary, {.seed = part(4095)});
  }
  if (config.head_bias) head_.bias = tensor<T, 1>::zeros(config.vocabulary);
}

SSMLIB_INSTANTIATE(language_model, class language_model<float>);
SSMLIB_INSTANTIATE(language_model, class language_model<double>);

}  // namespace ssm
