#pragma once

#include <ssmlib/expr/delta_rule.hpp>
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/mixer/mamba2.hpp>
#include <ssmlib/mixer/options.hpp>
#include <ssmlib/mixer/sequence_mixer.hpp>
#include <ssmlib/nn/l2_normalize.hpp>
#include <ssmlib/nn/norm.hpp>

#include <cmath>
#include <cstdint>
#include <utility>

namespace ssm {

/// Gated DeltaNet: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = S_t^T
/// q_t with unit keys and queries, beta = sigmoid, g = -exp(A_log) softplus(a + dt_bias); the
/// output is normalised per head, then gated by silu(z). in_proj makes [q, k, v, z, beta, a]; a
/// causal convolution with silu runs over [q, k, v].
/// @source Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464.
template <Floating T, Backend B = cpu>
class gated_delta_net : public sequence_mixer<gated_delta_net<T, B>, T, B> {
 public:
  gated_delta_net() = default;
  /// @throws value_error  an option out of range.
  gated_delta_net(const gated_delta_net_options& options, std::uint64_t seed)
      : options_(detail::completed(options)) {
    const auto& o = options_;
    in_proj = linear<T, B>::make(o.width, conv_channels() + values() + 2 * o.heads, {.seed = seed});
    conv1d = causal_conv1d<T, B>::make(conv_channels(), o.conv_width, seed + 1,
                                       conv1d_activation::silu, /*bias=*/false);
    dt_bias = detail::initial_dt_bias<T, B>(o.heads, 1e-3, 0.1, 1e-4, seed + 2);
    a_log = detail::log_of_uniform<T, B>(o.heads, 1.0, 16.0, seed + 3);
    norm = gated_rms_norm<T, B>::make(values(), gate_order::norm_first,
                                      {.eps = o.norm_epsilon, .group = o.value_dim});
    out_proj = linear<T, B>::make(values(), o.width, {.seed = seed + 4, .scale = o.out_scale});
  }

  linear<T, B> in_proj, out_proj;
  causal_conv1d<T, B> conv1d;               // (2 qk + values, W), no bias
  tensor<accum_t<T>, 1, B> dt_bias, a_log;  // (H)
  gated_rms_norm<T, B> norm;

  [[nodiscard]] const gated_delta_net_options& options() const { return options_; }
  [[nodiscard]] index_t width() const { return options_.width; }
  [[nodiscard]] index_t values() const { return options_.heads * options_.value_dim; }
  [[nodiscard]] index_t conv_channels() const {
    return 2 * options_.qk_heads * options_.head_dim + values();
  }
  [[nodiscard]] index_t conv_width() const { return options_.conv_width; }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "in_proj", self.in_proj);
    visit(f, "conv1d", self.conv1d);
    f("dt_bias", self.dt_bias, parameter_kind::decay);
    f("A_log", self.a_log, parameter_kind::decay);
    visit(f, "norm", self.norm);
    visit(f, "out_proj", self.out_proj);
  }

  [[nodiscard]] auto project(const pass<T, B>& p, const tensor<T, 3, B>& u,
                             const sequence_layout& layout, conv_state<T, B>* state) const {
    const auto& o = options_;
    const index_t keys = o.qk_heads * o.head_dim;
    const auto [q_k_v, z, beta_in, a] =
        detail::split_features<4>(in_proj(p, u), {conv_channels(), values(), o.heads, o.heads});
    const auto [q_in, k_in, v] = detail::split_features<3>(
        detail::convolve(p, conv1d, q_k_v, layout, state), {keys, keys, values()});
    const auto q = l2_normalize(p, detail::split_heads(q_in, o.qk_heads), 1e-6);
    const auto k = l2_normalize(p, detail::split_heads(k_in, o.qk_heads), 1e-6);
    const auto beta = eval(sigmoid(beta_in), p.tape, p.ctx);
    const auto log_decay = eval(-(exp(a_log) * softplus(a + dt_bias)), p.tape, p.ctx);
    const double scale = 1.0 / std::sqrt(static_cast<double>(o.head_dim));
    auto product = packed(layout, delta_rule(log_decay, beta, q * transpose(k) * scale)) *
                   detail::split_heads(v, o.heads);
    return projected<decltype(product), T, B>{std::move(product), z};
  }
  template <class Parts>
  [[nodiscard]] tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y,
                                       const Parts& parts) const {
    return out_proj(p, norm(p, detail::merge_heads(y), parts.gate));
  }

 private:
  gated_delta_net_options options_;
};

}  // namespace ssm
