#pragma once

#include <ssmlib/kernels/cuda/wrappers.hpp>
#include <ssmlib/lower/cuda/quadratic.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/wrappers.hpp>

#include <concepts>
#include <type_traits>

namespace ssm {

/// @file
/// row_normalized and with_diagonal on CUDA over any mixer: each algorithm of the inner mixer, with
/// its gradient and its state, gives that of the whole; see lower/wrappers.hpp.

namespace detail {

/// Features of X with the ones. Without a state, bf16 rows get as many zeros as make them whole
/// 16-byte pieces, which the tensor cores' kernels want.
template <Floating T>
[[nodiscard]] index_t width_with_ones(index_t features, bool has_state) {
  const bool pads = std::same_as<T, bf16> && !has_state && features >= 8;
  return pads ? round_up(features + 1, 8) : features + 1;
}
template <Floating T>
[[nodiscard]] tensor<T, 4, cuda> with_ones(const cuda::context& ctx, const tensor<T, 4, cuda>& x,
                                           index_t width) {
  tensor<T, 4, cuda> wide(x.extent(0), x.extent(1), x.extent(2), width);
  kernels::cuda::append_ones<T>(ctx.stream(), x.const_view(), wide.view());
  return wide;
}

template <class Alg, MatrixMixer M>
void apply_cuda_diagonal(const cuda::context& ctx, Alg algorithm, const with_diagonal<M>& m,
                         const tensor<typename M::value_type, 4, cuda>& x,
                         const tensor<typename M::value_type, 4, cuda>& y,
                         const carry<typename M::value_type, cuda>& c) {
  const auto inner = inner_of(m);
  if constexpr (requires { apply_mixer_plus_diagonal(ctx, algorithm, inner, m.d, x, y, c); }) {
    apply_mixer_plus_diagonal(ctx, algorithm, inner, m.d, x, y, c);
  } else {
    using T = typename M::value_type;
    apply_mixer(ctx, algorithm, inner, x, y, c);
    kernels::cuda::add_skip<T>(ctx.stream(), m.d.const_view(), x.const_view(), y.view());
  }
}
template <class Alg, MatrixMixer M>
void apply_cuda_diagonal_vjp(const cuda::context& ctx, Alg algorithm, const with_diagonal<M>& m,
                             const tensor<typename M::value_type, 4, cuda>& x,
                             const tensor<typename M::value_type, 4, cuda>& dy,
                             with_diagonal<M>& dm,
                             const tensor<typename M::value_type, 4, cuda>& dx,
                             const carry_gradient<typename M::value_type, cuda>& c) {
  const auto inner = inner_of(m);
  if constexpr (requires {
                  apply_mixer_plus_diagonal_vjp(ctx, algorithm, inner, m.d, x, dy, dm.inner, dm.d,
                                                dx, c);
                }) {
    apply_mixer_plus_diagonal_vjp(ctx, algorithm, inner, m.d, x, dy, dm.inner, dm.d, dx, c);
  } else {
    using T = typename M::value_type;
    apply_mixer_vjp(ctx, algorithm, inner, x, dy, dm.inner, dx, c);
    if (!dx && !dm.d) return;
    const cuda_workspace workspace(ctx,
                                   kernels::cuda::add_skip_vjp_workspace_bytes<T>(dy.const_view()));
    kernels::cuda::add_skip_vjp<T>(ctx.stream(), m.d.const_view(), x.const_view(), dy.const_view(),
                                   dm.d.view(), dx.view(), workspace.data());
  }
}

template <class Alg, MatrixMixer M>
void apply_cuda_normalized(const cuda::context& ctx, Alg algorithm, const row_normalized<M>& m,
                           const tensor<typename M::value_type, 4, cuda>& x,
                           const tensor<typename M::value_type, 4, cuda>& y,
                           const carry<typename M::value_type, cuda>& c) {
  using T = typename M::value_type;
  const index_t width = width_with_ones<T>(y.extent(3), c.initial || c.final || c.snapshots);
  const tensor<T, 4, cuda> wide(y.extent(0), y.extent(1), y.extent(2), width);
  apply_mixer(ctx, algorithm, inner_of(m), with_ones(ctx, x, width), wide, c);
  kernels::cuda::divide_rows<T>(ctx.stream(), wide.const_view(), y.view());
}
template <class Alg, MatrixMixer M>
void apply_cuda_normalized_vjp(const cuda::context& ctx, Alg algorithm, const row_normalized<M>& m,
                               const tensor<typename M::value_type, 4, cuda>& x,
                               const tensor<typename M::value_type, 4, cuda>& dy,
                               row_normalized<M>& dm,
                               const tensor<typename M::value_type, 4, cuda>& dx,
                               const carry_gradient<typename M::value_type, cuda>& c) {
  using T = typename M::value_type;
  const index_t features = dy.extent(3);
  const index_t width = width_with_ones<T>(features, c.initial || c.d_final || c.d_initial);
  const tensor<T, 4, cuda> wide_x = with_ones(ctx, x, width);
  const tensor<T, 4, cuda> wide(dy.extent(0), dy.extent(1), dy.extent(2), width);
  const auto inner = inner_of(m);
  carry<T, cuda> forward;
  forward.initial = c.initial;
  apply_mixer(ctx, algorithm, inner, wide_x, wide, forward);
  kernels::cuda::divide_rows_vjp<T>(ctx.stream(), dy.const_view(), wide.view());
  tensor<T, 4, cuda> wide_dx;
  if (dx) wide_dx = tensor<T, 4, cuda>::zeros(wide_x.extents());
  apply_mixer_vjp(ctx, algorithm, inner, wide_x, wide, dm.inner, wide_dx, c);
  if (dx) add_to(dx, wide_dx.slice(3, 0, features));
}

// ---- gram matrices in the type of sums, which masks are of already ------------------------------

template <Floating T, class Phi>
[[nodiscard]] gram<accum_t<T>, cuda, Phi> in_sums(const cuda::context& ctx,
                                                  const gram<T, cuda, Phi>& g) {
  return {as_type<accum_t<T>>(ctx, g.q), as_type<accum_t<T>>(ctx, g.k), g.alpha, g.layout};
}
template <class L, Floating T, class Phi>
[[nodiscard]] masked_gram<L, accum_t<T>, cuda, Phi> in_sums(const cuda::context& ctx,
                                                            const masked_gram<L, T, cuda, Phi>& m) {
  return {m.mask, in_sums(ctx, m.kernel), m.layout};
}
/// Gradients to add to, the mask's own among them.
template <Floating T, class Phi>
[[nodiscard]] gram<accum_t<T>, cuda, Phi> gradients_in_sums(const gram<T, cuda, Phi>& g) {
  return {sums_like(g.q), sums_like(g.k), 1.0, {}};
}
template <class L, Floating T, class Phi>
[[nodiscard]] masked_gram<L, accum_t<T>, cuda, Phi> gradients_in_sums(
    const masked_gram<L, T, cuda, Phi>& m) {
  return {m.mask, gradients_in_sums(m.kernel), {}};
}
template <Floating T, class Phi>
void add_from_sums(const cuda::context& ctx, const gram<T, cuda, Phi>& to,
                   const gram<accum_t<T>, cuda, Phi>& from) {
  if (to.q) add_to(to.q, as_type<T>(ctx, from.q));
  if (to.k) add_to(to.k, as_type<T>(ctx, from.k));
}
template <class L, Floating T, class Phi>
void add_from_sums(const cuda::context& ctx, const masked_gram<L, T, cuda, Phi>& to,
                   const masked_gram<L, accum_t<T>, cuda, Phi>& from) {
  add_from_sums(ctx, to.kernel, from.kernel);
}
template <class M>
concept HasTiles = requires(const cuda::context& ctx, const M& m) {
  in_sums(ctx, m);
};

}  // namespace detail

/// M X + d x, from any algorithm of M.
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer(
    const cuda::context& ctx, Alg algorithm, const with_diagonal<M>& m,
    const tensor<typename M::value_type, 4, cuda>& x,
    const tensor<typename M::value_type, 4, cuda>& y,
    const carry<typename M::value_type, cuda>& c) {
  detail::apply_cuda_diagonal(ctx, algorithm, m, x, y, c);
}
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer_vjp(
    const cuda::context& ctx, Alg algorithm, const with_diagonal<M>& m,
    const tensor<typename M::value_type, 4, cuda>& x,
    const tensor<typename M::value_type, 4, cuda>& dy, with_diagonal<M>& dm,
    const tensor<typename M::value_type, 4, cuda>& dx,
    const carry_gradient<typename M::value_type, cuda>& c) {
  detail::apply_cuda_diagonal_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}
template <MatrixMixer M>
void apply_mixer(const cuda::context& ctx, alg::quadratic algorithm, const with_diagonal<M>& m,
                 const tensor<typename M::value_type, 4, cuda>& x,
                 const tensor<typename M::value_type, 4, cuda>& y,
                 const carry<typename M::value_type, cuda>& c) {
  detail::apply_cuda_diagonal(ctx, algorithm, m, x, y, c);
}
template <MatrixMixer M>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic algorithm, const with_diagonal<M>& m,
                     const tensor<typename M::value_type, 4, cuda>& x,
                     const tensor<typename M::value_type, 4, cuda>& dy, with_diagonal<M>& dm,
                     const tensor<typename M::value_type, 4, cuda>& dx,
                     const carry_gradient<typename M::value_type, cuda>& c) {
  detail::apply_cuda_diagonal_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}

/// M X divided by the row sums of M, from any algorithm of M: the sums are one more feature.
/// @cost  that of M with one feature more, and two passes over X and the result. Sums of bf16 are
///        rounded to bf16 before the division.
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer(
    const cuda::context& ctx, Alg algorithm, const row_normalized<M>& m,
    const tensor<typename M::value_type, 4, cuda>& x,
    const tensor<typename M::value_type, 4, cuda>& y,
    const carry<typename M::value_type, cuda>& c) {
  detail::apply_cuda_normalized(ctx, algorithm, m, x, y, c);
}
/// @cost  the forward pass again, the gradient of M with one feature more, and three passes.
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer_vjp(
    const cuda::context& ctx, Alg algorithm, const row_normalized<M>& m,
    const tensor<typename M::value_type, 4, cuda>& x,
    const tensor<typename M::value_type, 4, cuda>& dy, row_normalized<M>& dm,
    const tensor<typename M::value_type, 4, cuda>& dx,
    const carry_gradient<typename M::value_type, cuda>& c) {
  detail::apply_cuda_normalized_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}
/// alg::quadratic of a gram matrix, masked or not, in tiles and in the type of sums, so that bf16
/// is rounded once; of any other mixer through the host.
template <MatrixMixer M>
void apply_mixer(const cuda::context& ctx, alg::quadratic algorithm, const row_normalized<M>& m,
                 const tensor<typename M::value_type, 4, cuda>& x,
                 const tensor<typename M::value_type, 4, cuda>& y,
                 const carry<typename M::value_type, cuda>& c) {
  using T = typename M::value_type;
  using A = accum_t<T>;
  if constexpr (!detail::HasTiles<M>) {
    detail::apply_on_host(ctx, m, x, y, c);
  } else {
    if (std::same_as<T, A> || c.initial || c.final || c.snapshots) {
      return detail::apply_cuda_normalized(ctx, algorithm, m, x, y, c);
    }
    const auto inner = detail::in_sums(ctx, detail::inner_of(m));
    const row_normalized<std::remove_const_t<decltype(inner)>> exact{inner, m.layout};
    const tensor<A, 4, cuda> sums(y.extents());
    detail::apply_cuda_normalized(ctx, algorithm, exact, detail::as_type<A>(ctx, x), sums,
                                  carry<A, cuda>{});
    y.copy_from(detail::as_type<T>(ctx, sums));
  }
}
template <MatrixMixer M>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic algorithm, const row_normalized<M>& m,
                     const tensor<typename M::value_type, 4, cuda>& x,
                     const tensor<typename M::value_type, 4, cuda>& dy, row_normalized<M>& dm,
                     const tensor<typename M::value_type, 4, cuda>& dx,
                     const carry_gradient<typename M::value_type, cuda>& c) {
  using T = typename M::value_type;
  using A = accum_t<T>;
  if constexpr (!detail::HasTiles<M>) {
    detail::apply_on_host_vjp(m, x, dy, dm, dx, c);
  } else {
    if (std::same_as<T, A> || c.initial || c.d_final || c.d_initial) {
      return detail::apply_cuda_normalized_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
    }
    const auto inner = detail::in_sums(ctx, detail::inner_of(m));
    using exact_node = row_normalized<std::remove_const_t<decltype(inner)>>;
    exact_node gradients{detail::gradients_in_sums(dm.inner), {}};
    const tensor<A, 4, cuda> d_x = detail::sums_like(dx);
    detail::apply_cuda_normalized_vjp(ctx, algorithm, exact_node{inner, m.layout},
                                      detail::as_type<A>(ctx, x), detail::as_type<A>(ctx, dy),
                                      gradients, d_x, carry_gradient<A, cuda>{});
    detail::add_from_sums(ctx, dm.inner, gradients.inner);
    if (dx) detail::add_to(dx, detail::as_type<T>(ctx, d_x));
  }
}

}  // namespace ssm
