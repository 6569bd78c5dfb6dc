#pragma once

#include <ssmlib/kernels/cpu/toeplitz_gram.hpp>
#include <ssmlib/kernels/cpu/toeplitz_quadratic.hpp>
#include <ssmlib/lower/gram.hpp>

#include <concepts>
#include <string_view>
#include <utility>

namespace ssm {

/// @file
/// Toeplitz masks, by themselves and over a gram matrix: Fourier transforms or blocks. A transform
/// mixes all tokens of a sequence, so its rounding error is relative to the largest values of a
/// column, and outputs before a changed token agree to rounding, not to the bit.

namespace detail {

/// Operands of a Toeplitz product as the kernels take them.
template <Real T>
struct toeplitz_tokens {
  tensor<T, 2> kernel;
  tensor<T, 3> q, k, x;
  sequence_layout layout;
  kernels::toeplitz_problem<T> p;

  template <class B>
  toeplitz_tokens(const toeplitz_mask<T, B>& m, sequence_layout sequences, const tensor<T, 4>& x4,
                  index_t heads)
      : kernel(m.kernel), x(input_tokens(x4)), layout(std::move(sequences)) {
    m.check_length(layout.max_length());
    p.kernel = kernel.const_view();
    p.x = x.const_view();
    p.heads = heads;
    p.offsets = layout.offsets();
    p.sequences = layout.sequences();
  }
  template <class B, class Phi>
  void set_gram(const cpu::context& ctx, const gram<T, B, Phi>& g) {
    q = input_tokens(mapped<Phi>(ctx, g.q));
    k = input_tokens(mapped<Phi>(ctx, g.k));
    p.q = q.const_view();
    p.k = k.const_view();
    p.alpha = static_cast<T>(g.alpha);
  }
  [[nodiscard]] kernels::toeplitz_entries<T> entries() const { return {p.kernel, p.heads}; }
};

}  // namespace detail

// ---- L X ----------------------------------------------------------------------------------------

/// @cost O(T log T) a column of X, O(T) memory a task.
template <Real T, Backend B>
void apply_mixer(const cpu::context& ctx, alg::structured, const toeplitz_mask<T, B>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  const detail::toeplitz_tokens<T> tokens(m, detail::layout_with(m, x), x, y.extent(2));
  const detail::result_tokens<T> out(y);
  kernels::toeplitz_fft<T>(ctx, tokens.p, out.get().view());
  out.finish();
}
/// @cost T^2 flops a column of X as matrix products; no T x T storage.
template <Real T, Backend B>
void apply_mixer(const cpu::context& ctx, alg::quadratic, const toeplitz_mask<T, B>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  const detail::toeplitz_tokens<T> tokens(m, detail::layout_with(m, x), x, y.extent(2));
  const detail::result_tokens<T> out(y);
  kernels::toeplitz_quadratic<T>(ctx, tokens.p, out.get().view());
  out.finish();
}

namespace detail {
template <class Alg, Real T, Backend B>
requires(std::same_as<Alg, alg::structured> || std::same_as<Alg, alg::quadratic>) void toeplitz_vjp(
    const cpu::context& ctx, Alg, const toeplitz_mask<T, B>& m, const tensor<T, 4>& x,
    const tensor<T, 4>& dy, toeplitz_mask<T, B>& dm, const tensor<T, 4>& dx,
    const carry_gradient<T>& c) {
  refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  const toeplitz_tokens<T> tokens(m, layout_with(m, x), x, dy.extent(2));
  const head_gradients<T, 4> d_x(dx, dy.extent(2));
  const tensor<T, 3> d_out = input_tokens(dy);
  const kernels::toeplitz_gradients<T> g{dm.kernel.view(), d_x.get().view(), {}, {}};
  if constexpr (std::same_as<Alg, alg::structured>) {
    kernels::toeplitz_fft_vjp<T>(ctx, tokens.p, d_out.const_view(), g);
  } else {
    kernels::toeplitz_quadratic_vjp<T>(ctx, tokens.p, d_out.const_view(), g);
  }
  d_x.finish();
}
}  // namespace detail

template <Real T, Backend B>
void apply_mixer_vjp(const cpu::context& ctx, alg::structured a, const toeplitz_mask<T, B>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, toeplitz_mask<T, B>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::toeplitz_vjp(ctx, a, m, x, dy, dm, dx, c);
}
template <Real T, Backend B>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic a, const toeplitz_mask<T, B>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, toeplitz_mask<T, B>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::toeplitz_vjp(ctx, a, m, x, dy, dm, dx, c);
}

/// Transforms win from about 512 tokens for a few columns of X and from 128 for many.
template <Real T>
[[nodiscard]] std::string_view choose_algorithm(const toeplitz_mask<T, cpu>&, index_t length,
                                                index_t width) {
  return length >= (width >= 32 ? 128 : 512) ? alg::structured::name : alg::quadratic::name;
}

// ---- (L o Q K^T) V ------------------------------------------------------------------------------

/// @cost O(N P T log T) a head, O(T) memory a task.
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer(const cpu::context& ctx, alg::structured,
                 const masked_gram<toeplitz_mask<T, B>, T, B, Phi>& m, const tensor<T, 4>& x,
                 const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  detail::toeplitz_tokens<T> tokens(m.mask, layout_of(m), x, y.extent(2));
  tokens.set_gram(ctx, m.kernel);
  const detail::result_tokens<T> out(y);
  kernels::toeplitz_gram_fft<T>(ctx, tokens.p, out.get().view());
  out.finish();
}
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer_vjp(const cpu::context& ctx, alg::structured,
                     const masked_gram<toeplitz_mask<T, B>, T, B, Phi>& m, const tensor<T, 4>& x,
                     const tensor<T, 4>& dy, masked_gram<toeplitz_mask<T, B>, T, B, Phi>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  const index_t heads = dy.extent(2);
  detail::toeplitz_tokens<T> tokens(m.mask, layout_of(m), x, heads);
  tokens.set_gram(ctx, m.kernel);
  const detail::feature_gradients<Phi, T> dq(dm.kernel.q, heads), dk(dm.kernel.k, heads);
  const detail::head_gradients<T, 4> d_x(dx, heads);
  const tensor<T, 3> d_out = detail::input_tokens(dy);
  kernels::toeplitz_gram_fft_vjp<T>(ctx, tokens.p, d_out.const_view(),
                                    {dm.mask.kernel.view(), d_x.get().view(), dq.get(), dk.get()});
  dq.finish(m.kernel.q);
  dk.finish(m.kernel.k);
  d_x.finish();
}

/// @cost O(T^2 (N + P)) a head in blocks; no T x T storage.
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer(const cpu::context& ctx, alg::quadratic,
                 const masked_gram<toeplitz_mask<T, B>, T, B, Phi>& m, const tensor<T, 4>& x,
                 const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  const sequence_layout layout = layout_of(m);
  m.mask.check_length(layout.max_length());
  detail::apply_in_blocks(ctx, m.kernel, layout,
                          kernels::toeplitz_entries<T>{m.mask.kernel.const_view(), y.extent(2)}, x,
                          y);
}
template <Real T, Backend B, FeatureMap Phi>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic,
                     const masked_gram<toeplitz_mask<T, B>, T, B, Phi>& m, const tensor<T, 4>& x,
                     const tensor<T, 4>& dy, masked_gram<toeplitz_mask<T, B>, T, B, Phi>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  const index_t heads = dy.extent(2);
  detail::toeplitz_tokens<T> tokens(m.mask, layout_of(m), x, heads);
  detail::apply_in_blocks_vjp(ctx, m.kernel, tokens.layout, tokens.entries(), x, dy, dm.kernel, dx);
  if (!dm.mask.kernel) return;
  tokens.set_gram(ctx, m.kernel);
  const kernels::toeplitz_problem<T>& p = tokens.p;
  const tensor<T, 3> d_out = detail::input_tokens(dy);
  kernels::masked_quadratic_mask_vjp<T>(
      ctx, {p.q, p.k, p.x, p.alpha, heads, p.offsets, p.sequences}, tokens.entries(),
      d_out.const_view(), dm.mask.kernel.view());
}

/// Transforms cost N P channels, blocks T (N + P): measured equal at T = 150 N P / (N + P).
template <Real T, FeatureMap Phi>
[[nodiscard]] std::string_view choose_algorithm(
    const masked_gram<toeplitz_mask<T, cpu>, T, cpu, Phi>& m, index_t length, index_t width) {
  const index_t n = m.key_size();
  return length * (n + width) >= 150 * n * width ? alg::structured::name : alg::quadratic::name;
}

}  // namespace ssm
