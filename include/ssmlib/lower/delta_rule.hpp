#pragma once

#include <ssmlib/expr/delta_rule.hpp>
#include <ssmlib/kernels/cpu/delta_rule_vjp.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

#include <algorithm>

namespace ssm {

namespace detail {

/// The operands of one call, kept alive while kernels read them.
template <Real T>
struct delta_rule_call {
  delta_rule_call(const delta_rule_mixer<T>& m, const tensor<T, 4>& x)
      : layout(layout_of(m)),
        q(input_tokens(m.kernel.q)),
        k(input_tokens(m.kernel.k)),
        v(input_tokens(x)),
        log_decay(input_tokens(m.log_decay)),
        beta(input_tokens(m.beta)),
        alpha(static_cast<T>(m.kernel.alpha)) {}

  [[nodiscard]] kernels::delta_rule_operands<T> operands(index_t heads) const {
    return {q.const_view(),    k.const_view(), v.const_view(), log_decay.const_view(),
            beta.const_view(), alpha,          heads,          layout.offsets(),
            layout.sequences()};
  }

  sequence_layout layout;
  tensor<T, 3> q, k, v;
  tensor<T, 2> log_decay, beta;
  T alpha;
};

template <Real T>
void delta_rule_chunked(const cpu::context& ctx, const delta_rule_mixer<T>& m,
                        const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c,
                        index_t size) {
  refuse_snapshots(c);
  const delta_rule_call<T> call(m, x);
  const result_tokens<T> out(y);
  kernels::delta_rule_chunked<T>(ctx, call.operands(y.extent(2)), size, c.initial.const_view(),
                                 c.final.view(), out.get().view());
  out.finish();
}

template <Real T>
void delta_rule_vjp(const cpu::context& ctx, const delta_rule_mixer<T>& m, const tensor<T, 4>& x,
                    const tensor<T, 4>& dy, delta_rule_mixer<T>& dm, const tensor<T, 4>& dx,
                    const carry_gradient<T>& c, index_t size) {
  const delta_rule_call<T> call(m, x);
  const index_t heads = dy.extent(2);
  const head_gradients<T, 4> d_q(dm.kernel.q, heads), d_k(dm.kernel.k, heads), d_v(dx, heads);
  const head_gradients<T, 3> d_decay(dm.log_decay, heads), d_beta(dm.beta, heads);
  const tensor<T, 3> out = input_tokens(dy);
  kernels::delta_rule_vjp<T>(ctx, call.operands(heads), size, c.initial.const_view(),
                             out.const_view(), c.d_final.const_view(),
                             {d_q.get().view(), d_k.get().view(), d_v.get().view(),
                              d_decay.get().view(), d_beta.get().view(), c.d_initial.view()});
  for (const auto* gradient : {&d_q, &d_k, &d_v})
    gradient->finish();
  for (const auto* gradient : {&d_decay, &d_beta})
    gradient->finish();
}

}  // namespace detail

/// Chunks of `size` tokens (0: 64), the state between them. @cost T H (6 N P + 2 size (N + P))
/// flops.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::chunked chunks, const delta_rule_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::delta_rule_chunked(ctx, m, x, y, c, chunks.size);
}
/// Token by token: the same bits however a sequence is split.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::recurrent, const delta_rule_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  const detail::delta_rule_call<T> call(m, x);
  const detail::result_tokens<T> out(y);
  kernels::delta_rule_recurrent<T>(ctx, call.operands(y.extent(2)), c.initial.const_view(),
                                   c.final.view(), {c.snapshots.view(), c.slots, c.first_position},
                                   out.get().view());
  out.finish();
}
/// One chunk a sequence: the T x T matrices are materialised.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::quadratic, const delta_rule_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::delta_rule_chunked(ctx, m, x, y, c, std::max<index_t>(1, layout_of(m).max_length()));
}

template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::chunked chunks, const delta_rule_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, delta_rule_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::delta_rule_vjp(ctx, m, x, dy, dm, dx, c, chunks.size);
}
/// The recurrent form's gradient goes by chunks: it needs every state twice.
template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::recurrent, const delta_rule_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, delta_rule_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::delta_rule_vjp(ctx, m, x, dy, dm, dx, c, index_t{0});
}
template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic, const delta_rule_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, delta_rule_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::delta_rule_vjp(ctx, m, x, dy, dm, dx, c, std::max<index_t>(1, layout_of(m).max_length()));
}

}  // namespace ssm
