#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/decode/sampling.hpp>
#include <ssmlib/model/language_model.hpp>

#include <concepts>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace ssm {

/// Prompts or continuations, one row of token ids a sequence.
using token_rows = std::vector<std::vector<std::int32_t>>;

struct generate_options {
  index_t max_new_tokens = 128;
  std::optional<std::int32_t> stop = {};  ///< ends a sequence; it is part of the result
  sampling_options sampling = {};
  /// Called with (sequence, token) as soon as a token is certain.
  std::function<void(index_t, std::int32_t)> on_token = {};
};

namespace detail {

/// Packs the tokens of all sequences for advance(). @pre rows.size() is the number of sequences
struct packed_ids {
  explicit packed_ids(const token_rows& rows) {
    // From the pool: a decoding step does not reach the system allocator.
    const tensor<index_t, 1> lengths(static_cast<index_t>(rows.size()));
    for (std::size_t i = 0; i < rows.size(); ++i)
      lengths.data()[i] = static_cast<index_t>(rows[i].size());
    layout = sequence_layout::from_lengths(std::span<const index_t>(lengths.data(), rows.size()));
    ids = tensor<std::int32_t, 2>(1, layout.tokens());
    index_t t = 0;
    for (const auto& row : rows) {
      for (const std::int32_t id : row)
        ids(0, t++) = id;
    }
  }
  tensor<std::int32_t, 2> ids;
  sequence_layout layout;
};

inline void check_prompts(const char* operation, const token_rows& prompts) {
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    if (prompts[i].empty()) {
      throw value_error("ssm: " + std::string(operation) + ": prompt " + std::to_string(i) +
                        " is empty; give at least one token");
    }
  }
}

/// Logits where the host reads them.
template <Floating T, Backend B>
[[nodiscard]] tensor<accum_t<T>, 3> logits_on_host(const tensor<T, 3, B>& logits) {
  if constexpr (std::same_as<T, bf16>) {
    return cast<float>(on_host(logits));
  } else {
    return on_host(logits);
  }
}

/// The hidden states of the last new token of each sequence, (1, sequences, d); zeros for those
/// that have none.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> last_tokens(const tensor<T, 3, B>& hidden,
                                          const sequence_layout& layout) {
  const index_t n = layout.sequences();
  auto last = tensor<T, 3, B>::zeros(1, n, hidden.extent(2));
  for (index_t i = 0; i < n; ++i) {
    if (layout.length(i) == 0) continue;
    last.slice(1, i, i + 1).copy_from(hidden.slice(1, layout.end(i) - 1, layout.end(i)));
  }
  return last;
}

template <Real T>
[[nodiscard]] std::span<const T> logits_row(const tensor<T, 3>& logits, index_t i) {
  return {&logits(0, i, 0), static_cast<std::size_t>(logits.extent(2))};
}

/// What follows some tokens, on the host: the most likely token after each, or all logits.
template <Real T>
struct followers {
  std::vector<std::int32_t> likeliest;
  tensor<T, 3> logits;  ///< (1, tokens, V)

  /// Where temperature is 0 the likeliest alone is kept. The first of equals, as everywhere.
  static followers of(const tensor<T, 3>& logits, bool likeliest_alone) {
    if (!likeliest_alone) return {{}, logits};
    followers f;
    for (index_t i = 0; i < logits.extent(1); ++i)
      f.likeliest.push_back(argmax(logits_row(logits, i)));
    return f;
  }
};

/// A batch of sequences that a model continues: what generate() and speculate() ask of a backend.
/// That of CUDA is in decode/cuda/decoder.hpp.
template <class M>
class model_steps {
 public:
  using T = typename M::value_type;
  using B = typename M::backend;

  model_steps(const M& model, index_t sequences, index_t max_rollback,
              const typename B::context& ctx)
      : model_(model), ctx_(ctx) {
    const typename B::scope scope(ctx);
    state_ = model.initial_state(sequences, max_rollback);
  }

  [[nodiscard]] index_t position(index_t i) const { return state_.position(i); }
  void rollback(std::span<const index_t> n) { state_.rollback(n); }
  /// What follows the last new token of each sequence.
  [[nodiscard]] followers<accum_t<T>> last(const token_rows& rows, bool likeliest_alone) {
    const typename B::scope scope(ctx_);
    const packed_ids packed(rows);
    const auto hidden = model_.advance(pass(), state_, packed.ids, packed.layout);
    return after(last_tokens(hidden, packed.layout), likeliest_alone);
  }
  /// What follows each new token.
  [[nodiscard]] followers<accum_t<T>> all(const token_rows& rows, bool likeliest_alone) {
    const typename B::scope scope(ctx_);
    const packed_ids packed(rows);
    return after(model_.advance(pass(), state_, packed.ids, packed.layout), likeliest_alone);
  }

 private:
  [[nodiscard]] ssm::pass<T, B> pass() { return {ctx_, nullptr, true, &weights_}; }
  [[nodiscard]] followers<accum_t<T>> after(const tensor<T, 3, B>& hidden, bool likeliest_alone) {
    return followers<accum_t<T>>::of(logits_on_host(model_.head()(pass(), hidden)),
                                     likeliest_alone);
  }

  const M& model_;
  const typename B::context& ctx_;
  typename M::state_type state_;
  weight_cache<T, B> weights_;
};

}  // namespace detail

/// Continues each prompt, token by token from a recurrent state: the cost of a token does not grow
/// with the length for recurrent mixers.
///
/// @param prompts  one row of at least one id per sequence; lengths may differ, nothing is padded
/// @return         the new tokens of each sequence; what a sequence gets does not depend on what
///                 else is in the batch
/// @throws value_error  an empty prompt or an option outside its range.
template <LanguageModel M>
[[nodiscard]] token_rows generate(
    const M& model, const token_rows& prompts, const generate_options& options = {},
    const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  detail::check_prompts("generate", prompts);
  check_sampling(options.sampling);
  if constexpr (requires { generate_on_device(model, prompts, options, ctx); }) {
    return generate_on_device(model, prompts, options, ctx);
  }
  detail::model_steps<M> steps(model, static_cast<index_t>(prompts.size()), 0, ctx);
  token_rows result(prompts.size()), fresh = prompts;
  std::vector<double> distribution;
  for (index_t step = 0; step < options.max_new_tokens; ++step) {
    bool any = false;
    for (const auto& row : fresh)
      any = any || !row.empty();
    if (!any) break;
    const auto logits = steps.last(fresh, false).logits;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      if (fresh[i].empty()) continue;
      const auto sequence = static_cast<index_t>(i);
      next_token_distribution(detail::logits_row(logits, sequence), options.sampling, distribution);
      const std::int32_t token =
          pick(distribution,
               random_draw(options.sampling.seed, sequence, steps.position(sequence), draw::token));
      result[i].push_back(token);
      if (options.on_token) options.on_token(sequence, token);
      fresh[i].assign(1, token);
      if (options.stop && token == *options.stop) fresh[i].clear();
    }
  }
  return result;
}

#define SSMLIB_DETAIL_LIST(T)                                                   \
  SSMLIB_INSTANTIATE(decoding, token_rows generate<language_model<T>>(          \
                                   const language_model<T>&, const token_rows&, \
                                   const generate_options&, const cpu::context&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
