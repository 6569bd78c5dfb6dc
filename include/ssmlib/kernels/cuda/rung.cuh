#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/rung.hpp>

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <string>

/// @file
/// What the current device and the code that was compiled for it can run. Kernels of the sm_90a
/// rung are empty in code for other architectures; nobody launches those, because the rung is asked
/// here and not of the device alone.

namespace ssm::kernels::cuda {

namespace detail {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SSMLIB_DETAIL_PROBE_THREADS 64
#else
#define SSMLIB_DETAIL_PROBE_THREADS 32
#endif
/// Never launched: the threads it allows tell which code the device has loaded.
static __global__ __launch_bounds__(SSMLIB_DETAIL_PROBE_THREADS) void rung_probe_kernel() {}
#undef SSMLIB_DETAIL_PROBE_THREADS

[[nodiscard]] inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  SSMLIB_CHECK_CUDA(cudaGetDevice(&device));
  SSMLIB_CHECK_CUDA(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

/// The compute capability of the current device, as 90.
[[nodiscard]] inline int device_arch() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

}  // namespace detail

/// The highest rung that the current device has and this program has code for. Launch attributes of
/// compute capability 9.0, clusters and early starts, go with code of the sm_90a rung too: code for
/// others neither forms clusters nor waits for the kernel ahead.
[[nodiscard]] inline rung device_rung() {
  static std::atomic<signed char> known[64] = {};  // of each device, 1 + its rung once it was asked
  int device = 0;
  SSMLIB_CHECK_CUDA(cudaGetDevice(&device));
  const signed char before = device < 64 ? known[device].load() : 0;
  if (before > 0) return static_cast<rung>(before - 1);
  rung r = rung_of(detail::device_arch());
  if (r == rung::sm_90a) {
    cudaFuncAttributes code{};
    SSMLIB_CHECK_CUDA(cudaFuncGetAttributes(&code, detail::rung_probe_kernel));
    if (code.maxThreadsPerBlock != 64) r = rung::sm_80;
  }
  if (device < 64) known[device] = static_cast<signed char>(1 + static_cast<int>(r));
  return r;
}

/// The highest rung at most `most` that can be launched.
[[nodiscard]] inline rung usable_rung(rung most) {
  return std::min(most, device_rung());
}

/// Bytes of shared memory that a block can have: 99 KiB or more from compute capability 8.0 on.
[[nodiscard]] inline int shared_bytes_of_block() {
  return detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

/// Lets blocks of a kernel have this much shared memory.
/// @throws backend_error  the device has less
template <class Kernel>
void allow_shared_memory_of(Kernel kernel, std::size_t bytes) {
  if (bytes <= 48 * 1024) return;
  if (bytes > static_cast<std::size_t>(shared_bytes_of_block())) {
    throw backend_error("ssm: a kernel needs " + std::to_string(bytes) +
                        " bytes of shared memory a block, but this device has " +
                        std::to_string(shared_bytes_of_block()) +
                        "; use a smaller element type or fewer keys");
  }
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes)));
}

}  // namespace ssm::kernels::cuda
