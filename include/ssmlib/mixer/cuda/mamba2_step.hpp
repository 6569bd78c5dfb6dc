#pragma once

#include <ssmlib/kernels/cuda/skinny.hpp>
#include <ssmlib/kernels/cuda/ssd_step.hpp>
#include <ssmlib/lower/cuda/elements.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/mixer/mamba2.hpp>
#include <ssmlib/nn/norm.hpp>

#include <algorithm>
#include <concepts>

namespace ssm {

namespace detail {

/// What a product of few rows takes on the way to its factor.
struct skinny_norm {
  const void* weight = nullptr;  ///< of accum_t<T>; null: no norm
  index_t group = 0;             ///< features that are normalised together; 0: all
  double epsilon = 0;
};

/// norm(x) w^T + bias + residual in passes of 64 rows; absent tensors are left out.
template <Floating T>
[[nodiscard]] tensor<T, 2, cuda> skinny_linear(const pass<T, cuda>& p, const tensor<T, 2, cuda>& x,
                                               const linear<T, cuda>& layer,
                                               const skinny_norm& norm,
                                               const tensor<T, 2, cuda>& residual) {
  constexpr index_t most = 64;
  const index_t copies = p.weights != nullptr ? p.weights->size() : 0;
  const tensor<T, 2, cuda> w = weight_of(p, layer.weight);
  // Whether w has been there before this call.
  const bool at_rest =
      std::same_as<T, accum_t<T>> || (p.weights != nullptr && p.weights->size() == copies);
  const tensor<T, 2, cuda> y(x.extent(0), w.extent(0));
  for (index_t first = 0; first < x.extent(0); first += most) {
    const index_t last = std::min(first + most, x.extent(0));
    kernels::cuda::skinny_problem<T, T, T> problem;
    problem.x = x.slice(0, first, last).const_view();
    problem.w = w.const_view();
    problem.y = y.slice(0, first, last).view();
    if (residual) problem.residual = residual.slice(0, first, last).const_view();
    problem.bias = layer.bias.data();
    problem.early = at_rest;
    problem.most = kernels::cuda::rung_of(p.ctx.arch());
    if (norm.weight != nullptr) {
      problem.normalise = true;
      problem.norm_weight = static_cast<const accum_t<T>*>(norm.weight);
      problem.group = norm.group;
      problem.epsilon = static_cast<accum_t<T>>(norm.epsilon);
    }
    const cuda_workspace workspace(p.ctx, kernels::cuda::skinny_workspace_bytes(problem));
    kernels::cuda::skinny_forward(p.ctx.stream(), problem, workspace.data());
  }
  return y;
}

/// The tokens through a Mamba-2 mixer between its projections, and the state behind them.
/// @param projected  (tokens, [z, x, B, C, dt])
/// @return           (tokens, inner), gated
template <Floating T, class State>
[[nodiscard]] tensor<T, 2, cuda> mamba2_step(const cuda::context& ctx, const mamba2<T, cuda>& m,
                                             State& state, const tensor<T, 2, cuda>& projected,
                                             const sequence_layout& layout) {
  using real = accum_t<T>;
  const mamba2_options& o = m.options();
  const index_t inner = m.inner(), channels = m.conv_channels();
  const device_layout sequences(ctx, layout);
  const carry<T, cuda> states = state.matrix.whole();
  const auto positions = sequences.positions(ctx, states.first_position);
  const tensor<T, 2, cuda> y(projected.extent(0), inner);
  const auto part = [&](index_t begin, index_t size) {
    return projected.slice(1, begin, begin + size).const_view();
  };
  kernels::cuda::ssd_step_problem<T, real> p;
  p.heads = o.heads;
  p.groups = o.groups;
  p.features = o.head_dim;
  p.key_size = o.state;
  p.sequences = sequences.sequences;
  p.max_length = sequences.max_length;
  p.offsets = sequences.offsets;
  p.z = part(0, inner);
  p.xbc = part(inner, channels);
  p.dt = part(inner + channels, o.heads);
  p.taps = m.conv1d.weight.data();
  p.tap_step = m.conv1d.weight.strides()[1];
  p.tap_channel = m.conv1d.weight.strides()[0];
  p.conv_bias = m.conv1d.bias.data();
  p.width = o.conv_width;
  p.activate = m.conv1d.activation == conv1d_activation::silu;
  p.a = m.a_log.data();
  p.a_is_log = true;
  p.dt_bias = m.dt_bias.data();
  p.d = m.d.data();
  p.low = static_cast<real>(o.limits.low);
  p.high = static_cast<real>(o.limits.high);
  p.ring.inputs = state.conv.ring().view();
  p.position = positions.data();
  p.state = states.final.view();
  p.y = y.view();
  p.snapshots = states.snapshots.view();
  p.slots = states.slots;
  p.early = true;  // the projection ahead writes none of what the layer keeps
  kernels::cuda::ssd_step_forward(ctx.stream(), p);
  return y;
}

}  // namespace detail

/// x + mixer(norm(x)) for at most 16 tokens of each sequence in three kernels: a Mamba-2 layer's
/// norm and input projection; convolution, step, skip connection and gate; its norm and output
/// projection with the residual connection.
/// @return  absent where the layer is of another form or the pieces are longer
template <Floating T, class Matrix>
[[nodiscard]] tensor<T, 3, cuda> advance_block(const pass<T, cuda>& p,
                                               const rms_norm<T, cuda>& norm,
                                               const mamba2<T, cuda>& m,
                                               mixer_state<T, Matrix, cuda>& state,
                                               const tensor<T, 3, cuda>& x,
                                               const sequence_layout& layout) {
  const mamba2_options& o = m.options();
  const index_t ring_rows = state.conv.ring().extent(1);
  if (!p.fixed_order || layout.max_length() > max_fixed_step || x.size() == 0 ||
      norm.weight.size() != x.extent(2) || ring_rows < o.conv_width - 1 + max_fixed_step ||
      (o.gated_norm &&
       (m.norm.order != gate_order::gate_first || m.norm.weight.size() != m.inner()))) {
    return {};
  }
  const cuda::scope scope(p.ctx);
  const tensor<T, 2, cuda> rows = detail::input_tokens(x);
  const auto projected = detail::skinny_linear(
      p, rows, m.in_proj, {norm.weight.data(), norm.options.group, norm.options.eps}, {});
  const auto mixed = detail::mamba2_step(p.ctx, m, state, projected, layout);
  detail::skinny_norm gated;
  if (o.gated_norm) gated = {m.norm.weight.data(), m.norm.options.group, m.norm.options.eps};
  const auto y = detail::skinny_linear(p, mixed, m.out_proj, gated, rows);
  state.skip(layout);
  return y.template reshape<3>(x.extents());
}

}  // namespace ssm
