#pragma once

#include <ssmlib/base/types.hpp>

#include <cstdint>
#include <cuda_bf16.h>

/// @file
/// What device code of all kernels shares: bf16 in and out, exact two-number decays, warp sums.

#define SSMLIB_DEVICE __device__ __forceinline__

namespace ssm::kernels::cuda {

/// bf16 of the library is bf16 of the device, bit for bit.
template <class T>
struct device_type {
  using type = T;
};
template <>
struct device_type<bf16> {
  using type = __nv_bfloat16;
};

SSMLIB_DEVICE float widen(float x) { return x; }
SSMLIB_DEVICE double widen(double x) { return x; }
SSMLIB_DEVICE float widen(bf16 x) { return __uint_as_float(std::uint32_t{x.bits} << 16); }

template <class To>
SSMLIB_DEVICE To narrow(float x) {
  if constexpr (std::is_same_v<To, bf16>) {
    bf16 r;
    r.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    return r;
  } else {
    return static_cast<To>(x);
  }
}
template <class To>
SSMLIB_DEVICE To narrow(double x) {
  static_assert(std::is_same_v<To, double>);
  return x;
}

/// Two floats as the 32-bit pair of bf16 that matrix instructions take; `low` is the first.
SSMLIB_DEVICE std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

/// The sum over the lanes of a warp, in a fixed tree; every lane gets it.
template <class T>
SSMLIB_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
template <class T>
SSMLIB_DEVICE T warp_max(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

}  // namespace ssm::kernels::cuda
