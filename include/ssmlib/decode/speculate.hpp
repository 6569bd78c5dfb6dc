#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/decode/generate.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ssm {

struct speculation_options {
  index_t draft_tokens = 4;  ///< K, proposed per step; 1 to 15
};

struct speculation_statistics {
  index_t steps = 0;     ///< verifications, counted per sequence
  index_t proposed = 0;  ///< draft tokens
  index_t accepted = 0;  ///< draft tokens that the target agreed with
  index_t emitted = 0;   ///< tokens that verifications produced

  [[nodiscard]] double tokens_per_step() const {
    return steps == 0 ? 0.0 : static_cast<double>(emitted) / static_cast<double>(steps);
  }
  [[nodiscard]] double acceptance() const {
    return proposed == 0 ? 0.0 : static_cast<double>(accepted) / static_cast<double>(proposed);
  }
};

struct speculation_result {
  token_rows tokens;
  speculation_statistics statistics;
};

namespace detail {

/// Speculative decoding of a batch. Invariants between steps: the target has consumed everything
/// but the last token of each sequence; the draft everything but `pending`.
template <class Target, class Draft>
class speculator {
 public:
  speculator(const Target& target, const Draft& draft, const generate_options& options,
             index_t draft_tokens, const token_rows& prompts,
             const typename Target::backend::context& ctx)
      : options_(options),
        draft_tokens_(draft_tokens),
        target_(target, static_cast<index_t>(prompts.size()), draft_tokens, ctx),
        draft_(draft, static_cast<index_t>(prompts.size()), draft_tokens, ctx),
        sequences_(prompts.size()) {
    result_.tokens.resize(prompts.size());
    // Both read the prompts in one piece, so that a target that is its own draft has equal states.
    (void)draft_.last(prompts, is_greedy());
    const auto follow = target_.last(prompts, is_greedy());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const auto row = static_cast<index_t>(i);
      if (options_.max_new_tokens < 1) {
        sequences_[i].done = true;
        continue;
      }
      emit(i, choose(follow, row, [&] { return uniform(i, target_.position(row), draw::token); }));
    }
  }

  [[nodiscard]] speculation_result run() {
    while (std::ranges::any_of(sequences_, [](const sequence& s) { return !s.done; })) {
      propose();
      verify();
    }
    return std::move(result_);
  }

 private:
  using TargetReal = typename Target::value_type;

  struct sequence {
    std::vector<std::int32_t> pending;   // known, not yet seen by the draft
    std::vector<std::int32_t> proposal;  // d_1 .. d_k
    std::vector<std::vector<double>> q;  // the draft's distributions, when sampling
    bool done = false;
  };

  [[nodiscard]] bool is_greedy() const { return options_.sampling.temperature == 0.0; }
  // The token after a row; p_ is what it was drawn from, unless greedy.
  template <class Real, class Uniform>
  [[nodiscard]] std::int32_t choose(const followers<Real>& follow, index_t row, Uniform u) {
    if (is_greedy()) return follow.likeliest[static_cast<std::size_t>(row)];
    next_token_distribution(logits_row(follow.logits, row), options_.sampling, p_);
    return pick(p_, u());
  }
  [[nodiscard]] double uniform(std::size_t i, index_t position, draw purpose) const {
    return random_draw(options_.sampling.seed, static_cast<index_t>(i), position, purpose);
  }

  void emit(std::size_t i, std::int32_t token) {
    sequence& s = sequences_[i];
    result_.tokens[i].push_back(token);
    s.pending.push_back(token);
    if (options_.on_token) options_.on_token(static_cast<index_t>(i), token);
    s.done = static_cast<index_t>(result_.tokens[i].size()) >= options_.max_new_tokens ||
             (options_.stop && token == *options_.stop);
  }

  void propose() {
    token_rows rows(sequences_.size());
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      sequence& s = sequences_[i];
      s.proposal.clear();
      s.q.clear();
      if (!s.done && wanted(i) > 0) rows[i] = std::exchange(s.pending, {});
    }
    for (index_t round = 0; round < draft_tokens_; ++round) {
      if (std::ranges::all_of(rows, [](const auto& r) { return r.empty(); })) return;
      const auto follow = draft_.last(rows, is_greedy());
      for (std::size_t i = 0; i < sequences_.size(); ++i) {
        if (rows[i].empty()) continue;
        sequence& s = sequences_[i];
        const auto row = static_cast<index_t>(i);
        const std::int32_t token =
            choose(follow, row, [&] { return uniform(i, draft_.position(row), draw::draft); });
        s.proposal.push_back(token);
        if (!is_greedy()) s.q.push_back(p_);
        const bool more = static_cast<index_t>(s.proposal.size()) < wanted(i);
        rows[i].assign(more ? 1 : 0, token);
      }
    }
  }

  // One token of a step comes from the target itself, so the last one needs no proposal.
  [[nodiscard]] index_t wanted(std::size_t i) const {
    const auto have = static_cast<index_t>(result_.tokens[i].size());
    return std::min(draft_tokens_, options_.max_new_tokens - have - 1);
  }

  void verify() {
    token_rows rows(sequences_.size());
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      if (sequences_[i].done) continue;
      rows[i].push_back(result_.tokens[i].back());
      rows[i].insert(rows[i].end(), sequences_[i].proposal.begin(), sequences_[i].proposal.end());
    }
    const auto follow = target_.all(rows, is_greedy());
    std::vector<index_t> target_back(sequences_.size(), 0), draft_back(sequences_.size(), 0);
    index_t first = 0;  // row of the logits
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      const auto length = static_cast<index_t>(rows[i].size());
      const index_t begin = std::exchange(first, first + length);
      if (sequences_[i].done) continue;
      const index_t accepted =
          accept(i, follow, begin, target_.position(static_cast<index_t>(i)) - length);
      const auto k = static_cast<index_t>(sequences_[i].proposal.size());
      target_back[i] = k - accepted;
      // The draft has seen d_1 .. d_{k-1}.
      draft_back[i] = std::max<index_t>(k - 1 - accepted, 0);
    }
    target_.rollback(target_back);
    draft_.rollback(draft_back);
  }

  // Emits the agreed tokens and one of the target's own; returns how many proposals were agreed.
  // A token that the draft has not seen goes to `pending`.
  index_t accept(std::size_t i, const followers<accum_t<TargetReal>>& follow, index_t first,
                 index_t position) {
    sequence& s = sequences_[i];
    const auto k = static_cast<index_t>(s.proposal.size());
    const bool untouched = k == 0;  // the draft was not asked, everything stays pending
    index_t accepted = 0;
    std::int32_t own = 0;
    for (;; ++accepted) {
      const index_t here = position + accepted + 1;
      own = choose(follow, first + accepted, [&] { return uniform(i, here, draw::token); });
      if (accepted == k) break;
      const auto j = static_cast<std::size_t>(accepted);
      const auto proposed = static_cast<std::size_t>(s.proposal[j]);
      if (is_greedy()) {
        if (own == s.proposal[j]) continue;
        break;
      }
      const std::vector<double>& q = s.q[j];
      if (uniform(i, here, draw::accept) * q[proposed] <= p_[proposed]) continue;
      own = pick_residual(q, uniform(i, here, draw::residual));
      break;
    }
    auto& statistics = result_.statistics;
    ++statistics.steps;
    statistics.proposed += k;
    statistics.accepted += accepted;
    const std::vector<std::int32_t> agreed(s.proposal.begin(), s.proposal.begin() + accepted);
    const std::size_t before = result_.tokens[i].size();
    for (const std::int32_t token : agreed) {
      if (!s.done) emit(i, token);
    }
    if (!s.done) emit(i, own);
    statistics.emitted += static_cast<index_t>(result_.tokens[i].size() - before);
    if (!untouched) {
      // emit() queued every token; the draft has already seen all but d_k and the target's own.
      const auto seen = std::min<index_t>(accepted, k - 1);
      const auto drop = std::min(static_cast<std::size_t>(seen), s.pending.size());
      s.pending.erase(s.pending.begin(), s.pending.begin() + static_cast<std::ptrdiff_t>(drop));
    }
    return accepted;
  }

  // From max(p - q, 0), normalised; from p if nothing is left of it by rounding.
  [[nodiscard]] std::int32_t pick_residual(const std::vector<double>& q, double u) const {
    std::vector<double> rest(p_.size());
    double sum = 0;
    for (std::size_t v = 0; v < rest.size(); ++v)
      sum += rest[v] = std::max(p_[v] - q[v], 0.0);
    if (!(sum > 0)) return pick(p_, u);
    for (double& x : rest)
      x /= sum;
    return pick(rest, u);
  }

  const generate_options& options_;
  index_t draft_tokens_;
  model_steps<Target> target_;
  model_steps<Draft> draft_;
  std::vector<sequence> sequences_;
  speculation_result result_;
  std::vector<double> p_;
};

}  // namespace detail

/// Continues each prompt with the target's distribution, several tokens a step: a draft model
/// proposes K tokens, the target verifies them in one call of advance(), and both states roll back
/// to what was accepted. Targets and drafts may be recurrent, attention or hybrid.
///
/// Greedy: the tokens equal generate()'s to the last bit, whatever the draft, but for the rounding
/// of prompts of more than 16 tokens (docs/decoding.md). Sampling: tokens are distributed exactly
/// as generate()'s.
/// @throws value_error  an empty prompt, an option outside its range, or vocabularies that differ.
/// @source Leviathan et al. 2022, arXiv:2211.17192; for recurrent states: Wang et al. 2024,
///         arXiv:2408.15237, section 4.
template <LanguageModel Target, LanguageModel Draft>
requires std::same_as<typename Target::backend, typename Draft::backend>
[[nodiscard]] speculation_result speculate(
    const Target& target, const Draft& draft, const token_rows& prompts,
    const generate_options& options = {}, const speculation_options& speculation = {},
    const typename Target::backend::context& ctx = default_context<typename Target::backend>()) {
  detail::check_prompts("speculate", prompts);
  check_sampling(options.sampling);
  if (speculation.draft_tokens < 1 || speculation.draft_tokens >= max_fixed_step) {
    throw value_error("ssm: speculate: draft_tokens is " +
                      std::to_string(speculation.draft_tokens) + "; wanted 1 to " +
                      std::to_string(max_fixed_step - 1));
  }
  if (target.head().out_features() != draft.head().out_features()) {
    throw value_error(
        "ssm: speculate: the target has " + std::to_string(target.head().out_features()) +
        " tokens in its vocabulary, the draft " + std::to_string(draft.head().out_features()) +
        "; wanted one tokenizer for both");
  }
  return detail::speculator<Target, Draft>(target, draft, options, speculation.draft_tokens,
                                           prompts, ctx)
      .run();
}

#define SSMLIB_DETAIL_LIST(T)                                                              \
  SSMLIB_INSTANTIATE(                                                                      \
      decoding, speculation_result speculate<language_model<T>, language_model<T>>(        \
                    const language_model<T>&, const language_model<T>&, const token_rows&, \
                    const generate_options&, const speculation_options&, const cpu::context&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
