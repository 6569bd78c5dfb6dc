#pragma once

#include <ssmlib/expr/gram.hpp>
#include <ssmlib/expr/mask.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <utility>
#include <vector>

namespace ssm {

/// The gated delta rule: the state forgets by a scalar and then moves what it holds for k_t towards
/// v_t,
///
///     S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - (exp(g_t) S_{t-1})^T k_t)^T,  y_t = alpha S_t^T
///     q_t.
///
/// The transition exp(g_t) (I - beta_t k_t k_t^T) is not diagonal; as a matrix, entry (t, s) is
/// alpha q_t^T A_t .. A_{s+1} k_s beta_s with these transitions A. Keys are taken as they are: the
/// rule is stable for beta |k|^2 in [0, 2], so normalise keys first (l2_normalize). Without a decay
/// (g = 0) it is DeltaNet.
/// @source Yang et al. 2024, arXiv:2412.06464, eq. 10; DeltaNet: arXiv:2406.06484.
template <Floating T, Backend B = cpu>
struct delta_rule_mixer {
  using value_type = T;
  using backend = B;
  using structure = structure::delta_rule;
  using algorithms = alg_list<alg::chunked, alg::recurrent, alg::quadratic>;

  tensor<accum_t<T>, 3, B> log_decay;  // (b, T, Hg)
  tensor<accum_t<T>, 3, B> beta;       // (b, T, Hb)
  gram<T, B> kernel;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return kernel.batch(); }
  [[nodiscard]] index_t length() const { return kernel.length(); }
  [[nodiscard]] index_t heads() const {
    return std::max({log_decay.extent(2), beta.extent(2), kernel.heads()});
  }
  [[nodiscard]] index_t key_size() const { return kernel.key_size(); }
  [[nodiscard]] index_t state_features(index_t p) const { return p; }

  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("log_decay", self.log_decay, operand::per_token);
    f("beta", self.beta, operand::per_token);
    gram<T, B>::operands(self.kernel, f);
  }

  [[nodiscard]] auto on_host() const {
    return delta_rule_mixer<double>{detail::exact_on_host(log_decay), detail::exact_on_host(beta),
                                    kernel.on_host(), layout};
  }
  /// out[t - begin] = entry (t, s) for the tokens begin <= t < end of the sequence of token s: the
  /// vector k_s beta_s multiplied by one transition after the other.
  void column(index_t begin, index_t end, index_t s, index_t h,
              double* out) const requires std::same_as<B, cpu> {
    const index_t n = length(), hg = group_of(h, heads(), log_decay.extent(2)),
                  hb = group_of(h, heads(), beta.extent(2)),
                  hq = group_of(h, heads(), kernel.q.extent(2)),
                  hk = group_of(h, heads(), kernel.k.extent(2));
    const auto size = static_cast<std::size_t>(key_size());
    std::vector<double> w(size, 0.0);
    for (index_t t = begin; t < end; ++t) {
      const double rate = static_cast<double>(beta(t / n, t % n, hb));
      const auto key = [&](std::size_t i) {
        return static_cast<double>(kernel.k(t / n, t % n, hk, static_cast<index_t>(i)));
      };
      if (t > s) {
        double along = 0;
        for (std::size_t i = 0; i < size; ++i)
          along += key(i) * w[i];
        const double decay = std::exp(static_cast<double>(log_decay(t / n, t % n, hg)));
        for (std::size_t i = 0; i < size; ++i)
          w[i] = decay * (w[i] - rate * along * key(i));
      } else if (t == s) {
        for (std::size_t i = 0; i < size; ++i)
          w[i] = rate * key(i);
      }
      double sum = 0;
      for (std::size_t i = 0; i < size; ++i) {
        sum += static_cast<double>(kernel.q(t / n, t % n, hq, static_cast<index_t>(i))) * w[i];
      }
      out[t - begin] = kernel.alpha * sum;
    }
  }
  void column(index_t begin, index_t end, index_t s, index_t h, double* out) const
      requires(!std::same_as<B, cpu>) {
    on_host().column(begin, end, s, h, out);
  }
  [[nodiscard]] tensor<double, 4> dense() const { return detail::dense_columns(*this); }
};

/// The gated delta rule as a mixer.
///
/// @param log_decay  (b, T, Hg), (T, Hg) or (T): log of each token's decay, <= 0; the first token's
///                   acts on the initial state only; -infinity resets
/// @param beta       likewise: how far each token moves the state, in [0, 1] (up to 2 is stable)
/// @param kernel     Q * transpose(K), with a scale if wanted
/// @throws shape_error  batch, length or heads do not fit.
/// @cost   O(1); nothing is evaluated.
template <Floating T, int Rg, int Rb, Backend B>
[[nodiscard]] delta_rule_mixer<T, B> delta_rule(const tensor<accum_t<T>, Rg, B>& log_decay,
                                                const tensor<accum_t<T>, Rb, B>& beta,
                                                gram<T, B> kernel) {
  constexpr const char* what = "delta_rule(log_decay, beta, Q * transpose(K))";
  delta_rule_mixer<T, B> m{
      detail::promote_scalar(log_decay), detail::promote_scalar(beta), std::move(kernel), {}};
  for (const tensor<accum_t<T>, 3, B>* t : {&m.log_decay, &m.beta}) {
    detail::check_time(what, t->extent(0), t->extent(1), m.batch(), m.length());
    detail::join_heads(what, t->extent(2), m.kernel.heads());
  }
  detail::join_heads(what, m.log_decay.extent(2), m.beta.extent(2));
  m.layout = m.kernel.layout;
  return m;
}

}  // namespace ssm
