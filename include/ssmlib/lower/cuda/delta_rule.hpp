#pragma once

#include <ssmlib/expr/delta_rule.hpp>
#include <ssmlib/kernels/cuda/delta_rule.hpp>
#include <ssmlib/lower/cuda/chunk.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/positions.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

namespace ssm {

/// @file
/// The gated delta rule on CUDA: alg::chunked and alg::recurrent. Keys have at most 256 features.

namespace detail {

/// The kernels' problem with what its views point to.
template <Floating T>
struct cuda_delta_rule {
  cuda_delta_rule(const cuda::context& ctx, const delta_rule_mixer<T, cuda>& m,
                  const tensor<T, 4, cuda>& x, index_t heads)
      : q(input_tokens(m.kernel.q)),
        k(input_tokens(m.kernel.k)),
        v(input_tokens(x)),
        log_decay(input_tokens(m.log_decay)),
        beta(input_tokens(m.beta)),
        layout(ctx, layout_of(m)) {
    p.q = q.const_view();
    p.k = k.const_view();
    p.v = v.const_view();
    p.log_decay = log_decay.const_view();
    p.beta = beta.const_view();
    p.alpha = static_cast<accum_t<T>>(m.kernel.alpha);
    p.heads = heads;
    p.offsets = layout.offsets;
    p.sequences = layout.sequences;
    p.max_length = layout.max_length;
  }

  tensor<T, 3, cuda> q, k, v;
  tensor<accum_t<T>, 2, cuda> log_decay, beta;
  device_layout layout;
  kernels::cuda::delta_rule_problem<T> p;
};

template <Floating T>
void cuda_delta_rule_vjp(const cuda::context& ctx, const delta_rule_mixer<T, cuda>& m,
                         const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                         delta_rule_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                         const carry_gradient<T, cuda>& c) {
  const index_t heads = dy.extent(2);
  const cuda_delta_rule<T> call(ctx, m, x, heads);
  const head_gradients<T, 4, cuda> d_q(dm.kernel.q, heads), d_k(dm.kernel.k, heads), d_v(dx, heads);
  const head_gradients<accum_t<T>, 3, cuda> d_decay(dm.log_decay, heads), d_beta(dm.beta, heads);
  const tensor<T, 3, cuda> d_out = input_tokens(dy);
  const cuda_workspace workspace(ctx, kernels::cuda::delta_rule_vjp_workspace_bytes<T>(call.p));
  kernels::cuda::delta_rule_vjp<T>(
      ctx.stream(), call.p, d_out.const_view(), c.initial.const_view(), c.d_final.const_view(),
      {d_q.get().view(), d_k.get().view(), d_v.get().view(), d_decay.get().view(),
       d_beta.get().view(), c.d_initial.view(), true},
      workspace.data());
  d_q.finish();
  d_k.finish();
  d_v.finish();
  d_decay.finish();
  d_beta.finish();
}

}  // namespace detail

/// The state from chunk to chunk of 64 tokens, whatever size the algorithm asks for.
/// @cost  T H (6 N P + 128 (3 N + 2 P)) flops
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::chunked algorithm,
                 const delta_rule_mixer<T, cuda>& m, const tensor<T, 4, cuda>& x,
                 const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::check_chunk(algorithm);
  detail::refuse_snapshots(c);
  if (y.size() == 0) return detail::carry_over(c);
  const detail::cuda_delta_rule<T> call(ctx, m, x, y.extent(2));
  const detail::result_tokens<T, cuda> out(y);
  const detail::cuda_workspace workspace(ctx, kernels::cuda::delta_rule_workspace_bytes<T>(call.p));
  kernels::cuda::delta_rule_chunked<T>(ctx.stream(), call.p, out.get().view(),
                                       {c.initial.const_view(), c.final.view()}, workspace.data());
  out.finish();
}
/// Token by token: the same bits however a sequence is split.
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::recurrent, const delta_rule_mixer<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  if (y.size() == 0) return detail::carry_over(c);
  const detail::cuda_delta_rule<T> call(ctx, m, x, y.extent(2));
  const detail::result_tokens<T, cuda> out(y);
  const auto first = detail::snapshot_positions(ctx, c, call.layout);
  kernels::cuda::delta_rule_recurrent<T>(ctx.stream(), call.p, out.get().view(),
                                         {c.initial.const_view(), c.final.view()},
                                         {c.snapshots.view(), c.slots, first.data()});
  out.finish();
}

/// @cost  T H (18 N P + 128 (8 N + 7 P)) flops; nothing is kept of the forward pass. An operand
/// with
///        fewer heads than the result has a gradient for every head first.
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::chunked algorithm,
                     const delta_rule_mixer<T, cuda>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, delta_rule_mixer<T, cuda>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::check_chunk(algorithm);
  detail::cuda_delta_rule_vjp(ctx, m, x, dy, dm, dx, c);
}
/// The recurrent form's gradient goes by chunks: it needs every state twice.
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::recurrent, const delta_rule_mixer<T, cuda>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     delta_rule_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                     const carry_gradient<T, cuda>& c) {
  detail::cuda_delta_rule_vjp(ctx, m, x, dy, dm, dx, c);
}

}  // namespace ssm
