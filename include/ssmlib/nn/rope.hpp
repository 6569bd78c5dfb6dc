#pragma once

#include <ssmlib/kernels/cpu/rope.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/pass.hpp>
#include <ssmlib/tensor/layout.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>
#include <string>

namespace ssm {

/// The frequency rule of Llama 3.1: wavelengths above original_length / low are stretched by
/// `factor`, those below original_length / high are kept, those between are blended.
struct llama3_scaling {
  double factor = 8.0;
  double low = 1.0, high = 4.0;
  double original_length = 8192.0;

  friend bool operator==(const llama3_scaling&, const llama3_scaling&) = default;
};

/// Rotary position embedding: feature pair i of a token at position p is turned by the angle
///
///     p * base^(-2 i / rot),   rot = fraction * D, rounded down to an even number
struct rope_options {
  double fraction = 1.0;  ///< of the features that are turned, the first ones; in [0, 1]
  double base = 10000.0;
  bool interleaved =
      false;  ///< pairs (2i, 2i + 1), as in GPT-J; else (i, i + rot / 2), as in Llama
  std::optional<llama3_scaling> scaling = {};

  friend bool operator==(const rope_options&, const rope_options&) = default;
};

namespace detail {

/// @return (pairs) radians a token. @throws value_error  an option is out of range.
[[nodiscard]] inline tensor<double, 1> rope_frequencies(const rope_options& options,
                                                        index_t features) {
  if (!(options.fraction >= 0.0 && options.fraction <= 1.0) || !(options.base > 0.0)) {
    throw value_error("ssm: rope: the fraction is " + std::to_string(options.fraction) +
                      " and the base " + std::to_string(options.base) +
                      "; wanted a fraction in [0, 1] and a base above 0");
  }
  const auto turned =
      static_cast<index_t>(std::floor(options.fraction * static_cast<double>(features) + 1e-9));
  const index_t pairs = turned / 2;
  tensor<double, 1> frequency(pairs);
  for (index_t i = 0; i < pairs; ++i) {
    frequency(i) = std::pow(options.base, -static_cast<double>(i) / static_cast<double>(pairs));
  }
  if (!options.scaling) return frequency;
  const llama3_scaling& s = *options.scaling;
  if (!(s.factor > 0.0) || !(s.high > s.low) || !(s.low > 0.0) || !(s.original_length > 0.0)) {
    throw value_error("ssm: rope: llama3 scaling has factor " + std::to_string(s.factor) +
                      ", low " + std::to_string(s.low) + ", high " + std::to_string(s.high) +
                      ", original length " + std::to_string(s.original_length) +
                      "; wanted numbers above 0 and low < high");
  }
  for (index_t i = 0; i < pairs; ++i) {
    // How often the pair turns within the original length, between low (0) and high (1).
    const double turns = s.original_length * frequency(i) / (2.0 * std::numbers::pi);
    const double kept = std::clamp((turns - s.low) / (s.high - s.low), 0.0, 1.0);
    frequency(i) *= kept + (1.0 - kept) / s.factor;
  }
  return frequency;
}

/// Cosines and sines of every token. @return (tokens, 2, columns)
template <Real T>
[[nodiscard]] tensor<T, 3> rope_table(const cpu::context& ctx, const sequence_layout& layout,
                                      const rope_options& options, index_t features) {
  const tensor<double, 1> frequency = rope_frequencies(options, features);
  const index_t columns = frequency.extent(0) * (options.interleaved ? 2 : 1);
  const tensor<T, 3> table(layout.tokens(), 2, columns);
  const index_t* offsets = layout.offsets();
  const auto position = [&](index_t token) {
    const index_t* next = std::upper_bound(offsets, offsets + layout.sequences() + 1, token);
    const index_t i = next - offsets - 1;
    return layout.first_position(i) + token - layout.begin(i);
  };
  kernels::rope_table<T>(ctx, frequency.const_view(), options.interleaved, position, table.view());
  return table;
}

}  // namespace detail

/// x with its feature pairs turned by their positions' angles: position first_position(i) + t for
/// token t of sequence i. The product of a query and a key then depends on their distance.
///
/// @param x       (b, T, H, D)
/// @param layout  the sequences; default: b sequences of length T from position 0
/// @return        (b, T, H, D); the gradient is the turn back
/// @throws shape_error  the layout covers another number of tokens.
/// @throws value_error  an option is out of range.
/// @cost   O(tokens H D); angles in double, once a token for all heads
/// @source Su et al. 2021, arXiv:2104.09864, section 3.2.
template <Real T>
[[nodiscard]] tensor<T, 4> rope(const pass<T>& p, const tensor<T, 4>& x,
                                const sequence_layout& layout, const rope_options& options = {}) {
  const sequence_layout sequences =
      layout ? layout : sequence_layout::rectangular(x.extent(0), x.extent(1));
  if (sequences.tokens() != x.extent(0) * x.extent(1)) {
    throw shape_error("ssm: rope: the layout has " + std::to_string(sequences.tokens()) +
                      " tokens, x is " + to_string<4>(x.extents()) + "; wanted as many");
  }
  const tensor<T, 3> table = detail::rope_table<T>(p.ctx, sequences, options, x.extent(3));
  const tensor<T, 4> y(x.extents());
  const tensor<T, 3> rows = detail::input_tokens(x);
  kernels::rope_rotate<false, T>(p.ctx, options.interleaved, false, table.const_view(),
                                 rows.const_view(), detail::input_tokens(y).view());
  if (p.tape == nullptr || !p.tape->wants(x)) return y;
  p.tape->record(y, [x, y, table, interleaved = options.interleaved, t = p.tape, &ctx = p.ctx] {
    const detail::output_tokens<T, 4> dx(t->gradient(x));
    const tensor<T, 3> dy = detail::input_tokens(t->gradient(y));
    kernels::rope_rotate<true, T>(ctx, interleaved, true, table.const_view(), dy.const_view(),
                                  dx.get().view());
    dx.finish();
  });
  return y;
}

}  // namespace ssm
