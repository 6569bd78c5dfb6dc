#pragma once

#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/model/language_model.hpp>
#include <ssmlib/nn/linear.hpp>
#include <ssmlib/train/data.hpp>
#include <ssmlib/train/gradient.hpp>
#include <ssmlib/train/losses.hpp>
#include <ssmlib/train/next_token.hpp>

#include <concepts>
#include <cstdint>

namespace ssm {

namespace detail {

/// 1 where a token has a target, 0 where not; absent if all have one.
[[nodiscard]] tensor<std::int32_t, 2> target_mask(const token_batch& batch);
/// The head, with its own copy of the parameters if the tape would give these a gradient.
template <Floating T, Backend B>
[[nodiscard]] linear<T, B> unwatched(const linear<T, B>& head, const tape<T, B>* t) {
  const bool watched = t != nullptr && (t->wants(head.weight) || t->wants(head.bias));
  return watched ? with_own_parameters(head) : head;
}
/// Models that compute in one type on one backend.
template <class M, class N>
concept AlikeModels = std::same_as<typename M::value_type, typename N::value_type> &&
    std::same_as<typename M::backend, typename N::backend>;
/// @throws value_error  a divisor where the trainer divides.
void check_sum(const char* operation, const kl_options& options);
/// @throws shape_error  not as many chosen answers as rejected ones.
void check_pairs(const char* operation, index_t chosen, index_t rejected);

}  // namespace detail

/// Word-level distillation of one model into another on a batch, for train():
///
///     temperature^2 * sum over tokens that have a target of KL(teacher || student)
///
/// and what it is to be divided by: those tokens, or with kl_divisor::batch the sequences. Tokens
/// with no_target (a prompt, padding) do not count; a batch without targets counts all.
/// @param teacher  not recorded: it gets no gradient
/// @throws value_error  options.divide_by, which the trainer decides.
template <LanguageModel Teacher, LanguageModel Student>
requires detail::AlikeModels<Teacher, Student>
[[nodiscard]] loss_sum<typename Student::value_type, typename Student::backend> distillation_loss(
    const Teacher& teacher, const Student& student,
    const pass<typename Student::value_type, typename Student::backend>& p,
    const token_batch& batch, const kl_options& options = {}) {
  detail::check_sum("distillation_loss", options);
  const pass<typename Student::value_type, typename Student::backend> silent{p.ctx, nullptr, false,
                                                                             p.weights};
  kl_options undivided = options;
  undivided.divide_by = 1;
  const auto kl = lm_kl_divergence(p, student.hidden(p, batch.inputs, batch.layout), student.head(),
                                   teacher.hidden(silent, batch.inputs, batch.layout),
                                   detail::unwatched(teacher.head(), p.tape),
                                   detail::target_mask(batch), undivided);
  const bool by_tokens = options.divisor == kl_divisor::tokens;
  return {kl.loss, by_tokens ? kl.tokens : batch.sequences().sequences()};
}

/// A loss_sum over pairs of answers, and how the policy ranks them.
template <Floating T, Backend B = cpu>
struct preference_loss_sum : loss_sum<T, B> {
  pair_ranking<B> ranking;

  [[nodiscard]] double accuracy() const { return ranking.accuracy(); }
  [[nodiscard]] double mean_margin() const { return ranking.mean_margin(); }
};

/// Direct preference optimisation of a model on pairs of answers, for train(): the loss of dpo_loss
/// summed over pairs. The tokens of an answer are those that have a target; give those of the
/// prompt no_target.
/// @param reference         not recorded: it gets no gradient
/// @param chosen, rejected  sequence i of one is paired with sequence i of the other
/// @throws shape_error  other numbers of sequences. @throws value_error  beta is not > 0.
template <LanguageModel Policy, LanguageModel Reference>
requires detail::AlikeModels<Policy, Reference>
[[nodiscard]] preference_loss_sum<typename Policy::value_type, typename Policy::backend> dpo_loss(
    const Policy& policy, const Reference& reference,
    const pass<typename Policy::value_type, typename Policy::backend>& p, const token_batch& chosen,
    const token_batch& rejected, double beta = 0.1) {
  using T = typename Policy::value_type;
  using B = typename Policy::backend;
  const index_t pairs = chosen.sequences().sequences();
  detail::check_pairs("dpo_loss", pairs, rejected.sequences().sequences());
  const auto score = [](const auto& model, const pass<T, B>& to, const token_batch& b) {
    return sequence_log_probability(to, model.hidden(to, b.inputs, b.layout), model.head(),
                                    b.targets, {}, b.layout);
  };
  const pass<T, B> silent{p.ctx, nullptr, false, p.weights};
  const dpo_result<T, B> r =
      dpo_loss(p, score(policy, p, chosen), score(policy, p, rejected),
               score(reference, silent, chosen), score(reference, silent, rejected), beta);
  return {{eval(r.loss * static_cast<accum_t<T>>(pairs), p.tape, p.ctx), pairs}, r.ranking};
}

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/train/model_losses_impl.hpp>
#endif
