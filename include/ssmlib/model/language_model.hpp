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
///   value_type, backend              of its activations
template <class M, class T = typename M::value_type, class B = typename M::backend>
concept LanguageModel = requires(const M& m, const pass<T, B>& p,
                                 const tensor<std::int32_t, 2>& ids, const sequence_layout& layout,
                                 typename M::state_type& state) {
  { m.hidden(p, ids, layout) } -> std::same_as<tensor<T, 3, B>>;
  { m.advance(p, state, ids, layout) } -> std::same_as<tensor<T, 3, B>>;
  { m.initial_state(index_t{1}, index_t{0}) } -> std::same_as<typename M::state_type>;
  { m.head() } -> std::convertible_to<const linear<T, B>&>;
  { m.parameters() } -> std::same_as<std::vector<parameter<T, B>>>;
};

/// A layer of the caller's own: where the pattern has `letter`, the model has what `make` returns,
/// often mixer_layer<...>(config, options, seed). It trains, distils and decodes as the others do.
/// @tparam T  of the model
template <Floating T, Backend B = cpu>
struct own_layer {
  char letter;  ///< none of layer_letters
  std::function<std::shared_ptr<any_block<T, B>>(const model_config&, std::uint64_t seed)> make;
};

/// A language model as a run-time list of layers: Transformer, Mamba, Mamba-2 and hybrids are one
/// class, told apart by a pattern. Copying shares the parameters; clone() copies them.
template <Floating T, Backend B = cpu>
class language_model {
 public:
  using value_type = T;
  using backend = B;
  using state_type = model_state;

  language_model() = default;
  /// Freshly initialised.
  /// @param own  layers for further letters of the pattern
  /// @throws value_error, shape_error  a config that does not fit together.
  language_model(const model_config& config, std::uint64_t seed,
                 const std::vector<own_layer<T, B>>& own = {});

  [[nodiscard]] const model_config& config() const { return config_; }
  [[nodiscard]] index_t layers() const { return static_cast<index_t>(blocks_.size()); }
  [[nodiscard]] const any_block<T, B>& block(index_t i) const {
    return *blocks_[static_cast<std::size_t>(i)];
  }
  /// hidden -> logits; with tied embeddings its weight is the embedding.
  [[nodiscard]] const linear<T, B>& head() const { return head_; }

  /// Recompute each layer's activations in the backward pass instead of keeping them.
  void set_checkpointing(bool on) { checkpointing_ = on; }

  /// ids (b, T) -> (b, T, d), the residual stream before layer 0.
  [[nodiscard]] tensor<T, 3, B> embed(const pass<T, B>& p,
                                      const tensor<std::int32_t, 2>& ids) const {
    return embedding_(p, ids);
  }
  [[nodiscard]] tensor<T, 3, B> final_norm(const pass<T, B>& p, const tensor<T, 3, B>& x) const {
    return std::visit([&](const auto& norm) { return norm(p, x); }, norm_);
  }

  /// @param ids     (b, T), or (1, tokens) with a layout of packed sequences
  /// @return        (b, T, d), after the final norm
  [[nodiscard]] tensor<T, 3, B> hidden(const pass<T, B>& p, const tensor<std::int32_t, 2>& ids,
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
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, model_state& state,
                                        const tensor<std::int32_t, 2>& ids,
                                        const sequence_layout& layout = {}) const;
  /// The same for ids on the device, which are not looked at: one outside the vocabulary gives NaN.
  /// @param layout  where it has a backend's copy, that is taken for the state's positions
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, model_state& state,
                                        const tensor<std::int32_t, 2, B>& ids,
                                        const sequence_layout& layout = {}) const
      requires(!std::same_as<B, cpu>);

  /// Every trainable tensor; a tied head is listed once, as the embedding.
  [[nodiscard]] std::vector<parameter<T, B>> parameters() const;

  /// A model of the same config with its own copy of the parameters.
  [[nodiscard]] language_model clone() const;

 private:
  template <Backend Ids>
  [[nodiscard]] static sequence_layout whole(const tensor<std::int32_t, 2, Ids>& ids,
                                             const sequence_layout& layout) {
    if (!layout) return sequence_layout::rectangular(ids.extent(0), ids.extent(1));
    if (layout.tokens() != ids.size()) {
      throw shape_error("ssm: the layout has " + std::to_string(layout.tokens()) +
                        " tokens, ids are " + to_string<2>(ids.extents()) + "; wanted as many");
    }
    return layout;
  }

  /// advance(); embed(pass) gives the new tokens' vectors once the state is known to fit.
  template <class Embed>
  [[nodiscard]] tensor<T, 3, B> advance_from(const pass<T, B>& p, model_state& state,
                                             const sequence_layout& pieces, Embed embed) const;

  [[nodiscard]] std::vector<any_state> layer_states(index_t sequences, index_t max_rollback) const {
    std::vector<any_state> layers;
    for (const auto& b : blocks_)
      layers.push_back(b->initial_state(sequences, max_rollback));
    return layers;
  }
  [[nodiscard]] static std::shared_ptr<any_block<T, B>> make_block(
      const model_config& c, char letter, std::uint64_t seed,
      const std::vector<own_layer<T, B>>& own);

  model_config config_;
  embedding<T, B> embedding_;
  std::vector<std::shared_ptr<any_block<T, B>>> blocks_;
  std::shared_ptr<const std::string> pattern_;  // the config's; a state that shares it fits
  std::variant<rms_norm<T, B>, layer_norm<T, B>> norm_;
  linear<T, B> head_;
  bool checkpointing_ = false;
};

template <Floating T, Backend B>
tensor<T, 3, B> language_model<T, B>::hidden(const pass<T, B>& p,
                                             const tensor<std::int32_t, 2>& ids,
                                             const sequence_layout& layout) const {
  const sequence_layout all = whole(ids, layout);
  const typename B::scope scope(p.ctx);
  tensor<T, 3, B> x = embed(p, ids);
  for (const auto& b : blocks_) {
    if (checkpointing_ && p.tape != nullptr) {
      x = checkpoint(x, p.tape, [p, b, all](const tensor<T, 3, B>& in, tape<T, B>* t) {
        return b->forward({p.ctx, t, false, p.weights}, in, all);
      });
    } else {
      x = b->forward(p, x, all);
    }
  }
  return final_norm(p, x);
}

template <Floating T, Backend B>
template <class Embed>
tensor<T, 3, B> language_model<T, B>::advance_from(const pass<T, B>& p, model_state& state,
                                                   const sequence_layout& pieces,
                                                   Embed embed) const {
  const typename B::scope scope(p.ctx);
  if (!state.is_of(pattern_)) state.check_model(config_.pattern, layer_states(0, 0));
  state.positions().check_layout(pieces);
  sequence_layout placed = pieces;
  if (!pieces.copy()) {
    placed = pieces.at_positions(state.positions().all());
    if constexpr (requires { apply_layout(p.ctx, placed); }) placed = apply_layout(p.ctx, placed);
  }
  const pass<T, B> step{p.ctx, nullptr, pieces.max_length() <= max_fixed_step, p.weights};
  tensor<T, 3, B> x = embed(step);
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    x = blocks_[i]->advance(step, state.layers()[i], x, placed);
  }
  state.positions().advance(pieces);
  return final_norm(step, x);
}

template <Floating T, Backend B>
tensor<T, 3, B> language_model<T, B>::advance(const pass<T, B>& p, model_state& state,
                                              const tensor<std::int32_t, 2>& ids,
                                              const sequence_layout& layout) const {
  return advance_from(p, state, whole(ids, layout),
                      [&](const pass<T, B>& step) { return embed(step, ids); });
}

template <Floating T, Backend B>
tensor<T, 3, B> language_model<T, B>::advance(const pass<T, B>& p, model_state& state,
                                              const tensor<std::int32_t, 2, B>& ids,
                                              const sequence_layout& layout) const
    requires(!std::same_as<B, cpu>) {
  return advance_from(p, state, whole(ids, layout), [&](const pass<T, B>& step) {
    tensor<T, 3, B> x(ids.extent(0), ids.extent(1), config_.width);
    apply_embedding(step.ctx, embedding_.weight, ids, detail::input_tokens(x));
    return x;
  });
}

template <Floating T, Backend B>
std::vector<parameter<T, B>> language_model<T, B>::parameters() const {
  std::vector<parameter<T, B>> list = parameters_of<T, B>(embedding_, "embedding");
  const auto append = [&](std::vector<parameter<T, B>> more) {
    for (auto& p : more)
      list.push_back(std::move(p));
  };
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    append(blocks_[i]->parameters("layers." + std::to_string(i)));
  }
  std::visit([&](const auto& norm) { append(parameters_of<T, B>(norm, "final_norm")); }, norm_);
  if (!config_.tie_embeddings) {
    append(parameters_of<T, B>(head_, "lm_head"));
  } else if (head_.bias) {
    list.push_back({"lm_head.bias", head_.bias, {head_.bias.size()}, parameter_kind::bias});
  }
  return list;
}

template <Floating T, Backend B>
language_model<T, B> language_model<T, B>::clone() const {
  language_model copy = *this;
  copy.embedding_ = with_own_parameters(embedding_);
  for (auto& b : copy.blocks_)
    b = b->clone();
  std::visit([](auto& norm) { norm = with_own_parameters(norm); }, copy.norm_);
  copy.head_ = with_own_parameters(head_);
  if (config_.tie_embeddings) copy.head_.weight = copy.embedding_.weight;
  return copy;
}

template <Floating T, Backend B>
std::shared_ptr<any_block<T, B>> language_model<T, B>::make_block(
    const model_config& c, char letter, std::uint64_t seed,
    const std::vector<own_layer<T, B>>& own) {
  for (const own_layer<T, B>& layer : own) {
    if (layer.letter != letter) continue;
    if (auto block = layer.make ? layer.make(c, seed) : nullptr) return block;
    throw value_error("ssm: the own layer '" + std::string(1, letter) +
                      "' made no block; wanted a function that returns one, see mixer_layer");
  }
  switch (letter) {
    case '*':
      return detail::make_mixer_block<attention<T, B>>(c, c.attention, seed);
    case 'M':
      return detail::make_mixer_block<mamba2<T, B>>(c, c.mamba2, seed);
    case 'm':
      return detail::make_mixer_block<mamba1<T, B>>(c, c.mamba1, seed);
    case 'D':
      return detail::make_mixer_block<discrete_mamba2<T, B>>(c, c.discrete_mamba2, seed);
    case 'R':
      return detail::make_mixer_block<retention<T, B>>(c, c.retention, seed);
    case 'L':
      return detail::make_mixer_block<linear_attention<T, feature::elu_plus_one, B>>(
          c, c.linear_attention, seed);
    case 'G':
      return detail::make_mixer_block<gated_delta_net<T, B>>(c, c.gated_delta_net, seed);
    case 'P':
      return detail::make_parallel_block<attention<T, B>>(c, c.attention, seed);
    case 'p':
      return detail::make_parallel_block<discrete_mamba2<T, B>>(c, c.discrete_mamba2, seed);
    default:
      return detail::make_mlp_block<T, B>(c, seed);
  }
}

template <Floating T, Backend B>
language_model<T, B>::language_model(const model_config& config, std::uint64_t seed,
                                     const std::vector<own_layer<T, B>>& own)
    : config_(config) {
  std::string own_letters;
  for (const own_layer<T, B>& layer : own)
    own_letters += layer.letter;
  check_config(config, own_letters);
  // Seeds of different parts are far apart, so that no two tensors start alike.
  const auto part = [&](std::size_t i) { return (seed * 4096 + i) * 1024; };
  embedding_ =
      embedding<T, B>::make(config.vocabulary, config.width, part(0), config.embedding_deviation);
  for (std::size_t i = 0; i < config.pattern.size(); ++i) {
    blocks_.push_back(make_block(config, config.pattern[i], part(i + 1), own));
  }
  pattern_ = std::make_shared<const std::string>(config.pattern);
  detail::with_norm<T, B>(config, [&](auto norm) { norm_ = std::move(norm); });
  if (config.tie_embeddings) {
    head_.weight = embedding_.weight;
  } else {
    head_ = linear<T, B>::make(config.width, config.vocabulary, {.seed = part(4095)});
  }
  if (config.head_bias) head_.bias = tensor<accum_t<T>, 1, B>::zeros(config.vocabulary);
}

SSMLIB_INSTANTIATE(language_model, class language_model<float>);
SSMLIB_INSTANTIATE(language_model, class language_model<double>);

}  // namespace ssm
