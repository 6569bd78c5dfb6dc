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

template <Floating T, Backend B = cpu>
struct conv1d_options {
  conv1d_activation activation = conv1d_activation::none;
  sequence_layout layout{};   ///< default: b sequences of T tokens
  tensor<T, 3, B> initial{};  ///< (sequences, width - 1, channels), oldest first; absent: zeros
};

template <Floating T, Backend B = cpu>
struct conv1d_result {
  tensor<T, 3, B> y;            ///< (b, T, channels)
  tensor<T, 3, B> final_state;  ///< (sequences, width - 1, channels): the last inputs, oldest first
};

/// The operands of one convolution, checked. Weight and bias are those of the layer.
template <Floating T, Backend B = cpu>
struct conv1d_operands {
  tensor<T, 2, B> x;                ///< (tokens, channels)
  tensor<accum_t<T>, 2, B> weight;  ///< (channels, width)
  tensor<accum_t<T>, 1, B> bias;    ///< (channels), or absent
  conv1d_activation activation;
  sequence_layout layout;

  /// @throws shape_error  the sizes do not fit.
  conv1d_operands(const tensor<T, 3, B>& tokens, const tensor<accum_t<T>, 2, B>& filter,
                  const tensor<accum_t<T>, 1, B>& offset, conv1d_activation act,
                  const sequence_layout& sequences)
      : x(detail::input_tokens(tokens)),
        weight(filter),
        bias(offset),
        activation(act),
        layout(sequences ? sequences
                         : sequence_layout::rectangular(tokens.extent(0), tokens.extent(1))) {
    if (!weight || weight.extent(0) != channels() || weight.extent(1) < 1) {
      throw shape_error("ssm: causal_conv1d: x is " + to_string<3>(tokens.extents()) +
                        ", the weight is " + to_string<2>(weight.extents()) + "; wanted (" +
                        std::to_string(channels()) + " x width)");
    }
    detail::check_parameter<accum_t<T>, 1>("causal_conv1d", "the bias", bias, {channels()});
    if (layout.tokens() != x.extent(0)) {
      throw shape_error("ssm: causal_conv1d: x is " + to_string<3>(tokens.extents()) +
                        ", the layout has " + std::to_string(layout.tokens()) +
                        " tokens; wanted as many");
    }
  }

  [[nodiscard]] index_t channels() const { return x.extent(1); }
  [[nodiscard]] index_t width() const { return weight.extent(1); }
  void check_initial(const tensor<T, 3, B>& initial) const {
    detail::check_parameter<T, 3>("causal_conv1d", "the initial state", initial,
                                  {layout.sequences(), width() - 1, channels()});
  }
};

namespace detail {

/// The operands as the CPU's kernels take them: taps as rows, (width, channels), and a row of
/// zeros.
template <Real T>
class conv1d_taps {
 public:
  explicit conv1d_taps(const conv1d_operands<T>& o)
      : operands_(o), taps_(o.width() + 1, o.channels()) {
    for (index_t j = 0; j < o.width(); ++j) {
      for (index_t c = 0; c < o.channels(); ++c)
        taps_(j, c) = o.weight(c, j);
    }
    std::fill_n(zeros(), o.channels(), T(0));
  }
  [[nodiscard]] kernels::conv1d_problem<T> problem(
      const kernels::conv1d_history<const T>& history) const {
    const conv1d_operands<T>& o = operands_;
    return {o.x.const_view(), taps_.data(),       o.bias ? o.bias.data() : zeros(),
            zeros(),          o.width(),          o.activation,
            history,          o.layout.offsets(), o.layout.sequences()};
  }
  /// With an initial state as the history.
  [[nodiscard]] kernels::conv1d_problem<T> problem(const tensor<T, 3>& initial) const {
    if (initial.size() == 0) return problem(kernels::conv1d_history<const T>{});
    return problem({initial.data(), operands_.width() - 1, operands_.channels(), nullptr});
  }

 private:
  [[nodiscard]] T* zeros() const { return taps_.data() + operands_.width() * operands_.channels(); }

  const conv1d_operands<T>& operands_;
  tensor<T, 2> taps_;
};

}  // namespace detail

template <Real T>
void apply_conv1d(const cpu::context& ctx, const conv1d_operands<T>& o, const tensor<T, 3>& initial,
                  const tensor<T, 2>& y) {
  kernels::causal_conv1d(ctx, detail::conv1d_taps<T>(o).problem(initial), y.view());
}
/// Gradients that are wanted are added to.
template <Real T>
void apply_conv1d_vjp(const cpu::context& ctx, const conv1d_operands<T>& o,
                      const tensor<T, 3>& initial, const tensor<T, 2>& dy, const tensor<T, 2>& dx,
                      const tensor<T, 2>& d_weight, const tensor<T, 1>& d_bias,
                      const tensor<T, 3>& d_initial) {
  kernels::conv1d_gradients<T> d{dx.view(), d_weight.view(), d_bias.data(), {}};
  if (d_initial.size() != 0) d.history = {d_initial.data(), o.width() - 1, o.channels(), nullptr};
  kernels::causal_conv1d_vjp(ctx, detail::conv1d_taps<T>(o).problem(initial), dy.const_view(), d);
}
/// final (sequences, width - 1, channels) becomes the inputs that the next token meets.
template <Real T>
void apply_conv1d_final(const cpu::context&, const conv1d_operands<T>& o,
                        const tensor<T, 3>& initial, const tensor<T, 3>& final) {
  kernels::conv1d_final_inputs(detail::conv1d_taps<T>(o).problem(initial), final.view());
}
/// Adds the gradient of the final inputs to those of the tokens and of the initial state.
template <Real T>
void apply_conv1d_final_vjp(const cpu::context&, const sequence_layout& layout,
                            const tensor<T, 3>& d_final, const tensor<T, 2>& dx,
                            const tensor<T, 3>& d_initial) {
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
/// y from a ring of earlier inputs, (sequences, rows, channels); sequence i stands at position[i],
/// its input at position p in row p mod rows. Then the ring takes the new inputs.
template <Real T>
void apply_conv1d_step(const cpu::context& ctx, const conv1d_operands<T>& o,
                       const tensor<T, 3>& ring, std::span<const index_t> position,
                       const tensor<T, 2>& y) {
  const index_t kept = ring.extent(1);
  kernels::conv1d_history<const T> history;
  if (kept > 0) history = {ring.data(), kept, o.channels(), position.data()};
  kernels::causal_conv1d(ctx, detail::conv1d_taps<T>(o).problem(history), y.view());
  for (index_t i = 0; i < o.layout.sequences(); ++i) {
    const index_t length = o.layout.length(i), end = position[static_cast<std::size_t>(i)] + length;
    for (index_t back = std::min(length, kept); back >= 1; --back) {
      std::copy_n(&o.x(o.layout.end(i) - back, 0), o.channels(), &ring(i, (end - back) % kept, 0));
    }
  }
}

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
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> causal_conv1d(
    const pass<T, B>& p, const tensor<T, 3, B>& x, const tensor<accum_t<T>, 2, B>& weight,
    const tensor<accum_t<T>, 1, B>& bias = {},
    const std::type_identity_t<conv1d_options<T, B>>& o = {}) {
  const typename B::scope scope(p.ctx);
  const conv1d_operands<T, B> call(x, weight, bias, o.activation, o.layout);
  call.check_initial(o.initial);
  tensor<T, 3, B> y(x.extents());
  apply_conv1d(p.ctx, call, o.initial, detail::input_tokens(y));
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(weight) || p.tape->wants(bias) ||
                             p.tape->wants(o.initial))) {
    return y;
  }
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3, B> dx(t->gradient(x));
    apply_conv1d_vjp(ctx, call, o.initial, detail::input_tokens(t->gradient(y)), dx.get(),
                     t->gradient(weight), t->gradient(bias), t->gradient(o.initial));
    dx.finish();
  });
  return y;
}

/// The same, and the inputs that the tokens after it would see: the state for advance().
template <Floating T, Backend B>
[[nodiscard]] conv1d_result<T, B> causal_conv1d_with_state(
    const pass<T, B>& p, const tensor<T, 3, B>& x, const tensor<accum_t<T>, 2, B>& weight,
    const tensor<accum_t<T>, 1, B>& bias = {},
    const std::type_identity_t<conv1d_options<T, B>>& o = {}) {
  const typename B::scope scope(p.ctx);
  const conv1d_operands<T, B> call(x, weight, bias, o.activation, o.layout);
  conv1d_result<T, B> r{
      causal_conv1d(p, x, weight, bias, o),
      tensor<T, 3, B>(call.layout.sequences(), call.width() - 1, call.channels())};
  apply_conv1d_final(p.ctx, call, o.initial, r.final_state);
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(o.initial))) return r;
  p.tape->record(r.final_state, [x, initial = o.initial, layout = call.layout, &ctx = p.ctx,
                                 final_state = r.final_state, t = p.tape] {
    const detail::output_tokens<T, 3, B> dx(t->gradient(x));
    apply_conv1d_final_vjp(ctx, layout, t->gradient(final_state), dx.get(), t->gradient(initial));
    dx.finish();
  });
  return r;
}

}  // namespace op

/// The last inputs of a causal convolution, per sequence: a ring of width - 1 + max_rollback rows,
/// on CUDA of 16 more, so that one kernel may read it and take a step's inputs. A value: copying is
/// a fork, == compares the inputs that the next token can meet (and positions).
template <Floating T, Backend B = cpu>
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
    const index_t more = std::same_as<B, cpu> ? 0 : max_fixed_step;
    ring_ = tensor<T, 3, B>::zeros(sequences, width - 1 + max_rollback + more, channels);
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

  /// Counts the tokens of an advance() that a recorded graph has run.
  void skip(const sequence_layout& layout) { positions_.advance(layout); }
  /// For kernels that move the state themselves, (sequences, rows, channels): the input at position
  /// p is in row p mod rows. They leave the positions to skip().
  [[nodiscard]] const tensor<T, 3, B>& ring() const { return ring_; }

  /// The inputs that the next token meets, (sequences, width - 1, channels), oldest first; a copy.
  [[nodiscard]] tensor<T, 3, B> window() const {
    tensor<T, 3, B> out(sequences(), std::max<index_t>(width_ - 1, 0), channels());
    const index_t kept = ring_.extent(1);
    for (index_t i = 0; i < sequences(); ++i) {
      for (index_t back = 1; back < width_; ++back) {
        const index_t to = width_ - 1 - back;
        const index_t from = ((positions_[i] - back) % kept + kept) % kept;
        out.slice(0, i, i + 1)
            .slice(1, to, to + 1)
            .copy_from(ring_.slice(0, i, i + 1).slice(1, from, from + 1));
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
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                        const tensor<accum_t<T>, 2, B>& weight,
                                        const tensor<accum_t<T>, 1, B>& bias,
                                        const conv1d_options<T, B>& o = {}) {
    const typename B::scope scope(p.ctx);
    const conv1d_operands<T, B> call(x, weight, bias, o.activation, o.layout);
    positions_.check_layout(call.layout);
    if (o.initial) {
      throw value_error(
          "ssm: advance: the convolution's state is its initial state; leave options.initial out");
    }
    if (call.width() != width_ || call.channels() != channels()) {
      throw shape_error("ssm: advance: the convolution has width " + std::to_string(call.width()) +
                        " and " + std::to_string(call.channels()) + " channels, its state " +
                        std::to_string(width_) + " and " + std::to_string(channels()) +
                        "; wanted the same");
    }
    tensor<T, 3, B> y(x.extents());
    apply_conv1d_step(p.ctx, call, ring_, positions_.all(), detail::input_tokens(y));
    positions_.advance(call.layout);
    return y;
  }

 private:
  detail::state_positions positions_;
  tensor<T, 3, B> ring_;
  index_t width_ = 1;
};

/// A causal depthwise convolution with its parameters.
template <Floating T, Backend B = cpu>
struct causal_conv1d {
  tensor<accum_t<T>, 2, B> weight;  ///< (channels, width)
  tensor<accum_t<T>, 1, B> bias;    ///< (channels), or absent
  conv1d_activation activation = conv1d_activation::silu;

  /// Weight and bias from U(-1/sqrt(width), 1/sqrt(width)), as PyTorch's depthwise convolution.
  [[nodiscard]] static causal_conv1d make(index_t channels, index_t width, std::uint64_t seed,
                                          conv1d_activation activation = conv1d_activation::silu,
                                          bool bias = true) {
    using W = accum_t<T>;
    causal_conv1d layer{
        detail::on_backend<B>(init::fan_in_uniform<W, 2>({channels, width}, width, 2 * seed)),
        {},
        activation};
    if (bias) {
      layer.bias =
          detail::on_backend<B>(init::fan_in_uniform<W, 1>({channels}, width, 2 * seed + 1));
    }
    return layer;
  }

  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                           const sequence_layout& layout = {}) const {
    return op::causal_conv1d(p, x, weight, bias, {activation, layout, {}});
  }
  [[nodiscard]] conv_state<T, B> make_state(index_t sequences, index_t max_rollback = 0) const {
    return {sequences, weight.extent(0), weight.extent(1), max_rollback};
  }
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                        conv_state<T, B>& state,
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
