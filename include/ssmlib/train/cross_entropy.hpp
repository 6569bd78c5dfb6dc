#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/cross_entropy.hpp>
#include <ssmlib/nn/linear.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

namespace ssm {

struct cross_entropy_options {
  std::int32_t ignore_index = -100;  ///< targets with this value do not count
  /// The sum over tokens is divided by this; 0: by the number of counted tokens. 1 gives the sum;
  /// the tokens of all parts of a batch give parts whose gradients add up to the batch's.
  double divide_by = 0;
  index_t block_tokens = 0;  ///< rows of logits held at a time; 0: by the vocabulary
};

/// A loss over tokens, recorded on the pass's tape.
template <Real T>
struct token_loss {
  tensor<T, 1> loss;  ///< one element, already divided
  double sum = 0;     ///< over the counted tokens
  index_t tokens = 0;
};

namespace detail {

/// Rows of logits to hold at a time: 2 MiB where that is enough rows for fast products, never
/// fewer than 256 rows nor more than 1024.
template <Real T>
[[nodiscard]] index_t logits_block(index_t wanted, index_t vocabulary, index_t tokens) {
  const index_t row = std::max<index_t>(1, vocabulary) * static_cast<index_t>(sizeof(T));
  const index_t automatic = std::clamp<index_t>((index_t{2} << 20) / row, 256, 1024);
  return std::clamp<index_t>(wanted > 0 ? wanted : automatic, 1, std::max<index_t>(1, tokens));
}

template <class T>
[[nodiscard]] view<T, 2> rows_between(view<T, 2> v, index_t begin, index_t end) {
  if (!v) return v;
  return {v.data + begin * v.stride(0), {end - begin, v.extent(1)}, v.strides};
}

/// f(t) for the rows of [begin, end), in parallel.
template <class F>
void for_each_row(const cpu::context& ctx, index_t begin, index_t end, index_t width, F f) {
  const index_t n = end - begin;
  kernels::for_each_piece(ctx, n, kernels::row_pieces(n, width),
                          [&](index_t, index_t from, index_t to) {
                            for (index_t t = begin + from; t < begin + to; ++t)
                              f(t);
                          });
}

template <Real T>
[[nodiscard]] tensor<T, 1> scalar(double value) {
  return tensor<T, 1>::full({1}, static_cast<T>(value));
}

inline void check_targets(const char* operation, const tensor<std::int32_t, 2>& targets,
                          index_t classes, std::int32_t ignore_index) {
  for (index_t t = 0; t < targets.size(); ++t) {
    const std::int32_t id = targets.data()[t];
    if (id == ignore_index || (id >= 0 && id < classes)) continue;
    throw value_error("ssm: " + std::string(operation) + ": the target of token " +
                      std::to_string(t) + " is " + std::to_string(id) + ", the vocabulary has " +
                      std::to_string(classes) + " entries; wanted an entry, or the ignore index " +
                      std::to_string(ignore_index));
  }
}

/// The log probabilities of targets, block of tokens by block of tokens. The logits of a block are
/// computed again in the backward pass.
template <Real T>
struct target_scores {
  tensor<T, 3> hidden;  // (b, T, d)
  linear<T> head;
  tensor<std::int32_t, 2> targets;  // dense
  std::int32_t ignore_index;
  index_t block;
  tensor<double, 1> log_probability, log_sum;  // (tokens); of counted tokens

  target_scores(const char* operation, const tensor<T, 3>& hidden_states, const linear<T>& lm_head,
                const tensor<std::int32_t, 2>& wanted, std::int32_t ignore, index_t block_tokens)
      : hidden(hidden_states), head(lm_head), targets(wanted.contiguous()), ignore_index(ignore) {
    check_linear(operation, hidden, head.weight, head.bias);
    if (hidden.extent(0) != wanted.extent(0) || hidden.extent(1) != wanted.extent(1)) {
      throw shape_error("ssm: " + std::string(operation) + ": the hidden states are " +
                        to_string<3>(hidden.extents()) + ", the targets " +
                        to_string<2>(wanted.extents()) + "; wanted the same batch and time");
    }
    check_targets(operation, targets, head.weight.extent(0), ignore_index);
    block = logits_block<T>(block_tokens, vocabulary(), tokens());
    log_probability = tensor<double, 1>::zeros(tokens());
    log_sum = tensor<double, 1>::zeros(tokens());
  }

  [[nodiscard]] index_t tokens() const { return targets.size(); }
  [[nodiscard]] index_t vocabulary() const { return head.weight.extent(0); }
  [[nodiscard]] bool counts(index_t t) const { return targets.data()[t] != ignore_index; }
  [[nodiscard]] bool wanted(const tape<T>* t) const {
    return t != nullptr && (t->wants(hidden) || t->wants(head.weight) || t->wants(head.bias));
  }

  void evaluate(const cpu::context& ctx) const {
    const tensor<T, 2> rows = input_tokens(hidden);
    for_each_block(ctx, rows, [&](index_t begin, index_t end, view<T, 2> logits) {
      for_each_row(ctx, begin, end, 4 * vocabulary(), [&](index_t t) {
        if (!counts(t)) return;
        const T* z = logits.data + (t - begin) * logits.stride(0);
        log_sum(t) = kernels::log_sum_exp(vocabulary(), z, T(1));
        log_probability(t) = static_cast<double>(z[targets.data()[t]]) - log_sum(t);
      });
    });
  }

  /// Adds the gradients of the sum over tokens of g(t) log_probability(t).
  template <class G>
  void add_gradients(const cpu::context& ctx, tape<T>& tape, G g) const {
    const tensor<T, 2> rows = input_tokens(hidden);
    const output_tokens<T, 3> dx(tape.gradient(hidden));
    const tensor<T, 2> d_weight = tape.gradient(head.weight);
    const tensor<T, 1> d_bias = tape.gradient(head.bias);
    for_each_block(ctx, rows, [&](index_t begin, index_t end, view<T, 2> logits) {
      for_each_row(ctx, begin, end, 4 * vocabulary(), [&](index_t t) {
        T* z = logits.data + (t - begin) * logits.stride(0);
        if (!counts(t)) return static_cast<void>(std::fill_n(z, vocabulary(), T(0)));
        const T weight = static_cast<T>(g(t));
        kernels::add_softmax<false>(vocabulary(), z, T(1), log_sum(t), -weight, z);
        z[targets.data()[t]] += weight;
      });
      linear_rows_vjp<T>(ctx, rows_between(rows.const_view(), begin, end), head.weight, logits,
                         rows_between(dx.get().view(), begin, end), d_weight.view(), d_bias);
    });
    dx.finish();
  }

 private:
  /// f(begin, end, logits of these tokens) for the blocks with tokens that count.
  template <class F>
  void for_each_block(const cpu::context& ctx, const tensor<T, 2>& rows, F f) const {
    const scratch<T> tile(block * vocabulary());
    for (index_t begin = 0; begin < tokens(); begin += block) {
      const index_t end = std::min(tokens(), begin + block);
      bool any = false;
      for (index_t t = begin; t < end; ++t)
        any = any || counts(t);
      if (!any) continue;
      const view<T, 2> logits{tile.data(), {end - begin, vocabulary()}, {vocabulary(), 1}};
      linear_rows<T>(ctx, false, rows_between(rows.const_view(), begin, end), head.weight,
                     head.bias, logits);
      f(begin, end, logits);
    }
  }
};

/// The sum of -log_probability over the tokens that count, and their number.
template <Real T, class Counts>
[[nodiscard]] token_loss<T> reduce_tokens(const tensor<double, 1>& log_probability, Counts counts,
                                          double divide_by) {
  token_loss<T> r;
  for (index_t t = 0; t < log_probability.size(); ++t) {
    if (!counts(t)) continue;
    r.sum -= log_probability(t);
    ++r.tokens;
  }
  if (divide_by == 0) divide_by = static_cast<double>(std::max<index_t>(1, r.tokens));
  r.loss = scalar<T>(r.sum / divide_by);
  return r;
}

}  // namespace detail

/// Cross-entropy of the next token through the output head, holding one block of logits at a time:
///
///     loss = - sum over counted tokens of log softmax(W h + bias)[target] / divisor
///
/// @param hidden   (b, T, d)
/// @param head     weight (V, d), bias (V) or absent; a tied embedding is linear<T>{table, {}}
/// @param targets  (b, T); options.ignore_index does not count
/// @return         the loss, the undivided sum and the counted tokens; 0 where no token counts
/// @throws shape_error  the sizes do not fit. @throws value_error  a target outside the vocabulary.
/// @cost   2 tokens d V flops, three times that backward, which computes the logits again;
///         memory: one block of logits and two numbers a token.
template <Real T>
[[nodiscard]] token_loss<T> lm_cross_entropy(const pass<T>& p, const tensor<T, 3>& hidden,
                                             const std::type_identity_t<linear<T>>& head,
                                             const tensor<std::int32_t, 2>& targets,
                                             const cross_entropy_options& o = {}) {
  const detail::target_scores<T> scores("lm_cross_entropy", hidden, head, targets, o.ignore_index,
                                        o.block_tokens);
  scores.evaluate(p.ctx);
  const auto r = detail::reduce_tokens<T>(
      scores.log_probability, [&](index_t t) { return scores.counts(t); }, o.divide_by);
  if (!scores.wanted(p.tape) || r.tokens == 0) return r;
  const double divisor = o.divide_by == 0 ? static_cast<double>(r.tokens) : o.divide_by;
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, t = p.tape] {
    const double g = -static_cast<double>(t->gradient(loss)(0)) / divisor;
    scores.add_gradients(ctx, *t, [g](index_t) { return g; });
  });
  return r;
}

/// The same from logits.
/// @param logits   (b, T, V)
/// @param targets  (b, T)
template <Real T>
[[nodiscard]] token_loss<T> cross_entropy(const pass<T>& p, const tensor<T, 3>& logits,
                                          const tensor<std::int32_t, 2>& targets,
                                          const cross_entropy_options& o = {});

/// The log probability of each sequence's counted targets, for preference losses and evaluation.
///
/// @param hidden   (b, T, d)
/// @param head     weight (V, d), bias (V) or absent
/// @param targets  (b, T); -100 does not count
/// @param mask     (b, T): 0 does not count; absent: all count
/// @param layout   the sequences; default: b sequences of T tokens
/// @return         (sequences)
/// @throws shape_error, value_error  as lm_cross_entropy
template <Real T>
[[nodiscard]] tensor<T, 1> sequence_log_probability(const pass<T>& p, const tensor<T, 3>& hidden,
                                                    const std::type_identity_t<linear<T>>& head,
                                                    const tensor<std::int32_t, 2>& targets,
                                                    const tensor<std::int32_t, 2>& mask = {},
                                                    const sequence_layout& layout = {});

// ---- definitions --------------------------------------------------------------------------------

template <Real T>
token_loss<T> cross_entropy(const pass<T>& p, const tensor<T, 3>& logits,
                            const tensor<std::int32_t, 2>& targets,
                            const cross_entropy_options& o) {
  if (logits.extent(0) != targets.extent(0) || logits.extent(1) != targets.extent(1)) {
    throw shape_error("ssm: cross_entropy: the logits are " + to_string<3>(logits.extents()) +
                      ", the targets " + to_string<2>(targets.extents()) +
                      "; wanted the same batch and time");
  }
  const tensor<T, 2> rows = detail::input_tokens(logits);
  const tensor<std::int32_t, 2> ids = targets.contiguous();
  const index_t tokens = rows.extent(0), vocabulary = rows.extent(1);
  detail::check_targets("cross_entropy", ids, vocabulary, o.ignore_index);
  const auto counts = [ids, ignore = o.ignore_index](index_t t) { return ids.data()[t] != ignore; };
  const auto log_probability = tensor<double, 1>::zeros(tokens);
  const auto log_sum = tensor<double, 1>::zeros(tokens);
  detail::for_each_row(p.ctx, 0, tokens, 4 * vocabulary, [&](index_t t) {
    if (!counts(t)) return;
    log_sum(t) = kernels::log_sum_exp(vocabulary, &rows(t, 0), T(1));
    log_probability(t) = static_cast<double>(rows(t, ids.data()[t])) - log_sum(t);
  });
  const auto r = detail::reduce_tokens<T>(log_probability, counts, o.divide_by);
  if (p.tape == nullptr || !p.tape->wants(logits) || r.tokens == 0) return r;
  const double divisor = o.divide_by == 0 ? static_cast<double>(r.tokens) : o.divide_by;
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, tape = p.tape] {
    const detail::output_tokens<T, 3> d(tape->gradient(logits));
    if (!d.get()) return;
    const T g = static_cast<T>(static_cast<double>(tape->gradient(loss)(0)) / divisor);
    detail::for_each_row(ctx, 0, tokens, 4 * vocabulary, [&](index_t t) {
      if (!counts(t)) return;
      kernels::add_softmax<true>(vocabulary, &rows(t, 0), T(1), log_sum(t), g, &d.get()(t, 0));
      d.get()(t, ids.data()[t]) -= g;
    });
    d.finish();
  });
  return r;
}

template <Real T>
tensor<T, 1> sequence_log_probability(const pass<T>& p, const tensor<T, 3>& hidden,
                                      const std::type_identity_t<linear<T>>& head,
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
  const detail::target_scores<T> scores("sequence_log_probability", hidden, head, wanted, ignored,
                                        0);
  scores.evaluate(p.ctx);
  tensor<T, 1> result(layout.sequences());
  tensor<std::int32_t, 1> sequence(wanted.size());
  for (index_t i = 0; i < layout.sequences(); ++i) {
    double sum = 0;
    for (index_t t = layout.begin(i); t < layout.end(i); ++t) {
      sequence(t) = static_cast<std::int32_t>(i);
      sum += scores.log_probability(t);
    }
    result(i) = static_cast<T>(sum);
  }
  if (!scores.wanted(p.tape)) return result;
  p.tape->record(result, [=, &ctx = p.ctx, tape = p.tape] {
    const tensor<T, 1> g = tape->gradient(result);
    scores.add_gradients(ctx, *tape,
                         [&](index_t t) { return static_cast<double>(g(sequence(t))); });
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
