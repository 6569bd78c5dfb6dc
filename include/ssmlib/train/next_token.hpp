#pragma once

#include <ssmlib/model/language_model.hpp>
#include <ssmlib/train/cross_entropy.hpp>
#include <ssmlib/train/data.hpp>
#include <ssmlib/train/gradient.hpp>

namespace ssm {

/// Next-token cross-entropy of a model on a batch, for train(): in nats, summed over the tokens
/// that have a target.
template <LanguageModel M>
[[nodiscard]] loss_sum<typename M::value_type, typename M::backend> next_token_loss(
    const M& model, const pass<typename M::value_type, typename M::backend>& p,
    const token_batch& batch) {
  const auto loss = lm_cross_entropy(p, model.hidden(p, batch.inputs, batch.layout), model.head(),
                                     batch.targets, {.ignore_index = no_target, .divide_by = 1.0});
  return {loss.loss, loss.tokens};
}

}  // namespace ssm
