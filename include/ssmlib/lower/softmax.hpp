#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/expr/softmax.hpp>
#include <ssmlib/kernels/cpu/attention_backward.hpp>
#include <ssmlib/kernels/cpu/attention_quadratic.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/tokens.hpp>

namespace ssm {

/// @file
/// Softmax attention on the CPU: alg::tiled in O(T) memory, alg::quadratic with the T x T matrix of
/// each sequence and head.

namespace detail {

template <Real T>
[[nodiscard]] kernels::attention_options attention_options_of(const softmax_mixer<T, cpu>& m) {
  return {m.logits.alpha, m.is_causal, m.window};
}

/// f(q, k, v, y, layout) with tokens merged, y overwritten.
template <Real T, class F>
void with_attention_tokens(const softmax_mixer<T, cpu>& m, const tensor<T, 4>& x,
                           const tensor<T, 4>& y, F f) {
  const tensor<T, 3> q = input_tokens(m.logits.q), k = input_tokens(m.logits.k),
                     v = input_tokens(x);
  if (is_token_major(y)) {
    f(q.const_view(), k.const_view(), v.const_view(),
      y.template reshape<3>(merge_batch(y.extents())).view(), layout_of(m));
    return;
  }
  const tensor<T, 4> dense(y.extents());
  f(q.const_view(), k.const_view(), v.const_view(),
    dense.template reshape<3>(merge_batch(y.extents())).view(), layout_of(m));
  y.copy_from(dense);
}

/// f(q, k, v, dy, dq, dk, dv, layout) with tokens merged, gradients added to.
template <Real T, class F>
void with_attention_gradients(const softmax_mixer<T, cpu>& m, const tensor<T, 4>& x,
                              const tensor<T, 4>& dy, const softmax_mixer<T, cpu>& dm,
                              const tensor<T, 4>& dx, F f) {
  const tensor<T, 3> q = input_tokens(m.logits.q), k = input_tokens(m.logits.k),
                     v = input_tokens(x), cotangent = input_tokens(dy);
  const output_tokens<T, 4> dq(dm.logits.q), dk(dm.logits.k), dv(dx);
  f(q.const_view(), k.const_view(), v.const_view(), cotangent.const_view(), dq.get().view(),
    dk.get().view(), dv.get().view(), layout_of(m));
  dq.finish();
  dk.finish();
  dv.finish();
}

}  // namespace detail

template <Real T>
void apply_mixer(const cpu::context& ctx, alg::tiled, const softmax_mixer<T, cpu>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  detail::with_attention_tokens(
      m, x, y, [&](auto q, auto k, auto v, auto out, const sequence_layout& layout) {
        kernels::attention_forward<T>(ctx, detail::attention_options_of(m), q, k, v, out,
                                      layout.offsets(), layout.sequences());
      });
}
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::quadratic, const softmax_mixer<T, cpu>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  detail::with_attention_tokens(
      m, x, y, [&](auto q, auto k, auto v, auto out, const sequence_layout& layout) {
        kernels::attention_quadratic<T>(ctx, detail::attention_options_of(m), q, k, v, out,
                                        layout.offsets(), layout.sequences());
      });
}

template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::tiled, const softmax_mixer<T, cpu>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, softmax_mixer<T, cpu>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  detail::with_attention_gradients(m, x, dy, dm, dx,
                                   [&](auto q, auto k, auto v, auto cotangent, auto dq, auto dk,
                                       auto dv, const sequence_layout& layout) {
                                     kernels::attention_backward<T>(
                                         ctx, detail::attention_options_of(m), q, k, v, cotangent,
                                         dq, dk, dv, layout.offsets(), layout.sequences());
                                   });
}
template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic, const softmax_mixer<T, cpu>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, softmax_mixer<T, cpu>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  detail::with_attention_gradients(m, x, dy, dm, dx,
                                   [&](auto q, auto k, auto v, auto cotangent, auto dq, auto dk,
                                       auto dv, const sequence_layout& layout) {
                                     kernels::attention_quadratic_vjp<T>(
                                         ctx, detail::attention_options_of(m), q, k, v, cotangent,
                                         dq, dk, dv, layout.offsets(), layout.sequences());
                                   });
}

#define SSMLIB_DETAIL_LIST(T, Algorithm)                                                          \
  SSMLIB_INSTANTIATE(                                                                             \
      softmax, void apply_mixer(const cpu::context&, alg::Algorithm, const softmax_mixer<T>&,     \
                                const tensor<T, 4>&, const tensor<T, 4>&, const carry<T>&));      \
  SSMLIB_INSTANTIATE(                                                                             \
      softmax, void apply_mixer_vjp(const cpu::context&, alg::Algorithm, const softmax_mixer<T>&, \
                                    const tensor<T, 4>&, const tensor<T, 4>&, softmax_mixer<T>&,  \
                                    const tensor<T, 4>&, const carry_gradient<T>&))
SSMLIB_DETAIL_LIST(float, tiled);
SSMLIB_DETAIL_LIST(float, quadratic);
SSMLIB_DETAIL_LIST(double, tiled);
SSMLIB_DETAIL_LIST(double, quadratic);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
