#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/pack.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <cmath>
#include <utility>

/// @file
/// Rotary position embedding: pairs of features turned by an angle that grows with the position.

namespace ssm::kernels {

namespace detail {

/// Cosine and sine of position * frequency, from a coarse and a fine part of the position: each
/// pair of parts is computed once, in double, and one product of complex numbers joins them. The
/// bits depend on the position alone.
class turn_table {
 public:
  explicit turn_table(view<const double, 1> frequency)
      : frequency_(frequency),
        pairs_(frequency.extents[0]),
        memory_(2 * (fine_steps + 1) * pairs_) {
    std::fill(known_, known_ + fine_steps, false);
  }
  /// Writes (pairs) cosines and sines.
  template <Real T>
  void write(index_t position, T* cosine, T* sine) {
    const index_t coarse = position / fine_steps, fine = position % fine_steps;
    double* big = row(fine_steps);
    double* small = row(fine);
    if (coarse != coarse_) turn(coarse * fine_steps, big);
    if (!known_[fine]) turn(fine, small);
    coarse_ = coarse;
    known_[fine] = true;
    for (index_t i = 0; i < pairs_; ++i) {
      cosine[i] = static_cast<T>(big[i] * small[i] - big[pairs_ + i] * small[pairs_ + i]);
      sine[i] = static_cast<T>(big[pairs_ + i] * small[i] + big[i] * small[pairs_ + i]);
    }
  }

 private:
  static constexpr index_t fine_steps = 64;

  [[nodiscard]] double* row(index_t i) const { return memory_.data() + 2 * i * pairs_; }
  void turn(index_t position, double* to) const {
    for (index_t i = 0; i < pairs_; ++i) {
      const double angle = static_cast<double>(position) * frequency_(i);
      to[i] = std::cos(angle);
      to[pairs_ + i] = std::sin(angle);
    }
  }

  view<const double, 1> frequency_;
  index_t pairs_;
  scratch<double> memory_;
  index_t coarse_ = -1;
  bool known_[fine_steps];
};

/// Exchanges the lanes 2i and 2i + 1.
template <Real T, int... I>
SSMLIB_ALWAYS_INLINE simd::pack<T> swap_neighbours(simd::pack<T> x,
                                                   std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x.v, x.v, (I ^ 1)...);
}

/// One head of one token: y = x turned, features from 2 * pairs on copied; or y += that.
template <bool Add, Real T>
struct turn_head {
  const T* cosine;
  const T* sine;
  index_t pairs;

  static void put(simd::pack<T> value, T* to, index_t count) {
    using P = simd::pack<T>;
    if (count == P::width) {
      if constexpr (Add) value += P::load(to);
      value.store(to);
    } else {
      if constexpr (Add) value += P::load_part(to, count);
      value.store_part(to, count);
    }
  }
  static simd::pack<T> get(const T* from, index_t count) {
    using P = simd::pack<T>;
    return count == P::width ? P::load(from) : P::load_part(from, count);
  }

  /// Pairs (i, i + pairs).
  void halves(const T* x, T* y) const {
    using P = simd::pack<T>;
    for (index_t i = 0; i < pairs; i += P::width) {
      const index_t n = std::min<index_t>(P::width, pairs - i);
      const P a = get(x + i, n), b = get(x + pairs + i, n);
      const P c = get(cosine + i, n), s = get(sine + i, n);
      put(simd::fma(a, c, -(b * s)), y + i, n);
      put(simd::fma(b, c, a * s), y + pairs + i, n);
    }
  }
  /// Pairs (2i, 2i + 1). The tables hold each cosine twice, each sine as (-s, s).
  void neighbours(const T* x, T* y) const {
    using P = simd::pack<T>;
    for (index_t i = 0; i < 2 * pairs; i += P::width) {
      const index_t n = std::min<index_t>(P::width, 2 * pairs - i);
      const P a = get(x + i, n);
      const P swapped = swap_neighbours<T>(a, std::make_integer_sequence<int, P::width>{});
      put(simd::fma(a, get(cosine + i, n), swapped * get(sine + i, n)), y + i, n);
    }
  }
};

}  // namespace detail

/// Cosines and sines for rope_rotate, (tokens, 2, pairs), for interleaved pairs (tokens, 2, 2
/// pairs).
/// @param frequency  (pairs) radians a token
/// @param position   position(token)
template <Real T, class F>
void rope_table(const cpu::context& ctx, view<const double, 1> frequency, bool interleaved,
                F position, view<T, 3> table) {
  const index_t pairs = frequency.extents[0];
  ctx.parallel_ranges(table.extents[0], 16, 64, [&](index_t begin, index_t end) {
    detail::turn_table turns(frequency);
    const scratch<T> row(2 * pairs);
    for (index_t t = begin; t < end; ++t) {
      T* cosine = &table(t, 0, 0);
      T* sine = &table(t, 1, 0);
      if (!interleaved) {
        turns.write(position(t), cosine, sine);
        continue;
      }
      turns.write(position(t), row.data(), row.data() + pairs);
      for (index_t i = 0; i < pairs; ++i) {
        cosine[2 * i] = cosine[2 * i + 1] = row[i];
        sine[2 * i] = -row[pairs + i];
        sine[2 * i + 1] = row[pairs + i];
      }
    }
  });
}

/// y = every head of x turned by its token's angles (Add: y += that); features beyond the pairs are
/// copied.
///
/// @param x      (tokens, H, D), y too; innermost stride 1
/// @param table  of rope_table; with `backwards` it turns the other way, which is the gradient
template <bool Add, Real T>
void rope_rotate(const cpu::context& ctx, bool interleaved, bool backwards, view<const T, 3> table,
                 view<const T, 3> x, view<T, 3> y) {
  const index_t columns = table.extents[2], pairs = interleaved ? columns / 2 : columns;
  ctx.parallel_ranges(x.extents[0], 64, 16, [&](index_t begin, index_t end) {
    const scratch<T> negated(columns);
    for (index_t t = begin; t < end; ++t) {
      const T* sine = columns > 0 ? &table(t, 1, 0) : nullptr;
      if (backwards) {
        for (index_t i = 0; i < columns; ++i)
          negated[i] = -sine[i];
        sine = negated.data();
      }
      const detail::turn_head<Add, T> turn{columns > 0 ? &table(t, 0, 0) : nullptr, sine, pairs};
      for (index_t h = 0; h < x.extents[1]; ++h) {
        const T* from = x.data + t * x.strides[0] + h * x.strides[1];
        T* to = y.data + t * y.strides[0] + h * y.strides[1];
        if (interleaved) {
          turn.neighbours(from, to);
        } else {
          turn.halves(from, to);
        }
        for (index_t d = 2 * pairs; d < x.extents[2]; ++d)
          to[d] = Add ? to[d] + from[d] : from[d];
      }
    }
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(layers,                                                                       \
                     void rope_rotate<false, T>(const cpu::context&, bool, bool, view<const T, 3>, \
                                                view<const T, 3>, view<T, 3>));                    \
  SSMLIB_INSTANTIATE(layers,                                                                       \
                     void rope_rotate<true, T>(const cpu::context&, bool, bool, view<const T, 3>,  \
                                               view<const T, 3>, view<T, 3>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
