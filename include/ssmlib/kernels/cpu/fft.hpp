#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/kernels/cpu/pack.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <type_traits>

/// @file
/// Complex Fourier transforms of many columns at once: a lane of a pack is a column, so that every
/// butterfly is plain vector arithmetic. A block is n elements of two packs, real and imaginary.
///
/// The forward transform takes natural order to a permuted one (decimation in frequency), the
/// inverse takes it back (decimation in time), both in place: a convolution multiplies in between
/// and never needs the order. The recursion goes depth first and finishes a part forward, product
/// and inverse while it lies in cache.

namespace ssm::kernels {

/// Radices and twiddle factors for transforms of the smallest size 2^a or 3 * 2^a that is at least
/// what is asked for.
template <Real T>
class fft_plan {
 public:
  struct level {
    int radix;
    index_t size;       ///< of the blocks that this level splits
    const T* twiddles;  ///< w^(q k) as (re, im), for k < size / radix and q = 1 .. radix - 1
  };

  explicit fft_plan(index_t at_least) : size_(good_size(at_least)), twiddles_(3 * size_ + 8) {
    index_t rest = size_;
    while (rest > 1) {
      // The odd radices first: the innermost levels, which run most often, are of radix 4.
      const int radix = rest % 3 == 0 ? 3 : rest % 4 == 0 && is_power_of_four(rest) ? 4 : 2;
      levels_[static_cast<std::size_t>(count_++)] = {radix, rest, nullptr};
      rest /= radix;
    }
    fill_twiddles();
  }

  [[nodiscard]] index_t size() const { return size_; }
  [[nodiscard]] int levels() const { return count_; }
  [[nodiscard]] const level& at(int l) const { return levels_[static_cast<std::size_t>(l)]; }

  [[nodiscard]] static index_t good_size(index_t at_least) {
    index_t n = 1;
    while (n < at_least)
      n *= 2;
    return n >= 4 && n / 4 * 3 >= at_least ? n / 4 * 3 : n;
  }

 private:
  static bool is_power_of_four(index_t n) {
    while (n % 4 == 0)
      n /= 4;
    return n == 1;
  }

  /// e^(-2 pi i j / n) is the product of two entries of short tables, in double.
  void fill_twiddles() {
    using complex = std::array<double, 2>;
    constexpr index_t low = 256;
    const index_t high = size_ / low + 1;
    const scratch<complex> table(low + high);
    const double step = -2 * std::numbers::pi / static_cast<double>(size_);
    const auto root = [step](index_t j) {
      return complex{std::cos(step * static_cast<double>(j)),
                     std::sin(step * static_cast<double>(j))};
    };
    for (index_t j = 0; j < low; ++j)
      table[j] = root(j);
    for (index_t j = 0; j < high; ++j)
      table[low + j] = root(j * low);
    T* to = twiddles_.data();
    for (int l = 0; l < count_; ++l) {
      level& one = levels_[static_cast<std::size_t>(l)];
      one.twiddles = to;
      for (index_t k = 0; k < one.size / one.radix; ++k) {
        for (index_t q = 1; q < one.radix; ++q) {
          const index_t j = q * k * (size_ / one.size) % size_;
          const complex a = table[j % low], b = table[low + j / low];
          *to++ = static_cast<T>(a[0] * b[0] - a[1] * b[1]);
          *to++ = static_cast<T>(a[0] * b[1] + a[1] * b[0]);
        }
      }
    }
  }

  index_t size_;
  int count_ = 0;
  std::array<level, 64> levels_{};
  scratch<T> twiddles_;
};

namespace detail {

template <Real T>
struct complex_pack {
  simd::pack<T> re, im;
};
/// Numbers of T in an element.
template <Real T>
inline constexpr index_t element_size = 2 * simd::pack<T>::width;

template <Real T>
SSMLIB_ALWAYS_INLINE complex_pack<T> load_element(const T* p) {
  return {simd::pack<T>::load(p), simd::pack<T>::load(p + simd::pack<T>::width)};
}
template <Real T>
SSMLIB_ALWAYS_INLINE void store_element(T* p, complex_pack<T> x) {
  x.re.store(p);
  x.im.store(p + simd::pack<T>::width);
}
/// x w, or x times the conjugate of w.
template <bool Conjugate, Real T>
SSMLIB_ALWAYS_INLINE complex_pack<T> times(complex_pack<T> x, const T* w) {
  const simd::pack<T> c(w[0]), s(Conjugate ? -w[1] : w[1]);
  return {simd::fma(x.re, c, -(x.im * s)), simd::fma(x.re, s, x.im * c)};
}
template <Real T>
SSMLIB_ALWAYS_INLINE complex_pack<T> operator+(complex_pack<T> a, complex_pack<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <Real T>
SSMLIB_ALWAYS_INLINE complex_pack<T> operator-(complex_pack<T> a, complex_pack<T> b) {
  return {a.re - b.re, a.im - b.im};
}
/// -i x forward, i x inverse.
template <bool Inverse, Real T>
SSMLIB_ALWAYS_INLINE complex_pack<T> quarter_turn(complex_pack<T> x) {
  if constexpr (Inverse) return {-x.im, x.re};
  return {x.im, -x.re};
}

template <int R, bool Inverse, Real T>
SSMLIB_ALWAYS_INLINE void butterfly(complex_pack<T> (&x)[R]) {
  if constexpr (R == 2) {
    const complex_pack<T> a = x[0];
    x[0] = a + x[1];
    x[1] = a - x[1];
  } else if constexpr (R == 3) {
    const simd::pack<T> half(T(-0.5)), sine(static_cast<T>(0.86602540378443864676));
    const complex_pack<T> sum = x[1] + x[2], turned = quarter_turn<Inverse>(x[1] - x[2]);
    const complex_pack<T> middle{simd::fma(sum.re, half, x[0].re),
                                 simd::fma(sum.im, half, x[0].im)};
    const complex_pack<T> side{turned.re * sine, turned.im * sine};
    x[0] = x[0] + sum;
    x[1] = middle + side;
    x[2] = middle - side;
  } else {
    const complex_pack<T> a = x[0] + x[2], b = x[0] - x[2];
    const complex_pack<T> c = x[1] + x[3], d = quarter_turn<Inverse>(x[1] - x[3]);
    x[0] = a + c;
    x[1] = b + d;
    x[2] = a - c;
    x[3] = b - d;
  }
}

/// One level forward over one block: `load(i)` gives element i, which may come from elsewhere.
template <int R, Real T, class Load>
void forward_step(const typename fft_plan<T>::level& l, T* block, Load load) {
  const index_t part = l.size / R;
  const T* w = l.twiddles;
  for (index_t k = 0; k < part; ++k, w += 2 * (R - 1)) {
    complex_pack<T> x[R];
    simd::unroll<R>([&](auto j) SSMLIB_LAMBDA_INLINE { x[j] = load(k + j * part); });
    butterfly<R, false>(x);
    store_element(block + k * element_size<T>, x[0]);
    simd::unroll<R - 1>([&](auto j) SSMLIB_LAMBDA_INLINE {
      store_element(block + (k + (j + 1) * part) * element_size<T>,
                    times<false>(x[j + 1], w + 2 * j));
    });
  }
}
/// One level inverse: `store(i, x)` takes element i.
template <int R, Real T, class Store>
void inverse_step(const typename fft_plan<T>::level& l, const T* block, Store store) {
  const index_t part = l.size / R;
  const T* w = l.twiddles;
  for (index_t k = 0; k < part; ++k, w += 2 * (R - 1)) {
    complex_pack<T> x[R];
    x[0] = load_element(block + k * element_size<T>);
    simd::unroll<R - 1>([&](auto j) SSMLIB_LAMBDA_INLINE {
      x[j + 1] =
          times<true>(load_element(block + (k + (j + 1) * part) * element_size<T>), w + 2 * j);
    });
    butterfly<R, true>(x);
    simd::unroll<R>([&](auto j) SSMLIB_LAMBDA_INLINE { store(k + j * part, x[j]); });
  }
}
/// f(std::integral_constant<int, R>) for the radix of a level.
template <class F>
SSMLIB_ALWAYS_INLINE void with_radix(int radix, F f) {
  if (radix == 4) return f(std::integral_constant<int, 4>{});
  if (radix == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 3>{});
}

template <Real T>
SSMLIB_ALWAYS_INLINE auto in_block(T* block) {
  return [block](index_t i)
             SSMLIB_LAMBDA_INLINE { return load_element(block + i * element_size<T>); };
}
template <Real T>
SSMLIB_ALWAYS_INLINE auto to_block(T* block) {
  return [block](index_t i, complex_pack<T> x)
             SSMLIB_LAMBDA_INLINE { store_element(block + i * element_size<T>, x); };
}

/// Levels l and below, in place, forward.
template <Real T>
void transform(const fft_plan<T>& plan, int l, T* block) {
  if (l == plan.levels()) return;
  const auto& level = plan.at(l);
  with_radix(level.radix, [&](auto r) { forward_step<r()>(level, block, in_block(block)); });
  const index_t part = level.size / level.radix;
  for (int q = 0; q < level.radix; ++q)
    transform(plan, l + 1, block + q * part * element_size<T>);
}
template <Real T>
void untransform(const fft_plan<T>& plan, int l, T* block) {
  if (l == plan.levels()) return;
  const auto& level = plan.at(l);
  const index_t part = level.size / level.radix;
  for (int q = 0; q < level.radix; ++q) {
    untransform(plan, l + 1, block + q * part * element_size<T>);
  }
  with_radix(level.radix, [&](auto r) { inverse_step<r()>(level, block, to_block(block)); });
}

/// The innermost level has no twiddles: forward, product and inverse in registers.
template <int R, bool Conjugate, Real T>
void convolve_leaf(T* block, const T* spectrum) {
  complex_pack<T> x[R];
  simd::unroll<R>([&](auto j)
                      SSMLIB_LAMBDA_INLINE { x[j] = load_element(block + j * element_size<T>); });
  butterfly<R, false>(x);
  simd::unroll<R>([&](auto j)
                      SSMLIB_LAMBDA_INLINE { x[j] = times<Conjugate>(x[j], spectrum + 2 * j); });
  butterfly<R, true>(x);
  simd::unroll<R>([&](auto j)
                      SSMLIB_LAMBDA_INLINE { store_element(block + j * element_size<T>, x[j]); });
}
template <bool Conjugate, Real T>
void convolve_block(const fft_plan<T>& plan, int l, T* block, const T* spectrum) {
  const auto& level = plan.at(l);
  if (l + 1 == plan.levels()) {
    with_radix(level.radix, [&](auto r) { convolve_leaf<r(), Conjugate>(block, spectrum); });
    return;
  }
  const index_t part = level.size / level.radix;
  with_radix(level.radix, [&](auto r) { forward_step<r()>(level, block, in_block(block)); });
  for (int q = 0; q < level.radix; ++q) {
    convolve_block<Conjugate>(plan, l + 1, block + q * part * element_size<T>,
                              spectrum + 2 * q * part);
  }
  with_radix(level.radix, [&](auto r) { inverse_step<r()>(level, block, to_block(block)); });
}

}  // namespace detail

/// The circular convolution of columns with one spectrum (correlation, with its conjugate), as
/// fft_spectra gives it: element i is `load(i)`, result i goes to `store(i, x)`.
/// @param block  plan.size() elements of working memory
template <bool Conjugate, Real T, class Load, class Store>
void fft_convolve(const fft_plan<T>& plan, const T* spectrum, T* block, Load load, Store store) {
  using namespace detail;
  if (plan.levels() == 0) return store(0, times<Conjugate>(load(0), spectrum));
  const auto& top = plan.at(0);
  const index_t part = top.size / top.radix;
  with_radix(top.radix, [&](auto r) { forward_step<r()>(top, block, load); });
  for (int q = 0; q < top.radix; ++q) {
    T* sub = block + q * part * element_size<T>;
    const T* values = spectrum + 2 * q * part;
    if (plan.levels() == 1) {
      store_element(sub, times<Conjugate>(load_element(sub), values));
    } else {
      convolve_block<Conjugate>(plan, 1, sub, values);
    }
  }
  with_radix(top.radix, [&](auto r) { inverse_step<r()>(top, block, store); });
}

/// The forward transform in permuted order; element i is `load(i)`.
template <Real T, class Load>
void fft_forward(const fft_plan<T>& plan, T* block, Load load) {
  using namespace detail;
  if (plan.levels() == 0) return store_element(block, load(0));
  const auto& top = plan.at(0);
  const index_t part = top.size / top.radix;
  with_radix(top.radix, [&](auto r) { forward_step<r()>(top, block, load); });
  for (int q = 0; q < top.radix; ++q)
    transform(plan, 1, block + q * part * element_size<T>);
}

/// The inverse of fft_forward without the factor 1 / size, in place.
template <Real T>
void fft_inverse(const fft_plan<T>& plan, T* block) {
  detail::untransform(plan, 0, block);
}

/// Spectra of real signals, divided by the size: what fft_convolve multiplies by.
/// @param signals  (count x length), zeros follow
/// @param spectra  count times size complex numbers (re, im), in permuted order
template <Real T>
void fft_spectra(const cpu::context& ctx, const fft_plan<T>& plan, view<const T, 2> signals,
                 T* spectra) {
  using namespace detail;
  constexpr index_t w = simd::pack<T>::width;
  const index_t count = signals.extent(0), length = signals.extent(1), n = plan.size();
  const T scale = T(1) / static_cast<T>(n);
  ctx.parallel_for((count + w - 1) / w, [&](index_t group) {
    const index_t first = group * w, lanes = std::min(w, count - first);
    const scratch<T> block(n * element_size<T>);
    fft_forward(plan, block.data(), [&](index_t i) SSMLIB_LAMBDA_INLINE {
      alignas(simd::native_bytes) T values[w] = {};
      for (index_t lane = 0; i < length && lane < lanes; ++lane) {
        values[lane] = signals(first + lane, i);
      }
      return complex_pack<T>{simd::pack<T>::load(values), simd::pack<T>(T(0))};
    });
    for (index_t i = 0; i < n; ++i) {
      const T* element = block.data() + i * element_size<T>;
      for (index_t lane = 0; lane < lanes; ++lane) {
        spectra[2 * ((first + lane) * n + i)] = scale * element[lane];
        spectra[2 * ((first + lane) * n + i) + 1] = scale * element[w + lane];
      }
    }
  });
}

}  // namespace ssm::kernels
