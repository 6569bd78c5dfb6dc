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

/// What the gradient of attention takes from the forward pass.
template <Floating T>
struct saved_attention {
  tensor<T, 3, cuda> y;                 // (tokens, heads, P)
  tensor<accum_t<T>, 2, cuda> log_sum;  // (heads, tokens)
};

template <Floating T>
void run_attention_backward(const cuda::context& ctx, const cuda_attention<T>& call,
                            const saved_attention<T>& saved, const tensor<T, 3, cuda>& d_out,
                            const softmax_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx) {
  const added_gradient<T, 4> dq(dm.logits.q), dk(dm.logits.k), dv(dx);
  const cuda_workspace workspace(ctx, kernels::cuda::attention_backward_workspace_bytes<T>(call.p));
  kernels::cuda::attention_backward<T>(ctx.stream(), call.p, saved.y.const_view(),
                                       saved.log_sum.const_view(), d_out.const_view(), dq.tokens(),
                                       dk.tokens(), dv.tokens(), workspace.data());
  dq.finish();
  dk.finish();
  dv.finish();
}

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

/// The same on a tape: the result and the rows' statistics, one number a token and head, are kept
/// for the gradient.
template <Floating T>
[[nodiscard]] detail::saved_attention<T> apply_mixer_saving(const cuda::context& ctx, alg::tiled,
                                                            const softmax_mixer<T, cuda>& m,
                                                            const tensor<T, 4, cuda>& x,
                                                            const tensor<T, 4, cuda>& y) {
  const detail::cuda_attention<T> call(ctx, m, x, y.extent(2));
  const detail::saved_attention<T> saved{
      detail::input_tokens(y), tensor<accum_t<T>, 2, cuda>(y.extent(2), y.extent(0) * y.extent(1))};
  kernels::cuda::attention_forward<T>(ctx.stream(), call.p, saved.y.view(), saved.log_sum.view());
  return saved;
}
/// @cost  14 H D flops a kept pair. Working memory: two numbers a token and head, and gradients
/// that
///        others have added to before.
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::tiled, const softmax_mixer<T, cuda>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     softmax_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                     const detail::saved_attention<T>& saved) {
  const detail::cuda_attention<T> call(ctx, m, x, dy.extent(2));
  detail::run_attention_backward(ctx, call, saved, detail::input_tokens(dy), dm, dx);
}

/// @cost  18 H D flops a kept pair: 14 of the gradient, and 4 because the forward pass runs again
///        for the result and the rows' statistics. Working memory: these too.
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
  const detail::saved_attention<T> saved{tensor<T, 3, cuda>(d_out.extents()),
                                         tensor<accum_t<T>, 2, cuda>(heads, d_out.extent(0))};
  kernels::cuda::attention_forward<T>(ctx.stream(), call.p, saved.y.view(), saved.log_sum.view());
  detail::run_attention_backward(ctx, call, saved, d_out, dm, dx);
}

}  // namespace ssm
