#pragma once

#include <ssmlib/kernels/cpu/rows.hpp>
#include <ssmlib/nn/pass.hpp>
#include <ssmlib/tensor/layout.hpp>

#include <cstdint>
#include <optional>
#include <utility>

namespace ssm {

namespace detail {

/// Numbers that stay on their backend until somebody reads them.
template <Backend B>
class late_numbers {
 public:
  late_numbers() = default;
  /// @param values  the work of the current context, or absent
  explicit late_numbers(tensor<double, 1, B> values)
      : values_(std::move(values)), context_(B::current()) {}

  /// On the host; on CUDA when the work before them is done.
  [[nodiscard]] tensor<double, 1> read() const {
    if (!context_) return {};
    const typename B::scope scope(*context_);
    return on_host(values_);
  }

 private:
  tensor<double, 1, B> values_;
  std::optional<decltype(B::current())> context_;
};

}  // namespace detail

/// A loss over tokens, recorded on the pass's tape.
template <Floating T, Backend B = cpu>
struct token_loss {
  tensor<accum_t<T>, 1, B> loss;  ///< one element, already divided
  detail::late_numbers<B> total;  ///< what sum() reads
  index_t tokens = 0;             ///< that count

  /// Over the counted tokens, not divided. On CUDA it waits for the loss.
  [[nodiscard]] double sum() const {
    const tensor<double, 1> value = total.read();
    return value ? value(0) : 0.0;
  }
};

/// What the gradients of tokens are multiplied by: factor values(t) / divisor. The values,
/// gradients of a loss themselves, stay on their backend.
template <Real R, Backend B = cpu>
struct token_weights {
  tensor<R, 1, B> values;  ///< (tokens), or (1) for all tokens
  double factor = 1, divisor = 1;

  [[nodiscard]] index_t step() const { return values.size() > 1 ? 1 : 0; }
  /// Those of the tokens [begin, end).
  [[nodiscard]] token_weights between(index_t begin, index_t end) const {
    return step() == 0 ? *this : token_weights{values.slice(0, begin, end), factor, divisor};
  }
  /// The CPU only.
  [[nodiscard]] double operator()(index_t t) const {
    return factor * static_cast<double>(values(t * step())) / divisor;
  }
};

/// sums[i] = sign * the sum of the values of sequence i, in the order of tokens.
/// @param layout  absent: all tokens are one sequence
inline void apply_token_sums(const cpu::context&, const tensor<double, 1>& values,
                             const sequence_layout& layout, double sign,
                             const tensor<double, 1>& sums) {
  for (index_t i = 0; i < sums.size(); ++i) {
    const index_t begin = layout ? layout.begin(i) : 0,
                  end = layout ? layout.end(i) : values.size();
    double sum = 0;
    for (index_t t = begin; t < end; ++t)
      sum += values(t);
    sums(i) = 0.0 + sign * sum;  // no negative zero
  }
}
/// to[i] = factor from[i] / divisor, rounded.
template <Real R>
void apply_scaled(const cpu::context&, const tensor<double, 1>& from, double factor, double divisor,
                  const tensor<R, 1>& to) {
  for (index_t i = 0; i < to.size(); ++i)
    to(i) = static_cast<R>(factor * from(i) / divisor);
}
/// to[t] = from[index[t]].
template <Real R>
void apply_spread(const cpu::context&, const tensor<R, 1>& from,
                  const tensor<std::int32_t, 1>& index, const tensor<R, 1>& to) {
  for (index_t t = 0; t < to.size(); ++t)
    to(t) = from(index(t));
}

namespace detail {

/// f(t) for the rows of [0, n), in parallel.
template <class F>
void for_each_row(const cpu::context& ctx, index_t n, index_t width, F f) {
  kernels::for_each_piece(ctx, n, kernels::row_pieces(n, width),
                          [&](index_t, index_t begin, index_t end) {
                            for (index_t t = begin; t < end; ++t)
                              f(t);
                          });
}

/// The rows [begin, end); absent stays absent.
template <Element T, int R, Backend B>
[[nodiscard]] tensor<T, R, B> rows_between(const tensor<T, R, B>& t, index_t begin, index_t end) {
  return t ? t.slice(0, begin, end) : t;
}

/// loss = factor sum / divisor with sum = sign * the sum of the terms, which are 0 where a token
/// does not count.
template <Floating T, Backend B>
[[nodiscard]] token_loss<T, B> make_token_loss(const typename B::context& ctx,
                                               const tensor<double, 1, B>& terms, double sign,
                                               double factor, double divisor, index_t tokens) {
  const tensor<double, 1, B> sum(1);
  const tensor<accum_t<T>, 1, B> loss(1);
  apply_token_sums(ctx, terms, sequence_layout{}, sign, sum);
  apply_scaled(ctx, sum, factor, divisor, loss);
  return {loss, late_numbers<B>(sum), tokens};
}

}  // namespace detail

}  // namespace ssm
