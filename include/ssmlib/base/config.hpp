#pragma once

/// @file
/// Version, compiler attributes and nothing else. Lowest header of the library.

#define SSMLIB_VERSION_MAJOR 0
#define SSMLIB_VERSION_MINOR 1
#define SSMLIB_VERSION_PATCH 0

#if defined(__GNUC__) || defined(__clang__)
#define SSMLIB_ALWAYS_INLINE inline __attribute__((always_inline))
#define SSMLIB_NOINLINE __attribute__((noinline))
#define SSMLIB_RESTRICT __restrict__
#else
#error "ssm: the CPU kernels use GNU vector extensions; build with g++ or clang"
#endif

/// For functions that kernels of every backend call: nvcc compiles them for the device too.
#if defined(__CUDACC__)
#define SSMLIB_HOST_DEVICE __host__ __device__
#else
#define SSMLIB_HOST_DEVICE
#endif
