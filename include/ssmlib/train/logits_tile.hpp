#pragma once

#include <ssmlib/nn/linear.hpp>
#include <ssmlib/train/token_loss.hpp>

#include <algorithm>
#include <concepts>

namespace ssm::detail {

/// Rows of logits to hold at a time. On the CPU 2 MiB where that is enough rows for fast products,
/// never fewer than 256 rows nor more than 1024; elsewhere 256 MiB and 8192 rows.
template <Floating T, Backend B>
[[nodiscard]] index_t logits_block(index_t wanted, index_t vocabulary, index_t tokens) {
  constexpr index_t bytes = index_t{1} << (std::same_as<B, cpu> ? 21 : 28);
  constexpr index_t most = std::same_as<B, cpu> ? 1024 : 8192;
  const index_t row = std::max<index_t>(1, vocabulary) * static_cast<index_t>(sizeof(T));
  const index_t automatic = std::clamp<index_t>(bytes / row, 256, most);
  return std::clamp<index_t>(wanted > 0 ? wanted : automatic, 1, std::max<index_t>(1, tokens));
}

/// One block of a model's logits, computed when it is asked for, and its share of the backward
/// pass.
template <Floating T, Backend B>
class logits_tile {
 public:
  /// @param weight      the head's, in T
  /// @param vocabulary  the first entries of the head
  /// @param block       the most tokens at a time
  logits_tile(const tensor<T, 3, B>& hidden, const linear<T, B>& head,
              const tensor<T, 2, B>& weight, index_t vocabulary, index_t block)
      : rows_(input_tokens(hidden)),
        weight_(weight.slice(0, 0, vocabulary)),
        parameter_(head.weight.slice(0, 0, vocabulary)),
        bias_(head.bias ? head.bias.slice(0, 0, vocabulary) : head.bias),
        tile_(block, row_step(vocabulary)) {}

  /// The logits of the tokens [begin, end), (end - begin, vocabulary).
  const tensor<T, 2, B>& compute(const typename B::context& ctx, index_t begin, index_t end) {
    begin_ = begin;
    end_ = end;
    logits_ = tile_.slice(0, 0, end - begin).slice(1, 0, weight_.extent(0));
    apply_linear(ctx, false, rows_.slice(0, begin, end), weight_, bias_, logits_);
    return logits_;
  }
  /// The tile holds the gradient of the logits now. @param dx  of all tokens, or absent
  void add_gradients(const typename B::context& ctx, tape<T, B>& tape,
                     const tensor<T, 2, B>& dx) const {
    apply_linear_vjp(ctx, rows_.slice(0, begin_, end_), weight_, logits_,
                     rows_between(dx, begin_, end_), tape.gradient(parameter_),
                     tape.gradient(bias_));
  }

 private:
  /// On the GPU rows begin at multiples of 16 bytes, for the products.
  [[nodiscard]] static index_t row_step(index_t vocabulary) {
    return std::same_as<B, cpu> ? vocabulary
                                : round_up(vocabulary, 16 / static_cast<index_t>(sizeof(T)));
  }

  tensor<T, 2, B> rows_, weight_;
  tensor<accum_t<T>, 2, B> parameter_;
  tensor<accum_t<T>, 1, B> bias_;
  tensor<T, 2, B> tile_, logits_;
  index_t begin_ = 0, end_ = 0;
};

template <Floating T, Backend B>
[[nodiscard]] bool wants_any(const tape<T, B>* t, const tensor<T, 3, B>& hidden,
                             const linear<T, B>& head) {
  return t != nullptr && (t->wants(hidden) || t->wants(head.weight) || t->wants(head.bias));
}

}  // namespace ssm::detail
