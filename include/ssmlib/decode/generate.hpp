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

/// Logits of the last new token of each sequence that has one, in step order; (sequences, V).
template <class M>
[[nodiscard]] tensor<accum_t<typename M::value_type>, 3> last_logits(
    const M& model, const typename M::backend::context& ctx, typename M::state_type& state,
    const token_rows& rows) {
  using T = typename M::value_type;
  using B = typename M::backend;
  const typename B::scope scope(ctx);
  const packed_ids packed(rows);
  const pass<T, B> p{ctx, nullptr, true};
  const tensor<T, 3, B> hidden = model.advance(p, state, packed.ids, packed.layout);
  const index_t n = packed.layout.sequences();
  auto last = tensor<T, 3, B>::zeros(1, n, hidden.extent(2));
  for (index_t i = 0; i < n; ++i) {
    if (packed.layout.length(i) == 0) continue;
    last.slice(1, i, i + 1)
        .copy_from(hidden.slice(1, packed.layout.end(i) - 1, packed.layout.end(i)));
  }
  return logits_on_host(model.head()(p, last));
}

template <Real T>
[[nodiscard]] std::span<const T> logits_row(const tensor<T, 3>& logits, index_t i) {
  return {&logits(0, i, 0), static_cast<std::size_t>(logits.extent(2))};
}

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
  auto state = model.initial_state(static_cast<index_t>(prompts.size()), 0);
  token_rows result(prompts.size()), fresh = prompts;
  std::vector<double> distribution;
  for (index_t step = 0; step < options.max_new_tokens; ++step) {
    bool any = false;
    for (const auto& row : fresh)
      any = any || !row.empty();
    if (!any) break;
    const auto logits = detail::last_logits(model, ctx, state, fresh);
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      if (fresh[i].empty()) continue;
      const auto sequence = static_cast<index_t>(i);
      next_token_distribution(detail::logits_row(logits, sequence), options.sampling, distribution);
      const std::int32_t token =
          pick(distribution,
               random_draw(options.sampling.seed, sequence, state.position(sequence), draw::token));
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
