#pragma once

#include <ssmlib/expr/hadamard.hpp>
#include <ssmlib/kernels/cuda/ssd.hpp>
#include <ssmlib/lower/cuda/chunk.hpp>
#include <ssmlib/lower/cuda/elements.hpp>
#include <ssmlib/lower/cuda/feature_map.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

#include <concepts>
#include <utility>

namespace ssm {

/// @file
/// The semiseparable family on CUDA: one pair of kernels for linear attention, retention, Mamba-2
/// and the masks by themselves, by alg::chunked.
///
/// Numbers on the device are not looked at: a decay(gamma) that is not positive gives what its
/// logarithm gives, where the CPU throws.

namespace detail {

/// A mask's operands as the kernels take them, in the type that decays have, and their gradients.
template <class L>
struct cuda_mask;

template <class V>
struct cuda_mask<causal_mask<V, cuda>> {
  cuda_mask(const cuda::context&, const causal_mask<V, cuda>&) {}
  template <class P>
  void set(P&) const {}
};
template <class V>
struct cuda_mask<decay_mask<V, cuda>> {
  tensor<accum_t<V>, 1, cuda> gamma;
  cuda_mask(const cuda::context& ctx, const decay_mask<V, cuda>& m)
      : gamma(as_type<accum_t<V>>(ctx, m.gamma)) {}
  template <class P>
  void set(P& p) const {
    p.gamma = gamma.const_view();
  }
};
template <class V>
struct cuda_mask<semiseparable_mask<V, cuda>> {
  tensor<accum_t<V>, 2, cuda> log_a, weight;
  cuda_mask(const cuda::context& ctx, const semiseparable_mask<V, cuda>& m)
      : log_a(input_tokens(as_type<accum_t<V>>(ctx, m.log_a))) {
    if (m.weight) weight = input_tokens(as_type<accum_t<V>>(ctx, m.weight));
  }
  template <class P>
  void set(P& p) const {
    p.log_a = log_a.const_view();
    p.weight = weight.const_view();
  }
};

/// A gradient in the type of sums that is added to one in the mask's own type.
template <Floating V, int R>
class mask_gradient {
 public:
  explicit mask_gradient(const tensor<V, R, cuda>& target) : target_(target) {
    if (target) own_ = tensor<accum_t<V>, R, cuda>(target.extents());
  }
  [[nodiscard]] const tensor<accum_t<V>, R, cuda>& get() const { return own_; }
  void finish(const cuda::context& ctx) const {
    if (target_) add_to(target_, as_type<V>(ctx, own_));
  }

 private:
  tensor<V, R, cuda> target_;
  tensor<accum_t<V>, R, cuda> own_;
};
template <Real V, int R>
class mask_gradient<V, R> : public added_gradient<V, R> {
 public:
  using added_gradient<V, R>::added_gradient;
  void finish(const cuda::context&) const { added_gradient<V, R>::finish(); }
};

template <class L>
struct cuda_mask_gradients;
template <class V>
struct cuda_mask_gradients<causal_mask<V, cuda>> {
  explicit cuda_mask_gradients(const causal_mask<V, cuda>&) {}
  template <class G>
  void set(G&) const {}
  void finish(const cuda::context&) const {}
};
template <class V>
struct cuda_mask_gradients<decay_mask<V, cuda>> {
  mask_gradient<V, 1> gamma;
  explicit cuda_mask_gradients(const decay_mask<V, cuda>& m) : gamma(m.gamma) {}
  template <class G>
  void set(G& g) const {
    g.gamma = gamma.get().view();
  }
  void finish(const cuda::context& ctx) const { gamma.finish(ctx); }
};
template <class V>
struct cuda_mask_gradients<semiseparable_mask<V, cuda>> {
  mask_gradient<V, 3> log_a, weight;
  explicit cuda_mask_gradients(const semiseparable_mask<V, cuda>& m)
      : log_a(m.log_a), weight(m.weight) {}
  template <class G>
  void set(G& g) const {
    g.log_a = rows(log_a.get());
    g.weight = rows(weight.get());
  }
  void finish(const cuda::context& ctx) const {
    log_a.finish(ctx);
    weight.finish(ctx);
  }

 private:
  static view<accum_t<V>, 2> rows(const tensor<accum_t<V>, 3, cuda>& t) {
    if (!t) return {};
    return t.template reshape<2>(merge_batch(t.extents())).view();
  }
};

/// The kernels' problem with what its views point to.
template <Floating T, class L>
struct cuda_ssd {
  cuda_ssd(const cuda::context& ctx, const L& m, const sequence_layout& sequences,
           const tensor<T, 4, cuda>& x4, index_t heads, const tensor<accum_t<T>, 1, cuda>& skip)
      : mask(ctx, m), x(input_tokens(x4)), d(skip), layout(ctx, sequences) {
    p.heads = heads;
    mask.set(p);
    p.x = x.const_view();
    p.d = d.const_view();
    p.offsets = layout.offsets;
    p.sequences = layout.sequences;
    p.max_length = layout.max_length;
    p.most = kernels::cuda::rung_of(ctx.arch());
  }
  void set_gram(const tensor<T, 4, cuda>& q4, const tensor<T, 4, cuda>& k4, double alpha) {
    q = input_tokens(q4);
    k = input_tokens(k4);
    p.q = q.const_view();
    p.k = k.const_view();
    p.alpha = static_cast<accum_t<T>>(alpha);
  }
  /// A bare mask: one key feature, of the value 1 for every token.
  void set_ones() {
    q = tensor<T, 3, cuda>::full({1, 1, 1}, T(1.0f));
    p.q = p.k = {q.data(), {x.extent(0), 1, 1}, {0, 0, 1}};
  }

  cuda_mask<L> mask;
  tensor<T, 3, cuda> q, k, x;
  tensor<accum_t<T>, 1, cuda> d;
  device_layout layout;
  kernels::cuda::ssd_problem<T> p;
};

template <Floating T, class L>
void run_cuda_ssd(const cuda::context& ctx, const cuda_ssd<T, L>& s, const tensor<T, 4, cuda>& y,
                  const carry<T, cuda>& c) {
  const result_tokens<T, cuda> out(y);
  const cuda_workspace workspace(ctx, kernels::cuda::ssd_forward_workspace_bytes<T>(s.p));
  kernels::cuda::ssd_forward<T>(ctx.stream(), s.p, out.get().view(),
                                {c.initial.const_view(), c.final.view()}, workspace.data());
  out.finish();
}

template <Floating T, class L>
void run_cuda_ssd_vjp(const cuda::context& ctx, const cuda_ssd<T, L>& s,
                      const tensor<T, 4, cuda>& dy, kernels::cuda::ssd_gradients<T>& g,
                      const L& d_mask, const tensor<accum_t<T>, 1, cuda>& dd,
                      const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  const cuda_mask_gradients<L> mask(d_mask);
  const added_gradient<T, 4> x(dx);
  const added_gradient<accum_t<T>, 1> d(dd);
  const added_gradient<accum_t<T>, 4> d_initial(c.d_initial);
  mask.set(g);
  g.x = x.tokens();
  g.d = d.get().view();
  g.d_final = c.d_final.const_view();
  g.d_initial = d_initial.get().view();
  const tensor<T, 3, cuda> d_out = input_tokens(dy);
  const cuda_workspace workspace(ctx, kernels::cuda::ssd_backward_workspace_bytes<T>(s.p));
  kernels::cuda::ssd_backward<T>(ctx.stream(), s.p, d_out.const_view(),
                                 {c.initial.const_view(), {}}, g, workspace.data());
  mask.finish(ctx);
  x.finish();
  d.finish();
  d_initial.finish();
}

template <class L, Floating T, class Phi>
void apply_cuda_semiseparable(const cuda::context& ctx, alg::chunked algorithm,
                              const masked_gram<L, T, cuda, Phi>& m,
                              const tensor<accum_t<T>, 1, cuda>& skip, const tensor<T, 4, cuda>& x,
                              const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  check_chunk(algorithm);
  refuse_snapshots(c);
  if (y.size() == 0) return carry_over(c);
  cuda_ssd<T, L> s(ctx, m.mask, layout_of(m), x, y.extent(2), skip);
  s.set_gram(mapped<Phi>(ctx, m.kernel.q), mapped<Phi>(ctx, m.kernel.k), m.kernel.alpha);
  run_cuda_ssd(ctx, s, y, c);
}

template <class L, Floating T, class Phi>
void apply_cuda_semiseparable_vjp(const cuda::context& ctx, alg::chunked algorithm,
                                  const masked_gram<L, T, cuda, Phi>& m,
                                  const tensor<accum_t<T>, 1, cuda>& skip,
                                  const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                                  const masked_gram<L, T, cuda, Phi>& dm,
                                  const tensor<accum_t<T>, 1, cuda>& d_skip,
                                  const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  check_chunk(algorithm);
  cuda_ssd<T, L> s(ctx, m.mask, layout_of(m), x, dy.extent(2), skip);
  s.set_gram(mapped<Phi>(ctx, m.kernel.q), mapped<Phi>(ctx, m.kernel.k), m.kernel.alpha);
  const mapped_gradient<Phi, T> dq(dm.kernel.q), dk(dm.kernel.k);
  kernels::cuda::ssd_gradients<T> g;
  g.q = dq.tokens();
  g.k = dk.tokens();
  run_cuda_ssd_vjp(ctx, s, dy, g, dm.mask, d_skip, dx, c);
  dq.finish(ctx, m.kernel.q);
  dk.finish(ctx, m.kernel.k);
}

template <class L, Floating T>
[[nodiscard]] cuda_ssd<T, L> cuda_bare_mask(const cuda::context& ctx, const L& m,
                                            const tensor<T, 4, cuda>& x, index_t heads) {
  const bool any_length = !m.layout && m.length() == 0;
  cuda_ssd<T, L> s(
      ctx, m, any_length ? sequence_layout::rectangular(x.extent(0), x.extent(1)) : layout_of(m), x,
      heads, {});
  s.set_ones();
  return s;
}

}  // namespace detail

// ---- mask o (Q K^T) with a semiseparable mask ---------------------------------------------------

/// @cost O(T): matrix products in chunks of 64 tokens, whatever size the algorithm asks for.
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cuda::context& ctx, alg::chunked algorithm,
                 const masked_gram<L, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                 const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::apply_cuda_semiseparable(ctx, algorithm, m, {}, x, y, c);
}
/// @cost as the forward pass, about 3 times; states and mapped features are computed again, and
///       every gradient is a tensor of its own before it is added.
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cuda::context& ctx, alg::chunked algorithm,
                     const masked_gram<L, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, masked_gram<L, T, cuda, Phi>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::apply_cuda_semiseparable_vjp(ctx, algorithm, m, {}, x, dy, dm, {}, dx, c);
}

/// The same with D x added by the kernels: see lower/wrappers.hpp.
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_plus_diagonal(const cuda::context& ctx, alg::chunked algorithm,
                               const masked_gram<L, T, cuda, Phi>& m,
                               const tensor<accum_t<T>, 1, cuda>& d, const tensor<T, 4, cuda>& x,
                               const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::apply_cuda_semiseparable(ctx, algorithm, m, d, x, y, c);
}
template <MatrixMixer L, Floating T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_plus_diagonal_vjp(const cuda::context& ctx, alg::chunked algorithm,
                                   const masked_gram<L, T, cuda, Phi>& m,
                                   const tensor<accum_t<T>, 1, cuda>& d,
                                   const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                                   masked_gram<L, T, cuda, Phi>& dm,
                                   const tensor<accum_t<T>, 1, cuda>& dd,
                                   const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::apply_cuda_semiseparable_vjp(ctx, algorithm, m, d, x, dy, dm, dd, dx, c);
}

// ---- the masks by themselves --------------------------------------------------------------------

/// L X, O(T) a feature. The state is (sequences, heads, 1, features).
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cuda::context& ctx, alg::chunked algorithm, const L& m,
                 const tensor<typename L::value_type, 4, cuda>& x,
                 const tensor<typename L::value_type, 4, cuda>& y,
                 const carry<typename L::value_type, cuda>& c) {
  detail::check_chunk(algorithm);
  detail::refuse_snapshots(c);
  if (y.size() == 0) return detail::carry_over(c);
  detail::run_cuda_ssd(ctx, detail::cuda_bare_mask(ctx, m, x, y.extent(2)), y, c);
}
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cuda::context& ctx, alg::chunked algorithm, const L& m,
                     const tensor<typename L::value_type, 4, cuda>& x,
                     const tensor<typename L::value_type, 4, cuda>& dy, L& dm,
                     const tensor<typename L::value_type, 4, cuda>& dx,
                     const carry_gradient<typename L::value_type, cuda>& c) {
  detail::check_chunk(algorithm);
  kernels::cuda::ssd_gradients<typename L::value_type> g;
  detail::run_cuda_ssd_vjp(ctx, detail::cuda_bare_mask(ctx, m, x, dy.extent(2)), dy, g, dm, {}, dx,
                           c);
}

}  // namespace ssm
