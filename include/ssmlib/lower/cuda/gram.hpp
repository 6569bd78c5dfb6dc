#pragma once

#include <ssmlib/kernels/cuda/quadratic.hpp>
#include <ssmlib/lower/cuda/host_reference.hpp>
#include <ssmlib/lower/cuda/semiseparable.hpp>

#include <concepts>
#include <type_traits>

namespace ssm {

/// @file
/// The gram matrix by itself, by associativity or in tiles, and alg::quadratic of the library's
/// masks, by themselves and over a gram matrix, in tiles: no T x T storage, nothing goes through
/// the host.

namespace detail {

/// The sequences of a mixer, of X's rectangle where the mixer fits any length.
template <class M, Floating T>
[[nodiscard]] sequence_layout layout_with(const M& m, const tensor<T, 4, cuda>& x) {
  if (m.layout || m.length() != 0) return layout_of(m);
  return sequence_layout::rectangular(x.extent(0), x.extent(1));
}

/// A zeroed stand-in of sums for a tensor, absent where that is.
template <Floating T>
[[nodiscard]] tensor<accum_t<T>, 4, cuda> sums_like(const tensor<T, 4, cuda>& t) {
  if (!t) return {};
  return tensor<accum_t<T>, 4, cuda>::zeros(t.extents());
}
/// A mask's operands as the kernels of masked products take them, with what their views point to.
template <class L>
struct cuda_tile_mask;

template <class L>
requires is_semiseparable_mask<L>
struct cuda_tile_mask<L> {
  using kind = kernels::cuda::quadratic_mask_kind;
  using gradients = cuda_mask_gradients<L>;

  cuda_tile_mask(const cuda::context& ctx, const L& m) : operands(ctx, m) {}
  template <class T>
  void set(kernels::cuda::quadratic_mask<T>& mask) const {
    mask.kind = kind_of(std::type_identity<L>{});
    operands.set(mask);
  }

  cuda_mask<L> operands;

 private:
  template <class V>
  static kind kind_of(std::type_identity<causal_mask<V, cuda>>) {
    return kind::causal;
  }
  template <class V>
  static kind kind_of(std::type_identity<decay_mask<V, cuda>>) {
    return kind::decay;
  }
  template <class V>
  static kind kind_of(std::type_identity<semiseparable_mask<V, cuda>>) {
    return kind::semiseparable;
  }
};

template <class V>
struct cuda_tile_mask<window_mask<V, cuda>> {
  struct gradients {
    explicit gradients(const window_mask<V, cuda>&) {}
    template <class G>
    void set(G&) const {}
    void finish(const cuda::context&) const {}
  };
  cuda_tile_mask(const cuda::context&, const window_mask<V, cuda>& m) : size(m.size) {}
  template <class T>
  void set(kernels::cuda::quadratic_mask<T>& mask) const {
    mask.kind = kernels::cuda::quadratic_mask_kind::window;
    mask.window = size;
  }
  index_t size;
};

template <class V>
struct cuda_tile_mask<toeplitz_mask<V, cuda>> {
  struct gradients {
    mask_gradient<V, 2> kernel;
    explicit gradients(const toeplitz_mask<V, cuda>& m) : kernel(m.kernel) {}
    template <class G>
    void set(G& g) const {
      g.kernel = kernel.get().view();
    }
    void finish(const cuda::context& ctx) const { kernel.finish(ctx); }
  };
  cuda_tile_mask(const cuda::context& ctx, const toeplitz_mask<V, cuda>& m)
      : kernel(as_type<accum_t<V>>(ctx, m.kernel)) {}
  template <class T>
  void set(kernels::cuda::quadratic_mask<T>& mask) const {
    mask.kind = kernels::cuda::quadratic_mask_kind::toeplitz;
    mask.kernel = kernel.const_view();
  }
  tensor<accum_t<V>, 2, cuda> kernel;
};

/// No mask.
struct cuda_no_mask {
  struct gradients {
    template <class G>
    void set(G&) const {}
    void finish(const cuda::context&) const {}
  };
  template <class T>
  void set(kernels::cuda::quadratic_mask<T>&) const {}
};

/// The masks whose entries the kernels of masked products know.
template <class L>
concept TileMask = requires(const cuda::context& ctx, const L& m) {
  cuda_tile_mask<L>(ctx, m);
};

/// The kernels' problem with what its views point to.
template <Floating T>
struct cuda_tokens {
  cuda_tokens(const cuda::context& ctx, const sequence_layout& sequences,
              const tensor<T, 4, cuda>& x4, index_t heads)
      : x(input_tokens(x4)), layout(ctx, sequences) {
    p.x = x.const_view();
    p.heads = heads;
    p.offsets = layout.offsets;
    p.sequences = layout.sequences;
    p.max_length = layout.max_length;
  }
  template <class Phi>
  void set_gram(const cuda::context& ctx, const gram<T, cuda, Phi>& g) {
    q = input_tokens(mapped<Phi>(ctx, g.q));
    k = input_tokens(mapped<Phi>(ctx, g.k));
    p.q = q.const_view();
    p.k = k.const_view();
    p.alpha = static_cast<accum_t<T>>(g.alpha);
  }

  tensor<T, 3, cuda> q, k, x;
  device_layout layout;
  kernels::cuda::quadratic_problem<T> p;
};

/// y = (mask o the problem's gram matrix) x in tiles.
template <Floating T, class Mask>
void run_cuda_tiles(const cuda::context& ctx, const cuda_tokens<T>& tokens, const Mask& mask,
                    const tensor<T, 4, cuda>& y) {
  kernels::cuda::quadratic_mask<T> m;
  mask.set(m);
  const result_tokens<T, cuda> out(y);
  const cuda_workspace workspace(ctx,
                                 kernels::cuda::masked_quadratic_workspace_bytes<T>(tokens.p, m));
  kernels::cuda::masked_quadratic<T>(ctx.stream(), tokens.p, m, out.get().view(), workspace.data());
  out.finish();
}
/// @param g  set for q and k, if there are any
template <Floating T, class Mask, class Gradients>
void run_cuda_tiles_vjp(const cuda::context& ctx, const cuda_tokens<T>& tokens, const Mask& mask,
                        const tensor<T, 4, cuda>& dy, kernels::cuda::quadratic_gradients<T>& g,
                        const Gradients& d_mask, const tensor<T, 4, cuda>& dx) {
  kernels::cuda::quadratic_mask<T> m;
  mask.set(m);
  d_mask.set(g);
  const added_gradient<T, 4> x(dx);
  g.x = x.tokens();
  const tensor<T, 3, cuda> d_out = input_tokens(dy);
  const cuda_workspace workspace(
      ctx, kernels::cuda::masked_quadratic_vjp_workspace_bytes<T>(tokens.p, m, g));
  kernels::cuda::masked_quadratic_vjp<T>(ctx.stream(), tokens.p, m, d_out.const_view(), g,
                                         workspace.data());
  d_mask.finish(ctx);
  x.finish();
}

/// The same for mask o phi(Q) phi(K)^T.
template <Floating T, class Phi, class Mask>
void apply_cuda_gram_tiles(const cuda::context& ctx, const gram<T, cuda, Phi>& g,
                           const sequence_layout& layout, const Mask& mask,
                           const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y) {
  if (y.size() == 0) return;
  cuda_tokens<T> tokens(ctx, layout, x, y.extent(2));
  tokens.set_gram(ctx, g);
  run_cuda_tiles(ctx, tokens, mask, y);
}
template <Floating T, class Phi, class Mask, class Gradients>
void apply_cuda_gram_tiles_vjp(const cuda::context& ctx, const gram<T, cuda, Phi>& g,
                               const sequence_layout& layout, const Mask& mask,
                               const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                               const gram<T, cuda, Phi>& dg, const Gradients& d_mask,
                               const tensor<T, 4, cuda>& dx) {
  cuda_tokens<T> tokens(ctx, layout, x, dy.extent(2));
  tokens.set_gram(ctx, g);
  const mapped_gradient<Phi, T> dq(dg.q), dk(dg.k);
  kernels::cuda::quadratic_gradients<T> gradients;
  gradients.q = dq.tokens();
  gradients.k = dk.tokens();
  run_cuda_tiles_vjp(ctx, tokens, mask, dy, gradients, d_mask, dx);
  dq.finish(ctx, g.q);
  dk.finish(ctx, g.k);
}

}  // namespace detail

// ---- Q K^T --------------------------------------------------------------------------------------

/// alpha Q (K^T X). @cost  4 N P flops a token and head
template <Floating T, FeatureMap Phi>
void apply_mixer(const cuda::context& ctx, alg::associative, const gram<T, cuda, Phi>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::refuse_carry(c);
  if (y.size() == 0) return;
  detail::cuda_tokens<T> tokens(ctx, layout_of(m), x, y.extent(2));
  tokens.set_gram(ctx, m);
  const detail::result_tokens<T, cuda> out(y);
  const detail::cuda_workspace workspace(
      ctx, kernels::cuda::gram_associative_workspace_bytes<T>(tokens.p));
  kernels::cuda::gram_associative<T>(ctx.stream(), tokens.p, out.get().view(), workspace.data());
  out.finish();
}
template <Floating T, FeatureMap Phi>
void apply_mixer_vjp(const cuda::context& ctx, alg::associative, const gram<T, cuda, Phi>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     gram<T, cuda, Phi>& dm, const tensor<T, 4, cuda>& dx,
                     const carry_gradient<T, cuda>& c) {
  detail::refuse_carry<T, cuda>({c.initial, c.d_final, {}, 0, nullptr});
  detail::cuda_tokens<T> tokens(ctx, layout_of(m), x, dy.extent(2));
  tokens.set_gram(ctx, m);
  const detail::mapped_gradient<Phi, T> dq(dm.q), dk(dm.k);
  const detail::added_gradient<T, 4> d_x(dx);
  const tensor<T, 3, cuda> d_out = detail::input_tokens(dy);
  kernels::cuda::quadratic_gradients<T> g;
  g.q = dq.tokens();
  g.k = dk.tokens();
  g.x = d_x.tokens();
  const detail::cuda_workspace workspace(
      ctx, kernels::cuda::gram_associative_workspace_bytes<T>(tokens.p));
  kernels::cuda::gram_associative_vjp<T>(ctx.stream(), tokens.p, d_out.const_view(), g,
                                         workspace.data());
  dq.finish(ctx, m.q);
  dk.finish(ctx, m.k);
  d_x.finish();
}

/// (alpha Q K^T) X. @cost  2 (N + P) flops a head and pair of tokens
template <Floating T, FeatureMap Phi>
void apply_mixer(const cuda::context& ctx, alg::quadratic, const gram<T, cuda, Phi>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::refuse_carry(c);
  detail::apply_cuda_gram_tiles(ctx, m, layout_of(m), detail::cuda_no_mask{}, x, y);
}
template <Floating T, FeatureMap Phi>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic, const gram<T, cuda, Phi>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     gram<T, cuda, Phi>& dm, const tensor<T, 4, cuda>& dx,
                     const carry_gradient<T, cuda>& c) {
  detail::refuse_carry<T, cuda>({c.initial, c.d_final, {}, 0, nullptr});
  detail::apply_cuda_gram_tiles_vjp(ctx, m, layout_of(m), detail::cuda_no_mask{}, x, dy, dm,
                                    detail::cuda_no_mask::gradients{}, dx);
}

// ---- mask o (Q K^T) -----------------------------------------------------------------------------

/// @cost  2 (N + P) flops a head and pair of tokens in a tile of 64 x 64 (32 x 32 for double) that
///        is not all zeros: O(T w) for a window. With a state, which only the semiseparable masks
///        have, all of it is the twin's on the host.
template <detail::TileMask L, Floating T, FeatureMap Phi>
void apply_mixer(const cuda::context& ctx, alg::quadratic, const masked_gram<L, T, cuda, Phi>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  if (c.initial || c.final || c.snapshots) return detail::apply_on_host(ctx, m, x, y, c);
  const detail::cuda_tile_mask<L> mask(ctx, m.mask);
  detail::apply_cuda_gram_tiles(ctx, m.kernel, layout_of(m), mask, x, y);
}
template <detail::TileMask L, Floating T, FeatureMap Phi>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic,
                     const masked_gram<L, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, masked_gram<L, T, cuda, Phi>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  if (c.initial || c.d_final || c.d_initial) return detail::apply_on_host_vjp(m, x, dy, dm, dx, c);
  const detail::cuda_tile_mask<L> mask(ctx, m.mask);
  const typename detail::cuda_tile_mask<L>::gradients d_mask(dm.mask);
  detail::apply_cuda_gram_tiles_vjp(ctx, m.kernel, layout_of(m), mask, x, dy, dm.kernel, d_mask,
                                    dx);
}

// ---- the masks by themselves --------------------------------------------------------------------

/// L X. @cost  2 P flops a head and pair of tokens; with a state, the twin's on the host.
template <template <Floating, Backend> class Mask, Floating T>
requires detail::TileMask<Mask<T, cuda>>
void apply_mixer(const cuda::context& ctx, alg::quadratic, const Mask<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  if (c.initial || c.final || c.snapshots) return detail::apply_on_host(ctx, m, x, y, c);
  if (y.size() == 0) return;
  const detail::cuda_tokens<T> tokens(ctx, detail::layout_with(m, x), x, y.extent(2));
  detail::run_cuda_tiles(ctx, tokens, detail::cuda_tile_mask<Mask<T, cuda>>(ctx, m), y);
}
template <template <Floating, Backend> class Mask, Floating T>
requires detail::TileMask<Mask<T, cuda>>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic, const Mask<T, cuda>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy, Mask<T, cuda>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  if (c.initial || c.d_final || c.d_initial) return detail::apply_on_host_vjp(m, x, dy, dm, dx, c);
  const detail::cuda_tokens<T> tokens(ctx, detail::layout_with(m, x), x, dy.extent(2));
  const detail::cuda_tile_mask<Mask<T, cuda>> mask(ctx, m);
  const typename detail::cuda_tile_mask<Mask<T, cuda>>::gradients d_mask(dm);
  kernels::cuda::quadratic_gradients<T> g;
  detail::run_cuda_tiles_vjp(ctx, tokens, mask, dy, g, d_mask, dx);
}

}  // namespace ssm
