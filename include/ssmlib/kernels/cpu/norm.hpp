#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/activation.hpp>

#include <algorithm>
#include <cmath>

/// @file
/// Normalisations of token rows. A token's bits depend on its row alone; the statistics are
/// computed again in the backward pass, where the row is in the cache anyway. Sums over tokens
/// (weight gradients) go through a number of parts that the sizes fix.

namespace ssm::kernels {

/// Where silu(gate) enters a gated norm: norm(x) * silu(gate), or norm(x * silu(gate)).
enum class gate_order { none, norm_first, gate_first };

template <Real T>
struct rms_norm_problem {
  view<const T, 2> x;     ///< (tokens, width)
  view<const T, 2> gate;  ///< (tokens, width), or absent
  const T* weight;        ///< (width), or (group) for all groups
  index_t group;          ///< features that are normalised together; divides the width
  index_t weight_step;    ///< group, or 0 where the groups share the weight
  T eps;
};

template <Real T>
struct rms_norm_gradients {
  view<T, 2> x, gate;
  T* weight = nullptr;
  index_t weight_size = 0;
};

namespace detail {

/// The row of an optional operand.
template <class T>
SSMLIB_ALWAYS_INLINE T* row_of(view<T, 2> v, index_t t, index_t offset) {
  return v ? v.data + t * v.stride(0) + offset : nullptr;
}

template <gate_order Order, Real T>
SSMLIB_ALWAYS_INLINE void rms_norm_group(const T* x, const T* z, const T* w, index_t n, T eps,
                                         T* y) {
  using P = simd::pack<T>;
  const T squares = sum_packs<T>(n, [=](index_t i, index_t count, P sum) SSMLIB_LAMBDA_INLINE {
    P v = load_up_to(x + i, count);
    if constexpr (Order == gate_order::gate_first) {
      v *= simd::silu(load_up_to(z + i, count));
      store_up_to(y + i, count, v);
    }
    return simd::fma(v, v, sum);
  });
  const P rstd(T(1) / std::sqrt(squares / static_cast<T>(n) + eps));
  const T* from = Order == gate_order::gate_first ? y : x;
  for_packs<T>(n, [=](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
    P v = load_up_to(from + i, count) * rstd * load_up_to(w + i, count);
    if constexpr (Order == gate_order::norm_first) v *= simd::silu(load_up_to(z + i, count));
    store_up_to(y + i, count, v);
  });
}

/// With n = v rstd, g = dn: dv = rstd (g - n mean(g n)). dx, dz, dw may be null.
template <gate_order Order, Real T>
SSMLIB_ALWAYS_INLINE void rms_norm_group_vjp(const T* x, const T* z, const T* w, index_t n, T eps,
                                             const T* dy, T* dx, T* dz, T* dw) {
  using P = simd::pack<T>;
  P squares(T(0)), products(T(0));
  for_packs<T>(n, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
    P v = load_up_to(x + i, count), g = load_up_to(dy + i, count) * load_up_to(w + i, count);
    if constexpr (Order == gate_order::gate_first) v *= simd::silu(load_up_to(z + i, count));
    if constexpr (Order == gate_order::norm_first) g *= simd::silu(load_up_to(z + i, count));
    squares = simd::fma(v, v, squares);
    products = simd::fma(g, v, products);
  });
  const T mean_square = simd::horizontal_sum(squares) / static_cast<T>(n);
  const T r = T(1) / std::sqrt(mean_square + eps);
  const P rstd(r), mean(simd::horizontal_sum(products) * r / static_cast<T>(n));
  for_packs<T>(n, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
    const P in = load_up_to(x + i, count), weight = load_up_to(w + i, count);
    P v = in, d = load_up_to(dy + i, count);
    value_and_slope<T> s{P(T(1)), P(T(0))};
    if constexpr (Order != gate_order::none) s = silu_and_slope(load_up_to(z + i, count));
    if constexpr (Order == gate_order::gate_first) v *= s.value;
    const P normal = v * rstd;
    if constexpr (Order == gate_order::norm_first) {
      if (dz) add_up_to(dz + i, count, d * normal * weight * s.slope);
      d *= s.value;
    }
    if (dw) add_up_to(dw + i, count, d * normal);
    const P dv = rstd * (d * weight - normal * mean);
    if constexpr (Order == gate_order::gate_first) {
      if (dx) add_up_to(dx + i, count, dv * s.value);
      if (dz) add_up_to(dz + i, count, dv * in * s.slope);
    } else {
      if (dx) add_up_to(dx + i, count, dv);
    }
  });
}

template <gate_order Order, Real T>
void rms_norm(const cpu::context& ctx, const rms_norm_problem<T>& p, view<T, 2> y) {
  const index_t rows = y.extent(0), width = y.extent(1);
  for_each_piece(ctx, rows, row_pieces(rows, width), [&](index_t, index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t c = 0, g = 0; c < width; c += p.group, ++g) {
        rms_norm_group<Order>(row_of(p.x, t, c), row_of(p.gate, t, c), p.weight + g * p.weight_step,
                              p.group, p.eps, row_of(y, t, c));
      }
    }
  });
}

template <gate_order Order, Real T>
void rms_norm_vjp(const cpu::context& ctx, const rms_norm_problem<T>& p, view<const T, 2> dy,
                  const rms_norm_gradients<T>& d) {
  const index_t rows = dy.extent(0), width = dy.extent(1);
  const index_t pieces = row_pieces(rows, 2 * width);
  const scratch<T> parts(d.weight ? pieces * d.weight_size : 0);
  for_each_piece(ctx, rows, pieces, [&](index_t piece, index_t begin, index_t end) {
    T* dw = d.weight ? parts.data() + piece * d.weight_size : nullptr;
    if (dw) std::fill_n(dw, d.weight_size, T(0));
    for (index_t t = begin; t < end; ++t) {
      for (index_t c = 0, g = 0; c < width; c += p.group, ++g) {
        rms_norm_group_vjp<Order>(row_of(p.x, t, c), row_of(p.gate, t, c),
                                  p.weight + g * p.weight_step, p.group, p.eps, row_of(dy, t, c),
                                  row_of(d.x, t, c), row_of(d.gate, t, c),
                                  dw ? dw + g * p.weight_step : nullptr);
      }
    }
  });
  if (d.weight) add_parts(pieces, d.weight_size, parts.data(), d.weight);
}

}  // namespace detail

/// y = x rsqrt(mean(x^2) + eps) weight over groups of features, gated as `order` says.
/// @source Zhang and Sennrich 2019, arXiv:1910.07467; the gate: Dao and Gu 2024, arXiv:2405.21060.
template <Real T>
void rms_norm(const cpu::context& ctx, gate_order order, const rms_norm_problem<T>& p,
              view<T, 2> y) {
  switch (order) {
    case gate_order::none:
      return detail::rms_norm<gate_order::none>(ctx, p, y);
    case gate_order::norm_first:
      return detail::rms_norm<gate_order::norm_first>(ctx, p, y);
    case gate_order::gate_first:
      return detail::rms_norm<gate_order::gate_first>(ctx, p, y);
  }
}

/// Adds to the gradients that are wanted.
template <Real T>
void rms_norm_vjp(const cpu::context& ctx, gate_order order, const rms_norm_problem<T>& p,
                  view<const T, 2> dy, const rms_norm_gradients<T>& d) {
  switch (order) {
    case gate_order::none:
      return detail::rms_norm_vjp<gate_order::none>(ctx, p, dy, d);
    case gate_order::norm_first:
      return detail::rms_norm_vjp<gate_order::norm_first>(ctx, p, dy, d);
    case gate_order::gate_first:
      return detail::rms_norm_vjp<gate_order::gate_first>(ctx, p, dy, d);
  }
}

namespace detail {

template <Real T>
struct row_statistics {
  T mean, rstd;
};

template <Real T>
SSMLIB_ALWAYS_INLINE row_statistics<T> layer_norm_statistics(const T* x, index_t n, T eps) {
  using P = simd::pack<T>;
  const T mean = sum(n, x) / static_cast<T>(n);
  const T squares = sum_packs<T>(n, [=](index_t i, index_t count, P acc) SSMLIB_LAMBDA_INLINE {
    P centered = load_up_to(x + i, count) - P(mean);
    if (count != P::width) centered *= lanes_below<T>(count);
    return simd::fma(centered, centered, acc);
  });
  return {mean, T(1) / std::sqrt(squares / static_cast<T>(n) + eps)};
}

}  // namespace detail

/// y = (x - mean(x)) rsqrt(var(x) + eps) weight + bias; `bias` may be null.
/// @source Ba, Kiros and Hinton 2016, arXiv:1607.06450.
template <Real T>
void layer_norm(const cpu::context& ctx, view<const T, 2> x, const T* weight, const T* bias, T eps,
                view<T, 2> y) {
  using P = simd::pack<T>;
  const index_t rows = y.extent(0), width = y.extent(1);
  for_each_piece(ctx, rows, row_pieces(rows, width), [&](index_t, index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const T* in = detail::row_of(x, t, 0);
      T* out = detail::row_of(y, t, 0);
      const auto s = detail::layer_norm_statistics(in, width, eps);
      detail::for_packs<T>(width, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
        const P n = (detail::load_up_to(in + i, count) - P(s.mean)) * P(s.rstd);
        P v = n * detail::load_up_to(weight + i, count);
        if (bias) v += detail::load_up_to(bias + i, count);
        detail::store_up_to(out + i, count, v);
      });
    }
  });
}

template <Real T>
struct layer_norm_gradients {
  view<T, 2> x;
  T *weight = nullptr, *bias = nullptr;
};

/// Adds to the gradients that are wanted.
template <Real T>
void layer_norm_vjp(const cpu::context& ctx, view<const T, 2> x, const T* weight, T eps,
                    view<const T, 2> dy, const layer_norm_gradients<T>& d) {
  using P = simd::pack<T>;
  const index_t rows = dy.extent(0), width = dy.extent(1), pieces = row_pieces(rows, 2 * width);
  const scratch<T> parts(d.weight ? pieces * width : 0);
  for_each_piece(ctx, rows, pieces, [&](index_t piece, index_t begin, index_t end) {
    T* dw = d.weight ? parts.data() + piece * width : nullptr;
    if (dw) std::fill_n(dw, width, T(0));
    for (index_t t = begin; t < end; ++t) {
      const T *in = detail::row_of(x, t, 0), *cotangent = detail::row_of(dy, t, 0);
      T* dx = detail::row_of(d.x, t, 0);
      const auto s = detail::layer_norm_statistics(in, width, eps);
      P gradients(T(0)), products(T(0));
      detail::for_packs<T>(width, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
        const P g =
            detail::load_up_to(cotangent + i, count) * detail::load_up_to(weight + i, count);
        gradients += g;
        products = simd::fma(g, detail::load_up_to(in + i, count) - P(s.mean), products);
      });
      const P mean_g(simd::horizontal_sum(gradients) / static_cast<T>(width));
      const P mean_gn(simd::horizontal_sum(products) * s.rstd / static_cast<T>(width));
      detail::for_packs<T>(width, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
        const P c = detail::load_up_to(cotangent + i, count);
        const P n = (detail::load_up_to(in + i, count) - P(s.mean)) * P(s.rstd);
        if (dw) detail::add_up_to(dw + i, count, c * n);
        if (dx) {
          const P g = c * detail::load_up_to(weight + i, count);
          detail::add_up_to(dx + i, count, P(s.rstd) * (g - mean_g - n * mean_gn));
        }
      });
    }
  });
  if (d.weight) add_parts(pieces, width, parts.data(), d.weight);
  if (d.bias) add_column_sums(ctx, dy, d.bias);
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(layers, void rms_norm<T>(const cpu::context&, gate_order,                   \
                                              const rms_norm_problem<T>&, view<T, 2>));          \
  SSMLIB_INSTANTIATE(                                                                            \
      layers, void rms_norm_vjp<T>(const cpu::context&, gate_order, const rms_norm_problem<T>&,  \
                                   view<const T, 2>, const rms_norm_gradients<T>&));             \
  SSMLIB_INSTANTIATE(layers, void layer_norm<T>(const cpu::context&, view<const T, 2>, const T*, \
                                                const T*, T, view<T, 2>));                       \
  SSMLIB_INSTANTIATE(layers,                                                                     \
                     void layer_norm_vjp<T>(const cpu::context&, view<const T, 2>, const T*, T,  \
                                            view<const T, 2>, const layer_norm_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
