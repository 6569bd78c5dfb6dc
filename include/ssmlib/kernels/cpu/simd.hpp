#pragma once

#include <ssmlib/kernels/cpu/pack.hpp>

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

/// @file
/// Elementary functions of packs. "ulp" is the spacing of T at the exact result; the bounds hold
/// over all arguments, for float and double, and tests/kernels/simd_test.cpp asserts them.
/// Infinities, zeros and NaN behave as in <cmath>; the sign of a zero result is not kept. The
/// polynomials were fitted at Chebyshev nodes for float and are truncated series for double, which
/// serves tests and references.

namespace ssm::simd {

namespace detail {

/// c[0] + c[1] x + ... by Horner's rule.
template <Real T, std::size_t N>
SSMLIB_ALWAYS_INLINE pack<T> polynomial(pack<T> x, const T (&c)[N]) {
  pack<T> y(c[N - 1]);
  for (std::size_t i = N - 1; i-- > 0;)
    y = simd::fma(y, x, pack<T>(c[i]));
  return y;
}

template <class T>
struct exp_constants;
template <>
struct exp_constants<float> {
  static constexpr float round = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float zero_below = -110.0f, infinite_above = 89.0f;
  static constexpr float minus_one_below = -20.0f;
  // (e^r - 1 - r) / r^2, relative error of e^r 8e-9
  static constexpr float tail[] = {5.0000000000e-01f, 1.6666576990e-01f, 4.1666554617e-02f,
                                   8.3631790527e-03f, 1.3926183588e-03f};
};
template <>
struct exp_constants<double> {
  static constexpr double round = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double zero_below = -760.0, infinite_above = 710.0;
  static constexpr double minus_one_below = -45.0;
  static constexpr double tail[] = {1.0 / 2,        1.0 / 6,           1.0 / 24,
                                    1.0 / 120,      1.0 / 720,         1.0 / 5040,
                                    1.0 / 40320,    1.0 / 362880,      1.0 / 3628800,
                                    1.0 / 39916800, 1.0 / 479001600.0, 1.0 / 6227020800.0};
};

/// 2^k, k within the normal exponents.
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> power_of_two(typename pack<T>::ivec k) {
  using traits = native<T>;
  using uvec = typename pack<T>::uvec;
  constexpr typename traits::bits bias = traits::exponent_bias;
  return (typename pack<T>::vec)(((uvec)k + bias) << traits::mantissa_bits);
}

/// x + low = k ln 2 + r with |r| <= ln 2 / 2: gives k and e^r - 1.
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> reduced_expm1(pack<T> x, pack<T> low, typename pack<T>::ivec& k) {
  using c = exp_constants<T>;
  using P = pack<T>;
  using traits = native<T>;
  constexpr T log2_e = static_cast<T>(1.44269504088896340736);
  const P shifted = simd::fma(x + low, P(log2_e), P(c::round));
  const P n = shifted - P(c::round);
  using uvec = typename P::uvec;
  k = (typename P::ivec)((uvec)shifted.v - std::bit_cast<typename traits::bits>(c::round));
  const P r = simd::fma(n, P(-c::ln2_low), simd::fma(n, P(-c::ln2_high), x)) + low;
  return simd::fma(r * r, polynomial(r, c::tail), r);
}

/// e^(x + low); `low` is a correction smaller than 1.
template <Real T>
SSMLIB_ALWAYS_INLINE pack<T> exp_of_sum(pack<T> x, pack<T> low) {
  using c = exp_constants<T>;
  using P = pack<T>;
  typename P::ivec k;
  const P y = reduced_expm1(min(max(x, P(c::zero_below)), P(c::infinite_above)), low, k) + P(T(1));
  // In two steps, so that results below the smallest normal number are rounded once, by the last.
  const typename P::ivec half = k >> 1;
  return y * power_of_two<T>(half) * power_of_two<T>(k - half);
}

}  // namespace detail

/// e^x within 1.1 ulp, subnormal results included.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> exp(pack<T> x) {
  return detail::exp_of_sum(x, pack<T>(T(0)));
}

/// e^x - 1 within 2 ulp.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> expm1(pack<T> x) {
  using c = detail::exp_constants<T>;
  using P = pack<T>;
  typename P::ivec k;
  const P m =
      detail::reduced_expm1(min(max(x, P(c::minus_one_below)), P(c::infinite_above)), P(T(0)), k);
  // 2^k (m + 1) - 1, halved: 2^k itself overflows before the result does.
  const P scale = detail::power_of_two<T>(k - 1);
  const P y = simd::fma(scale, m, scale - P(T(0.5)));
  return y + y;
}

/// log x within 1 ulp, subnormal arguments included.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> log(pack<T> x) {
  using P = pack<T>;
  using traits = detail::native<T>;
  using vec = typename P::vec;
  using ivec = typename P::ivec;
  using uvec = typename P::uvec;
  using limits = std::numeric_limits<T>;
  using bits = typename traits::bits;
  constexpr T upscale = static_cast<T>(bits{1} << (traits::mantissa_bits + 2));
  const ivec tiny = x < P(limits::min());
  const P scaled = select(tiny, x * P(upscale), x);
  // scaled = 2^e m with m in [sqrt(1/2), sqrt(2))
  constexpr bits root_half = std::bit_cast<bits>(static_cast<T>(0.70710678118654752440));
  const uvec shifted = (uvec)scaled.v - root_half;
  const ivec exponent = ((ivec)shifted >> traits::mantissa_bits) -
                        (tiny & static_cast<typename traits::integer>(traits::mantissa_bits + 2));
  const uvec mantissa = (shifted & ((bits{1} << traits::mantissa_bits) - 1)) + root_half;
  const P e(__builtin_convertvector(exponent, vec));
  const P f = P((vec)mantissa) - P(T(1));
  // With s = f / (2 + f): log(1 + f) = 2 atanh(s) = 2s + s^3 R(s^2), and 2s = f - s f.
  const P s = f / (f + P(T(2)));
  const P z = s * s;
  P r;
  if constexpr (std::is_same_v<T, float>) {
    static constexpr float c[] = {6.6666666554e-01f, 4.0000121914e-01f, 2.8550812381e-01f,
                                  2.3330696711e-01f};
    r = detail::polynomial(z, c);
  } else {
    static constexpr double c[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11,
                                   2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
    r = detail::polynomial(z, c);
  }
  using k = detail::exp_constants<T>;
  const P small = s * (f - z * r) - e * P(k::ln2_low);
  P y = simd::fma(e, P(k::ln2_high), f - small);
  y = select(x == P(limits::infinity()), x, y);
  y = select(x == P(T(0)), P(-limits::infinity()), y);
  return select(x >= P(T(0)), y, P(limits::quiet_NaN()));
}

/// log(1 + x) within 2 ulp.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> log1p(pack<T> x) {
  using P = pack<T>;
  const P u = x + P(T(1));
  // What the sum lost, divided by u: the first-order correction of log(u).
  const typename P::ivec regular = (x > P(T(-1))) & (x < P(T(1e16)));
  const P lost = select(regular, (x - (u - P(T(1)))) / u, P(T(0)));
  return log(u) + lost;
}

/// tanh x within 3 ulp.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> tanh(pack<T> x) {
  using P = pack<T>;
  const P a = min(abs(x), P(T(22)));
  const P e = expm1(a + a);
  return copysign(e / (e + P(T(2))), x);
}

/// 1 / (1 + e^-x) within 3 ulp, subnormal results included.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> sigmoid(pack<T> x) {
  using P = pack<T>;
  const P e = exp(-abs(x));
  return select(x < P(T(0)), e, P(T(1))) / (e + P(T(1)));
}

/// x sigmoid(x) within 3 ulp, or 750 subnormal spacings where e^x is subnormal.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> silu(pack<T> x) {
  // Below the bound sigmoid is 0; the clamp keeps -inf * 0 away.
  return max(x, pack<T>(T(-800))) * sigmoid(x);
}

/// log(1 + e^x) within 3 ulp.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> softplus(pack<T> x) {
  return max(x, pack<T>(T(0))) + log1p(exp(-abs(x)));
}

namespace detail {

/// f in every lane, one after the other.
template <Real T, class F>
SSMLIB_ALWAYS_INLINE pack<T> by_lane(pack<T> x, F f) {
  T lanes[pack<T>::width];
  x.store(lanes);
  for (T& lane : lanes)
    lane = f(lane);
  return pack<T>::load(lanes);
}

/// The upper bits of x, whose square is exact.
SSMLIB_ALWAYS_INLINE pack<float> upper_half(pack<float> x) {
  return (pack<float>::vec)((pack<float>::uvec)x.v & 0xfffff000u);
}

/// e^(z^2) erfc(z) for 0 <= z <= 10.6; relative error 3e-8.
/// The form (1 + 2 z) e^(z^2) erfc(z) as a polynomial of (z - 2) / (z + 2) is that of
/// Shepherd and Laframboise 1981, Math. Comp. 36; the coefficients are our own fit.
SSMLIB_ALWAYS_INLINE pack<float> scaled_erfc(pack<float> z) {
  using P = pack<float>;
  static constexpr float c[] = {1.2769783915e+00f,  -9.2763915697e-02f, -1.6603132431e-01f,
                                1.6405359361e-01f,  -5.4205416112e-02f, -8.0473734807e-03f,
                                8.6385070897e-03f,  1.2801680595e-03f,  -1.2509537117e-03f,
                                -3.7028098098e-04f, 2.2995684544e-05f};
  return polynomial((z - P(2.0f)) / (z + P(2.0f)), c) / simd::fma(z, P(2.0f), P(1.0f));
}

}  // namespace detail

/// The error function within 3 ulp; for double that of std::erf, lane by lane.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> erf(pack<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return detail::by_lane(x, [](double t) { return std::erf(t); });
  } else {
    using P = pack<float>;
    static constexpr float c[] = {1.1283791658e+00f,  -3.7612626667e-01f, 1.1283594715e-01f,
                                  -2.6854212011e-02f, 5.1890874234e-03f,  -8.0168642872e-04f,
                                  7.8758750627e-05f};
    const P z = min(abs(x), P(10.2f));
    const P outer = P(1.0f) - detail::scaled_erfc(z) * exp(-(z * z));
    return select(z < P(1.0f), x * detail::polynomial(x * x, c), copysign(outer, x));
  }
}

/// x Phi(x) with the normal distribution's Phi: GELU with erf. Float: within 4 ulp, or 1e-42;
/// double: through std::erfc, lane by lane.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> gelu(pack<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return detail::by_lane(x, [](double t) {
      return t < -40 ? 0.0 : 0.5 * t * std::erfc(t * -0.70710678118654752440);
    });
  } else {
    using P = pack<float>;
    const P a = min(abs(x), P(14.9f));
    // e^(-a^2 / 2) with a^2 in two parts: its rounding error would be multiplied by a^2.
    const P high = detail::upper_half(a), low = (a - high) * (a + high);
    const P e = detail::exp_of_sum(P(-0.5f) * high * high, P(-0.5f) * low);
    const P upper = P(0.5f) * detail::scaled_erfc(a * P(0.70710678f)) * e;  // Phi(-|x|)
    return max(x, P(-14.9f)) * select(x < P(0.0f), upper, P(1.0f) - upper);
  }
}

/// GELU by tanh: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), computed as x sigmoid(2 u).
/// Within 4 ulp, or an absolute error of 2^-23 (float) or 2^-52: far in the negative tail the
/// rounding of 2 u is a larger part of a vanishing result.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> gelu_tanh(pack<T> x) {
  using P = pack<T>;
  constexpr T twice = static_cast<T>(1.59576912160573071176);  // 2 sqrt(2 / pi)
  const P a = max(x, P(T(-30)));  // there the result is 0, and -inf * 0 is kept away
  const P u = P(twice) * a * simd::fma(a * a, P(T(0.044715)), P(T(1)));
  return a * sigmoid(u);
}

}  // namespace ssm::simd
