#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

namespace ssm::detail {

/// The positions of n sequences, from the host, which does not wait for the device. Absent stays
/// absent.
[[nodiscard]] inline tensor<index_t, 1, cuda> device_positions(const cuda::context& ctx,
                                                               const index_t* positions,
                                                               index_t n) {
  if (positions == nullptr) return {};
  const cuda::scope scope(ctx);
  const tensor<index_t, 1, cuda> there(n);
  ctx.copy(there.data(), positions, static_cast<std::size_t>(n) * sizeof(index_t),
           cudaMemcpyHostToDevice);
  return there;
}

/// Where the first tokens of a call's sequences stand, for its snapshots: absent where it keeps
/// none.
template <Floating T>
[[nodiscard]] tensor<index_t, 1, cuda> snapshot_positions(const cuda::context& ctx,
                                                          const carry<T, cuda>& c,
                                                          index_t sequences) {
  return device_positions(ctx, c.snapshots ? c.first_position : nullptr, sequences);
}

}  // namespace ssm::detail
