#pragma once

#include <ssmlib/expr/hadamard.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/mixer/options.hpp>
#include <ssmlib/mixer/sequence_mixer.hpp>
#include <ssmlib/nn/discretize.hpp>
#include <ssmlib/nn/norm.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

namespace ssm {

namespace detail {
/// softplus^-1 of log-uniform step sizes. @source mamba_ssm's initialisation; algorithms: Gu and
/// Dao 2023, section 3.6.
template <Floating T, Backend B>
[[nodiscard]] tensor<accum_t<T>, 1, B> initial_dt_bias(index_t n, double low, double high,
                                                       double floor, std::uint64_t seed) {
  tensor<accum_t<T>, 1> bias(n);
  philox random(seed);
  for (index_t i = 0; i < n; ++i) {
    const double dt = std::max(std::exp(random.uniform(std::log(low), std::log(high))), floor);
    bias(i) = static_cast<accum_t<T>>(dt + std::log(-std::expm1(-dt)));
  }
  return on_backend<B>(bias);
}
/// log of uniform numbers: A_log of heads whose A is in -[low, high).
template <Floating T, Backend B>
[[nodiscard]] tensor<accum_t<T>, 1, B> log_of_uniform(index_t n, double low, double high,
                                                      std::uint64_t seed) {
  const tensor<accum_t<T>, 1> a = uniform<accum_t<T>, 1>({n}, low, high, seed);
  for (index_t i = 0; i < n; ++i)
    a(i) = std::log(a(i));
  return on_backend<B>(a);
}
}  // namespace detail

/// Mamba-2: the state-space dual form with a scalar decay per head,
///
///     M = L o (C B^T) + diag(D),   L[t, s] = exp(A (delta_{s+1} + ... + delta_t)) delta_s
///
/// and delta = softplus(dt + dt_bias). in_proj makes [z, x, B, C, dt]; a causal convolution runs
/// over [x, B, C]; the output is normalised after the gate silu(z).
/// @source Dao and Gu 2024, arXiv:2405.21060, sections 6 and 7.
template <Floating T, Backend B = cpu>
class mamba2 : public sequence_mixer<mamba2<T, B>, T, B> {
 public:
  mamba2() = default;
  /// @throws value_error  an option out of range.
  mamba2(const mamba2_options& options, std::uint64_t seed) : options_(detail::completed(options)) {
    const auto& o = options_;
    in_proj =
        linear<T, B>::make(o.width, 2 * inner() + 2 * o.groups * o.state + o.heads, {.seed = seed});
    conv1d = causal_conv1d<T, B>::make(conv_channels(), o.conv_width, seed + 1, o.activation);
    dt_bias = detail::initial_dt_bias<T, B>(o.heads, o.dt_min, o.dt_max, o.dt_floor, seed + 3);
    a_log = detail::log_of_uniform<T, B>(o.heads, o.a_min, o.a_max, seed + 4);
    d = tensor<accum_t<T>, 1, B>::full({o.heads}, 1);
    if (o.gated_norm) {
      norm = gated_rms_norm<T, B>::make(
          inner(), o.norm_before_gate ? gate_order::norm_first : gate_order::gate_first,
          {.eps = o.norm_epsilon, .group = inner() / o.groups});
    }
    out_proj = linear<T, B>::make(inner(), o.width, {.seed = seed + 5, .scale = o.out_scale});
  }

  linear<T, B> in_proj, out_proj;
  causal_conv1d<T, B> conv1d;                  // (inner + 2 G N, W)
  tensor<accum_t<T>, 1, B> dt_bias, a_log, d;  // (H)
  gated_rms_norm<T, B> norm;                   // its weight is absent without gated_norm

  [[nodiscard]] const mamba2_options& options() const { return options_; }
  [[nodiscard]] index_t inner() const { return options_.heads * options_.head_dim; }
  [[nodiscard]] index_t width() const { return options_.width; }
  [[nodiscard]] index_t conv_channels() const {
    return inner() + 2 * options_.groups * options_.state;
  }
  [[nodiscard]] index_t conv_width() const { return options_.conv_width; }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "in_proj", self.in_proj);
    visit(f, "conv1d", self.conv1d);
    f("dt_bias", self.dt_bias, parameter_kind::decay);
    f("A_log", self.a_log, parameter_kind::decay);
    f("D", self.d, parameter_kind::decay);
    visit(f, "norm", self.norm);
    visit(f, "out_proj", self.out_proj);
  }

  [[nodiscard]] auto project(const pass<T, B>& p, const tensor<T, 3, B>& u,
                             const sequence_layout& layout, conv_state<T, B>* state) const {
    const auto& o = options_;
    const index_t bc = o.groups * o.state;
    const auto [z, x_b_c, dt] =
        detail::split_features<3>(in_proj(p, u), {inner(), inner() + 2 * bc, o.heads});
    const tensor<T, 3, B> mixed = detail::convolve(p, conv1d, x_b_c, layout, state);
    const auto [x, b, c] = detail::split_features<3>(mixed, {inner(), bc, bc});
    const auto a = eval(-exp(a_log), p.tape, p.ctx);
    const auto [delta, log_a] = discretize(p, dt, a, dt_bias, o.limits);
    auto matrix =
        hadamard(semiseparable(log_a, delta),
                 detail::split_heads(c, o.groups) * transpose(detail::split_heads(b, o.groups))) +
        diagonal(d);
    auto product = packed(layout, std::move(matrix)) * detail::split_heads(x, o.heads);
    return projected<decltype(product), T, B>{std::move(product), z};
  }
  template <class Parts>
  [[nodiscard]] tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y4,
                                       const Parts& parts) const {
    const tensor<T, 3, B> y = detail::merge_heads(y4);
    if (!options_.gated_norm) return out_proj(p, eval(p, y * silu(parts.gate)));
    return out_proj(p, norm(p, y, parts.gate));
  }

 private:
  mamba2_options options_;
};

/// The discrete Mamba-2 of Phi-Mamba: decay sigmoid(-a_t), inputs not scaled by a step, own B and C
/// per head, gate silu(z + z_bias), no norm. The same matrix node as mamba2, without a weight.
/// in_proj makes [x, B, C, z, a].
/// @source Bick et al. 2024 (MOHAWK), arXiv:2408.10189, section 3 and the Phi-Mamba code release.
template <Floating T, Backend B = cpu>
class discrete_mamba2 : public sequence_mixer<discrete_mamba2<T, B>, T, B> {
 public:
  discrete_mamba2() = default;
  /// @throws value_error  an option out of range.
  discrete_mamba2(const discrete_mamba2_options& options, std::uint64_t seed)
      : options_(detail::completed(options)) {
    const auto& o = options_;
    in_proj = linear<T, B>::make(o.width, 2 * inner() + 2 * o.qk_heads * o.state + o.heads,
                                 {.seed = seed});
    conv1d = causal_conv1d<T, B>::make(conv_channels(), o.conv_width, seed + 1, o.activation);
    z_bias = tensor<accum_t<T>, 1, B>::zeros(inner());
    d = tensor<accum_t<T>, 1, B>::full({o.heads}, 1);
    out_proj = linear<T, B>::make(inner(), o.width, {.seed = seed + 2, .scale = o.out_scale});
    if (o.identity_init) open();
  }

  linear<T, B> in_proj, out_proj;
  causal_conv1d<T, B> conv1d;
  tensor<accum_t<T>, 1, B> z_bias;  // (inner)
  tensor<accum_t<T>, 1, B> d;       // (H)

  /// The root of silu(z) = 1: a gate with this bias and no weights passes its input.
  static constexpr double unit_gate = 1.278464542761074;

  /// Makes the convolution and the gate the identity, so that only the matrix acts.
  void open() {
    conv1d.weight.fill(0);
    conv1d.weight.slice(1, options_.conv_width - 1, options_.conv_width).fill(1);
    conv1d.bias.fill(0);
    const index_t z = inner() + 2 * options_.qk_heads * options_.state;
    in_proj.weight.slice(0, z, z + inner()).fill(0);
    z_bias.fill(static_cast<accum_t<T>>(unit_gate));
  }

  [[nodiscard]] const discrete_mamba2_options& options() const { return options_; }
  [[nodiscard]] index_t inner() const { return options_.heads * options_.head_dim; }
  [[nodiscard]] index_t width() const { return options_.width; }
  [[nodiscard]] index_t conv_channels() const {
    return inner() + 2 * options_.qk_heads * options_.state;
  }
  [[nodiscard]] index_t conv_width() const { return options_.conv_width; }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "in_proj", self.in_proj);
    visit(f, "conv1d", self.conv1d);
    f("z_bias", self.z_bias, parameter_kind::bias);
    f("D", self.d, parameter_kind::decay);
    visit(f, "out_proj", self.out_proj);
  }

  [[nodiscard]] auto project(const pass<T, B>& p, const tensor<T, 3, B>& u,
                             const sequence_layout& layout, conv_state<T, B>* state) const {
    const auto& o = options_;
    const index_t bc = o.qk_heads * o.state;
    const auto [x_b_c, z, a] =
        detail::split_features<3>(in_proj(p, u), {inner() + 2 * bc, inner(), o.heads});
    const tensor<T, 3, B> mixed = detail::convolve(p, conv1d, x_b_c, layout, state);
    const auto [x, b, c] = detail::split_features<3>(mixed, {inner(), bc, bc});
    const auto log_a = eval(-softplus(a), p.tape, p.ctx);
    auto matrix =
        hadamard(semiseparable(log_a), detail::split_heads(c, o.qk_heads) *
                                           transpose(detail::split_heads(b, o.qk_heads))) +
        diagonal(d);
    auto product = packed(layout, std::move(matrix)) * detail::split_heads(x, o.heads);
    return projected<decltype(product), T, B>{std::move(product), z};
  }
  template <class Parts>
  [[nodiscard]] tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y,
                                       const Parts& parts) const {
    return out_proj(p, eval(p, detail::merge_heads(y) * silu(parts.gate + z_bias)));
  }

 private:
  discrete_mamba2_options options_;
};

}  // namespace ssm
