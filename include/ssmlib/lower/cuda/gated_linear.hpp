#pragma once

#include <ssmlib/expr/gated_linear.hpp>
#include <ssmlib/kernels/cuda/gated_linear.hpp>
#include <ssmlib/lower/cuda/chunk.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/positions.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

namespace ssm {

/// @file
/// Gated linear attention on CUDA: alg::chunked and alg::recurrent. Keys have at most 256 features.

namespace detail {

/// The kernels' problem with what its views point to.
template <Floating T>
struct cuda_gated_linear {
  cuda_gated_linear(const cuda::context& ctx, const gated_linear_mixer<T, cuda>& m,
                    const tensor<T, 4, cuda>& x, index_t heads)
      : q(input_tokens(m.kernel.q)),
        k(input_tokens(m.kernel.k)),
        v(input_tokens(x)),
        log_gate(input_tokens(m.log_gate)),
        layout(ctx, layout_of(m)) {
    p.q = q.const_view();
    p.k = k.const_view();
    p.v = v.const_view();
    p.log_gate = log_gate.const_view();
    p.alpha = static_cast<accum_t<T>>(m.kernel.alpha);
    p.heads = heads;
    p.offsets = layout.offsets;
    p.sequences = layout.sequences;
    p.max_length = layout.max_length;
  }

  tensor<T, 3, cuda> q, k, v;
  tensor<accum_t<T>, 3, cuda> log_gate;
  device_layout layout;
  kernels::cuda::gated_linear_problem<T> p;
};

template <Floating T>
void cuda_gated_linear_vjp(const cuda::context& ctx, const gated_linear_mixer<T, cuda>& m,
                           const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                           gated_linear_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                           const carry_gradient<T, cuda>& c) {
  const index_t heads = dy.extent(2);
  const cuda_gated_linear<T> call(ctx, m, x, heads);
  const head_gradients<T, 4, cuda> d_q(dm.kernel.q, heads), d_k(dm.kernel.k, heads), d_v(dx, heads);
  const head_gradients<accum_t<T>, 4, cuda> d_gate(dm.log_gate, heads);
  const tensor<T, 3, cuda> d_out = input_tokens(dy);
  const cuda_workspace workspace(ctx, kernels::cuda::gated_linear_vjp_workspace_bytes<T>(call.p));
  kernels::cuda::gated_linear_vjp<T>(ctx.stream(), call.p, d_out.const_view(),
                                     c.initial.const_view(), c.d_final.const_view(),
                                     {d_q.get().view(), d_k.get().view(), d_gate.get().view(),
                                      d_v.get().view(), c.d_initial.view(), true},
                                     workspace.data());
  d_q.finish();
  d_k.finish();
  d_v.finish();
  d_gate.finish();
}

}  // namespace detail

/// The state from chunk to chunk of 64 tokens, whatever size the algorithm asks for.
/// @cost  4 T H N P + 128 T H (N + P) flops
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::chunked algorithm,
                 const gated_linear_mixer<T, cuda>& m, const tensor<T, 4, cuda>& x,
                 const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::check_chunk(algorithm);
  detail::refuse_snapshots(c);
  if (y.size() == 0) return detail::carry_over(c);
  const detail::cuda_gated_linear<T> call(ctx, m, x, y.extent(2));
  const detail::result_tokens<T, cuda> out(y);
  const detail::cuda_workspace workspace(ctx,
                                         kernels::cuda::gated_linear_workspace_bytes<T>(call.p));
  kernels::cuda::gated_linear_chunked<T>(ctx.stream(), call.p, out.get().view(),
                                         {c.initial.const_view(), c.final.view()},
                                         workspace.data());
  out.finish();
}
/// Token by token: the same bits however a sequence is split.
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::recurrent, const gated_linear_mixer<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  if (y.size() == 0) return detail::carry_over(c);
  const detail::cuda_gated_linear<T> call(ctx, m, x, y.extent(2));
  const detail::result_tokens<T, cuda> out(y);
  const auto first = detail::snapshot_positions(ctx, c, call.layout);
  kernels::cuda::gated_linear_recurrent<T>(ctx.stream(), call.p, out.get().view(),
                                           {c.initial.const_view(), c.final.view()},
                                           {c.snapshots.view(), c.slots, first.data()});
  out.finish();
}

/// @cost  12 T H N P + 512 T H (N + P) flops; nothing is kept of the forward pass. An operand with
///        fewer heads than the result has a gradient for every head first.
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::chunked algorithm,
                     const gated_linear_mixer<T, cuda>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, gated_linear_mixer<T, cuda>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::check_chunk(algorithm);
  detail::cuda_gated_linear_vjp(ctx, m, x, dy, dm, dx, c);
}
/// The recurrent form's gradient goes by chunks: it needs every state twice.
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::recurrent, const gated_linear_mixer<T, cuda>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     gated_linear_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                     const carry_gradient<T, cuda>& c) {
  detail::cuda_gated_linear_vjp(ctx, m, x, dy, dm, dx, c);
}

}  // namespace ssm
