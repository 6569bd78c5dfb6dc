#pragma once

#include <ssmlib/expr/gram.hpp>
#include <ssmlib/expr/mask.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <type_traits>
#include <utility>

namespace ssm {

/// A gram matrix with an additive 0 / -infinity mask, on its way into softmax.
template <Floating T, Backend B>
struct masked_logits {
  gram<T, B> logits;
  bool is_causal;
  index_t window;  // 0: none
};

template <Floating T, Backend B>
[[nodiscard]] masked_logits<T, B> operator+(gram<T, B> g, causal_t) {
  return {std::move(g), true, 0};
}
template <Floating T, Backend B>
[[nodiscard]] masked_logits<T, B> operator+(gram<T, B> g, window_t w) {
  return {std::move(g), true, w.size};
}

/// A second mask is refused with a sentence.
template <Floating T, Backend B, class Mask>
requires std::same_as<Mask, causal_t> || std::same_as<Mask, window_t> masked_logits<T, B>
operator+(masked_logits<T, B> logits, Mask) {
  static_assert(!std::same_as<Mask, Mask>,
                "ssm: these logits have a mask already; add one, + causal or + window(w), which is "
                "causal too");
  return logits;
}

/// Softmax attention: rows of exp(alpha q_t . k_s) over the tokens s that the mask keeps, divided
/// by their sum. Not recurrent in fixed memory: its state is the keys and values so far.
template <Floating T, Backend B = cpu>
struct softmax_mixer {
  using value_type = T;
  using backend = B;
  using structure = structure::softmax_dense;
  using algorithms = alg_list<alg::tiled, alg::quadratic>;

  gram<T, B> logits;
  bool is_causal = false;
  index_t window = 0;  ///< keep t - window < s <= t; 0: all s <= t
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return logits.batch(); }
  [[nodiscard]] index_t length() const { return logits.length(); }
  [[nodiscard]] index_t heads() const { return logits.heads(); }
  [[nodiscard]] index_t key_size() const { return logits.key_size(); }
  [[nodiscard]] causality causal() const {
    return is_causal ? causality::causal : causality::not_causal;
  }

  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    gram<T, B>::operands(self.logits, f);
  }
  [[nodiscard]] bool keeps(index_t t, index_t s) const {
    return !is_causal || (s <= t && (window == 0 || s > t - window));
  }
  [[nodiscard]] auto on_host() const {
    return softmax_mixer<double>{logits.on_host(), is_causal, window, layout};
  }
  [[nodiscard]] tensor<double, 4> dense() const requires(!std::same_as<B, cpu>) {
    return on_host().dense();
  }
  [[nodiscard]] tensor<double, 4> dense() const requires std::same_as<B, cpu> {
    const sequence_layout sequences = layout_of(*this);
    const index_t n = layout ? sequences.tokens() : length();
    auto m = tensor<double, 4>::zeros(layout ? 1 : batch(), heads(), n, n);
    for (index_t i = 0; i < sequences.sequences(); ++i) {
      const index_t begin = sequences.begin(i), end = sequences.end(i), base = layout ? 0 : begin;
      for (index_t h = 0; h < heads(); ++h) {
        for (index_t t = begin; t < end; ++t) {
          double largest = -std::numeric_limits<double>::infinity(), sum = 0;
          for (index_t s = begin; s < end; ++s) {
            if (!keeps(t, s)) continue;
            double& entry = m(layout ? 0 : i, h, t - base, s - base);
            entry = logits.entry(t, s, h, heads());
            largest = std::max(largest, entry);
          }
          for (index_t s = begin; s < end; ++s) {
            if (!keeps(t, s)) continue;
            double& entry = m(layout ? 0 : i, h, t - base, s - base);
            entry = std::exp(entry - largest);
            sum += entry;
          }
          for (index_t s = begin; s < end; ++s) {
            if (keeps(t, s)) m(layout ? 0 : i, h, t - base, s - base) /= sum;
          }
        }
      }
    }
    return m;
  }
};

/// Row-wise softmax of Q K^T alpha, with `+ causal` or `+ window(w)` before if wanted.
///
/// @return (T x T) structure::softmax_dense; algorithms tiled, quadratic
/// @source Vaswani et al. 2017; tiling: Dao et al. 2022, arXiv:2205.14135.
template <Floating T, Backend B>
[[nodiscard]] softmax_mixer<T, B> softmax(masked_logits<T, B> l) {
  sequence_layout layout = l.logits.layout;
  return {std::move(l.logits), l.is_causal, l.window, std::move(layout)};
}
template <Floating T, Backend B>
[[nodiscard]] softmax_mixer<T, B> softmax(gram<T, B> g) {
  sequence_layout layout = g.layout;
  return {std::move(g), false, 0, std::move(layout)};
}
/// softmax of anything else is refused with a sentence. Its result has the type that is expected,
/// so that the sentence stands before what the compiler says of it.
template <class E>
requires requires {
  typename E::value_type;
}
softmax_mixer<std::conditional_t<Real<typename E::value_type>, typename E::value_type, float>>
softmax(const E&) {
  static_assert(detail::is_tensor<E> && !detail::is_tensor<E>,
                "ssm: softmax takes logits, Q * transpose(K) with an optional scale and mask; "
                "softmax of a plain tensor is softmax_rows(x)");
  return {};
}

}  // namespace ssm
