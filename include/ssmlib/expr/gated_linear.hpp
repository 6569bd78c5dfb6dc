#pragma once

#include <ssmlib/expr/gram.hpp>
#include <ssmlib/expr/mask.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <utility>
#include <vector>

namespace ssm {

/// Gated linear attention: every key channel n of a head decays by its own gate,
///
///     S_t = diag(exp(log_gate_t)) S_{t-1} + k_t v_t^T,     y_t = alpha S_t^T q_t,
///
/// as a matrix: entry (t, s) is alpha sum_n q_t[n] k_s[n] exp(log_gate_{s+1}[n] + ... +
/// log_gate_t[n]) for t >= s.
/// @source Yang et al. 2023, arXiv:2312.06635, section 4.
template <Floating T, Backend B = cpu>
struct gated_linear_mixer {
  using value_type = T;
  using backend = B;
  using structure = structure::semiseparable;
  using algorithms = alg_list<alg::chunked, alg::recurrent, alg::quadratic>;

  tensor<accum_t<T>, 4, B> log_gate;  // (b, T, Hg, N)
  gram<T, B> kernel;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return kernel.batch(); }
  [[nodiscard]] index_t length() const { return kernel.length(); }
  [[nodiscard]] index_t heads() const { return std::max(log_gate.extent(2), kernel.heads()); }
  [[nodiscard]] index_t key_size() const { return kernel.key_size(); }
  [[nodiscard]] index_t state_features(index_t p) const { return p; }

  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("log_gate", self.log_gate, operand::per_token);
    gram<T, B>::operands(self.kernel, f);
  }

  [[nodiscard]] auto on_host() const {
    return gated_linear_mixer<double>{detail::exact_on_host(log_gate), kernel.on_host(), layout};
  }
  /// out[t - begin] = entry (t, s) for the tokens begin <= t < end of the sequence of token s.
  void column(index_t begin, index_t end, index_t s, index_t h,
              double* out) const requires std::same_as<B, cpu> {
    const index_t n = length(), hg = group_of(h, heads(), log_gate.extent(2)),
                  hq = group_of(h, heads(), kernel.q.extent(2)),
                  hk = group_of(h, heads(), kernel.k.extent(2));
    std::vector<double> decay(static_cast<std::size_t>(key_size()), 0.0);
    for (index_t t = begin; t < end; ++t) {
      double sum = 0;
      for (index_t i = 0; t >= s && i < key_size(); ++i) {
        double& log_decay = decay[static_cast<std::size_t>(i)];
        if (t > s) log_decay += static_cast<double>(log_gate(t / n, t % n, hg, i));
        sum += static_cast<double>(kernel.q(t / n, t % n, hq, i)) * std::exp(log_decay) *
               static_cast<double>(kernel.k(s / n, s % n, hk, i));
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

/// Gated linear attention as a mixer: Q K^T with a decay for every key channel.
///
/// @param log_gate  (b, T, Hg, N), (T, Hg, N) or (T, N): log of each channel's decay, <= 0; the
///                  first token's acts on the initial state only; -infinity resets
/// @param kernel    Q * transpose(K), with a scale if wanted
/// @throws shape_error  batch, length, heads or feature sizes do not fit.
/// @cost   O(1); nothing is evaluated.
template <Floating T, int R, Backend B>
[[nodiscard]] gated_linear_mixer<T, B> gated(const tensor<accum_t<T>, R, B>& log_gate,
                                             gram<T, B> kernel) {
  tensor<accum_t<T>, 4, B> gate = detail::promote(log_gate);
  if (gate.extent(3) != kernel.key_size()) {
    throw shape_error("ssm: gated(log_gate, Q * transpose(K)): log_gate is " +
                      to_string<4>(gate.extents()) + ", Q is " + to_string<4>(kernel.q.extents()) +
                      "; wanted a gate for every feature of the keys");
  }
  detail::check_time("gated(log_gate, Q * transpose(K))", gate.extent(0), gate.extent(1),
                     kernel.batch(), kernel.length());
  detail::join_heads("gated(log_gate, Q * transpose(K))", gate.extent(2), kernel.heads());
  sequence_layout layout = kernel.layout;
  return {std::move(gate), std::move(kernel), std::move(layout)};
}

}  // namespace ssm
