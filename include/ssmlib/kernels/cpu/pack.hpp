#pragma once

#include <ssmlib/base/config.hpp>
#include <ssmlib/base/types.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

/// @file
/// `pack<T>`: one native vector register. Written with the vector extensions of g++ and clang, so
/// the same source serves every instruction set. The few instructions that these do not reach are
/// named one by one: <immintrin.h> would be a tenth of what including the library costs.

/// For lambdas inside kernels: `[&](auto i) SSMLIB_LAMBDA_INLINE { ... }`.
#define SSMLIB_LAMBDA_INLINE __attribute__((always_inline))

namespace ssm::simd {

/// Bytes of the widest vector that the compiler flags offer.
#if defined(__AVX512F__)
inline constexpr int native_bytes = 64;
#elif defined(__AVX__)
inline constexpr int native_bytes = 32;
#else
inline constexpr int native_bytes = 16;
#endif

namespace detail {
template <class T>
struct native;
template <>
struct native<float> {
  typedef float vec __attribute__((vector_size(native_bytes)));
  typedef std::int32_t ivec __attribute__((vector_size(native_bytes)));
  typedef std::uint32_t uvec __attribute__((vector_size(native_bytes)));
  using integer = std::int32_t;
  using bits = std::uint32_t;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
};
template <>
struct native<double> {
  typedef double vec __attribute__((vector_size(native_bytes)));
  typedef std::int64_t ivec __attribute__((vector_size(native_bytes)));
  typedef std::uint64_t uvec __attribute__((vector_size(native_bytes)));
  using integer = std::int64_t;
  using bits = std::uint64_t;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
};

/// f(0), f(1), ... f(N-1) with compile-time indices: arrays indexed by them stay in registers.
template <int... I, class F>
SSMLIB_ALWAYS_INLINE void unroll(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
}  // namespace detail

template <int N, class F>
SSMLIB_ALWAYS_INLINE void unroll(F&& f) {
  detail::unroll(std::make_integer_sequence<int, N>{}, f);
}

/// The value of a register of `width` numbers.
template <Real T>
struct pack {
  using traits = detail::native<T>;
  using vec = typename traits::vec;
  using ivec = typename traits::ivec;  ///< also what comparisons give: lanes of 0 or -1
  using uvec = typename traits::uvec;
  static constexpr int width = native_bytes / static_cast<int>(sizeof(T));

  vec v;

  pack() = default;
  SSMLIB_ALWAYS_INLINE pack(vec x) : v(x) {}
  /// Every lane x.
  SSMLIB_ALWAYS_INLINE pack(T x) : v(x - vec{}) {}  // x - 0 is x, also for -0

  [[nodiscard]] static SSMLIB_ALWAYS_INLINE pack load(const T* p) {
    pack r;
    std::memcpy(&r.v, p, sizeof(vec));
    return r;
  }
  SSMLIB_ALWAYS_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(vec)); }

  /// The first n < width lanes from memory, zeros in the others.
  [[nodiscard]] static SSMLIB_ALWAYS_INLINE pack load_part(const T* p, index_t n) {
    alignas(native_bytes) T lanes[width] = {};
    for (index_t i = 0; i < n; ++i)
      lanes[i] = p[i];
    return load(lanes);
  }
  SSMLIB_ALWAYS_INLINE void store_part(T* p, index_t n) const {
    alignas(native_bytes) T lanes[width];
    store(lanes);
    for (index_t i = 0; i < n; ++i)
      p[i] = lanes[i];
  }

  SSMLIB_ALWAYS_INLINE T operator[](int lane) const { return v[lane]; }

  friend SSMLIB_ALWAYS_INLINE pack operator+(pack a, pack b) { return a.v + b.v; }
  friend SSMLIB_ALWAYS_INLINE pack operator-(pack a, pack b) { return a.v - b.v; }
  friend SSMLIB_ALWAYS_INLINE pack operator*(pack a, pack b) { return a.v * b.v; }
  friend SSMLIB_ALWAYS_INLINE pack operator/(pack a, pack b) { return a.v / b.v; }
  friend SSMLIB_ALWAYS_INLINE pack operator-(pack a) { return -a.v; }
  friend SSMLIB_ALWAYS_INLINE ivec operator<(pack a, pack b) { return (ivec)(a.v < b.v); }
  friend SSMLIB_ALWAYS_INLINE ivec operator>(pack a, pack b) { return (ivec)(a.v > b.v); }
  friend SSMLIB_ALWAYS_INLINE ivec operator<=(pack a, pack b) { return (ivec)(a.v <= b.v); }
  friend SSMLIB_ALWAYS_INLINE ivec operator>=(pack a, pack b) { return (ivec)(a.v >= b.v); }
  friend SSMLIB_ALWAYS_INLINE ivec operator==(pack a, pack b) { return (ivec)(a.v == b.v); }
  SSMLIB_ALWAYS_INLINE pack& operator+=(pack b) { return *this = *this + b; }
  SSMLIB_ALWAYS_INLINE pack& operator-=(pack b) { return *this = *this - b; }
  SSMLIB_ALWAYS_INLINE pack& operator*=(pack b) { return *this = *this * b; }
};

/// Makes the compiler hold x in a register, where it would read memory again for every use.
template <Real T>
SSMLIB_ALWAYS_INLINE void keep_in_register([[maybe_unused]] pack<T>& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x.v));
#endif
}

/// a * b + c, rounded once where the hardware can; without such hardware, twice.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> fma(pack<T> a, pack<T> b, pack<T> c) {
#if defined(__clang__)
#pragma clang fp contract(on)
  return a.v * b.v + c.v;
#elif defined(__AVX512F__)  // g++ does not contract under -std=c++20
  typedef float floats __attribute__((vector_size(64)));
  typedef double doubles __attribute__((vector_size(64)));
  constexpr int all_lanes = -1, current_rounding = 4;
  if constexpr (std::is_same_v<T, float>) {
    return (typename pack<T>::vec)__builtin_ia32_vfmaddps512_mask(
        (floats)a.v, (floats)b.v, (floats)c.v, all_lanes, current_rounding);
  } else {
    return (typename pack<T>::vec)__builtin_ia32_vfmaddpd512_mask(
        (doubles)a.v, (doubles)b.v, (doubles)c.v, all_lanes, current_rounding);
  }
#elif defined(__FMA__)
  if constexpr (std::is_same_v<T, float>) {
    return __builtin_ia32_vfmaddps256(a.v, b.v, c.v);
  } else {
    return __builtin_ia32_vfmaddpd256(a.v, b.v, c.v);
  }
#elif defined(__aarch64__)
  typename pack<T>::vec r;
  for (int i = 0; i < pack<T>::width; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      r[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    } else {
      r[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
    }
  }
  return r;
#else
  return a.v * b.v + c.v;
#endif
}
/// The scalar with the roundings of the vector form, for the tails of loops.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE T fma(T a, T b, T c) {
#if defined(__AVX512F__) || defined(__FMA__) || defined(__aarch64__)
  if constexpr (std::is_same_v<T, float>) {
    return __builtin_fmaf(a, b, c);
  } else {
    return __builtin_fma(a, b, c);
  }
#else
  return a * b + c;
#endif
}

/// mask ? a : b in every lane.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> select(typename pack<T>::ivec mask, pack<T> a,
                                                  pack<T> b) {
  return mask ? a.v : b.v;
}
/// The smaller of each lane; where x is NaN, NaN (clamping keeps it).
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> min(pack<T> x, pack<T> bound) {
  return bound.v < x.v ? bound.v : x.v;
}
/// The larger of each lane; where x is NaN, NaN.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> max(pack<T> x, pack<T> bound) {
  return bound.v > x.v ? bound.v : x.v;
}
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> abs(pack<T> x) {
  using traits = detail::native<T>;
  using vec = typename pack<T>::vec;
  using uvec = typename pack<T>::uvec;
  constexpr auto magnitude = static_cast<typename traits::bits>(-1) >> 1;
  return (vec)((uvec)x.v & (uvec{} + magnitude));
}
/// |x| with the sign of s.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> copysign(pack<T> x, pack<T> s) {
  using traits = detail::native<T>;
  using vec = typename pack<T>::vec;
  using uvec = typename pack<T>::uvec;
  constexpr auto magnitude = static_cast<typename traits::bits>(-1) >> 1;
  return (vec)(((uvec)x.v & (uvec{} + magnitude)) | ((uvec)s.v & ~(uvec{} + magnitude)));
}

/// The sum of the lanes: halves are added to halves, so the order is a fixed tree.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE T horizontal_sum(pack<T> x) {
  constexpr int lane = 16 / static_cast<int>(sizeof(T));
  typedef T half_vec __attribute__((vector_size(16)));
  half_vec part[native_bytes / 16];
  std::memcpy(part, &x.v, sizeof(x.v));
  for (int half = native_bytes / 32; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      part[i] += part[i + half];
  }
  if constexpr (lane == 4) {
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
  } else {
    return part[0][0] + part[0][1];
  }
}
/// The largest lane; NaN lanes are passed over unless the first is one.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE T horizontal_max(pack<T> x) {
  T best = x[0];
  for (int i = 1; i < pack<T>::width; ++i)
    best = x[i] > best ? x[i] : best;
  return best;
}

/// The square root of each lane, correctly rounded.
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> sqrt(pack<T> x) {
  typename pack<T>::vec y;
#if defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) {
    __asm__("vsqrtps %1, %0" : "=v"(y) : "v"(x.v));
  } else {
    __asm__("vsqrtpd %1, %0" : "=v"(y) : "v"(x.v));
  }
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) {
    __asm__("sqrtps %1, %0" : "=x"(y) : "x"(x.v));
  } else {
    __asm__("sqrtpd %1, %0" : "=x"(y) : "x"(x.v));
  }
#else
  for (int i = 0; i < pack<T>::width; ++i)
    y[i] = std::sqrt(x.v[i]);
#endif
  return y;
}

/// `width` bf16 numbers, widened exactly.
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<float> load_widened(const bf16* p) {
  typedef std::uint16_t half_vec __attribute__((vector_size(native_bytes / 2)));
  half_vec h;
  std::memcpy(&h, p, sizeof(h));
  pack<float>::uvec wide;
#if defined(__AVX2__)  // g++ 12 makes five instructions of the conversion below
  __asm__("vpmovzxwd %1, %0" : "=v"(wide) : "v"(h));
#else
  wide = __builtin_convertvector(h, pack<float>::uvec);
#endif
  return (pack<float>::vec)(wide << 16);
}
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> load_widened(const T* p) {
  return pack<T>::load(p);
}
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<float> load_widened_part(const bf16* p, index_t n) {
  alignas(native_bytes) float lanes[pack<float>::width] = {};
  for (index_t i = 0; i < n; ++i)
    lanes[i] = static_cast<float>(p[i]);
  return pack<float>::load(lanes);
}
template <Real T>
[[nodiscard]] SSMLIB_ALWAYS_INLINE pack<T> load_widened_part(const T* p, index_t n) {
  return pack<T>::load_part(p, n);
}

/// out[i] = f(in[i]) for i in [0, n), f from pack to pack; `out` may be `in`.
template <Real T, class F>
SSMLIB_ALWAYS_INLINE void map(index_t n, const T* in, T* out, F f) {
  constexpr int w = pack<T>::width;
  index_t i = 0;
  for (; i + w <= n; i += w)
    f(pack<T>::load(in + i)).store(out + i);
  if (i < n) f(pack<T>::load_part(in + i, n - i)).store_part(out + i, n - i);
}
/// out[i] = f(a[i], b[i]); `out` may be `a` or `b`.
template <Real T, class F>
SSMLIB_ALWAYS_INLINE void map(index_t n, const T* a, const T* b, T* out, F f) {
  constexpr int w = pack<T>::width;
  index_t i = 0;
  for (; i + w <= n; i += w)
    f(pack<T>::load(a + i), pack<T>::load(b + i)).store(out + i);
  if (i < n) {
    f(pack<T>::load_part(a + i, n - i), pack<T>::load_part(b + i, n - i))
        .store_part(out + i, n - i);
  }
}

}  // namespace ssm::simd
