#pragma once

#include <ssmlib/expr/gated_linear.hpp>
#include <ssmlib/kernels/cpu/gated_linear_vjp.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

#include <algorithm>

namespace ssm {

namespace detail {

/// The operands of one call, kept alive while kernels read them.
template <Real T>
struct gated_linear_call {
  gated_linear_call(const gated_linear_mixer<T>& m, const tensor<T, 4>& x)
      : layout(layout_of(m)),
        q(input_tokens(m.kernel.q)),
        k(input_tokens(m.kernel.k)),
        log_gate(input_tokens(m.log_gate)),
        v(input_tokens(x)),
        alpha(static_cast<T>(m.kernel.alpha)) {}

  [[nodiscard]] kernels::gated_linear_operands<T> operands(index_t heads) const {
    return {q.const_view(), k.const_view(), log_gate.const_view(), v.const_view(),
            alpha,          heads,          layout.offsets(),      layout.sequences()};
  }

  sequence_layout layout;
  tensor<T, 3> q, k, log_gate, v;
  T alpha;
};

template <Real T>
void gated_linear_chunked(const cpu::context& ctx, const gated_linear_mixer<T>& m,
                          const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c,
                          index_t size) {
  refuse_snapshots(c);
  const gated_linear_call<T> call(m, x);
  const result_tokens<T> out(y);
  kernels::gated_linear_chunked<T>(ctx, call.operands(y.extent(2)), size, c.initial.const_view(),
                                   c.final.view(), out.get().view());
  out.finish();
}

template <Real T>
void gated_linear_vjp(const cpu::context& ctx, const gated_linear_mixer<T>& m,
                      const tensor<T, 4>& x, const tensor<T, 4>& dy, gated_linear_mixer<T>& dm,
                      const tensor<T, 4>& dx, const carry_gradient<T>& c, index_t size) {
  const gated_linear_call<T> call(m, x);
  const index_t heads = dy.extent(2);
  const head_gradients<T, 4> d_q(dm.kernel.q, heads), d_k(dm.kernel.k, heads),
      d_gate(dm.log_gate, heads), d_v(dx, heads);
  const tensor<T, 3> out = input_tokens(dy);
  kernels::gated_linear_vjp<T>(ctx, call.operands(heads), size, c.initial.const_view(),
                               out.const_view(), c.d_final.const_view(),
                               {d_q.get().view(), d_k.get().view(), d_gate.get().view(),
                                d_v.get().view(), c.d_initial.view()});
  for (const auto* gradient : {&d_q, &d_k, &d_gate, &d_v})
    gradient->finish();
}

}  // namespace detail

/// Chunks of `size` tokens (0: 16, or 32 for wide keys), the state between them. @cost 4 T H N P
/// flops.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::chunked chunks, const gated_linear_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::gated_linear_chunked(ctx, m, x, y, c, chunks.size);
}
/// Token by token: the same bits however a sequence is split.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::recurrent, const gated_linear_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  const detail::gated_linear_call<T> call(m, x);
  const detail::result_tokens<T> out(y);
  kernels::gated_linear_recurrent<T>(
      ctx, call.operands(y.extent(2)), c.initial.const_view(), c.final.view(),
      {c.snapshots.view(), c.slots, c.first_position}, out.get().view());
  out.finish();
}
/// One chunk a sequence: the T x T scores are materialised.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::quadratic, const gated_linear_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::gated_linear_chunked(ctx, m, x, y, c, std::max<index_t>(1, layout_of(m).max_length()));
}

template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::chunked chunks, const gated_linear_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, gated_linear_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::gated_linear_vjp(ctx, m, x, dy, dm, dx, c, chunks.size);
}
/// The recurrent form's gradient goes by chunks: it needs every state twice.
template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::recurrent, const gated_linear_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, gated_linear_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::gated_linear_vjp(ctx, m, x, dy, dm, dx, c, index_t{0});
}
template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic, const gated_linear_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, gated_linear_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::gated_linear_vjp(ctx, m, x, dy, dm, dx, c,
                           std::max<index_t>(1, layout_of(m).max_length()));
}

}  // namespace ssm
