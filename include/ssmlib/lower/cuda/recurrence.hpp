#pragma once

#include <ssmlib/kernels/cuda/recurrence.hpp>
#include <ssmlib/kernels/cuda/selective_step.hpp>
#include <ssmlib/lower/cuda/positions.hpp>
#include <ssmlib/lower/cuda/selective.hpp>
#include <ssmlib/lower/cuda/semiseparable.hpp>

namespace ssm {

/// @file
/// alg::recurrent on CUDA for the semiseparable family and the selective scan: token by token, the
/// same bits however a sequence is split and whatever else is in the batch. What advance() runs for
/// a few tokens. Their gradients are those of the forms for long sequences, which need every state
/// twice.

namespace detail {

template <Floating T, class L>
void run_cuda_recurrence(const cuda::context& ctx, const cuda_ssd<T, L>& s,
                         const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  const result_tokens<T, cuda> out(y);
  const auto first = snapshot_positions(ctx, c, s.layout);
  kernels::cuda::linear_recurrence<T>(ctx.stream(), s.p, out.get().view(),
                                      {c.initial.const_view(), c.final.view()},
                                      {c.snapshots.view(), c.slots, first.data()});
  out.finish();
}

template <class L, Floating T, class Phi>
void apply_cuda_recurrence(const cuda::context& ctx, const masked_gram<L, T, cuda, Phi>& m,
                           const tensor<accum_t<T>, 1, cuda>& skip, const tensor<T, 4, cuda>& x,
                           const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  if (y.size() == 0) return carry_over(c);
  cuda_ssd<T, L> s(ctx, m.mask, layout_of(m), x, y.extent(2), skip);
  s.set_gram(mapped<Phi>(ctx, m.kernel.q), mapped<Phi>(ctx, m.kernel.k), m.kernel.alpha);
  run_cuda_recurrence(ctx, s, y, c);
}

// Every feature of x is a recurrence of its own; Mamba has one.
template <Floating T>
void run_cuda_selective_recurrence(const cuda::context& ctx, const selective_mixer<T, cuda>& m,
                                   const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                                   const carry<T, cuda>& c, const tensor<accum_t<T>, 1, cuda>& d) {
  if (y.size() == 0) return carry_over(c);
  const index_t channels = y.extent(2), features = y.extent(3);
  const cuda_selective<T> call(ctx, m, channels, d);
  const auto first = snapshot_positions(ctx, c, call.layout);
  for (index_t f = 0; f < features; ++f) {
    const tensor<T, 2, cuda> u = channel_rows(repeat_heads(feature_of(x, f), 2, channels));
    const tensor<T, 3, cuda> plane = feature_of(y, f);
    const bool direct = is_token_major(plane);
    const tensor<T, 3, cuda> out = direct ? plane : tensor<T, 3, cuda>(plane.extents());
    kernels::cuda::selective_recurrence<T>(
        ctx.stream(), call.with(u, c.initial, f),
        out.template reshape<2>(merge_batch(out.extents())).view(), state_feature(c.final, f),
        {state_feature(c.snapshots, f), c.slots, first.data()});
    if (!direct) plane.copy_from(out);
  }
}

}  // namespace detail

// ---- mask o (Q K^T) with a semiseparable mask ---------------------------------------------------

/// @cost  5 N P flops a token and head, one token after the other; the state is read and written
///        once.
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cuda::context& ctx, alg::recurrent, const masked_gram<L, T, cuda, Phi>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::apply_cuda_recurrence(ctx, m, {}, x, y, c);
}
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cuda::context& ctx, alg::recurrent,
                     const masked_gram<L, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, masked_gram<L, T, cuda, Phi>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::apply_cuda_semiseparable_vjp(ctx, alg::chunked{}, m, {}, x, dy, dm, {}, dx, c);
}

/// The same with D x added by the kernels: see lower/wrappers.hpp.
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_plus_diagonal(const cuda::context& ctx, alg::recurrent,
                               const masked_gram<L, T, cuda, Phi>& m,
                               const tensor<accum_t<T>, 1, cuda>& d, const tensor<T, 4, cuda>& x,
                               const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::apply_cuda_recurrence(ctx, m, d, x, y, c);
}
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_plus_diagonal_vjp(const cuda::context& ctx, alg::recurrent,
                                   const masked_gram<L, T, cuda, Phi>& m,
                                   const tensor<accum_t<T>, 1, cuda>& d,
                                   const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                                   masked_gram<L, T, cuda, Phi>& dm,
                                   const tensor<accum_t<T>, 1, cuda>& dd,
                                   const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::apply_cuda_semiseparable_vjp(ctx, alg::chunked{}, m, d, x, dy, dm, dd, dx, c);
}

// ---- the masks by themselves --------------------------------------------------------------------

/// L X token by token. The state is (sequences, heads, 1, features).
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cuda::context& ctx, alg::recurrent, const L& m,
                 const tensor<typename L::value_type, 4, cuda>& x,
                 const tensor<typename L::value_type, 4, cuda>& y,
                 const carry<typename L::value_type, cuda>& c) {
  if (y.size() == 0) return detail::carry_over(c);
  detail::run_cuda_recurrence(ctx, detail::cuda_bare_mask(ctx, m, x, y.extent(2)), y, c);
}
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cuda::context& ctx, alg::recurrent, const L& m,
                     const tensor<typename L::value_type, 4, cuda>& x,
                     const tensor<typename L::value_type, 4, cuda>& dy, L& dm,
                     const tensor<typename L::value_type, 4, cuda>& dx,
                     const carry_gradient<typename L::value_type, cuda>& c) {
  apply_mixer_vjp(ctx, alg::chunked{}, m, x, dy, dm, dx, c);
}

// ---- the selective scan -------------------------------------------------------------------------

/// @cost  T D N exponentials a feature of x, one token after the other.
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::recurrent, const selective_mixer<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::run_cuda_selective_recurrence(ctx, m, x, y, c, {});
}
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::recurrent, const selective_mixer<T, cuda>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     selective_mixer<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                     const carry_gradient<T, cuda>& c) {
  detail::run_cuda_selective_vjp(ctx, alg::scan{}, m, x, dy, dm, dx, c, {}, {});
}

/// selective(...) + diagonal(d): the recurrence adds the skip connection on the way.
template <Floating T>
void apply_mixer_plus_diagonal(const cuda::context& ctx, alg::recurrent,
                               const selective_mixer<T, cuda>& m,
                               const tensor<accum_t<T>, 1, cuda>& d, const tensor<T, 4, cuda>& x,
                               const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::run_cuda_selective_recurrence(ctx, m, x, y, c, d);
}
template <Floating T>
void apply_mixer_plus_diagonal_vjp(const cuda::context& ctx, alg::recurrent,
                                   const selective_mixer<T, cuda>& m,
                                   const tensor<accum_t<T>, 1, cuda>& d,
                                   const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                                   selective_mixer<T, cuda>& dm,
                                   const tensor<accum_t<T>, 1, cuda>& dd,
                                   const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::run_cuda_selective_vjp(ctx, alg::scan{}, m, x, dy, dm, dx, c, d, dd);
}

}  // namespace ssm
