#pragma once

#include <ssmlib/expr/hadamard.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/mixer/options.hpp>
#include <ssmlib/mixer/sequence_mixer.hpp>
#include <ssmlib/nn/norm.hpp>

#include <cmath>
#include <cstdint>
#include <utility>

namespace ssm {

/// Causal linear attention, normalised: rows of causal o (phi(Q) phi(K)^T), divided by their sums.
/// @tparam Phi  feature map with positive values, see ssm::feature
/// @source Katharopoulos et al. 2020, arXiv:2006.16236.
template <Floating T, FeatureMap Phi = feature::elu_plus_one, Backend B = cpu>
class linear_attention : public sequence_mixer<linear_attention<T, Phi, B>, T, B> {
 public:
  linear_attention() = default;
  /// @throws value_error  an option out of range.
  linear_attention(const linear_attention_options& options, std::uint64_t seed)
      : options_(detail::completed(options)) {
    const auto& o = options_;
    q_proj = linear<T, B>::make(o.width, o.heads * o.head_dim, {.seed = seed});
    k_proj = linear<T, B>::make(o.width, o.kv_heads * o.head_dim, {.seed = seed + 1});
    v_proj = linear<T, B>::make(o.width, o.kv_heads * o.head_dim, {.seed = seed + 2});
    o_proj =
        linear<T, B>::make(o.heads * o.head_dim, o.width, {.seed = seed + 3, .scale = o.out_scale});
  }

  linear<T, B> q_proj, k_proj, v_proj, o_proj;

  [[nodiscard]] const linear_attention_options& options() const { return options_; }
  [[nodiscard]] index_t width() const { return options_.width; }
  [[nodiscard]] index_t conv_channels() const { return 0; }
  [[nodiscard]] index_t conv_width() const { return 1; }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "q_proj", self.q_proj);
    visit(f, "k_proj", self.k_proj);
    visit(f, "v_proj", self.v_proj);
    visit(f, "o_proj", self.o_proj);
  }

  [[nodiscard]] auto project(const pass<T, B>& p, const tensor<T, 3, B>& u,
                             const sequence_layout& layout, conv_state<T, B>*) const {
    const auto q = detail::split_heads(q_proj(p, u), options_.heads);
    const auto k = detail::split_heads(k_proj(p, u), options_.kv_heads);
    const auto v = detail::split_heads(v_proj(p, u), options_.kv_heads);
    auto matrix = normalize_rows(hadamard(causal, with_features(Phi{}, q * transpose(k))));
    auto product = packed(layout, std::move(matrix)) * v;
    return projected<decltype(product), T, B>{std::move(product), {}};
  }
  template <class Parts>
  [[nodiscard]] tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y,
                                       const Parts&) const {
    return o_proj(p, detail::merge_heads(y));
  }

 private:
  linear_attention_options options_;
};

/// Retention: decay(gamma) o (Q K^T) / sqrt(N) with one fixed decay a head,
/// gamma_h = 1 - 2^(-5-h), RMSNorm per head, and a silu gate.
/// @source Sun et al. 2023, arXiv:2307.08621, section 2.
template <Floating T, Backend B = cpu>
class retention : public sequence_mixer<retention<T, B>, T, B> {
 public:
  retention() = default;
  /// @throws value_error  an option out of range.
  retention(const retention_options& options, std::uint64_t seed)
      : options_(detail::completed(options)) {
    const auto& o = options_;
    q_proj = linear<T, B>::make(o.width, o.heads * o.head_dim, {.seed = seed});
    k_proj = linear<T, B>::make(o.width, o.heads * o.head_dim, {.seed = seed + 1});
    v_proj = linear<T, B>::make(o.width, o.heads * o.value_dim, {.seed = seed + 2});
    g_proj = linear<T, B>::make(o.width, o.heads * o.value_dim, {.seed = seed + 3});
    o_proj = linear<T, B>::make(o.heads * o.value_dim, o.width,
                                {.seed = seed + 4, .scale = o.out_scale});
    norm = gated_rms_norm<T, B>::make(o.heads * o.value_dim, gate_order::norm_first,
                                      {.group = o.value_dim});
    tensor<accum_t<T>, 1> decays(o.heads);
    for (index_t h = 0; h < o.heads; ++h) {
      decays(h) = static_cast<accum_t<T>>(1.0 - std::exp2(-5.0 - static_cast<double>(h)));
    }
    gamma = detail::on_backend<B>(decays);
  }

  linear<T, B> q_proj, k_proj, v_proj, g_proj, o_proj;
  gated_rms_norm<T, B> norm;
  tensor<accum_t<T>, 1, B> gamma;  ///< (H); a constant, not a parameter

  [[nodiscard]] const retention_options& options() const { return options_; }
  [[nodiscard]] index_t width() const { return options_.width; }
  [[nodiscard]] index_t conv_channels() const { return 0; }
  [[nodiscard]] index_t conv_width() const { return 1; }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "q_proj", self.q_proj);
    visit(f, "k_proj", self.k_proj);
    visit(f, "v_proj", self.v_proj);
    visit(f, "g_proj", self.g_proj);
    visit(f, "norm", self.norm);
    visit(f, "o_proj", self.o_proj);
  }

  [[nodiscard]] auto project(const pass<T, B>& p, const tensor<T, 3, B>& u,
                             const sequence_layout& layout, conv_state<T, B>*) const {
    const auto q = detail::split_heads(q_proj(p, u), options_.heads);
    const auto k = detail::split_heads(k_proj(p, u), options_.heads);
    const auto v = detail::split_heads(v_proj(p, u), options_.heads);
    const double scale = 1.0 / std::sqrt(static_cast<double>(options_.head_dim));
    auto product = packed(layout, hadamard(decay(gamma), q * transpose(k) * scale)) * v;
    return projected<decltype(product), T, B>{std::move(product), g_proj(p, u)};
  }
  template <class Parts>
  [[nodiscard]] tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y,
                                       const Parts& parts) const {
    return o_proj(p, norm(p, detail::merge_heads(y), parts.gate));
  }

 private:
  retention_options options_;
};

}  // namespace ssm
