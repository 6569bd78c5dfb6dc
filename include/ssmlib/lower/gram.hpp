#pragma once

#include <ssmlib/kernels/cpu/gram.hpp>
#include <ssmlib/lower/head_gradients.hpp>
#include <ssmlib/lower/semiseparable.hpp>

#include <concepts>
#include <string_view>
#include <utility>

namespace ssm {

/// @file
/// The gram matrix by itself, by associativity or in blocks, and under a window, in blocks.

namespace detail {

/// The sequences of a mixer, of X's rectangle where the mixer fits any length.
template <class M, Real T>
[[nodiscard]] sequence_layout layout_with(const M& m, const tensor<T, 4>& x) {
  if (m.layout || m.length() != 0) return layout_of(m);
  return sequence_layout::rectangular(x.extent(0), x.extent(1));
}

/// Where the gradient of phi(t) is added, each head in its own rows; finish() adds the heads of a
/// group and carries the sum on to t.
template <class Phi, Real T>
class feature_gradients {
 public:
  feature_gradients(const tensor<T, 4>& gradient, index_t heads)
      : gradient_(gradient), mapped_(stand_in(gradient)), heads_(mapped_, heads) {}
  [[nodiscard]] view<T, 3> get() const { return heads_.get().view(); }
  void finish(const tensor<T, 4>& t) const {
    heads_.finish();
    if constexpr (!std::same_as<Phi, feature::identity>) {
      if (!gradient_) return;
      mapped_.zip_with(t, [](T& g, const T& x) { g *= Phi::slope(x); });
      add_to(gradient_, mapped_);
    }
  }

 private:
  static tensor<T, 4> stand_in(const tensor<T, 4>& gradient) {
    if (std::same_as<Phi, feature::identity> || !gradient) return gradient;
    return tensor<T, 4>::zeros(gradient.extents());
  }
  tensor<T, 4> gradient_, mapped_;
  head_gradients<T, 4> heads_;
};

/// alpha phi(Q) phi(K)^T and X as the kernels take them.
template <Real T>
struct gram_tokens {
  tensor<T, 3> q, k, x;
  sequence_layout layout;
  index_t heads;

  template <class B, class Phi>
  gram_tokens(const cpu::context& ctx, const gram<T, B, Phi>& g, sequence_layout sequences,
              const tensor<T, 4>& x4, index_t result_heads)
      : q(input_tokens(mapped<Phi>(ctx, g.q))),
        k(input_tokens(mapped<Phi>(ctx, g.k))),
        x(input_tokens(x4)),
        layout(std::move(sequences)),
        heads(result_heads) {}
  [[nodiscard]] kernels::quadratic_problem<T> problem(double alpha) const {
    return {q.const_view(), k.const_view(),   x.const_view(),    static_cast<T>(alpha),
            heads,          layout.offsets(), layout.sequences()};
  }
};

/// y = (mask o alpha phi(Q) phi(K)^T) x in blocks.
template <Real T, class B, class Phi, class Mask>
void apply_in_blocks(const cpu::context& ctx, const gram<T, B, Phi>& g,
                     const sequence_layout& layout, const Mask& mask, const tensor<T, 4>& x,
                     const tensor<T, 4>& y) {
  const gram_tokens<T> tokens(ctx, g, layout, x, y.extent(2));
  const result_tokens<T> out(y);
  kernels::masked_quadratic<T>(ctx, tokens.problem(g.alpha), mask, out.get().view());
  out.finish();
}
template <Real T, class B, class Phi, class Mask>
void apply_in_blocks_vjp(const cpu::context& ctx, const gram<T, B, Phi>& g,
                         const sequence_layout& layout, const Mask& mask, const tensor<T, 4>& x,
                         const tensor<T, 4>& dy, const gram<T, B, Phi>& dg,
                         const tensor<T, 4>& dx) {
  const index_t heads = dy.extent(2);
  const gram_tokens<T> tokens(ctx, g, layout, x, heads);
  const feature_gradients<Phi, T> dq(dg.q, heads), dk(dg.k, heads);
  const head_gradients<T, 4> d_x(dx, heads);
  const tensor<T, 3> d_out = input_tokens(dy);
  kernels::masked_quadratic_vjp<T>(ctx, tokens.problem(g.alpha), mask, d_out.const_view(), dq.get(),
                                   dk.get(), d_x.get().view());
  dq.finish(g.q);
  dk.finish(g.k);
  d_x.finish();
}

}  // namespace detail

/// alpha Q (K^T X). @cost O(T N P) a head.
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer(const cpu::context& ctx, alg::associative, const gram<T, B, Phi>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  const detail::gram_tokens<T> tokens(ctx, m, layout_of(m), x, y.extent(2));
  const detail::result_tokens<T> out(y);
  kernels::gram_associative<T>(ctx, tokens.problem(m.alpha), out.get().view());
  out.finish();
}
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer_vjp(const cpu::context& ctx, alg::associative, const gram<T, B, Phi>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, gram<T, B, Phi>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  const index_t heads = dy.extent(2);
  const detail::gram_tokens<T> tokens(ctx, m, layout_of(m), x, heads);
  const detail::feature_gradients<Phi, T> dq(dm.q, heads), dk(dm.k, heads);
  const detail::head_gradients<T, 4> d_x(dx, heads);
  const tensor<T, 3> d_out = detail::input_tokens(dy);
  kernels::gram_associative_vjp<T>(ctx, tokens.problem(m.alpha), d_out.const_view(), dq.get(),
                                   dk.get(), d_x.get().view());
  dq.finish(m.q);
  dk.finish(m.k);
  d_x.finish();
}

/// (alpha Q K^T) X in blocks. @cost O(T^2 (N + P)) a head, O(1) further memory a task.
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer(const cpu::context& ctx, alg::quadratic, const gram<T, B, Phi>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  detail::apply_in_blocks(ctx, m, layout_of(m), kernels::no_mask<T>{}, x, y);
}
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic, const gram<T, B, Phi>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, gram<T, B, Phi>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  detail::apply_in_blocks_vjp(ctx, m, layout_of(m), kernels::no_mask<T>{}, x, dy, dm, dx);
}

/// By shape: Q K^T first is cheaper only for a few tokens.
template <Real T, FeatureMap Phi>
[[nodiscard]] std::string_view choose_algorithm(const gram<T, cpu, Phi>& m, index_t length,
                                                index_t width) {
  const index_t n = m.key_size();
  return length * (n + width) < 2 * n * width ? alg::quadratic::name : alg::associative::name;
}

/// A window: only the blocks on the band. @cost O(T w (N + P)) a head.
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer(const cpu::context& ctx, alg::quadratic,
                 const masked_gram<window_mask<T, B>, T, B, Phi>& m, const tensor<T, 4>& x,
                 const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  detail::apply_in_blocks(ctx, m.kernel, layout_of(m), kernels::band_mask<T>{m.mask.size}, x, y);
}
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic,
                     const masked_gram<window_mask<T, B>, T, B, Phi>& m, const tensor<T, 4>& x,
                     const tensor<T, 4>& dy, masked_gram<window_mask<T, B>, T, B, Phi>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  detail::apply_in_blocks_vjp(ctx, m.kernel, layout_of(m), kernels::band_mask<T>{m.mask.size}, x,
                              dy, dm.kernel, dx);
}

}  // namespace ssm
