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
#include <type_traits>

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

}  // namespace detail

/// Cosines and sines of every token, as the backend's apply_rope takes them.
template <Floating T>
[[nodiscard]] tensor<T, 3> apply_rope_table(const cpu::context& ctx, std::type_identity<T>,
                                            const sequence_layout& layout,
                                            const tensor<double, 1>& frequency, bool interleaved) {
  const index_t columns = frequency.extent(0) * (interleaved ? 2 : 1);
  const tensor<T, 3> table(layout.tokens(), 2, columns);
  const index_t* offsets = layout.offsets();
  const auto position = [&](index_t token) {
    const index_t* next = std::upper_bound(offsets, offsets + layout.sequences() + 1, token);
    const index_t i = next - offsets - 1;
    return layout.first_position(i) + token - layout.begin(i);
  };
  kernels::rope_table<T>(ctx, frequency.const_view(), interleaved, position, table.view());
  return table;
}
/// y = x turned.
template <Real T>
void apply_rope(const cpu::context& ctx, bool interleaved, const tensor<T, 3>& table,
                const tensor<T, 3>& x, const tensor<T, 3>& y) {
  kernels::rope_rotate<false, T>(ctx, interleaved, false, table.const_view(), x.const_view(),
                                 y.view());
}
/// dx += dy turned back.
template <Real T>
void apply_rope_vjp(const cpu::context& ctx, bool interleaved, const tensor<T, 3>& table,
                    const tensor<T, 3>& dy, const tensor<T, 3>& dx) {
  kernels::rope_rotate<true, T>(ctx, interleaved, true, table.const_view(), dy.const_view(),
                                dx.view());
}

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
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 4, B> rope(const pass<T, B>& p, const tensor<T, 4, B>& x,
                                   const sequence_layout& layout,
                                   const rope_options& options = {}) {
  const sequence_layout sequences =
      layout ? layout : sequence_layout::rectangular(x.extent(0), x.extent(1));
  if (sequences.tokens() != x.extent(0) * x.extent(1)) {
    throw shape_error("ssm: rope: the layout has " + std::to_string(sequences.tokens()) +
                      " tokens, x is " + to_string<4>(x.extents()) + "; wanted as many");
  }
  const typename B::scope scope(p.ctx);
  const auto table =
      apply_rope_table(p.ctx, std::type_identity<T>{}, sequences,
                       detail::rope_frequencies(options, x.extent(3)), options.interleaved);
  const tensor<T, 4, B> y(x.extents());
  apply_rope(p.ctx, options.interleaved, table, detail::input_tokens(x), detail::input_tokens(y));
  if (p.tape == nullptr || !p.tape->wants(x)) return y;
  p.tape->record(y, [x, y, table, interleaved = options.interleaved, t = p.tape, &ctx = p.ctx] {
    const detail::output_tokens<T, 4, B> dx(t->gradient(x));
    apply_rope_vjp(ctx, interleaved, table, detail::input_tokens(t->gradient(y)), dx.get());
    dx.finish();
  });
  return y;
}

}  // namespace ssm
