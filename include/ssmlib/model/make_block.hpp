#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/mixer/attention.hpp>
#include <ssmlib/mixer/gated_delta_net.hpp>
#include <ssmlib/mixer/linear_attention.hpp>
#include <ssmlib/mixer/mamba1.hpp>
#include <ssmlib/mixer/mamba2.hpp>
#include <ssmlib/model/block.hpp>
#include <ssmlib/model/config.hpp>
#include <ssmlib/nn/mlp.hpp>
#include <ssmlib/nn/norm.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <memory>
#include <utility>

/// @file
/// The layers that a pattern can name. One function a mixer, with everything of its layers behind
/// it, so that each can be compiled by itself.

namespace ssm::detail {

/// Projections into the residual stream start smaller the more of them there are.
[[nodiscard]] inline double residual_scale(const model_config& c) {
  return 1.0 / std::sqrt(static_cast<double>(c.pattern.size()));
}

/// What all mixers of a model are told alike, where their options have a place for it.
template <class Options>
void set_from(const model_config& c, Options& options) {
  if constexpr (requires { options.width; }) options.width = c.width;
  if constexpr (requires { options.out_scale; }) options.out_scale = residual_scale(c);
}

/// use(norm) with a new norm of the config's kind.
template <Floating T, Backend B, class F>
auto with_norm(const model_config& c, F use) {
  if (c.norm == norm_kind::rms)
    return use(ssm::rms_norm<T, B>::make(c.width, {.eps = c.norm_epsilon}));
  return use(ssm::layer_norm<T, B>::make(c.width, c.norm_epsilon));
}

/// use(mlp) with a new MLP of the config's kind.
template <Floating T, Backend B, class F>
auto with_mlp(const model_config& c, std::uint64_t seed, F use) {
  const mlp_options o{.bias = false, .seed = seed + 50, .output_scale = residual_scale(c)};
  if (c.mlp == mlp_kind::gelu) return use(gelu_mlp<T, B>::make(c.width, c.mlp_width(), o));
  return use(swiglu_mlp<T, B>::make(c.width, c.mlp_width(), o));
}

template <class Mixer>
using block_of = any_block<typename Mixer::value_type, typename Mixer::backend>;

template <class Mixer, class Options>
[[nodiscard]] std::shared_ptr<block_of<Mixer>> make_mixer_block(const model_config& c,
                                                                Options options,
                                                                std::uint64_t seed) {
  using T = typename Mixer::value_type;
  using B = typename Mixer::backend;
  set_from(c, options);
  return with_norm<T, B>(c, [&](auto norm) -> std::shared_ptr<any_block<T, B>> {
    return std::make_shared<mixer_block<decltype(norm), Mixer>>(norm, Mixer(options, seed));
  });
}

template <class Mixer, class Options>
[[nodiscard]] std::shared_ptr<block_of<Mixer>> make_parallel_block(const model_config& c,
                                                                   Options options,
                                                                   std::uint64_t seed) {
  using T = typename Mixer::value_type;
  using B = typename Mixer::backend;
  set_from(c, options);
  return with_norm<T, B>(c, [&](auto norm) {
    return with_mlp<T, B>(c, seed, [&](auto mlp) -> std::shared_ptr<any_block<T, B>> {
      return std::make_shared<parallel_block<decltype(norm), Mixer, decltype(mlp)>>(
          norm, Mixer(options, seed), mlp);
    });
  });
}

template <Floating T, Backend B>
[[nodiscard]] std::shared_ptr<any_block<T, B>> make_mlp_block(const model_config& c,
                                                              std::uint64_t seed) {
  return with_norm<T, B>(c, [&](auto norm) {
    return with_mlp<T, B>(c, seed, [&](auto mlp) -> std::shared_ptr<any_block<T, B>> {
      return std::make_shared<mlp_block<T, B, decltype(norm), decltype(mlp)>>(norm, mlp);
    });
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      block_attention,                                                                             \
      std::shared_ptr<any_block<T>> make_mixer_block<attention<T>, attention_options>(             \
          const model_config&, attention_options, std::uint64_t));                                 \
  SSMLIB_INSTANTIATE(                                                                              \
      block_attention,                                                                             \
      std::shared_ptr<any_block<T>> make_parallel_block<attention<T>, attention_options>(          \
          const model_config&, attention_options, std::uint64_t));                                 \
  SSMLIB_INSTANTIATE(block_mamba2,                                                                 \
                     std::shared_ptr<any_block<T>> make_mixer_block<mamba2<T>, mamba2_options>(    \
                         const model_config&, mamba2_options, std::uint64_t));                     \
  SSMLIB_INSTANTIATE(                                                                              \
      block_discrete_mamba2,                                                                       \
      std::shared_ptr<any_block<T>> make_mixer_block<discrete_mamba2<T>, discrete_mamba2_options>( \
          const model_config&, discrete_mamba2_options, std::uint64_t));                           \
  SSMLIB_INSTANTIATE(block_discrete_mamba2,                                                        \
                     std::shared_ptr<any_block<T>>                                                 \
                         make_parallel_block<discrete_mamba2<T>, discrete_mamba2_options>(         \
                             const model_config&, discrete_mamba2_options, std::uint64_t));        \
  SSMLIB_INSTANTIATE(block_mamba1,                                                                 \
                     std::shared_ptr<any_block<T>> make_mixer_block<mamba1<T>, mamba1_options>(    \
                         const model_config&, mamba1_options, std::uint64_t));                     \
  SSMLIB_INSTANTIATE(                                                                              \
      block_linear_attention,                                                                      \
      std::shared_ptr<any_block<T>> make_mixer_block<retention<T>, retention_options>(             \
          const model_config&, retention_options, std::uint64_t));                                 \
  SSMLIB_INSTANTIATE(block_linear_attention,                                                       \
                     std::shared_ptr<any_block<T>>                                                 \
                         make_mixer_block<linear_attention<T>, linear_attention_options>(          \
                             const model_config&, linear_attention_options, std::uint64_t));       \
  SSMLIB_INSTANTIATE(                                                                              \
      block_gated_delta_net,                                                                       \
      std::shared_ptr<any_block<T>> make_mixer_block<gated_delta_net<T>, gated_delta_net_options>( \
          const model_config&, gated_delta_net_options, std::uint64_t));                           \
  SSMLIB_INSTANTIATE(block_mlp, std::shared_ptr<any_block<T>> make_mlp_block<T, cpu>(              \
                                    const model_config&, std::uint64_t))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::detail

namespace ssm {

/// A layer x + mixer(norm(x)) with a mixer of any type, for own_layer::make.
/// @tparam Mixer   a SequenceMixer, made of (options, seed)
/// @param options  its `width` and `out_scale`, where it has them, are set as for the other layers
template <class Mixer, class Options>
requires SequenceMixer<Mixer> && std::constructible_from<Mixer, Options, std::uint64_t>
[[nodiscard]] std::shared_ptr<detail::block_of<Mixer>> mixer_layer(const model_config& c,
                                                                   Options options,
                                                                   std::uint64_t seed) {
  return detail::make_mixer_block<Mixer>(c, std::move(options), seed);
}

/// The same in parallel with an MLP: x + mixer(n) + mlp(n), n = norm(x).
template <class Mixer, class Options>
requires SequenceMixer<Mixer> && std::constructible_from<Mixer, Options, std::uint64_t>
[[nodiscard]] std::shared_ptr<detail::block_of<Mixer>> parallel_layer(const model_config& c,
                                                                      Options options,
                                                                      std::uint64_t seed) {
  return detail::make_parallel_block<Mixer>(c, std::move(options), seed);
}

}  // namespace ssm
