#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/linear_recurrence.hpp>
#include <ssmlib/kernels/cpu/ssd.hpp>
#include <ssmlib/kernels/cpu/ssd_vjp.hpp>
#include <ssmlib/lower/wrappers.hpp>

#include <algorithm>
#include <concepts>
#include <string>
#include <string_view>
#include <utility>

namespace ssm {

/// @file
/// The semiseparable family on the CPU: one pair of kernels for linear attention, retention,
/// Mamba-2 and the masks by themselves.

namespace detail {

/// A mask's operands as the kernels take them, and their gradients. Holds what the views point to.
template <class L>
struct mask_tokens;

template <class T, class B>
struct mask_tokens<causal_mask<T, B>> {
  explicit mask_tokens(const causal_mask<T, B>&) {}
  void set(kernels::ssd_problem<T>&) const {}
};
template <class T, class B>
struct mask_tokens<decay_mask<T, B>> {
  tensor<T, 1> gamma;
  explicit mask_tokens(const decay_mask<T, B>& m) : gamma(m.gamma) {
    for (index_t h = 0; h < gamma.extent(0); ++h) {
      if (!(gamma(h) > T(0))) {
        throw value_error("ssm: decay(gamma): gamma of head " + std::to_string(h) + " is " +
                          std::to_string(gamma(h)) + "; wanted numbers in (0, 1]");
      }
    }
  }
  void set(kernels::ssd_problem<T>& p) const { p.gamma = gamma.const_view(); }
};

template <class T, class B>
struct mask_tokens<semiseparable_mask<T, B>> {
  tensor<T, 2> log_a, weight;
  explicit mask_tokens(const semiseparable_mask<T, B>& m)
      : log_a(input_tokens(m.log_a)), weight(input_tokens(m.weight)) {}
  void set(kernels::ssd_problem<T>& p) const {
    p.log_a = log_a.const_view();
    p.weight = weight.const_view();
  }
};

template <class L>
struct mask_sinks;
template <class T, class B>
struct mask_sinks<causal_mask<T, B>> {
  explicit mask_sinks(const causal_mask<T, B>&) {}
  void set(kernels::ssd_gradients<T>&) const {}
  void finish() const {}
};
template <class T, class B>
struct mask_sinks<decay_mask<T, B>> {
  tensor<T, 1> gamma;
  explicit mask_sinks(const decay_mask<T, B>& m) : gamma(m.gamma) {}
  void set(kernels::ssd_gradients<T>& g) const { g.gamma = gamma.view(); }
  void finish() const {}
};
template <class T, class B>
struct mask_sinks<semiseparable_mask<T, B>> {
  output_tokens<T, 3> log_a, weight;
  explicit mask_sinks(const semiseparable_mask<T, B>& m) : log_a(m.log_a), weight(m.weight) {}
  void set(kernels::ssd_gradients<T>& g) const {
    g.log_a = log_a.get().view();
    g.weight = weight.get().view();
  }
  void finish() const {
    log_a.finish();
    weight.finish();
  }
};

/// phi(t) element by element; t itself for the identity.
template <class Phi, Real T>
[[nodiscard]] tensor<T, 4> mapped(const cpu::context& ctx, const tensor<T, 4>& t) {
  if constexpr (std::same_as<Phi, feature::identity>) {
    return t;
  } else {
    const tensor<T, 4> from = t.contiguous();
    tensor<T, 4> to(t.extents());
    ctx.parallel_ranges(t.size(), 64, 1024, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i)
        to.data()[i] = Phi::value(from.data()[i]);
    });
    return to;
  }
}
/// Where the gradient of phi(t) is added; finish() carries it on to t.
template <class Phi, Real T>
class mapped_sink {
 public:
  explicit mapped_sink(const tensor<T, 4>& gradient)
      : gradient_(gradient), tokens_(target(gradient)) {}
  [[nodiscard]] view<T, 3> get() const { return tokens_.get().view(); }
  void finish(const tensor<T, 4>& t) const {
    tokens_.finish();
    if constexpr (!std::same_as<Phi, feature::identity>) {
      if (!gradient_) return;
      mapped_.zip_with(t, [](T& g, const T& x) { g *= Phi::slope(x); });
      add_to(gradient_, mapped_);
    }
  }

 private:
  const tensor<T, 4>& target(const tensor<T, 4>& gradient) {
    if constexpr (std::same_as<Phi, feature::identity>) {
      return gradient;
    } else {
      if (gradient) mapped_ = tensor<T, 4>::zeros(gradient.extents());
      return mapped_;
    }
  }
  tensor<T, 4> gradient_, mapped_;
  output_tokens<T, 4> tokens_;
};

/// The kernels' problem for mask o (alpha phi(Q) phi(K)^T), or for a bare mask: Q and K of ones.
template <class L>
struct semiseparable_problem {
  using T = typename L::value_type;

  mask_tokens<L> mask;
  tensor<T, 3> q, k, x;
  tensor<T, 1> d;
  sequence_layout layout;
  kernels::ssd_problem<T> p;

  semiseparable_problem(const L& m, sequence_layout sequences, const tensor<T, 4>& x4,
                        index_t heads, const tensor<T, 1>& skip = {})
      : mask(m), x(input_tokens(x4)), d(skip), layout(std::move(sequences)) {
    p.heads = heads;
    mask.set(p);
    p.x = x.const_view();
    p.d = d.const_view();
    p.offsets = layout.offsets();
    p.sequences = layout.sequences();
  }
  void set_gram(const tensor<T, 4>& q4, const tensor<T, 4>& k4, double alpha) {
    q = input_tokens(q4);
    k = input_tokens(k4);
    p.q = q.const_view();
    p.k = k.const_view();
    p.alpha = static_cast<T>(alpha);
  }
  void set_ones() {
    q = tensor<T, 3>::full({1, 1, 1}, T(1));
    p.q = p.k = {q.data(), {x.extent(0), 1, 1}, {0, 0, 1}};
  }
};

/// What the algorithms ask of the chunked kernels.
inline index_t chunk_of(alg::chunked a, const sequence_layout&) {
  if (a.size < 0) {
    throw value_error("ssm: alg::chunked{" + std::to_string(a.size) +
                      "}: wanted a chunk of at least 1 token, or 0 for the default");
  }
  return a.size == 0 ? 64 : a.size;
}
inline index_t chunk_of(alg::recurrent, const sequence_layout&) {
  return 64;
}
inline index_t chunk_of(alg::quadratic, const sequence_layout& layout) {
  return std::max<index_t>(1, layout.max_length());
}

template <class Alg, class L, Real T>
void run_semiseparable(const cpu::context& ctx, Alg algorithm, const semiseparable_problem<L>& s,
                       const tensor<T, 4>& y, const carry<T>& c) {
  const bool direct = is_token_major(y);
  const tensor<T, 4> target = direct ? y : tensor<T, 4>(y.extents());
  const auto out = target.template reshape<3>(merge_batch(target.extents()));
  const kernels::ssd_states<T> states{c.initial.const_view(), c.final.view()};
  if constexpr (std::same_as<Alg, alg::recurrent>) {
    kernels::linear_recurrence<T>(ctx, s.p, out.view(), states,
                                  {c.snapshots.view(), c.slots, c.first_position});
  } else {
    kernels::ssd_forward<T>(ctx, s.p, chunk_of(algorithm, s.layout), out.view(), states);
  }
  if (!direct) y.copy_from(target);
}

template <class Alg, class L, Real T>
void run_semiseparable_vjp(const cpu::context& ctx, Alg algorithm,
                           const semiseparable_problem<L>& s, const tensor<T, 4>& dy,
                           kernels::ssd_gradients<T>& g, const L& d_mask, const tensor<T, 1>& dd,
                           const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  const mask_sinks<L> mask(d_mask);
  const output_tokens<T, 4> x(dx);
  mask.set(g);
  g.x = x.get().view();
  g.d = dd.view();
  const tensor<T, 3> d_out = input_tokens(dy);
  kernels::ssd_vjp<T>(ctx, s.p, chunk_of(algorithm, s.layout), d_out.const_view(), g,
                      {c.initial.const_view(), c.d_final.const_view(), c.d_initial.view()});
  mask.finish();
  x.finish();
}

template <class Alg, class L, Real T, class B, class Phi>
void apply_semiseparable(const cpu::context& ctx, Alg algorithm, const masked_gram<L, T, B, Phi>& m,
                         const tensor<T, 1>& skip, const tensor<T, 4>& x, const tensor<T, 4>& y,
                         const carry<T>& c) {
  semiseparable_problem<L> s(m.mask, layout_of(m), x, y.extent(2), skip);
  s.set_gram(mapped<Phi>(ctx, m.kernel.q), mapped<Phi>(ctx, m.kernel.k), m.kernel.alpha);
  run_semiseparable(ctx, algorithm, s, y, c);
}

template <class Alg, class L, Real T, class B, class Phi>
void apply_semiseparable_vjp(const cpu::context& ctx, Alg algorithm,
                             const masked_gram<L, T, B, Phi>& m, const tensor<T, 1>& skip,
                             const tensor<T, 4>& x, const tensor<T, 4>& dy,
                             const masked_gram<L, T, B, Phi>& dm, const tensor<T, 1>& d_skip,
                             const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  semiseparable_problem<L> s(m.mask, layout_of(m), x, dy.extent(2), skip);
  s.set_gram(mapped<Phi>(ctx, m.kernel.q), mapped<Phi>(ctx, m.kernel.k), m.kernel.alpha);
  const mapped_sink<Phi, T> dq(dm.kernel.q), dk(dm.kernel.k);
  kernels::ssd_gradients<T> g;
  g.q = dq.get();
  g.k = dk.get();
  run_semiseparable_vjp(ctx, algorithm, s, dy, g, dm.mask, d_skip, dx, c);
  dq.finish(m.kernel.q);
  dk.finish(m.kernel.k);
}

template <class Alg>
concept LinearTimeAlgorithm = std::same_as<Alg, alg::chunked> || std::same_as<Alg, alg::recurrent>;

template <class L>
[[nodiscard]] semiseparable_problem<L> bare_mask_problem(const L& m,
                                                         const tensor<typename L::value_type, 4>& x,
                                                         index_t heads) {
  const bool any_length = !m.layout && m.length() == 0;
  semiseparable_problem<L> s(
      m, any_length ? sequence_layout::rectangular(x.extent(0), x.extent(1)) : layout_of(m), x,
      heads);
  s.set_ones();
  return s;
}

template <class Alg, class L>
void apply_bare_mask_vjp(const cpu::context& ctx, Alg algorithm, const L& m,
                         const tensor<typename L::value_type, 4>& x,
                         const tensor<typename L::value_type, 4>& dy, const L& dm,
                         const tensor<typename L::value_type, 4>& dx,
                         const carry_gradient<typename L::value_type>& c) {
  kernels::ssd_gradients<typename L::value_type> g;
  run_semiseparable_vjp(ctx, algorithm, bare_mask_problem(m, x, dy.extent(2)), dy, g, dm, {}, dx,
                        c);
}

}  // namespace detail

// ---- mask o (Q K^T) with a semiseparable mask ---------------------------------------------------

/// @cost O(T): chunked is matrix products, recurrent reads and writes the state once a token.
///       Quadratic is the chunked kernel with one chunk a sequence, O(T^2) time and memory.
///       The gradient of recurrent is that of chunked.
template <detail::LinearTimeAlgorithm Alg, MatrixMixer L, Real T, Backend B, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cpu::context& ctx, Alg algorithm, const masked_gram<L, T, B, Phi>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::apply_semiseparable<Alg>(ctx, algorithm, m, {}, x, y, c);
}
template <MatrixMixer L, Real T, Backend B, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cpu::context& ctx, alg::quadratic algorithm,
                 const masked_gram<L, T, B, Phi>& m, const tensor<T, 4>& x, const tensor<T, 4>& y,
                 const carry<T>& c) {
  detail::apply_semiseparable(ctx, algorithm, m, {}, x, y, c);
}
template <detail::LinearTimeAlgorithm Alg, MatrixMixer L, Real T, Backend B, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cpu::context& ctx, Alg algorithm, const masked_gram<L, T, B, Phi>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, masked_gram<L, T, B, Phi>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::apply_semiseparable_vjp(ctx, algorithm, m, {}, x, dy, dm, {}, dx, c);
}
template <MatrixMixer L, Real T, Backend B, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic algorithm,
                     const masked_gram<L, T, B, Phi>& m, const tensor<T, 4>& x,
                     const tensor<T, 4>& dy, masked_gram<L, T, B, Phi>& dm, const tensor<T, 4>& dx,
                     const carry_gradient<T>& c) {
  detail::apply_semiseparable_vjp(ctx, algorithm, m, {}, x, dy, dm, {}, dx, c);
}

/// The same with D on the diagonal of the chunks, which costs nothing: see lower/wrappers.hpp.
template <class Alg, MatrixMixer L, Real T, Backend B, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_plus_diagonal(const cpu::context& ctx, Alg algorithm,
                               const masked_gram<L, T, B, Phi>& m, const tensor<T, 1>& d,
                               const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::apply_semiseparable(ctx, algorithm, m, d, x, y, c);
}
template <class Alg, MatrixMixer L, Real T, Backend B, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
void apply_mixer_plus_diagonal_vjp(const cpu::context& ctx, Alg algorithm,
                                   const masked_gram<L, T, B, Phi>& m, const tensor<T, 1>& d,
                                   const tensor<T, 4>& x, const tensor<T, 4>& dy,
                                   masked_gram<L, T, B, Phi>& dm, const tensor<T, 1>& dd,
                                   const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::apply_semiseparable_vjp(ctx, algorithm, m, d, x, dy, dm, dd, dx, c);
}

/// Up to 16 tokens a step at a time is faster than a chunk, and has the bits of any split.
template <MatrixMixer L, Real T, FeatureMap Phi>
requires detail::is_semiseparable_mask<L>
[[nodiscard]] std::string_view choose_algorithm(const masked_gram<L, T, cpu, Phi>&, index_t length,
                                                index_t /*width*/) {
  return length <= 16 ? alg::recurrent::name : alg::chunked::name;
}

// ---- the masks by themselves: scans over X ------------------------------------------------------

/// L X as a scan, O(T) a feature. The state is (sequences, heads, 1, features).
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cpu::context& ctx, alg::recurrent algorithm, const L& m,
                 const tensor<typename L::value_type, 4>& x,
                 const tensor<typename L::value_type, 4>& y,
                 const carry<typename L::value_type>& c) {
  detail::run_semiseparable(ctx, algorithm, detail::bare_mask_problem(m, x, y.extent(2)), y, c);
}
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer(const cpu::context& ctx, alg::quadratic algorithm, const L& m,
                 const tensor<typename L::value_type, 4>& x,
                 const tensor<typename L::value_type, 4>& y,
                 const carry<typename L::value_type>& c) {
  detail::run_semiseparable(ctx, algorithm, detail::bare_mask_problem(m, x, y.extent(2)), y, c);
}
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cpu::context& ctx, alg::recurrent algorithm, const L& m,
                     const tensor<typename L::value_type, 4>& x,
                     const tensor<typename L::value_type, 4>& dy, L& dm,
                     const tensor<typename L::value_type, 4>& dx,
                     const carry_gradient<typename L::value_type>& c) {
  detail::apply_bare_mask_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}
template <MatrixMixer L>
requires detail::is_semiseparable_mask<L>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic algorithm, const L& m,
                     const tensor<typename L::value_type, 4>& x,
                     const tensor<typename L::value_type, 4>& dy, L& dm,
                     const tensor<typename L::value_type, 4>& dx,
                     const carry_gradient<typename L::value_type>& c) {
  detail::apply_bare_mask_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}

#define SSMLIB_DETAIL_LIST(T, Mask, Algorithm)                                                  \
  SSMLIB_INSTANTIATE(semiseparable, void detail::apply_semiseparable(                           \
                                        const cpu::context&, alg::Algorithm,                    \
                                        const masked_gram<Mask<T>, T, cpu, feature::identity>&, \
                                        const tensor<T, 1>&, const tensor<T, 4>&,               \
                                        const tensor<T, 4>&, const carry<T>&));                 \
  SSMLIB_INSTANTIATE(semiseparable,                                                             \
                     void detail::apply_semiseparable_vjp(                                      \
                         const cpu::context&, alg::Algorithm,                                   \
                         const masked_gram<Mask<T>, T, cpu, feature::identity>&,                \
                         const tensor<T, 1>&, const tensor<T, 4>&, const tensor<T, 4>&,         \
                         const masked_gram<Mask<T>, T, cpu, feature::identity>&,                \
                         const tensor<T, 1>&, const tensor<T, 4>&, const carry_gradient<T>&))
#define SSMLIB_DETAIL_ALGORITHMS(T, Mask) \
  SSMLIB_DETAIL_LIST(T, Mask, chunked);   \
  SSMLIB_DETAIL_LIST(T, Mask, recurrent); \
  SSMLIB_DETAIL_LIST(T, Mask, quadratic)
SSMLIB_DETAIL_ALGORITHMS(float, causal_mask);
SSMLIB_DETAIL_ALGORITHMS(float, decay_mask);
SSMLIB_DETAIL_ALGORITHMS(float, semiseparable_mask);
SSMLIB_DETAIL_ALGORITHMS(double, causal_mask);
SSMLIB_DETAIL_ALGORITHMS(double, decay_mask);
SSMLIB_DETAIL_ALGORITHMS(double, semiseparable_mask);
#undef SSMLIB_DETAIL_LIST
#undef SSMLIB_DETAIL_ALGORITHMS

}  // namespace ssm
