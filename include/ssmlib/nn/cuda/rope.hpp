#pragma once

#include <ssmlib/kernels/cuda/rope.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/nn/rope.hpp>

#include <cstddef>
#include <type_traits>

namespace ssm {

/// Cosines and sines of every token, (tokens, 2, pairs), in float for bf16.
template <Floating T>
[[nodiscard]] tensor<accum_t<T>, 3, cuda> apply_rope_table(const cuda::context& ctx,
                                                           std::type_identity<T>,
                                                           const sequence_layout& layout,
                                                           const tensor<double, 1>& frequency,
                                                           bool /*interleaved*/) {
  const tensor<accum_t<T>, 3, cuda> table(layout.tokens(), 2, frequency.extent(0));
  if (table.size() == 0) return table;
  const detail::device_layout sequences(ctx, layout);
  tensor<index_t, 1> first(layout.sequences());
  bool from_zero = !sequences.copy;
  for (index_t i = 0; i < layout.sequences(); ++i) {
    first(i) = layout.first_position(i);
    from_zero = from_zero && first(i) == 0;
  }
  tensor<index_t, 1, cuda> positions;
  if (!from_zero) positions = sequences.positions(ctx, first.data());
  const index_t pairs = frequency.extent(0);
  const view<const double, 1> there{
      ctx.constants(frequency.data(), static_cast<std::size_t>(pairs)), {pairs}, {1}};
  kernels::cuda::rope_table<accum_t<T>>(
      ctx.stream(), there,
      {sequences.offsets, positions.data(), sequences.sequences, sequences.max_length},
      table.view());
  return table;
}

template <Floating T>
void apply_rope(const cuda::context& ctx, bool interleaved,
                const tensor<accum_t<T>, 3, cuda>& table, const tensor<T, 3, cuda>& x,
                const tensor<T, 3, cuda>& y) {
  if (x.size() == 0) return;
  kernels::cuda::rope_rotate<T>(ctx.stream(), {table.const_view(), interleaved, false, false},
                                x.const_view(), y.view());
}

template <Floating T>
void apply_rope_vjp(const cuda::context& ctx, bool interleaved,
                    const tensor<accum_t<T>, 3, cuda>& table, const tensor<T, 3, cuda>& dy,
                    const tensor<T, 3, cuda>& dx) {
  if (dy.size() == 0 || !dx) return;
  const bool add = !detail::overwrites(dx);
  kernels::cuda::rope_rotate<T>(ctx.stream(), {table.const_view(), interleaved, true, add},
                                dy.const_view(), dx.view());
}

}  // namespace ssm
