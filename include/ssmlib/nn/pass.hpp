#pragma once

#include <ssmlib/grad/tape.hpp>

namespace ssm {

/// One pass through layers: the context that computes, and the tape that remembers (null:
/// inference).
///
/// `fixed_order` asks linear layers for the summation order of single steps, so that the bits of a
/// token depend on nothing but the token and the state. advance() sets it for steps of at most 16
/// tokens; larger pieces take the fastest order.
template <Real T>
struct pass {
  const cpu::context& ctx = default_context<cpu>();
  ssm::tape<T>* tape = nullptr;
  bool fixed_order = false;
};

/// The longest step that has the same bits whatever the split.
inline constexpr index_t max_fixed_step = 16;

}  // namespace ssm
