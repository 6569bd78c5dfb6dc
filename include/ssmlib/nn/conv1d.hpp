#pragma once

#include <ssmlib/kernels/cpu/conv1d.hpp>
#include <ssmlib/lower/state.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/parameter.hpp>
#include <ssmlib/nn/pass.hpp>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace ssm {

/// What follows the convolution: nothing, or silu.
using kernels::conv1d_activation;

template <Real T>
struct conv1d_options {
  conv1d_activation activation = conv1d_activation::none;
  sequence_layout layout{};  ///< default: b sequences of T tokens
  tensor<T, 3> initial{};    ///< (sequences, width - 1, channels), oldest first; absent: zeros
};

template <Real T>
struct conv1d_result {
  tensor<T, 3> y;            ///< (b, T, channels)
  tensor<T, 3> final_state;  ///< (sequences, width - 1, channels): the last inputs, oldest first
};

namespace detail {

/// The operands of one call in the form that the kernels take. Owns what it had to copy.
template <Real T>
class conv1d_call {
 public:
  conv1d_call(const tensor<T, 3>& x, const tensor<T, 2>& weight, const tensor<T, 1>& bias,
              conv1d_activation activation, const sequence_layout& layout)
      : layout_(layout ? layout : sequence_layout::rectangular(x.extent(0), x.extent(1))),
        rows_(input_tokens(x)),
        bias_(bias),
        activation_(activation) {
    const index_t channels = x.extent(2);
    if (!weight || weight.extent(0) != channels || weight.extent(1) < 1) {
      throw shape_error("ssm: causal_conv1d: x is " + to_string<3>(x.extents()) +
                        ", the weight is " + to_string<2>(weight.extents()) + "; wanted (" +
                        std::to_string(channels) + " x width)");
    }
    check_parameter<T, 1>("causal_conv1d", "the bias", bias, {channels});
    if (layout_.tokens() != x.extent(0) * x.extent(1)) {
      throw shape_error("ssm: causal_conv1d: x is " + to_string<3>(x.extents()) +
                        ", the layout has " + std::to_string(layout_.tokens()) +
                        " tokens; wanted as many");
    }
    // (width, channels), so that a tap is a row; one row of zeros follows.
    const index_t width = weight.extent(1);
    taps_ = tensor<T, 2>(width + 1, channels);
    for (index_t j = 0; j < width; ++j) {
      for (index_t c = 0; c < channels; ++c)
        taps_(j, c) = weight(c, j);
    }
    std::fill_n(zeros(), channels, T(0));
  }

  [[nodiscard]] index_t width() const { return taps_.extent(0) - 1; }
  [[nodiscard]] const sequence_layout& layout() const { return layout_; }
  [[nodiscard]] const tensor<T, 2>& rows() const { return rows_; }

  [[nodiscard]] kernels::conv1d_problem<T> problem(
      const kernels::conv1d_history<const T>& history) const {
    return {rows_.const_view(),
            taps_.data(),
            bias_ ? bias_.data() : zeros(),
            zeros(),
            width(),
            activation_,
            history,
            layout_.offsets(),
            layout_.sequences()};
  }
  /// The history that an initial state is. @throws shape_error  it has another shape.
  [[nodiscard]] kernels::conv1d_history<const T> history(const tensor<T, 3>& initial) const {
    check_parameter<T, 3>("causal_conv1d", "the initial state", initial,
                          {layout_.sequences(), width() - 1, rows_.extent(1)});
    if (initial.size() == 0) return {};
    return {initial.data(), width() - 1, rows_.extent(1), nullptr};
  }

 private:
  [[nodiscard]] T* zeros() const { return taps_.data() + width() * taps_.extent(1); }

  sequence_layout layout_;
  tensor<T, 2> rows_, taps_;
  tensor<T, 1> bias_;
  conv1d_activation activation_;
};

/// Adds the gradient of the final inputs to those of the tokens and of the initial state.
template <Real T>
void conv1d_final_inputs_vjp(const sequence_layout& layout, const tensor<T, 3>& d_final,
                             const tensor<T, 2>& dx, const tensor<T, 3>& d_initial) {
  const index_t rows = d_final.extent(1), channels = d_final.extent(2);
  for (index_t i = 0; i < layout.sequences(); ++i) {
    for (index_t r = 0; r < rows; ++r) {
      const index_t t = layout.end(i) - rows + r, before = layout.begin(i) - t;
      T* to = nullptr;
      if (before <= 0 && dx) to = &dx(t, 0);
      if (before > 0 && d_initial) to = &d_initial(i, rows - before, 0);
      if (to != nullptr) kernels::axpy(channels, T(1), &d_final(i, r, 0), to);
    }
  }
}

}  // namespace detail

namespace op {

/// Causal depthwise convolution along time:
///
///     y[t, c] = act(bias[c] + sum over j of weight[c, j] x[t - (width - 1) + j, c])
///
/// Taps never reach across the beginning of a sequence: there they meet the initial state.
/// @param x       (b, T, channels); may be a feature slice of a larger tensor
/// @param weight  (channels, width); tap width - 1 meets the current token
/// @param bias    (channels), or absent
/// @return        (b, T, channels)
/// @throws shape_error  the sizes do not fit.
/// @cost   2 width flops an element; nothing but x is kept for the backward pass.
template <Real T>
[[nodiscard]] tensor<T, 3> causal_conv1d(const pass<T>& p, const tensor<T, 3>& x,
                                         const tensor<T, 2>& weight, const tensor<T, 1>& bias = {},
                                         const std::type_identity_t<conv1d_options<T>>& o = {}) {
  const detail::conv1d_call<T> call(x, weight, bias, o.activation, o.layout);
  tensor<T, 3> y(x.extents());
  kernels::causal_conv1d(p.ctx, call.problem(call.history(o.initial)),
                         detail::input_tokens(y).view());
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(weight) || p.tape->wants(bias) ||
                             p.tape->wants(o.initial))) {
    return y;
  }
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3> dx(t->gradient(x));
    const tensor<T, 3> d_initial = t->gradient(o.initial);
    kernels::conv1d_gradients<T> d{
        dx.get().view(), t->gradient(weight).view(), t->gradient(bias).data(), {}};
    if (d_initial.size() != 0) {
      d.history = {d_initial.data(), call.width() - 1, x.extent(2), nullptr};
    }
    kernels::causal_conv1d_vjp(ctx, call.problem(call.history(o.initial)),
                               detail::input_tokens(t->gradient(y)).const_view(), d);
    dx.finish();
  });
  return y;
}

/// The same, and the inputs that the tokens after it would see: the state for advance().
template <Real T>
[[nodiscard]] conv1d_result<T> causal_conv1d_with_state(
    const pass<T>& p, const tensor<T, 3>& x, const tensor<T, 2>& weight,
    const tensor<T, 1>& bias = {}, const std::type_identity_t<conv1d_options<T>>& o = {}) {
  const detail::conv1d_call<T> call(x, weight, bias, o.activation, o.layout);
  conv1d_result<T> r{causal_conv1d(p, x, weight, bias, o),
                     tensor<T, 3>(call.layout().sequences(), call.width() - 1, x.extent(2))};
  kernels::conv1d_final_inputs(call.problem(call.history(o.initial)), r.final_state.view());
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(o.initial))) return r;
  p.tape->record(r.final_state, [x, initial = o.initial, layout = call.layout(),
                                 final_state = r.final_state, t = p.tape] {
    const detail::output_tokens<T, 3> dx(t->gradient(x));
    detail::conv1d_final_inputs_vjp(layout, t->gradient(final_state), dx.get(),
                                    t->gradient(initial));
    dx.finish();
  });
  return r;
}

}  // namespace op

/// The last inputs of a causal convolution, per sequence: a ring of width - 1 + max_rollback rows.
/// A value: copying is a fork, == compares the inputs that the next token can meet (and positions).
template <Real T>
class conv_state {
 public:
  conv_state() = default;
  /// @throws value_error  a count that is negative, or a width below 1.
  conv_state(index_t sequences, index_t channels, index_t width, index_t max_rollback = 0)
      : positions_(sequences, max_rollback), width_(width) {
    if (width < 1 || channels < 0) {
      throw value_error("ssm: conv_state of width " + std::to_string(width) + " and " +
                        std::to_string(channels) +
                        " channels: wanted a width of at least 1 and no negative count");
    }
    ring_ = tensor<T, 3>::zeros(sequences, width - 1 + max_rollback, channels);
  }
  conv_state(const conv_state& other)
      : positions_(other.positions_), ring_(other.ring_.clone()), width_(other.width_) {}
  conv_state(conv_state&&) = default;
  conv_state& operator=(conv_state other) {
    positions_ = std::move(other.positions_);
    ring_ = std::move(other.ring_);
    width_ = other.width_;
    return *this;
  }

  [[nodiscard]] index_t sequences() const { return positions_.sequences(); }
  [[nodiscard]] index_t channels() const { return ring_.extent(2); }
  [[nodiscard]] index_t width() const { return width_; }
  [[nodiscard]] index_t position(index_t i) const { return positions_[i]; }
  [[nodiscard]] index_t max_rollback() const { return positions_.max_rollback(); }
  [[nodiscard]] index_t can_roll_back(index_t i) const { return positions_.undoable(i); }

  /// Undoes the last n tokens. @throws value_error  more than can be undone; nothing changes then.
  void rollback(index_t n) { rollback(detail::same_count(sequences(), n)); }
  void rollback(std::span<const index_t> n) {
    detail::roll_back_each(positions_, n, [](index_t, index_t) {});
  }

  /// The inputs that the next token meets, (sequences, width - 1, channels), oldest first; a copy.
  [[nodiscard]] tensor<T, 3> window() const {
    tensor<T, 3> out(sequences(), std::max<index_t>(width_ - 1, 0), channels());
    for (index_t i = 0; i < sequences(); ++i) {
      for (index_t back = 1; back < width_; ++back) {
        std::copy_n(row(i, back), channels(), &out(i, width_ - 1 - back, 0));
      }
    }
    return out;
  }

  friend bool operator==(const conv_state& a, const conv_state& b) {
    return a.width_ == b.width_ && a.positions_ == b.positions_ &&
           detail::equal_elements(a.window(), b.window());
  }

  /// Whether they fit the same convolutions, but for the number of sequences.
  [[nodiscard]] bool same_sizes(const conv_state& other) const {
    return width_ == other.width_ && channels() == other.channels();
  }

  /// Convolves the new tokens of every sequence (none is allowed) from where the state stands, and
  /// moves the state behind them. A token's bits depend on its inputs alone, so every split of a
  /// sequence gives the same. Nothing is recorded on the tape.
  ///
  /// @param x       (b, T, channels)
  /// @param weight  (channels, width)
  /// @param o       activation and layout (one sequence for each of the state's); no initial state
  /// @return        (b, T, channels)
  /// @throws shape_error  the sizes do not fit. @throws value_error  an initial state is given.
  [[nodiscard]] tensor<T, 3> advance(const pass<T>& p, const tensor<T, 3>& x,
                                     const tensor<T, 2>& weight, const tensor<T, 1>& bias,
                                     const conv1d_options<T>& o = {}) {
    const detail::conv1d_call<T> call(x, weight, bias, o.activation, o.layout);
    const sequence_layout& layout = call.layout();
    positions_.check_layout(layout);
    if (o.initial) {
      throw value_error(
          "ssm: advance: the convolution's state is its initial state; leave options.initial out");
    }
    if (call.width() != width_ || x.extent(2) != channels()) {
      throw shape_error("ssm: advance: the convolution has width " + std::to_string(call.width()) +
                        " and " + std::to_string(x.extent(2)) + " channels, its state " +
                        std::to_string(width_) + " and " + std::to_string(channels()) +
                        "; wanted the same");
    }
    tensor<T, 3> y(x.extents());
    const index_t kept = ring_.extent(1);
    kernels::conv1d_history<const T> history;
    if (kept > 0) history = {ring_.data(), kept, channels(), positions_.all().data()};
    kernels::causal_conv1d(p.ctx, call.problem(history), detail::input_tokens(y).view());
    for (index_t i = 0; i < sequences(); ++i) {
      const index_t length = layout.length(i);
      positions_.advance(i, length);
      for (index_t back = std::min(length, kept); back >= 1; --back) {
        std::copy_n(&call.rows()(layout.end(i) - back, 0), channels(), row(i, back));
      }
    }
    return y;
  }

 private:
  [[nodiscard]] T* row(index_t i, index_t back) const {
    return kernels::conv1d_history<T>{ring_.data(), ring_.extent(1), channels(),
                                      positions_.all().data()}
        .row(i, back);
  }

  detail::state_positions positions_;
  tensor<T, 3> ring_;
  index_t width_ = 1;
};

/// A causal depthwise convolution with its parameters.
template <Real T>
struct causal_conv1d {
  tensor<T, 2> weight;  ///< (channels, width)
  tensor<T, 1> bias;    ///< (channels), or absent
  conv1d_activation activation = conv1d_activation::silu;

  /// Weight and bias from U(-1/sqrt(width), 1/sqrt(width)), as PyTorch's depthwise convolution.
  [[nodiscard]] static causal_conv1d make(index_t channels, index_t width, std::uint64_t seed,
                                          conv1d_activation activation = conv1d_activation::silu,
                                          bool bias = true) {
    causal_conv1d layer{
        init::fan_in_uniform<T, 2>({channels, width}, width, 2 * seed), {}, activation};
    if (bias) layer.bias = init::fan_in_uniform<T, 1>({channels}, width, 2 * seed + 1);
    return layer;
  }

  [[nodiscard]] tensor<T, 3> operator()(const pass<T>& p, const tensor<T, 3>& x,
                                        const sequence_layout& layout = {}) const {
    return op::causal_conv1d(p, x, weight, bias, {activation, layout, {}});
  }
  [[nodiscard]] conv_state<T> make_state(index_t sequences, index_t max_rollback = 0) const {
    return {sequences, weight.extent(0), weight.extent(1), max_rollback};
  }
  [[nodiscard]] tensor<T, 3> advance(const pass<T>& p, const tensor<T, 3>& x, conv_state<T>& state,
                                     const sequence_layout& layout = {}) const {
    return state.advance(p, x, weight, bias, {activation, layout, {}});
  }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::filter);
    f("bias", self.bias, parameter_kind::bias);
  }
};

}  // namespace ssm
