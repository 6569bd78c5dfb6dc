#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/cross_entropy.hpp>
#include <ssmlib/train/logits_tile.hpp>
#include <ssmlib/train/token_loss.hpp>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <memory>
#include <string>

namespace ssm {

struct cross_entropy_options {
  std::int32_t ignore_index = -100;  ///< targets with this value do not count
  /// The sum over tokens is divided by this; 0: by the number of counted tokens. 1 gives the sum;
  /// the tokens of all parts of a batch give parts whose gradients add up to the batch's.
  double divide_by = 0;
  index_t block_tokens = 0;  ///< rows of logits held at a time; 0: by the vocabulary
};

/// log_sum = log(sum of e^z) and log_probability = z[target] - log_sum of rows of logits (n, V).
/// The results of tokens with the target `ignored` are 0 before and stay 0.
template <Real T>
void apply_log_probability(const cpu::context& ctx, const tensor<T, 2>& logits,
                           const tensor<std::int32_t, 1>& targets, std::int32_t ignored,
                           const tensor<double, 1>& log_probability,
                           const tensor<double, 1>& log_sum) {
  const index_t vocabulary = logits.extent(1);
  detail::for_each_row(ctx, logits.extent(0), 4 * vocabulary, [&](index_t t) {
    if (targets(t) == ignored) return;
    const T* z = &logits(t, 0);
    log_sum(t) = kernels::log_sum_exp(vocabulary, z, T(1));
    log_probability(t) = static_cast<double>(z[targets(t)]) - log_sum(t);
  });
}
/// d_logits = or, with `add`, += the gradient of the sum over t of weights(t) log_probability(t).
/// It may overwrite the logits themselves.
template <Real T>
void apply_log_probability_vjp(const cpu::context& ctx, const tensor<T, 2>& logits,
                               const tensor<std::int32_t, 1>& targets, std::int32_t ignored,
                               const tensor<double, 1>& log_sum, const token_weights<T>& weights,
                               const tensor<T, 2>& d_logits, bool add) {
  const index_t vocabulary = logits.extent(1);
  detail::for_each_row(ctx, logits.extent(0), 4 * vocabulary, [&](index_t t) {
    T* d = &d_logits(t, 0);
    if (targets(t) == ignored) {
      if (!add) std::fill_n(d, vocabulary, T(0));
      return;
    }
    const T weight = static_cast<T>(weights(t));
    if (add) {
      kernels::add_softmax<true>(vocabulary, &logits(t, 0), T(1), log_sum(t), -weight, d);
    } else {
      kernels::add_softmax<false>(vocabulary, &logits(t, 0), T(1), log_sum(t), -weight, d);
    }
    d[targets(t)] += weight;
  });
}

namespace detail {

inline void check_targets(const char* operation, const tensor<std::int32_t, 1>& targets,
                          index_t classes, std::int32_t ignore_index) {
  for (index_t t = 0; t < targets.size(); ++t) {
    const std::int32_t id = targets(t);
    if (id == ignore_index || (id >= 0 && id < classes)) continue;
    throw value_error("ssm: " + std::string(operation) + ": the target of token " +
                      std::to_string(t) + " is " + std::to_string(id) + ", the vocabulary has " +
                      std::to_string(classes) + " entries; wanted an entry, or the ignore index " +
                      std::to_string(ignore_index));
  }
}

/// The targets of tokens, checked on the host and put on the backend once.
template <Backend B>
struct target_ids {
  tensor<std::int32_t, 1> host;  // (tokens), dense
  tensor<std::int32_t, 1, B> ids;
  std::int32_t ignored;
  index_t counted;

  target_ids(const char* operation, const tensor<std::int32_t, 2>& targets, index_t classes,
             std::int32_t ignore_index)
      : host(targets.contiguous().reshape(targets.size())), ignored(ignore_index) {
    check_targets(operation, host, classes, ignored);
    ids = on_backend<B>(host);
    counted = size() - std::count(host.data(), host.data() + size(), ignored);
  }

  [[nodiscard]] index_t size() const { return host.size(); }
  [[nodiscard]] bool any_counts(index_t begin, index_t end) const {
    return std::any_of(host.data() + begin, host.data() + end,
                       [this](std::int32_t id) { return id != ignored; });
  }
};

/// The log probabilities of targets, block of tokens by block of tokens. The logits of a block are
/// computed again in the backward pass.
template <Floating T, Backend B>
struct target_scores {
  tensor<T, 3, B> hidden;  // (b, T, d)
  linear<T, B> head;
  target_ids<B> targets;
  tensor<T, 2, B> weight;  // the head's, in T
  index_t block;
  tensor<double, 1, B> log_probability, log_sum;  // (tokens); 0 where a token does not count

  target_scores(const char* operation, const pass<T, B>& p, const tensor<T, 3, B>& hidden_states,
                const linear<T, B>& lm_head, const tensor<std::int32_t, 2>& wanted,
                std::int32_t ignore, index_t block_tokens)
      : hidden(hidden_states),
        head(lm_head),
        targets(checked(operation, hidden, head, wanted, ignore)),
        weight(weight_of(p, head.weight)),
        block(logits_block<T, B>(block_tokens, vocabulary(), targets.size())),
        log_probability(tensor<double, 1, B>::zeros(targets.size())),
        log_sum(tensor<double, 1, B>::zeros(targets.size())) {}

  [[nodiscard]] index_t vocabulary() const { return head.weight.extent(0); }

  void evaluate(const typename B::context& ctx) const {
    for_each_block(ctx, [&](index_t begin, index_t end, const tensor<T, 2, B>& logits, auto&) {
      apply_log_probability(ctx, logits, targets.ids.slice(0, begin, end), targets.ignored,
                            log_probability.slice(0, begin, end), log_sum.slice(0, begin, end));
    });
  }

  /// The same, and adds the gradients of the sum over tokens of weights(t) log_probability(t) while
  /// the logits are there.
  void evaluate_with_gradients(const typename B::context& ctx, tape<T, B>& tape,
                               const token_weights<accum_t<T>, B>& weights) const {
    const output_tokens<T, 3, B> dx(tape.gradient(hidden));
    for_each_block(
        ctx, [&](index_t begin, index_t end, const tensor<T, 2, B>& logits, const auto& tile) {
          const auto ids = targets.ids.slice(0, begin, end);
          apply_log_probability(ctx, logits, ids, targets.ignored,
                                log_probability.slice(0, begin, end), log_sum.slice(0, begin, end));
          apply_log_probability_vjp(ctx, logits, ids, targets.ignored, log_sum.slice(0, begin, end),
                                    weights.between(begin, end), logits, false);
          tile.add_gradients(ctx, tape, dx.get());
        });
    dx.finish();
  }

  /// Adds the gradients of the sum over tokens of weights(t) log_probability(t).
  void add_gradients(const typename B::context& ctx, tape<T, B>& tape,
                     const token_weights<accum_t<T>, B>& weights) const {
    const output_tokens<T, 3, B> dx(tape.gradient(hidden));
    for_each_block(
        ctx, [&](index_t begin, index_t end, const tensor<T, 2, B>& logits, const auto& tile) {
          apply_log_probability_vjp(ctx, logits, targets.ids.slice(0, begin, end), targets.ignored,
                                    log_sum.slice(0, begin, end), weights.between(begin, end),
                                    logits, false);
          tile.add_gradients(ctx, tape, dx.get());
        });
    dx.finish();
  }

 private:
  [[nodiscard]] static target_ids<B> checked(const char* operation, const tensor<T, 3, B>& hidden,
                                             const linear<T, B>& head,
                                             const tensor<std::int32_t, 2>& wanted,
                                             std::int32_t ignore) {
    check_linear(operation, hidden, head.weight, head.bias);
    if (hidden.extent(0) != wanted.extent(0) || hidden.extent(1) != wanted.extent(1)) {
      throw shape_error("ssm: " + std::string(operation) + ": the hidden states are " +
                        to_string<3>(hidden.extents()) + ", the targets " +
                        to_string<2>(wanted.extents()) + "; wanted the same batch and time");
    }
    return {operation, wanted, head.weight.extent(0), ignore};
  }

  /// f(begin, end, logits, tile) for the blocks with tokens that count.
  template <class F>
  void for_each_block(const typename B::context& ctx, F f) const {
    logits_tile<T, B> tile(hidden, head, weight, vocabulary(), block);
    for (index_t begin = 0; begin < targets.size(); begin += block) {
      const index_t end = std::min(targets.size(), begin + block);
      if (targets.any_counts(begin, end)) f(begin, end, tile.compute(ctx, begin, end), tile);
    }
  }
};

/// Evaluates the scores, and the gradients of factor / divisor times their sum: on a tape of their
/// own, for what p.tape wants.
template <Floating T, Backend B>
[[nodiscard]] std::shared_ptr<tape<T, B>> gradients_ahead(const pass<T, B>& p,
                                                          const target_scores<T, B>& scores,
                                                          double factor, double divisor) {
  const auto made = std::make_shared<tape<T, B>>();
  const auto watch = [&](const auto& x) {
    if (p.tape->wants(x)) made->watch(x);
  };
  watch(scores.hidden);
  watch(scores.head.weight);
  watch(scores.head.bias);
  const auto one = tensor<accum_t<T>, 1, B>::full({1}, accum_t<T>(1));
  scores.evaluate_with_gradients(p.ctx, *made, {one, factor, divisor});
  return made;
}

/// What the sum over `counted` tokens is divided by.
[[nodiscard]] inline double token_divisor(double divide_by, index_t counted) {
  return divide_by != 0 ? divide_by : static_cast<double>(std::max<index_t>(1, counted));
}

}  // namespace detail

/// Cross-entropy of the next token through the output head, holding one block of logits at a time:
///
///     loss = - sum over counted tokens of log softmax(W h + bias)[target] / divisor
///
/// @param hidden   (b, T, d)
/// @param head     weight (V, d), bias (V) or absent; a tied embedding is linear<T>{table, {}}
/// @param targets  (b, T), on the host; options.ignore_index does not count
/// @return         the loss, the undivided sum and the counted tokens; 0 where no token counts
/// @throws shape_error  the sizes do not fit. @throws value_error  a target outside the vocabulary.
/// @cost   2 tokens d V flops, three times that backward, which computes the logits again;
///         memory: one block of logits and two numbers a token. On CUDA, where products with the
///         head are most of a small model's time, the gradients are made while the logits are
///         there, and kept until the backward pass scales them: 6 tokens d V flops in all.
template <Floating T, Backend B>
[[nodiscard]] token_loss<T, B> lm_cross_entropy(const pass<T, B>& p, const tensor<T, 3, B>& hidden,
                                                const std::type_identity_t<linear<T, B>>& head,
                                                const tensor<std::int32_t, 2>& targets,
                                                const cross_entropy_options& o = {}) {
  const typename B::scope scope(p.ctx);
  const detail::target_scores<T, B> scores("lm_cross_entropy", p, hidden, head, targets,
                                           o.ignore_index, o.block_tokens);
  const index_t counted = scores.targets.counted;
  const double divisor = detail::token_divisor(o.divide_by, counted);
  const bool wanted = detail::wants_any(p.tape, hidden, head) && counted != 0;
  const auto loss = [&] {
    return detail::make_token_loss<T, B>(p.ctx, scores.log_probability, -1, 1, divisor, counted);
  };
  if constexpr (!std::same_as<B, cpu>) {
    if (wanted) {
      const auto made = detail::gradients_ahead(p, scores, -1.0, divisor);
      const auto r = loss();
      p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, t = p.tape] {
        const auto add = [&, g = t->gradient(loss)](const auto& x) {
          apply_scaled_gradient(ctx, made->gradient(x), g, t->gradient(x));
        };
        add(hidden);
        add(head.weight);
        add(head.bias);
      });
      return r;
    }
  }
  scores.evaluate(p.ctx);
  const auto r = loss();
  if (!wanted) return r;
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, t = p.tape] {
    scores.add_gradients(ctx, *t, {t->gradient(loss), -1.0, divisor});
  });
  return r;
}

/// The same from logits.
/// @param logits   (b, T, V)
/// @param targets  (b, T), on the host
template <Floating T, Backend B>
[[nodiscard]] token_loss<T, B> cross_entropy(const pass<T, B>& p, const tensor<T, 3, B>& logits,
                                             const tensor<std::int32_t, 2>& targets,
                                             const cross_entropy_options& o = {});

/// The log probability of each sequence's counted targets, for preference losses and evaluation.
///
/// @param hidden   (b, T, d)
/// @param head     weight (V, d), bias (V) or absent
/// @param targets  (b, T), on the host; -100 does not count
/// @param mask     (b, T): 0 does not count; absent: all count
/// @param layout   the sequences; default: b sequences of T tokens
/// @return         (sequences)
/// @throws shape_error, value_error  as lm_cross_entropy
template <Floating T, Backend B>
[[nodiscard]] tensor<accum_t<T>, 1, B> sequence_log_probability(
    const pass<T, B>& p, const tensor<T, 3, B>& hidden,
    const std::type_identity_t<linear<T, B>>& head, const tensor<std::int32_t, 2>& targets,
    const tensor<std::int32_t, 2>& mask = {}, const sequence_layout& layout = {});

// ---- definitions --------------------------------------------------------------------------------

template <Floating T, Backend B>
token_loss<T, B> cross_entropy(const pass<T, B>& p, const tensor<T, 3, B>& logits,
                               const tensor<std::int32_t, 2>& targets,
                               const cross_entropy_options& o) {
  if (logits.extent(0) != targets.extent(0) || logits.extent(1) != targets.extent(1)) {
    throw shape_error("ssm: cross_entropy: the logits are " + to_string<3>(logits.extents()) +
                      ", the targets " + to_string<2>(targets.extents()) +
                      "; wanted the same batch and time");
  }
  const typename B::scope scope(p.ctx);
  const tensor<T, 2, B> rows = detail::input_tokens(logits);
  const detail::target_ids<B> ids("cross_entropy", targets, rows.extent(1), o.ignore_index);
  const auto log_probability = tensor<double, 1, B>::zeros(ids.size());
  const auto log_sum = tensor<double, 1, B>::zeros(ids.size());
  apply_log_probability(p.ctx, rows, ids.ids, ids.ignored, log_probability, log_sum);
  const double divisor = detail::token_divisor(o.divide_by, ids.counted);
  const auto r = detail::make_token_loss<T, B>(p.ctx, log_probability, -1, 1, divisor, ids.counted);
  if (p.tape == nullptr || !p.tape->wants(logits) || ids.counted == 0) return r;
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, tape = p.tape] {
    const detail::output_tokens<T, 3, B> d(tape->gradient(logits));
    if (!d.get()) return;
    apply_log_probability_vjp(ctx, rows, ids.ids, ids.ignored, log_sum,
                              token_weights<accum_t<T>, B>{tape->gradient(loss), -1.0, divisor},
                              d.get(), true);
    d.finish();
  });
  return r;
}

template <Floating T, Backend B>
tensor<accum_t<T>, 1, B> sequence_log_probability(const pass<T, B>& p,
                                                  const tensor<T, 3, B>& hidden,
                                                  const std::type_identity_t<linear<T, B>>& head,
                                                  const tensor<std::int32_t, 2>& targets,
                                                  const tensor<std::int32_t, 2>& mask,
                                                  const sequence_layout& given) {
  constexpr std::int32_t ignored = -100;
  tensor<std::int32_t, 2> wanted = targets;
  if (mask) {
    detail::check_same_shape("sequence_log_probability", "the targets", targets, "the mask", mask);
    wanted = targets.clone();
    wanted.zip_with(mask, [](std::int32_t& id, const std::int32_t& keep) {
      if (keep == 0) id = ignored;
    });
  }
  const sequence_layout layout =
      given ? given : sequence_layout::rectangular(hidden.extent(0), hidden.extent(1));
  if (layout.tokens() != wanted.size()) {
    throw shape_error("ssm: sequence_log_probability: the targets are " +
                      to_string<2>(wanted.extents()) + ", the layout has " +
                      std::to_string(layout.tokens()) + " tokens; wanted as many");
  }
  const typename B::scope scope(p.ctx);
  const detail::target_scores<T, B> scores("sequence_log_probability", p, hidden, head, wanted,
                                           ignored, 0);
  scores.evaluate(p.ctx);
  const tensor<double, 1, B> sums(layout.sequences());
  const tensor<accum_t<T>, 1, B> result(layout.sequences());
  apply_token_sums(p.ctx, scores.log_probability, layout, 1, sums);
  apply_scaled(p.ctx, sums, 1, 1, result);
  if (!detail::wants_any(p.tape, hidden, head)) return result;
  const tensor<std::int32_t, 1> sequence(wanted.size());
  for (index_t i = 0; i < layout.sequences(); ++i) {
    std::fill(sequence.data() + layout.begin(i), sequence.data() + layout.end(i),
              static_cast<std::int32_t>(i));
  }
  const auto index = detail::on_backend<B>(sequence);
  p.tape->record(result, [=, &ctx = p.ctx, tape = p.tape] {
    const tensor<accum_t<T>, 1, B> g(index.size());
    apply_spread(ctx, tape->gradient(result), index, g);
    scores.add_gradients(ctx, *tape, {g});
  });
  return result;
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      training, token_loss<T> lm_cross_entropy<T>(                                                 \
                    const pass<T>&, const tensor<T, 3>&, const std::type_identity_t<linear<T>>&,   \
                    const tensor<std::int32_t, 2>&, const cross_entropy_options&));                \
  SSMLIB_INSTANTIATE(training, token_loss<T> cross_entropy<T>(const pass<T>&, const tensor<T, 3>&, \
                                                              const tensor<std::int32_t, 2>&,      \
                                                              const cross_entropy_options&));      \
  SSMLIB_INSTANTIATE(                                                                              \
      training,                                                                                    \
      tensor<T, 1> sequence_log_probability<T>(                                                    \
          const pass<T>&, const tensor<T, 3>&, const std::type_identity_t<linear<T>>&,             \
          const tensor<std::int32_t, 2>&, const tensor<std::int32_t, 2>&, const sequence_layout&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
