#pragma once

#include <ssmlib/expr/softmax.hpp>
#include <ssmlib/lower/kv_state.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/mixer/options.hpp>
#include <ssmlib/mixer/sequence_mixer.hpp>
#include <ssmlib/nn/rope.hpp>

#include <cmath>
#include <cstdint>
#include <utility>

namespace ssm {

/// Causal softmax self-attention: MHA, GQA (kv_heads < heads) or MQA (kv_heads = 1).
/// @source Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv:2305.13245.
template <Floating T, Backend B = cpu>
class attention : public sequence_mixer<attention<T, B>, T, B> {
 public:
  attention() = default;
  /// @throws value_error  an option out of range.
  attention(const attention_options& options, std::uint64_t seed)
      : options_(detail::completed(options)) {
    const auto& o = options_;
    q_proj = linear<T, B>::make(o.width, o.heads * o.head_dim, {.bias = o.bias, .seed = seed});
    k_proj =
        linear<T, B>::make(o.width, o.kv_heads * o.head_dim, {.bias = o.bias, .seed = seed + 1});
    v_proj =
        linear<T, B>::make(o.width, o.kv_heads * o.head_dim, {.bias = o.bias, .seed = seed + 2});
    o_proj = linear<T, B>::make(o.heads * o.head_dim, o.width,
                                {.bias = o.bias, .seed = seed + 3, .scale = o.out_scale});
  }

  linear<T, B> q_proj, k_proj, v_proj, o_proj;

  [[nodiscard]] const attention_options& options() const { return options_; }
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
    auto q = detail::split_heads(q_proj(p, u), options_.heads);
    auto k = detail::split_heads(k_proj(p, u), options_.kv_heads);
    const auto v = detail::split_heads(v_proj(p, u), options_.kv_heads);
    if (options_.rope) {
      q = rope(p, q, layout, *options_.rope);
      k = rope(p, k, layout, *options_.rope);
    }
    const double scale =
        options_.scale.value_or(1.0 / std::sqrt(static_cast<double>(options_.head_dim)));
    const auto logits = q * transpose(k) * scale;
    auto matrix = options_.window > 0 ? softmax(logits + ssm::window(options_.window))
                                      : softmax(logits + causal);
    auto product = packed(layout, std::move(matrix)) * v;
    return projected<decltype(product), T, B>{std::move(product), {}};
  }
  template <class Parts>
  [[nodiscard]] tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y,
                                       const Parts&) const {
    return o_proj(p, detail::merge_heads(y));
  }

 private:
  attention_options options_;
};

}  // namespace ssm
