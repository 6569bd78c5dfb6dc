#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/rows.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>

namespace ssm::kernels {

/// delta = clamp(softplus(dt + bias), low, high), a row a token; `bias` null: none.
template <Real T>
struct discretize_problem {
  view<const T, 2> dt;  // (tokens, heads), unit inner stride
  const T* a = nullptr;
  const T* bias = nullptr;
  T low, high;
};

/// Gradients, added to; absent ones are not computed.
template <Real T>
struct discretize_gradients {
  view<T, 2> dt;  // (tokens, heads)
  T *a = nullptr, *bias = nullptr;
};

namespace detail {

/// Beyond this softplus is its argument: the threshold of the published models.
inline constexpr double softplus_identity_above = 20.0;

template <Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> step_argument(const discretize_problem<T>& p, index_t t,
                                                 index_t h, index_t n) {
  const simd::pack<T> dt = load_up_to(p.dt.data + t * p.dt.strides[0] + h, n);
  return p.bias == nullptr ? dt : dt + load_up_to(p.bias + h, n);
}
template <Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> step_size(simd::pack<T> r) {
  return simd::select(r > simd::pack<T>(T(softplus_identity_above)), r, simd::softplus(r));
}

}  // namespace detail

/// delta and log_a = a delta, both (tokens, heads) with unit inner strides.
template <Real T>
void discretize(const cpu::context& ctx, const discretize_problem<T>& p, view<T, 2> delta,
                view<T, 2> log_a) {
  using pack = simd::pack<T>;
  const index_t heads = p.dt.extent(1);
  ctx.parallel_ranges(p.dt.extent(0), 16, 64, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      detail::for_packs<T>(heads, [&](index_t h, index_t n) {
        const pack raw = detail::step_size(detail::step_argument(p, t, h, n));
        const pack step = simd::min(simd::max(raw, pack(p.low)), pack(p.high));
        detail::store_up_to(delta.data + t * delta.strides[0] + h, n, step);
        detail::store_up_to(log_a.data + t * log_a.strides[0] + h, n,
                            step * detail::load_up_to(p.a + h, n));
      });
    }
  });
}

/// The gradients from those of delta and log_a. Sums over tokens are taken in pieces that depend
/// on the number of tokens only.
template <Real T>
void discretize_vjp(const cpu::context& ctx, const discretize_problem<T>& p,
                    view<const T, 2> d_delta, view<const T, 2> d_log_a,
                    const discretize_gradients<T>& g) {
  using pack = simd::pack<T>;
  const index_t tokens = p.dt.extent(0), heads = p.dt.extent(1);
  const index_t pieces = std::clamp<index_t>(tokens / 256, 1, 16);
  const index_t width = (heads + pack::width - 1) / pack::width * pack::width;
  const scratch<T> sums(pieces * 2 * width);
  ctx.parallel_for(pieces, [&](index_t piece) {
    T *da = sums.data() + piece * 2 * width, *db = da + width;
    std::fill_n(da, 2 * width, T(0));
    for (index_t t = tokens * piece / pieces; t < tokens * (piece + 1) / pieces; ++t) {
      detail::for_packs<T>(heads, [&](index_t h, index_t n) {
        const pack r = detail::step_argument(p, t, h, n), raw = detail::step_size(r);
        const pack step = simd::min(simd::max(raw, pack(p.low)), pack(p.high));
        const pack dl = detail::load_up_to(d_log_a.data + t * d_log_a.strides[0] + h, n);
        const pack ds = simd::fma(detail::load_up_to(p.a + h, n), dl,
                                  detail::load_up_to(d_delta.data + t * d_delta.strides[0] + h, n));
        const pack slope = simd::select(r > pack(T(detail::softplus_identity_above)), pack(T(1)),
                                        simd::sigmoid(r));
        const auto outside = (raw < pack(p.low)) | (raw > pack(p.high));
        const pack dr = simd::select(outside, pack(T(0)), ds * slope);
        if (g.dt) detail::add_up_to(g.dt.data + t * g.dt.strides[0] + h, n, dr);
        simd::fma(dl, step, pack::load(da + h)).store(da + h);
        (pack::load(db + h) + dr).store(db + h);
      });
    }
  });
  for (index_t piece = 0; piece < pieces; ++piece) {
    const T *da = sums.data() + piece * 2 * width, *db = da + width;
    for (index_t h = 0; h < heads; ++h) {
      if (g.a != nullptr) g.a[h] += da[h];
      if (g.bias != nullptr) g.bias[h] += db[h];
    }
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(layers, void discretize<T>(const cpu::context&, const discretize_problem<T>&, \
                                                view<T, 2>, view<T, 2>));                          \
  SSMLIB_INSTANTIATE(                                                                              \
      layers,                                                                                      \
      void discretize_vjp<T>(const cpu::context&, const discretize_problem<T>&, view<const T, 2>,  \
                             view<const T, 2>, const discretize_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
