#pragma once

#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/pass.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

namespace ssm {

template <Real T>
struct dpo_result {
  tensor<T, 1> loss;       ///< one element, recorded on the pass's tape
  double accuracy = 0;     ///< share of the pairs whose chosen answer has the larger reward
  double mean_margin = 0;  ///< mean over pairs of the chosen reward minus the rejected one
};

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
template <Real T>
[[nodiscard]] dpo_result<T> dpo_loss(const pass<T>& p, const tensor<T, 1>& policy_chosen,
                                     const tensor<T, 1>& policy_rejected,
                                     const tensor<T, 1>& reference_chosen,
                                     const tensor<T, 1>& reference_rejected, double beta) {
  const std::array<tensor<T, 1>, 4> inputs{policy_chosen, policy_rejected, reference_chosen,
                                           reference_rejected};
  for (const auto& other : inputs) {
    detail::check_same_shape("dpo_loss", "policy_chosen", policy_chosen, "another argument", other);
  }
  if (!(beta > 0)) {
    throw value_error("ssm: dpo_loss: beta is " + std::to_string(beta) +
                      "; wanted a positive number");
  }
  const index_t pairs = policy_chosen.extent(0);
  const double n = static_cast<double>(std::max<index_t>(1, pairs));
  // beta times the difference of the log ratios.
  const auto margin = [inputs, beta](index_t i) {
    const auto ratio = [&](std::size_t policy, std::size_t reference) {
      return static_cast<double>(inputs[policy](i)) - static_cast<double>(inputs[reference](i));
    };
    return beta * (ratio(0, 2) - ratio(1, 3));
  };
  dpo_result<T> r;
  double sum = 0;
  for (index_t i = 0; i < pairs; ++i) {
    const double m = margin(i);
    sum += std::max(-m, 0.0) + std::log1p(std::exp(-std::abs(m)));
    r.accuracy += (m > 0 ? 1 : 0) / n;
    r.mean_margin += m / n;
  }
  r.loss = tensor<T, 1>::full({1}, static_cast<T>(sum / n));
  bool wanted = false;
  for (const auto& t : inputs)
    wanted = wanted || (p.tape != nullptr && p.tape->wants(t));
  if (!wanted) return r;
  p.tape->record(r.loss, [=, loss = r.loss, tape = p.tape] {
    const double g = static_cast<double>(tape->gradient(loss)(0)) / n;
    constexpr std::array<double, 4> signs{1, -1, -1, 1};
    for (std::size_t k = 0; k < inputs.size(); ++k) {
      const tensor<T, 1> d = tape->gradient(inputs[k]);
      for (index_t i = 0; d && i < pairs; ++i) {
        d(i) -= static_cast<T>(signs[k] * g * beta / (1 + std::exp(margin(i))));
      }
    }
  });
  return r;
}

}  // namespace ssm
