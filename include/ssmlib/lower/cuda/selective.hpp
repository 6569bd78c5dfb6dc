#pragma once

#include <ssmlib/expr/selective.hpp>
#include <ssmlib/kernels/cuda/selective.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

#include <concepts>
#include <string>

namespace ssm {

/// @file
/// The selective scan on CUDA: alg::scan, with a state, and with the skip connection on the way.

namespace detail {

/// to (b, T, G * n) = from (b, T, G), every head n times; the same for rows.
template <Floating T, int R>
[[nodiscard]] tensor<T, R, cuda> repeat_heads(const tensor<T, R, cuda>& t, int axis,
                                              index_t heads) {
  const index_t groups = t.extent(axis);
  if (groups == heads) return t;
  shape<R> extents = t.extents();
  extents[static_cast<std::size_t>(axis)] = heads;
  tensor<T, R, cuda> all(extents);
  const index_t n = heads / groups;
  strided_axes from, to;  // outer axes as one each, the head, its copies
  const auto at = [](int d) { return static_cast<std::size_t>(d); };
  if constexpr (R == 3) {
    from = {{t.extent(0), t.extent(1), groups, n},
            {t.strides()[0], t.strides()[1], t.strides()[2], 0}};
    to = {{t.extent(0), t.extent(1), groups, n}, {all.strides()[0], all.strides()[1], n, 1}};
  } else {
    const index_t inner = R == 2 ? t.extent(1) : 1, step = R == 2 ? t.strides()[at(R - 1)] : 0;
    from = {{1, groups, n, inner}, {0, t.strides()[0], 0, step}};
    to = {{1, groups, n, inner}, {0, n * inner, inner, 1}};
  }
  if (all.size() > 0) elements<cuda>::copy(all.data(), to, t.data(), from, sizeof(T));
  return all;
}

/// to += from, the copies of a head summed in order: the gradient of repeat_heads.
template <Floating T, int R>
void add_repeated(const tensor<T, R, cuda>& to, const tensor<T, R, cuda>& from, int axis) {
  const index_t groups = to.extent(axis), n = from.extent(axis) / groups;
  if (n == 1) return add_to(to, from);
  for (index_t i = 0; i < n; ++i) {
    if constexpr (R == 3) {
      add_to(to, from.reshape(from.extent(0), from.extent(1), groups, n)
                     .slice(3, i, i + 1)
                     .reshape(from.extent(0), from.extent(1), groups));
    } else if constexpr (R == 2) {
      add_to(to, from.reshape(groups, n, from.extent(1))
                     .slice(1, i, i + 1)
                     .reshape(groups, from.extent(1)));
    } else {
      add_to(to, from.reshape(groups, n).slice(1, i, i + 1).reshape(groups));
    }
  }
}

/// Feature p of (b, T, G, P): (b, T, G).
template <Floating T>
[[nodiscard]] tensor<T, 3, cuda> feature_of(const tensor<T, 4, cuda>& t, index_t p) {
  if (!t) return {};
  return t.slice(3, p, p + 1).reshape(t.extent(0), t.extent(1), t.extent(2));
}

/// (b, T, D) -> (tokens, D) with neighbouring channels, shared where the strides allow it.
template <Floating T>
[[nodiscard]] tensor<T, 2, cuda> channel_rows(const tensor<T, 3, cuda>& t) {
  return input_tokens(is_token_major(t) ? t : t.clone());
}

/// Where a kernel adds the gradient of (b, T, G) with D channels: the target's own rows, or a
/// zeroed stand-in that finish() adds, the channels of a head in order.
template <Floating T>
class channel_gradient {
 public:
  channel_gradient(const tensor<T, 3, cuda>& target, index_t channels) : target_(target) {
    if (!target) return;
    if (target.extent(2) == channels && is_token_major(target)) {
      rows_ = target.template reshape<2>(merge_batch(target.extents()));
      return;
    }
    stand_in_ = tensor<T, 3, cuda>::zeros(target.extent(0), target.extent(1), channels);
    rows_ = stand_in_.template reshape<2>(merge_batch(stand_in_.extents()));
  }
  [[nodiscard]] view<T, 2> get() const { return rows_.view(); }
  void finish() const {
    if (stand_in_) add_repeated(target_, stand_in_, 2);
  }

 private:
  tensor<T, 3, cuda> target_, stand_in_;
  tensor<T, 2, cuda> rows_;
};
/// The same for (G, ...) with D rows.
template <Floating R, int Rank>
class row_gradient {
 public:
  row_gradient(const tensor<R, Rank, cuda>& target, index_t rows) : target_(target) {
    if (!target) return;
    whole_ = target;
    if (target.extent(0) == rows && (Rank > 1 || target.is_contiguous())) return;
    shape<Rank> extents = target.extents();
    extents[0] = rows;
    whole_ = tensor<R, Rank, cuda>::zeros(extents);
    stands_in_ = true;
  }
  [[nodiscard]] const tensor<R, Rank, cuda>& get() const { return whole_; }
  void finish() const {
    if (stands_in_) add_repeated(target_, whole_, 0);
  }

 private:
  tensor<R, Rank, cuda> target_, whole_;
  bool stands_in_ = false;
};

/// Feature p of a state (sequences, H, N, P).
template <Floating R>
[[nodiscard]] view<R, 3> state_feature(const tensor<R, 4, cuda>& s, index_t p) {
  if (!s) return {};
  return {s.data() + p * s.strides()[3],
          {s.extent(0), s.extent(1), s.extent(2)},
          {s.strides()[0], s.strides()[1], s.strides()[2]}};
}

/// The kernels' problem without u, with what its views point to.
template <Floating T>
struct cuda_selective {
  using real = accum_t<T>;

  cuda_selective(const cuda::context& ctx, const selective_mixer<T, cuda>& m, index_t channels,
                 const tensor<real, 1, cuda>& d)
      : layout(ctx, layout_of(m)),
        delta(channel_rows(repeat_heads(m.delta, 2, channels))),
        a(repeat_heads(m.a, 0, channels)),
        c(input_tokens(m.c)),
        b(input_tokens(m.b)) {
    if (d) skip = repeat_heads(d, 0, channels).contiguous();
    p.dt = delta.const_view();
    p.a = a.const_view();
    p.c = c.const_view();
    p.b = b.const_view();
    p.skip = skip.data();
    p.softplus = false;
    p.offsets = layout.offsets;
    p.sequences = layout.sequences;
    p.max_length = layout.max_length;
  }
  [[nodiscard]] kernels::cuda::selective_problem<T> with(const tensor<T, 2, cuda>& u,
                                                         const tensor<real, 4, cuda>& initial,
                                                         index_t feature) const {
    kernels::cuda::selective_problem<T> one = p;
    one.u = u.const_view();
    one.initial = state_feature(initial, feature);
    return one;
  }

  device_layout layout;
  tensor<T, 2, cuda> delta;
  tensor<real, 2, cuda> a;
  tensor<T, 3, cuda> c, b;
  tensor<real, 1, cuda> skip;
  kernels::cuda::selective_problem<T> p;
};

inline void check_block(alg::scan s) {
  if (s.size >= 0) return;
  throw value_error("ssm: alg::scan{" + std::to_string(s.size) +
                    "}: wanted a block of at least 1 token, or 0 for the default");
}

// Every feature of x is a scan of its own; Mamba has one.
template <Floating T>
void run_cuda_selective(const cuda::context& ctx, alg::scan algorithm,
                        const selective_mixer<T, cuda>& m, const tensor<T, 4, cuda>& x,
                        const tensor<T, 4, cuda>& y, const carry<T, cuda>& c,
                        const tensor<accum_t<T>, 1, cuda>& d) {
  check_block(algorithm);
  refuse_snapshots(c);
  if (y.size() == 0) return carry_over(c);
  const index_t channels = y.extent(2), features = y.extent(3);
  const cuda_selective<T> call(ctx, m, channels, d);
  for (index_t f = 0; f < features; ++f) {
    const tensor<T, 2, cuda> u = channel_rows(repeat_heads(feature_of(x, f), 2, channels));
    const tensor<T, 3, cuda> plane = feature_of(y, f);
    const bool direct = is_token_major(plane);
    const tensor<T, 3, cuda> out = direct ? plane : tensor<T, 3, cuda>(plane.extents());
    const auto problem = call.with(u, c.initial, f);
    const cuda_workspace workspace(ctx,
                                   kernels::cuda::selective_forward_workspace_bytes<T>(problem));
    kernels::cuda::selective_forward<T>(ctx.stream(), problem,
                                        out.template reshape<2>(merge_batch(out.extents())).view(),
                                        state_feature(c.final, f), nullptr, workspace.data());
    if (!direct) plane.copy_from(out);
  }
}

template <Floating T>
void run_cuda_selective_vjp(const cuda::context& ctx, alg::scan algorithm,
                            const selective_mixer<T, cuda>& m, const tensor<T, 4, cuda>& x,
                            const tensor<T, 4, cuda>& dy, selective_mixer<T, cuda>& dm,
                            const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c,
                            const tensor<accum_t<T>, 1, cuda>& d,
                            const tensor<accum_t<T>, 1, cuda>& dd) {
  using real = accum_t<T>;
  check_block(algorithm);
  const index_t channels = dy.extent(2), features = dy.extent(3);
  const cuda_selective<T> call(ctx, m, channels, d);
  const channel_gradient<T> d_delta(dm.delta, channels);
  const row_gradient<real, 2> d_a(dm.a, channels);
  const row_gradient<real, 1> d_skip(dd, channels);
  const output_tokens<T, 4, cuda> d_c(dm.c), d_b(dm.b);
  for (index_t f = 0; f < features; ++f) {
    const tensor<T, 2, cuda> u = channel_rows(repeat_heads(feature_of(x, f), 2, channels));
    const tensor<T, 2, cuda> d_out = channel_rows(feature_of(dy, f));
    const channel_gradient<T> d_u(feature_of(dx, f), channels);
    kernels::cuda::selective_gradients<T> g;
    g.dt = d_delta.get();
    g.a = d_a.get().view();
    g.c = d_c.get().view();
    g.b = d_b.get().view();
    g.u = d_u.get();
    g.skip = d_skip.get().data();
    g.initial = state_feature(c.d_initial, f);
    g.add = true;
    const auto problem = call.with(u, c.initial, f);
    const cuda_workspace workspace(ctx,
                                   kernels::cuda::selective_backward_workspace_bytes<T>(problem));
    const view<real, 3> d_final = state_feature(c.d_final, f);
    kernels::cuda::selective_backward<T>(ctx.stream(), problem, d_out.const_view(), d_final,
                                         nullptr, g, workspace.data());
    d_u.finish();
  }
  d_delta.finish();
  d_a.finish();
  d_skip.finish();
  d_c.finish();
  d_b.finish();
}

}  // namespace detail

/// The scan. How time is cut is the kernels' choice, whatever size the algorithm asks for.
/// @cost  T D N exponentials a feature of x, twice that where time is cut to fill the card
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::scan algorithm, const selective_mixer<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::run_cuda_selective(ctx, algorithm, m, x, y, c, {});
}
/// @cost  3 T D N exponentials: one of them for the states of the forward pass, which nobody keeps
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::scan algorithm,
                     const selective_mixer<T, cuda>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, selective_mixer<T, cuda>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::run_cuda_selective_vjp(ctx, algorithm, m, x, dy, dm, dx, c, {}, {});
}

/// selective(...) + diagonal(d): the scan adds the skip connection on the way.
template <Floating T>
void apply_mixer_plus_diagonal(const cuda::context& ctx, alg::scan algorithm,
                               const selective_mixer<T, cuda>& m,
                               const tensor<accum_t<T>, 1, cuda>& d, const tensor<T, 4, cuda>& x,
                               const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::run_cuda_selective(ctx, algorithm, m, x, y, c, d);
}
template <Floating T>
void apply_mixer_plus_diagonal_vjp(const cuda::context& ctx, alg::scan algorithm,
                                   const selective_mixer<T, cuda>& m,
                                   const tensor<accum_t<T>, 1, cuda>& d,
                                   const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                                   selective_mixer<T, cuda>& dm,
                                   const tensor<accum_t<T>, 1, cuda>& dd,
                                   const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::run_cuda_selective_vjp(ctx, algorithm, m, x, dy, dm, dx, c, d, dd);
}

}  // namespace ssm
