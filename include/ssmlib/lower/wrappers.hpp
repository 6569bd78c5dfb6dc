#pragma once

#include <ssmlib/expr/hadamard.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/tokens.hpp>

#include <concepts>
#include <numeric>
#include <string_view>

namespace ssm {

/// @file
/// row_normalized and with_diagonal over any mixer: each algorithm of the inner mixer, with its
/// gradient and its state, gives that of the whole. A mixer whose kernels add the diagonal on the
/// way overloads, in its own namespace,
///
///   apply_mixer_plus_diagonal(ctx, algorithm, mixer, d, x, y, carry)
///   apply_mixer_plus_diagonal_vjp(ctx, algorithm, mixer, d, x, dy, d_mixer, dd, dx, carry)

namespace detail {

template <MatrixMixer W>
[[nodiscard]] auto inner_of(const W& m) {
  auto inner = m.inner;
  if (m.layout) inner.layout = m.layout;
  return inner;
}

/// y[., h] += d_h x[., head of x].
template <Real T>
void add_skip(const cpu::context& ctx, const tensor<T, 1>& d, const tensor<T, 4>& x,
              const tensor<T, 4>& y) {
  const index_t heads = y.extent(2), length = y.extent(1), features = y.extent(3);
  ctx.parallel_ranges(y.extent(0) * length, 64, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < heads; ++h) {
        const T scale = d(group_of(h, heads, d.extent(0)));
        const T* from = &x(t / length, t % length, group_of(h, heads, x.extent(2)), 0);
        T* to = &y(t / length, t % length, h, 0);
        for (index_t p = 0; p < features; ++p) {
          to[p * y.strides()[3]] += scale * from[p * x.strides()[3]];
        }
      }
    }
  });
}

/// The gradients of add_skip: dx and dd, either may be absent. The tasks are heads of the operand
/// with the fewest, so that every sum has one owner and one order.
template <Real T>
void add_skip_vjp(const cpu::context& ctx, const tensor<T, 1>& d, const tensor<T, 4>& x,
                  const tensor<T, 4>& dy, const tensor<T, 1>& dd, const tensor<T, 4>& dx) {
  const index_t heads = dy.extent(2), features = dy.extent(3);
  const index_t tasks = std::gcd(std::gcd(heads, d.extent(0)), x.extent(2));
  ctx.parallel_for(tasks, [&](index_t task) {
    for (index_t h = heads * task / tasks; h < heads * (task + 1) / tasks; ++h) {
      const index_t hd = group_of(h, heads, d.extent(0)), hx = group_of(h, heads, x.extent(2));
      double sum = 0.0;
      for (index_t b = 0; b < dy.extent(0); ++b) {
        for (index_t t = 0; t < dy.extent(1); ++t) {
          for (index_t p = 0; p < features; ++p) {
            const T g = dy(b, t, h, p);
            sum += static_cast<double>(g) * static_cast<double>(x(b, t, hx, p));
            if (dx) dx(b, t, hx, p) += d(hd) * g;
          }
        }
      }
      if (dd) dd(hd) += static_cast<T>(sum);
    }
  });
}

template <class Alg, MatrixMixer M>
void apply_with_diagonal(const cpu::context& ctx, Alg algorithm, const with_diagonal<M>& m,
                         const tensor<typename M::value_type, 4>& x,
                         const tensor<typename M::value_type, 4>& y,
                         const carry<typename M::value_type>& c) {
  if constexpr (requires {
                  apply_mixer_plus_diagonal(ctx, algorithm, inner_of(m), m.d, x, y, c);
                }) {
    apply_mixer_plus_diagonal(ctx, algorithm, inner_of(m), m.d, x, y, c);
  } else {
    apply_mixer(ctx, algorithm, inner_of(m), x, y, c);
    add_skip(ctx, m.d, x, y);
  }
}
template <class Alg, MatrixMixer M>
void apply_with_diagonal_vjp(const cpu::context& ctx, Alg algorithm, const with_diagonal<M>& m,
                             const tensor<typename M::value_type, 4>& x,
                             const tensor<typename M::value_type, 4>& dy, with_diagonal<M>& dm,
                             const tensor<typename M::value_type, 4>& dx,
                             const carry_gradient<typename M::value_type>& c) {
  if constexpr (requires {
                  apply_mixer_plus_diagonal_vjp(ctx, algorithm, inner_of(m), m.d, x, dy, dm.inner,
                                                dm.d, dx, c);
                }) {
    apply_mixer_plus_diagonal_vjp(ctx, algorithm, inner_of(m), m.d, x, dy, dm.inner, dm.d, dx, c);
  } else {
    apply_mixer_vjp(ctx, algorithm, inner_of(m), x, dy, dm.inner, dx, c);
    if (dx || dm.d) add_skip_vjp(ctx, m.d, x, dy, dm.d, dx);
  }
}

/// X with one more feature, of the value 1, whose product is the row sum.
template <Real T>
[[nodiscard]] tensor<T, 4> with_ones(const cpu::context& ctx, const tensor<T, 4>& x) {
  const index_t p = x.extent(3), length = x.extent(1);
  tensor<T, 4> wide(x.extent(0), length, x.extent(2), p + 1);
  ctx.parallel_ranges(x.extent(0) * length, 64, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < x.extent(2); ++h) {
        T* to = &wide(t / length, t % length, h, 0);
        for (index_t i = 0; i < p; ++i)
          to[i] = x(t / length, t % length, h, i);
        to[p] = T(1);
      }
    }
  });
  return wide;
}

template <class Alg, MatrixMixer M>
void apply_row_normalized(const cpu::context& ctx, Alg algorithm, const row_normalized<M>& m,
                          const tensor<typename M::value_type, 4>& x,
                          const tensor<typename M::value_type, 4>& y,
                          const carry<typename M::value_type>& c) {
  using T = typename M::value_type;
  const index_t p = y.extent(3), length = y.extent(1);
  const tensor<T, 4> wide(y.extent(0), length, y.extent(2), p + 1);
  apply_mixer(ctx, algorithm, inner_of(m), with_ones(ctx, x), wide, c);
  ctx.parallel_ranges(y.extent(0) * length, 64, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < y.extent(2); ++h) {
        const T* row = &wide(t / length, t % length, h, 0);
        for (index_t i = 0; i < p; ++i)
          y(t / length, t % length, h, i) = row[i] / row[p];
      }
    }
  });
}

// y_i = n_i / z: dn = dy / z and dz = -(dy . y) / z. The quotients are computed again.
template <class Alg, MatrixMixer M>
void apply_row_normalized_vjp(const cpu::context& ctx, Alg algorithm, const row_normalized<M>& m,
                              const tensor<typename M::value_type, 4>& x,
                              const tensor<typename M::value_type, 4>& dy, row_normalized<M>& dm,
                              const tensor<typename M::value_type, 4>& dx,
                              const carry_gradient<typename M::value_type>& c) {
  using T = typename M::value_type;
  const index_t p = dy.extent(3), length = dy.extent(1);
  const tensor<T, 4> wide_x = with_ones(ctx, x);
  const tensor<T, 4> wide(dy.extent(0), length, dy.extent(2), p + 1);
  const auto inner = inner_of(m);
  carry<T> forward;
  forward.initial = c.initial;
  apply_mixer(ctx, algorithm, inner, wide_x, wide, forward);
  ctx.parallel_ranges(dy.extent(0) * length, 64, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < dy.extent(2); ++h) {
        T* row = &wide(t / length, t % length, h, 0);
        const T scale = T(1) / row[p];
        T sum = T(0);
        for (index_t i = 0; i < p; ++i) {
          const T g = dy(t / length, t % length, h, i) * scale;
          sum += g * (row[i] * scale);
          row[i] = g;
        }
        row[p] = -sum;
      }
    }
  });
  tensor<T, 4> wide_dx;
  if (dx) wide_dx = tensor<T, 4>::zeros(wide_x.extents());
  apply_mixer_vjp(ctx, algorithm, inner, wide_x, wide, dm.inner, wide_dx, c);
  if (dx) add_to(dx, wide_dx.slice(3, 0, p));
}

}  // namespace detail

template <MatrixMixer M>
[[nodiscard]] std::string_view choose_algorithm(const with_diagonal<M>& m, index_t length,
                                                index_t width) {
  return choose_algorithm(m.inner, length, width);
}
template <MatrixMixer M>
[[nodiscard]] std::string_view choose_algorithm(const row_normalized<M>& m, index_t length,
                                                index_t width) {
  return choose_algorithm(m.inner, length, width + 1);
}

/// M X + d x, from any algorithm of M.
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer(
    const cpu::context& ctx, Alg algorithm, const with_diagonal<M>& m,
    const tensor<typename M::value_type, 4>& x, const tensor<typename M::value_type, 4>& y,
    const carry<typename M::value_type>& c) {
  detail::apply_with_diagonal(ctx, algorithm, m, x, y, c);
}
template <MatrixMixer M>
void apply_mixer(const cpu::context& ctx, alg::quadratic algorithm, const with_diagonal<M>& m,
                 const tensor<typename M::value_type, 4>& x,
                 const tensor<typename M::value_type, 4>& y,
                 const carry<typename M::value_type>& c) {
  detail::apply_with_diagonal(ctx, algorithm, m, x, y, c);
}
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer_vjp(
    const cpu::context& ctx, Alg algorithm, const with_diagonal<M>& m,
    const tensor<typename M::value_type, 4>& x, const tensor<typename M::value_type, 4>& dy,
    with_diagonal<M>& dm, const tensor<typename M::value_type, 4>& dx,
    const carry_gradient<typename M::value_type>& c) {
  detail::apply_with_diagonal_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}
template <MatrixMixer M>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic algorithm, const with_diagonal<M>& m,
                     const tensor<typename M::value_type, 4>& x,
                     const tensor<typename M::value_type, 4>& dy, with_diagonal<M>& dm,
                     const tensor<typename M::value_type, 4>& dx,
                     const carry_gradient<typename M::value_type>& c) {
  detail::apply_with_diagonal_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}

/// M X divided by the row sums of M, from any algorithm of M.
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer(
    const cpu::context& ctx, Alg algorithm, const row_normalized<M>& m,
    const tensor<typename M::value_type, 4>& x, const tensor<typename M::value_type, 4>& y,
    const carry<typename M::value_type>& c) {
  detail::apply_row_normalized(ctx, algorithm, m, x, y, c);
}
template <MatrixMixer M>
void apply_mixer(const cpu::context& ctx, alg::quadratic algorithm, const row_normalized<M>& m,
                 const tensor<typename M::value_type, 4>& x,
                 const tensor<typename M::value_type, 4>& y,
                 const carry<typename M::value_type>& c) {
  detail::apply_row_normalized(ctx, algorithm, m, x, y, c);
}
template <class Alg, MatrixMixer M>
requires(!std::same_as<Alg, alg::quadratic>) void apply_mixer_vjp(
    const cpu::context& ctx, Alg algorithm, const row_normalized<M>& m,
    const tensor<typename M::value_type, 4>& x, const tensor<typename M::value_type, 4>& dy,
    row_normalized<M>& dm, const tensor<typename M::value_type, 4>& dx,
    const carry_gradient<typename M::value_type>& c) {
  detail::apply_row_normalized_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}
template <MatrixMixer M>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic algorithm, const row_normalized<M>& m,
                     const tensor<typename M::value_type, 4>& x,
                     const tensor<typename M::value_type, 4>& dy, row_normalized<M>& dm,
                     const tensor<typename M::value_type, 4>& dx,
                     const carry_gradient<typename M::value_type>& c) {
  detail::apply_row_normalized_vjp(ctx, algorithm, m, x, dy, dm, dx, c);
}

}  // namespace ssm
