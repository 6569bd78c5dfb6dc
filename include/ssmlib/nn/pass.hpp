#pragma once

#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/nn/weight_cache.hpp>

namespace ssm {

/// One pass through layers: the context that computes, and the tape that remembers (null:
/// inference).
///
/// `fixed_order` asks linear layers for the summation order of single steps, so that the bits of a
/// token depend on nothing but the token and the state. advance() sets it for steps of at most 16
/// tokens; larger pieces take the fastest order.
///
/// `weights` keeps parameters that a bf16 pass has converted, for the next call; null: each call
/// converts them again. See nn/weight_cache.hpp.
template <Floating T, Backend B = cpu>
struct pass {
  static_assert(!std::same_as<B, cpu> || Real<T>,
                "ssm: the CPU computes in float and double; bf16 is for CUDA");
  const typename B::context& ctx = default_context<B>();
  ssm::tape<T, B>* tape = nullptr;
  bool fixed_order = false;
  weight_cache<T, B>* weights = nullptr;
};

namespace detail {
/// A parameter, or a part of one, in the element type of the pass.
template <Floating T, Backend B, int R>
[[nodiscard]] tensor<T, R, B> weight_of(const pass<T, B>& p,
                                        const tensor<accum_t<T>, R, B>& parameter) {
  if constexpr (std::same_as<T, accum_t<T>>) {
    return parameter;
  } else {
    return p.weights != nullptr ? p.weights->get(p.ctx, parameter) : converted<T>(p.ctx, parameter);
  }
}
}  // namespace detail

/// Evaluates an elementwise expression to the element type of the pass, recorded on its tape. (The
/// plain eval of an expression over bf16 gives float.)
template <Floating T, Backend B, ElementwiseExpression E>
[[nodiscard]] tensor<T, E::rank, B> eval(const pass<T, B>& p, const E& e) {
  return eval_as<T>(e, p.tape, p.ctx);
}

/// The longest step that has the same bits whatever the split.
inline constexpr index_t max_fixed_step = 16;

}  // namespace ssm
