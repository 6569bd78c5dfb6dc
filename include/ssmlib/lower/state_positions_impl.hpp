#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/lower/state_positions.hpp>

#include <string>

namespace ssm::detail {

SSMLIB_INLINE state_positions::state_positions(index_t sequences, index_t max_rollback)
    : position_(tensor<index_t, 1>::zeros(sequences)),
      undoable_(tensor<index_t, 1>::zeros(sequences)),
      max_rollback_(max_rollback) {
  if (sequences < 0 || max_rollback < 0) {
    throw value_error("ssm: a state of " + std::to_string(sequences) + " sequences with rollback " +
                      std::to_string(max_rollback) + ": wanted counts that are not negative");
  }
}

SSMLIB_INLINE void state_positions::check_rollback(index_t i, index_t n) const {
  if (n < 0 || n > undoable_(i)) {
    throw value_error("ssm: rollback(" + std::to_string(n) + ") of sequence " + std::to_string(i) +
                      ": " + std::to_string(undoable_(i)) + " tokens can be undone (max_rollback " +
                      std::to_string(max_rollback_) +
                      "); make the state with a larger max_rollback");
  }
}

SSMLIB_INLINE void state_positions::check_rollback(std::span<const index_t> n) const {
  if (static_cast<index_t>(n.size()) != sequences()) {
    throw shape_error("ssm: rollback: " + std::to_string(n.size()) + " counts for " +
                      std::to_string(sequences()) + " sequences; give one each");
  }
  for (index_t i = 0; i < sequences(); ++i) {
    check_rollback(i, n[static_cast<std::size_t>(i)]);
  }
}

SSMLIB_INLINE void state_positions::check_layout(const sequence_layout& layout) const {
  if (layout.sequences() != sequences()) {
    throw shape_error("ssm: advance: the tokens are of " + std::to_string(layout.sequences()) +
                      " sequences, the state of " + std::to_string(sequences()) +
                      "; wanted the same");
  }
}

}  // namespace ssm::detail
