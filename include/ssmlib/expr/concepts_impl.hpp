#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/expr/concepts.hpp>

#include <algorithm>
#include <string>

namespace ssm::detail {

SSMLIB_INLINE index_t join_heads(const char* what, index_t a, index_t b) {
  if (a == 0 || b == 0) return std::max(a, b);
  if (std::max(a, b) % std::min(a, b) != 0) {
    throw shape_error("ssm: " + std::string(what) + ": " + std::to_string(a) + " heads and " +
                      std::to_string(b) + " heads; wanted one number to divide the other");
  }
  return std::max(a, b);
}

SSMLIB_INLINE void check_time(const char* what, index_t b0, index_t t0, index_t b1, index_t t1) {
  if ((b0 != 0 && b1 != 0 && b0 != b1) || (t0 != 0 && t1 != 0 && t0 != t1)) {
    throw shape_error("ssm: " + std::string(what) + ": one operand is (batch " +
                      std::to_string(b0) + ", time " + std::to_string(t0) + "), the other (batch " +
                      std::to_string(b1) + ", time " + std::to_string(t1) + "); wanted the same");
  }
}

SSMLIB_INLINE void check_tokens(const char* what, const sequence_layout& layout, index_t tokens) {
  if (layout.tokens() != tokens) {
    throw shape_error("ssm: " + std::string(what) + ": the layout has " +
                      std::to_string(layout.tokens()) + " tokens, the operands have " +
                      std::to_string(tokens) + "; wanted the same");
  }
}

SSMLIB_INLINE void throw_not_causal(const char* what) {
  throw value_error(
      "ssm: " + std::string(what) +
      ": the mixer's rows depend on tokens to come, as those of Q * transpose(K) do without a "
      "mask; put a causal mask over it, as hadamard(causal, Q * transpose(K))");
}

SSMLIB_INLINE void throw_not_causal_entry(index_t row, index_t column) {
  throw value_error(
      "ssm: advance: entry (" + std::to_string(row) + ", " + std::to_string(column) +
      ") of the mixer's matrix is not zero, so that token " + std::to_string(row) +
      " depends on one to come; evaluate whole sequences instead (or, if only rounding makes it "
      "so, give the mixer a member causal() that returns causality::causal)");
}

}  // namespace ssm::detail
