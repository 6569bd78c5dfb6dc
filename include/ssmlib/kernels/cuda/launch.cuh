#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/rung.cuh>

#include <cuda_runtime.h>

#include <cstddef>

/// @file
/// Launches that overlap with the end of the kernel before them in the stream.
///
/// A kernel launched by `launch_overlapped` may start before the one ahead has finished. It must
/// touch only memory at rest (weights, states of an earlier step) until `wait_for_kernel_ahead`
/// returns; then everything that was launched ahead of it is done and visible. It lets the next one
/// start with `let_next_kernel_start`: after its own wait, what was written two launches before is
/// at rest for the next.

namespace ssm::kernels::cuda {

SSMLIB_DEVICE void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
SSMLIB_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Launches a kernel of one trivially copyable parameter that calls wait_for_kernel_ahead().
/// `cluster` consecutive blocks share a cluster; `shared` may exceed 48 KiB. Where the device or
/// its code knows neither clusters nor early starts the launch is an ordinary one, of single
/// blocks.
template <class P>
void launch_overlapped(cudaStream_t stream, void (*kernel)(P), index_t blocks, int threads,
                       std::size_t shared, int cluster, const P& parameters) {
  allow_shared_memory_of(kernel, shared);
  // A multiprocessor divides its memory anew only when it is empty: kernels that are to overlap
  // must agree on the division.
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = device_rung() < rung::sm_90a ? 0 : cluster > 1 ? 2 : 1;
  SSMLIB_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, parameters));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

/// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  SSMLIB_CHECK_CUDA(cudaGetDevice(&device));
  SSMLIB_CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace ssm::kernels::cuda
