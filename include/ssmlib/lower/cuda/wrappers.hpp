#pragma once

#include <ssmlib/kernels/cuda/wrappers.hpp>
#include <ssmlib/lower/cuda/quadratic.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/wrappers.hpp>

#include <concepts>

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
template <MatrixMixer M>
void apply_mixer(const cuda::context& ctx, alg::quadratic algorithm, const row_normalized<M>& m,
                 const tensor<typename M::value_type, 4, cuda>& x,
                 const tensor<typename M::value_type, 4, cuda>& y,
                 const carry<typename M::value_type, cuda>& c) {
  detail::apply_cuda_normalized(ctx, algorithm, m, x, y, c);
}
template <MatrixMixer M>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic algorithm, const row_normalized<M>& m,
                     const tensor<typename M::value_type, 4, cuda>& x,
                     const tensor<typename M::value_type, 4, cuda>& dy, row_normalized<M>& dm,
                     const tensor<typename M::value_type, 4, cuda>& dx,
                     const carry_gradient<typename M::value_type, cuda>& c) {
  detail::apply_cuda_normalized_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}

}  // namespace ssm
