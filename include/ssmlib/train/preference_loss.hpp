#pragma once

#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/pass.hpp>
#include <ssmlib/train/token_loss.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

namespace ssm {

/// How a policy ranks pairs of answers. On CUDA the functions wait for what computes it.
template <Backend B = cpu>
struct pair_ranking {
  detail::late_numbers<B> margins;  ///< (pairs): the chosen reward minus the rejected one

  /// The share of the pairs whose chosen answer has the larger reward.
  [[nodiscard]] double accuracy() const {
    return mean([](double margin) { return margin > 0 ? 1.0 : 0.0; });
  }
  /// The mean over pairs of the chosen reward minus the rejected one.
  [[nodiscard]] double mean_margin() const {
    return mean([](double margin) { return margin; });
  }

 private:
  template <class F>
  [[nodiscard]] double mean(F f) const {
    const tensor<double, 1> all = margins.read();
    double sum = 0;
    for (index_t i = 0; i < all.size(); ++i)
      sum += f(all(i)) / static_cast<double>(all.size());
    return sum;
  }
};

template <Floating T, Backend B = cpu>
struct dpo_result {
  tensor<accum_t<T>, 1, B> loss;  ///< one element, recorded on the pass's tape
  pair_ranking<B> ranking;

  [[nodiscard]] double accuracy() const { return ranking.accuracy(); }
  [[nodiscard]] double mean_margin() const { return ranking.mean_margin(); }
};

/// The log probabilities of pairs of answers: of the chosen and rejected by the policy, then by the
/// reference.
template <Real R, Backend B = cpu>
using answer_scores = std::array<tensor<R, 1, B>, 4>;

/// margins = beta times the difference of the log ratios, loss = the mean of -log sigmoid(margin).
template <Real R>
void apply_preference(const cpu::context&, const answer_scores<R>& scores, double beta,
                      const tensor<double, 1>& margins, const tensor<R, 1>& loss) {
  double sum = 0;
  for (index_t i = 0; i < margins.size(); ++i) {
    const auto ratio = [&](std::size_t policy, std::size_t reference) {
      return static_cast<double>(scores[policy](i)) - static_cast<double>(scores[reference](i));
    };
    const double m = beta * (ratio(0, 2) - ratio(1, 3));
    sum += std::max(-m, 0.0) + std::log1p(std::exp(-std::abs(m)));
    margins(i) = m;
  }
  loss(0) = static_cast<R>(sum / static_cast<double>(std::max<index_t>(1, margins.size())));
}
/// Adds to the gradients of the scores, of which any may be absent. @param d_loss  (1)
template <Real R>
void apply_preference_vjp(const cpu::context&, double beta, const tensor<double, 1>& margins,
                          const tensor<R, 1>& d_loss, const answer_scores<R>& d_scores) {
  const index_t pairs = margins.size();
  const double g =
      static_cast<double>(d_loss(0)) / static_cast<double>(std::max<index_t>(1, pairs));
  constexpr std::array<double, 4> signs{1, -1, -1, 1};
  for (std::size_t k = 0; k < d_scores.size(); ++k) {
    for (index_t i = 0; d_scores[k] && i < pairs; ++i)
      d_scores[k](i) -= static_cast<R>(signs[k] * g * beta / (1 + std::exp(margins(i))));
  }
}

/// Direct preference optimisation: the mean over pairs of
///
///     -log sigmoid(beta ((policy_chosen - reference_chosen) - (policy_rejected -
///     reference_rejected)))
///
/// @param policy_chosen, ...  (pairs) log probabilities of whole answers, as
///                            sequence_log_probability returns them
/// @param beta                > 0: how far the policy may go from the reference
/// @throws shape_error  the numbers of pairs differ. @throws value_error  beta is not > 0.
/// @source Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
template <Floating T, Backend B>
[[nodiscard]] dpo_result<T, B> dpo_loss(const pass<T, B>& p,
                                        const tensor<accum_t<T>, 1, B>& policy_chosen,
                                        const tensor<accum_t<T>, 1, B>& policy_rejected,
                                        const tensor<accum_t<T>, 1, B>& reference_chosen,
                                        const tensor<accum_t<T>, 1, B>& reference_rejected,
                                        double beta) {
  const answer_scores<accum_t<T>, B> scores{policy_chosen, policy_rejected, reference_chosen,
                                            reference_rejected};
  for (const auto& other : scores) {
    detail::check_same_shape("dpo_loss", "policy_chosen", policy_chosen, "another argument", other);
  }
  if (!(beta > 0)) {
    throw value_error("ssm: dpo_loss: beta is " + std::to_string(beta) +
                      "; wanted a positive number");
  }
  const typename B::scope scope(p.ctx);
  const tensor<double, 1, B> margins(policy_chosen.extent(0));
  const tensor<accum_t<T>, 1, B> loss(1);
  apply_preference(p.ctx, scores, beta, margins, loss);
  const dpo_result<T, B> r{loss, {detail::late_numbers<B>(margins)}};
  const bool wanted =
      p.tape != nullptr &&
      std::any_of(scores.begin(), scores.end(), [&](const auto& s) { return p.tape->wants(s); });
  if (!wanted) return r;
  p.tape->record(loss, [=, &ctx = p.ctx, tape = p.tape] {
    answer_scores<accum_t<T>, B> gradients;
    for (std::size_t k = 0; k < scores.size(); ++k)
      gradients[k] = tape->gradient(scores[k]);
    apply_preference_vjp(ctx, beta, margins, tape->gradient(loss), gradients);
  });
  return r;
}

}  // namespace ssm
