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
template <Real T, class F>
auto with_norm(const model_config& c, F use) {
  if (c.norm == norm_kind::rms)
    return use(ssm::rms_norm<T>::make(c.width, {.eps = c.norm_epsilon}));
  return use(ssm::layer_norm<T>::make(c.width, c.norm_epsilon));
}

/// use(mlp) with a new MLP of the config's kind.
template <Real T, class F>
auto with_mlp(const model_config& c, std::uint64_t seed, F use) {
  const mlp_options o{.bias = false, .seed = seed + 50, .output_scale = residual_scale(c)};
  if (c.mlp == mlp_kind::gelu) return use(gelu_mlp<T>::make(c.width, c.mlp_width(), o));
  return use(swiglu_mlp<T>::make(c.width, c.mlp_width(), o));
}

template <class Mixer, Real T, class Options>
[[nodiscard]] std::shared_ptr<any_block<T>> make_mixer_block(const model_config& c, Options options,
                                                             std::uint64_t seed) {
  set_from(c, options);
  return with_norm<T>(c, [&](auto norm) -> std::shared_ptr<any_block<T>> {
    return std::make_shared<mixer_block<T, decltype(norm), Mixer>>(norm, Mixer(options, seed));
  });
}

template <class Mixer, Real T, class Options>
[[nodiscard]] std::shared_ptr<any_block<T>> make_parallel_block(const model_config& c,
                                                                Options options,
                                                                std::uint64_t seed) {
  set_from(c, options);
  return with_norm<T>(c, [&](auto norm) {
    return with_mlp<T>(c, seed, [&](auto mlp) -> std::shared_ptr<any_block<T>> {
      return std::make_shared<parallel_block<T, decltype(norm), Mixer, decltype(mlp)>>(
          norm, Mixer(options, seed), mlp);
    });
  });
}

template <Real T>
[[nodiscard]] std::shared_ptr<any_block<T>> make_mlp_block(const model_config& c,
                                                           std::uint64_t seed) {
  return with_norm<T>(c, [&](auto norm) {
    return with_mlp<T>(c, seed, [&](auto mlp) -> std::shared_ptr<any_block<T>> {
      return std::make_shared<mlp_block<T, decltype(norm), decltype(mlp)>>(norm, mlp);
    });
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      block_attention,                                                                             \
      std::shared_ptr<any_block<T>> make_mixer_block<attention<T>, T, attention_options>(          \
          const model_config&, attention_options, std::uint64_t));                                 \
  SSMLIB_INSTANTIATE(                                                                              \
      block_attention,                                                                             \
      std::shared_ptr<any_block<T>> make_parallel_block<attention<T>, T, attention_options>(       \
          const model_config&, attention_options, std::uint64_t));                                 \
  SSMLIB_INSTANTIATE(block_mamba2,                                                                 \
                     std::shared_ptr<any_block<T>> make_mixer_block<mamba2<T>, T, mamba2_options>( \
                         const model_config&, mamba2_options, std::uint64_t));                     \
  SSMLIB_INSTANTIATE(block_discrete_mamba2,                                                        \
                     std::shared_ptr<any_block<T>>                                                 \
                         make_mixer_block<discrete_mamba2<T>, T, discrete_mamba2_options>(         \
                             const model_config&, discrete_mamba2_options, std::uint64_t));        \
  SSMLIB_INSTANTIATE(block_discrete_mamba2,                                                        \
                     std::shared_ptr<any_block<T>>                                                 \
                         make_parallel_block<discrete_mamba2<T>, T, discrete_mamba2_options>(      \
                             const model_config&, discrete_mamba2_options, std::uint64_t));        \
  SSMLIB_INSTANTIATE(block_mamba1,                                                                 \
                     std::shared_ptr<any_block<T>> make_mixer_block<mamba1<T>, T, mamba1_options>( \
                         const model_config&, mamba1_options, std::uint64_t));                     \
  SSMLIB_INSTANTIATE(                                                                              \
      block_linear_attention,                                                                      \
      std::shared_ptr<any_block<T>> make_mixer_block<retention<T>, T, retention_options>(          \
          const model_config&, retention_options, std::uint64_t));                                 \
  SSMLIB_INSTANTIATE(block_linear_attention,                                                       \
                     std::shared_ptr<any_block<T>>                                                 \
                         make_mixer_block<linear_attention<T>, T, linear_attention_options>(       \
                             const model_config&, linear_attention_options, std::uint64_t));       \
  SSMLIB_INSTANTIATE(block_gated_delta_net,                                                        \
                     std::shared_ptr<any_block<T>>                                                 \
                         make_mixer_block<gated_delta_net<T>, T, gated_delta_net_options>(         \
                             const model_config&, gated_delta_net_options, std::uint64_t));        \
  SSMLIB_INSTANTIATE(block_mlp, std::shared_ptr<any_block<T>> make_mlp_block<T>(                   \
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
[[nodiscard]] std::shared_ptr<any_block<typename Mixer::value_type>> mixer_layer(
    const model_config& c, Options options, std::uint64_t seed) {
  return detail::make_mixer_block<Mixer, typename Mixer::value_type>(c, std::move(options), seed);
}

/// The same in parallel with an MLP: x + mixer(n) + mlp(n), n = norm(x).
template <class Mixer, class Options>
requires SequenceMixer<Mixer> && std::constructible_from<Mixer, Options, std::uint64_t>
[[nodiscard]] std::shared_ptr<any_block<typename Mixer::value_type>> parallel_layer(
    const model_config& c, Options options, std::uint64_t seed) {
  return detail::make_parallel_block<Mixer, typename Mixer::value_type>(c, std::move(options),
                                                                        seed);
}

}  // namespace ssm
