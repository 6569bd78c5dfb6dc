#pragma once

#include <ssmlib/expr/softmax.hpp>
#include <ssmlib/kernels/cuda/attention.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

namespace ssm {

/// @file
/// Softmax attention on CUDA: alg::tiled.

namespace detail {

/// The kernels' problem with what its views point to.
template <Floating T>
struct cuda_attention {
  cuda_attention(const cuda::context& ctx, const softmax_mixer<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, index_t heads)
      : q(input_tokens(m.logits.q)),
        k(input_tokens(m.logits.k)),
        v(input_tokens(x)),
        layout(ctx, layout_of(m)) {
    p.q = q.const_view();
    p.k = k.const_view();
    p.v = v.const_view();
    p.heads = heads;
    p.offsets = layout.offsets;
    p.sequences = layout.sequences;
    p.max_length = layout.max_length;
    p.scale = m.logits.alpha;
    p.causal = m.is_causal;
    p.window = m.window;
    p.most = kernels::cuda::rung_of(ctx.arch());
  }

  tensor<T, 3, cuda> q, k, v;
  device_layout layout;
  kernels::cuda::attention_problem<T> p;
};

}  // namespace detail

/// @cost  4 H D flops a kept pair of tokens; no working memory
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::tiled, const softmax_mixer<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::refuse_carry(c);
  if (y.size() == 0) return;
  const detail::cuda_attention<T> call(ctx, m, x, y.extent(2));
  const detail::result_tokens<T, cuda> out(y);
  kernels::cuda::attention_forward<T>(ctx.stream(), call.p, out.get().view(), {});
  out.finish();
}

/// @cost  18 H D flops a kept pair: 14 of the gradient, and 4 because the forward pass runs again
///        for the result and the rows' statistics, which nobody keeps. Working memory: the result,
///        three numbers a token and head, and the gradients before they are added.
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::tiled, const softmax_mixer<T, cuda>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     softmax_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                     const carry_gradient<T, cuda>& c) {
  detail::refuse_carry<T, cuda>({c.initial, c.d_final, {}, 0, nullptr});
  if (dy.size() == 0) return;
  const index_t heads = dy.extent(2);
  const detail::cuda_attention<T> call(ctx, m, x, heads);
  const tensor<T, 3, cuda> d_out = detail::input_tokens(dy);
  const tensor<T, 3, cuda> y(d_out.extents());
  const tensor<accum_t<T>, 2, cuda> log_sum(heads, d_out.extent(0));
  kernels::cuda::attention_forward<T>(ctx.stream(), call.p, y.view(), log_sum.view());

  const detail::added_gradient<T, 4> dq(dm.logits.q), dk(dm.logits.k), dv(dx);
  const detail::cuda_workspace workspace(
      ctx, kernels::cuda::attention_backward_workspace_bytes<T>(call.p));
  kernels::cuda::attention_backward<T>(ctx.stream(), call.p, y.const_view(), log_sum.const_view(),
                                       d_out.const_view(), dq.tokens(), dk.tokens(), dv.tokens(),
                                       workspace.data());
  dq.finish();
  dk.finish();
  dv.finish();
}

}  // namespace ssm
