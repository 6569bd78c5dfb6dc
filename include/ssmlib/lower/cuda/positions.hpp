#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/lower/cuda/layout.hpp>

namespace ssm::detail {

/// Where the first tokens of a call's sequences stand, for its snapshots: absent where it keeps
/// none.
template <Floating T>
[[nodiscard]] tensor<index_t, 1, cuda> snapshot_positions(const cuda::context& ctx,
                                                          const carry<T, cuda>& c,
                                                          const device_layout& layout) {
  if (!c.snapshots || c.first_position == nullptr) return {};
  return layout.positions(ctx, c.first_position);
}

}  // namespace ssm::detail
