#pragma once

#include "device.hpp"
#include "interrupt.hpp"
#include <ssmlib/ssmlib.hpp>

#include <cmath>
#include <cstdint>
#include <numbers>
#include <span>
#include <string>
#include <vector>

namespace demo {

/// What runs on the CPU.
using model = ssm::language_model<float>;

/// Bits per byte of a text under a model that reads windows of `window` bytes. Windows overlap by
/// half and score their second half, so that every byte but the first few has at least half a
/// window of context; all bytes but the first are scored once. @throws interrupted  Ctrl-C.
template <class T, class B>
[[nodiscard]] double bits_per_byte(const ssm::language_model<T, B>& m,
                                   std::span<const std::uint8_t> text, ssm::index_t window,
                                   const typename B::context& ctx) {
  const ssm::pass<T, B> p{ctx, nullptr, false};
  const ssm::index_t half = window / 2, n = static_cast<ssm::index_t>(text.size());
  double nats = 0;
  ssm::index_t scored = 0;
  constexpr ssm::index_t batch = 16;
  std::vector<ssm::index_t> starts;
  for (ssm::index_t begin = 0; begin == 0 || begin + half + 1 < n; begin += half) {
    starts.push_back(begin);
  }
  for (std::size_t i = 0; i < starts.size(); i += batch) {
    stop_if_requested();
    const std::size_t end = std::min(starts.size(), i + batch);
    ssm::token_batch tokens{ssm::tensor<std::int32_t, 2>(ssm::index_t(end - i), window),
                            ssm::tensor<std::int32_t, 2>(ssm::index_t(end - i), window)};
    tokens.inputs.fill(0);
    tokens.targets.fill(ssm::no_target);
    for (std::size_t j = i; j < end; ++j) {
      const auto row = static_cast<ssm::index_t>(j - i);
      for (ssm::index_t t = 0; t < window && starts[j] + t + 1 < n; ++t) {
        const auto at = static_cast<std::size_t>(starts[j] + t);
        tokens.inputs(row, t) = text[at];
        if (starts[j] == 0 || t >= half) tokens.targets(row, t) = text[at + 1];
      }
    }
    const auto loss = ssm::lm_cross_entropy(p, m.hidden(p, tokens.inputs), m.head(), tokens.targets,
                                            {.ignore_index = ssm::no_target});
    nats += loss.sum();
    scored += loss.tokens;
  }
  return nats / std::numbers::ln2 / static_cast<double>(std::max<ssm::index_t>(scored, 1));
}

[[nodiscard]] inline std::string text_of(const std::vector<std::int32_t>& tokens) {
  std::string text;
  for (const std::int32_t t : tokens)
    text += static_cast<char>(t);
  return text;
}

/// Entry [t, s] of one head of a layer's mixer, for a text: (T, T) row by row.
template <class T, class B>
[[nodiscard]] std::vector<float> mixer_matrix(const ssm::language_model<T, B>& m,
                                              ssm::index_t layer, ssm::index_t head,
                                              const ssm::tensor<T, 3, B>& layer_input,
                                              const typename B::context& ctx) {
  const ssm::index_t n = layer_input.extent(1);
  const auto panels = m.block(layer).mixer_matrix({ctx, nullptr, false}, layer_input,
                                                  ssm::sequence_layout::rectangular(1, n));
  const ssm::tensor<float, 3> all = device<B>::to_host(panels->panel(ctx, 0, 0, 0, n));
  std::vector<float> values;
  const ssm::index_t h = ssm::group_of(head, m.config().attention.heads, all.extent(1));
  for (ssm::index_t t = 0; t < n; ++t) {
    for (ssm::index_t s = 0; s < n; ++s)
      values.push_back(all(t, h, s));
  }
  return values;
}

/// The input of a layer for a text. @return (1, T, d)
template <class T, class B>
[[nodiscard]] ssm::tensor<T, 3, B> layer_input(const ssm::language_model<T, B>& m,
                                               ssm::index_t layer,
                                               std::span<const std::uint8_t> text,
                                               const typename B::context& ctx) {
  ssm::tensor<std::int32_t, 2> ids(1, static_cast<ssm::index_t>(text.size()));
  for (std::size_t i = 0; i < text.size(); ++i)
    ids(0, static_cast<ssm::index_t>(i)) = text[i];
  const ssm::pass<T, B> p{ctx, nullptr, false};
  ssm::tensor<T, 3, B> x = m.embed(p, ids);
  const auto layout = ssm::sequence_layout::rectangular(1, ids.extent(1));
  for (ssm::index_t i = 0; i < layer; ++i)
    x = m.block(i).forward(p, x, layout);
  return x;
}

}  // namespace demo
