#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/toeplitz.hpp>

#include <algorithm>

/// @file
/// L o (Q K^T) V with a Toeplitz L through Fourier transforms, channel by channel: key features n
/// and n + 1 are the real and imaginary part, lanes are value features. Memory: O(T) a task.

namespace ssm::kernels {

namespace detail {

/// The channels of one head of one sequence.
template <Real T>
struct gram_channels {
  using P = simd::pack<T>;
  static constexpr index_t lanes = P::width;

  const toeplitz_problem<T>& p;
  index_t begin, length, h;

  [[nodiscard]] static index_t value_blocks(index_t width) { return (width + lanes - 1) / lanes; }
  [[nodiscard]] index_t count(index_t block) const {
    return std::min(lanes, p.width() - block * lanes);
  }
  [[nodiscard]] const T* row(view<const T, 3> t, index_t i) const {
    return token_row(t, begin + i, h, p.heads);
  }
  /// Features n and n + 1 (0 beyond the last) of a row.
  struct two {
    T first, second;
  };
  [[nodiscard]] SSMLIB_ALWAYS_INLINE two pair(const T* features, index_t n) const {
    return {features[n], n + 1 < p.q.extent(2) ? features[n + 1] : T(0)};
  }
  /// (u_n + i u_(n+1)) v for token t: u is k or q, v is x or dy.
  [[nodiscard]] SSMLIB_ALWAYS_INLINE complex_pack<T> load(view<const T, 3> u, view<const T, 3> v,
                                                          index_t t, index_t n,
                                                          index_t block) const {
    if (t >= length) return zero_element<T>();
    const P values = load_up_to(row(v, t) + block * lanes, count(block));
    const two scale = pair(row(u, t), n);
    return {P(scale.first) * values, P(scale.second) * values};
  }
};

/// How the pairs of key features of a head are shared among tasks; a constant of the sizes.
inline index_t pair_groups(index_t pairs) {
  return std::min<index_t>(pairs, 4);
}

}  // namespace detail

/// y = (L o alpha Q K^T) x for every sequence and head; y (tokens, heads, P) is overwritten.
/// @cost O(N P T log T) a head.
template <Real T>
void toeplitz_gram_fft(const cpu::context& ctx, const toeplitz_problem<T>& p, view<T, 3> y) {
  using namespace detail;
  const index_t blocks = gram_channels<T>::value_blocks(p.width());
  for_each_batch(ctx, p, [&](const toeplitz_batch<T>& batch) {
    ctx.parallel_for(batch.count() * p.heads * blocks, [&](index_t task) {
      const index_t block = task % blocks, h = task / blocks % p.heads;
      const gram_channels<T> c{p, batch.begin(task / blocks / p.heads), batch.length(), h};
      const scratch<T> work(batch.plan().size() * element_size<T>);
      for (index_t t = 0; t < c.length; ++t) {
        std::fill_n(token_row(y, c.begin + t, h, p.heads) + block * c.lanes, c.count(block), T(0));
      }
      for (index_t n = 0; n < p.q.extent(2); n += 2) {
        fft_convolve<false>(
            batch.plan(), batch.spectrum(h), work.data(),
            [&](index_t t) SSMLIB_LAMBDA_INLINE { return c.load(p.k, p.x, t, n, block); },
            [&](index_t t, complex_pack<T> u) SSMLIB_LAMBDA_INLINE {
              if (t >= c.length) return;
              const auto q = c.pair(c.row(p.q, t), n);
              const simd::pack<T> a(p.alpha * q.first), b(p.alpha * q.second);
              add_up_to(token_row(y, c.begin + t, h, p.heads) + block * c.lanes, c.count(block),
                        simd::fma(a, u.re, b * u.im));
            });
      }
    });
  });
}

namespace detail {

/// dq, dk and the cross spectrum of the kernel's gradient, for some pairs of key features.
template <Real T>
void gram_key_gradients(const toeplitz_batch<T>& batch, const gram_channels<T>& c,
                        view<const T, 3> dy, const toeplitz_gradients<T>& g, index_t n, T* part) {
  const toeplitz_problem<T>& p = c.p;
  const fft_plan<T>& plan = batch.plan();
  const index_t size = plan.size() * element_size<T>, blocks = c.value_blocks(p.width());
  const bool second = n + 1 < p.q.extent(2);
  const scratch<T> a(size), b(size);
  // Features n and n + 1 of token t get the sums over lanes of u times the row of `with`.
  const auto add_to = [&](view<T, 3> to, view<const T, 3> with, index_t block, index_t t,
                          complex_pack<T> u) SSMLIB_LAMBDA_INLINE {
    if (t >= c.length) return;
    const simd::pack<T> v = load_up_to(c.row(with, t) + block * c.lanes, c.count(block));
    T* target = token_row(to, c.begin + t, c.h, p.heads) + n;
    target[0] += p.alpha * simd::horizontal_sum(u.re * v);
    if (second) target[1] += p.alpha * simd::horizontal_sum(u.im * v);
  };
  for (index_t block = 0; block < blocks; ++block) {
    const auto load_kv = [&](index_t t)
                             SSMLIB_LAMBDA_INLINE { return c.load(p.k, p.x, t, n, block); };
    const auto load_qdy = [&](index_t t)
                              SSMLIB_LAMBDA_INLINE { return c.load(p.q, dy, t, n, block); };
    if (g.q) {
      fft_convolve<false>(plan, batch.spectrum(c.h), a.data(), load_kv,
                          [&](index_t t, complex_pack<T> u) { add_to(g.q, dy, block, t, u); });
    }
    if (g.k) {
      fft_convolve<true>(plan, batch.spectrum(c.h), a.data(), load_qdy,
                         [&](index_t t, complex_pack<T> u) { add_to(g.k, p.x, block, t, u); });
    }
    if (g.kernel) {
      fft_forward(plan, a.data(), load_kv);
      fft_forward(plan, b.data(), [&](index_t t) SSMLIB_LAMBDA_INLINE {
        const complex_pack<T> v = load_qdy(t);
        const simd::pack<T> alpha(p.alpha);
        return complex_pack<T>{alpha * v.re, alpha * v.im};
      });
      add_cross_spectrum(plan.size(), a.data(), b.data(), part);
    }
  }
}

}  // namespace detail

/// Adds the gradients of toeplitz_gram_fft; each head has its own rows of g.x, g.q and g.k.
template <Real T>
void toeplitz_gram_fft_vjp(const cpu::context& ctx, const toeplitz_problem<T>& p,
                           view<const T, 3> dy, const toeplitz_gradients<T>& g) {
  using namespace detail;
  const index_t blocks = gram_channels<T>::value_blocks(p.width());
  const index_t pairs = (p.q.extent(2) + 1) / 2, groups = pair_groups(pairs);
  for_each_batch(ctx, p, [&](const toeplitz_batch<T>& batch) {
    const index_t n = batch.plan().size(), slices = sequence_slices(batch.count());
    const index_t per_head = groups * slices, sums = g.kernel ? 2 * n * p.heads * per_head : 0;
    const scratch<T> parts(sums);
    std::fill_n(parts.data(), sums, T(0));
    if (g.q || g.k || g.kernel) {
      ctx.parallel_for(p.heads * per_head, [&](index_t task) {
        const index_t h = task / per_head, group = task / slices % groups, slice = task % slices;
        for (index_t i = batch.count() * slice / slices; i < batch.count() * (slice + 1) / slices;
             ++i) {
          const gram_channels<T> c{p, batch.begin(i), batch.length(), h};
          for (index_t pair = pairs * group / groups; pair < pairs * (group + 1) / groups; ++pair) {
            gram_key_gradients(batch, c, dy, g, 2 * pair,
                               g.kernel ? parts.data() + 2 * n * task : nullptr);
          }
        }
      });
    }
    if (g.kernel) {
      add_correlations(ctx, batch.plan(), batch.length(), p.heads, per_head, parts.data(),
                       g.kernel);
    }
    if (!g.x) return;
    ctx.parallel_for(batch.count() * p.heads * blocks, [&](index_t task) {
      const index_t block = task % blocks, h = task / blocks % p.heads;
      const gram_channels<T> c{p, batch.begin(task / blocks / p.heads), batch.length(), h};
      const scratch<T> work(n * element_size<T>);
      for (index_t feature = 0; feature < p.q.extent(2); feature += 2) {
        fft_convolve<true>(
            batch.plan(), batch.spectrum(h), work.data(),
            [&](index_t t) SSMLIB_LAMBDA_INLINE { return c.load(p.q, dy, t, feature, block); },
            [&](index_t t, complex_pack<T> u) SSMLIB_LAMBDA_INLINE {
              if (t >= c.length) return;
              const auto k = c.pair(c.row(p.k, t), feature);
              const simd::pack<T> a(p.alpha * k.first), b(p.alpha * k.second);
              add_up_to(token_row(g.x, c.begin + t, h, p.heads) + block * c.lanes, c.count(block),
                        simd::fma(a, u.re, b * u.im));
            });
      }
    });
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(toeplitz, void toeplitz_gram_fft<T>(const cpu::context&,                      \
                                                         const toeplitz_problem<T>&, view<T, 3>)); \
  SSMLIB_INSTANTIATE(                                                                              \
      toeplitz, void toeplitz_gram_fft_vjp<T>(const cpu::context&, const toeplitz_problem<T>&,     \
                                              view<const T, 3>, const toeplitz_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
