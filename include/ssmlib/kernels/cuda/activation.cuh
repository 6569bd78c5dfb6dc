#pragma once

#include <ssmlib/kernels/cuda/device.cuh>

#include <cmath>
#include <cstdint>

/// @file
/// The functions that gates, steps and decays need, and pairs and quads of numbers as one access.
/// In float an exponential is one instruction of relative error 2e-7; in double it is exact.

namespace ssm::kernels::cuda {

inline constexpr double log2_of_e = 1.44269504088896340736;

SSMLIB_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SSMLIB_DEVICE double power_of_two(double x) {
  return exp2(x);
}

SSMLIB_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SSMLIB_DEVICE double reciprocal(double x) {
  return 1.0 / x;
}

template <class R>
SSMLIB_DEVICE R sigmoid(R x) {
  return reciprocal(R(1) + power_of_two(R(-log2_of_e) * x));
}
template <class R>
SSMLIB_DEVICE R silu(R x) {
  return x * sigmoid(x);
}

template <class R>
struct value_and_slope {
  R value, slope;
};
template <class R>
SSMLIB_DEVICE value_and_slope<R> silu_and_slope(R x) {
  const R s = sigmoid(x);
  return {x * s, s * (R(1) + x * (R(1) - s))};
}

/// log(1 + e^x); beyond 20 that is x, the threshold of the published models.
SSMLIB_DEVICE double softplus(double x) {
  return x > 20.0 ? x : ::log1p(::exp(x));
}
/// max(x, 0) + log1p(e), e = exp(-|x|) in (0, 1]: a polynomial, because log2 of a number near 1 has
/// lost the bits of small steps. Relative error 4e-7.
SSMLIB_DEVICE float softplus(float x) {
  const float e = power_of_two(static_cast<float>(-log2_of_e) * fabsf(x));
  float p = 5.126102141e-03f;
  p = fmaf(p, e, -2.907406468e-02f);
  p = fmaf(p, e, 7.751608674e-02f);
  p = fmaf(p, e, -1.360224762e-01f);
  p = fmaf(p, e, 1.907688074e-01f);
  p = fmaf(p, e, -2.483539899e-01f);
  p = fmaf(p, e, 3.331812171e-01f);
  p = fmaf(p, e, -4.999944498e-01f);
  p = fmaf(p, e, 9.999999659e-01f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

/// Count numbers that one instruction moves where they fit into 16 bytes.
template <class T, int Count>
struct alignas(sizeof(T) * Count > 16 ? 16 : sizeof(T) * Count) numbers {
  T v[Count];
};

/// The first `valid` of Count neighbours, zeros beyond; `aligned` says that all of them may be read
/// at once if all are valid.
template <int Count, class T>
SSMLIB_DEVICE numbers<T, Count> load_numbers(const T* p, int valid, bool aligned) {
  numbers<T, Count> r{};
  if (aligned && valid >= Count) {
    r = *reinterpret_cast<const numbers<T, Count>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (i < valid) r.v[i] = p[i];
  }
  return r;
}
template <int Count, class T>
SSMLIB_DEVICE void store_numbers(T* p, const numbers<T, Count>& x, int valid, bool aligned) {
  if (aligned && valid >= Count) {
    *reinterpret_cast<numbers<T, Count>*>(p) = x;
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (i < valid) p[i] = x.v[i];
  }
}

/// Neighbours in registers as they came from memory: unpacking them at once would wait for them.
template <class T, int Count>
struct packed {
  using type = numbers<T, Count>;
};
template <>
struct packed<bf16, 2> {
  using type = std::uint32_t;
};
template <>
struct packed<bf16, 4> {
  using type = uint2;
};
template <class T, int Count>
using packed_t = typename packed<T, Count>::type;

template <class T, int Count>
SSMLIB_DEVICE numbers<T, Count> widen(const numbers<T, Count>& x) {
  return x;
}
SSMLIB_DEVICE numbers<float, 2> widen(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
SSMLIB_DEVICE numbers<float, 4> widen(uint2 quad) {
  return {__uint_as_float(quad.x << 16), __uint_as_float(quad.x & 0xffff0000u),
          __uint_as_float(quad.y << 16), __uint_as_float(quad.y & 0xffff0000u)};
}
template <class T, class R>
SSMLIB_DEVICE packed_t<T, 2> narrow_pair(const R (&x)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    return pack_bf16(x[0], x[1]);
  } else {
    return {narrow<T>(x[0]), narrow<T>(x[1])};
  }
}

/// The first `valid` of Count neighbours one by one, zeros beyond.
template <int Count, class T>
SSMLIB_DEVICE packed_t<T, Count> load_singly(const T* p, int valid) {
  numbers<T, Count> r{};
#pragma unroll
  for (int i = 0; i < Count; ++i)
    if (i < valid) r.v[i] = p[i];
  packed_t<T, Count> word;
  memcpy(&word, &r, sizeof word);
  return word;
}

/// Whether rows of this start and stride (in elements) can be read `count` numbers at a time.
template <class T>
[[nodiscard]] inline bool rows_are_aligned(const T* data, std::int64_t stride, int count) {
  const std::uintptr_t bytes = sizeof(T) * count > 16 ? 16 : sizeof(T) * count;
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 &&
         static_cast<std::uintptr_t>(stride) * sizeof(T) % bytes == 0;
}

}  // namespace ssm::kernels::cuda
