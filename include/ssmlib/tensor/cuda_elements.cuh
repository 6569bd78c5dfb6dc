#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

#include <cuda_bf16.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstring>

namespace ssm::detail {

/// The offset of element i, counted in dense order.
__device__ inline index_t element_offset(index_t i, const strided_axes& axes) {
  index_t offset = 0;
#pragma unroll
  for (int d = 3; d > 0; --d) {
    offset += i % axes.extents[d] * axes.strides[d];
    i /= axes.extents[d];
  }
  return offset + i * axes.strides[0];
}

template <class Bits>
__global__ void copy_elements(Bits* to, const __grid_constant__ strided_axes to_axes,
                              const Bits* from, const __grid_constant__ strided_axes from_axes,
                              index_t n) {
  const index_t step = index_t{blockDim.x} * gridDim.x;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    to[element_offset(i, to_axes)] = from[element_offset(i, from_axes)];
  }
}

template <class Bits>
__global__ void fill_elements(Bits* to, const __grid_constant__ strided_axes axes, Bits value,
                              index_t n) {
  const index_t step = index_t{blockDim.x} * gridDim.x;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    to[element_offset(i, axes)] = value;
  }
}

/// Bytes that a launch takes along.
struct written_bytes {
  static constexpr std::size_t most = 3840;
  unsigned char* to;
  int n;
  unsigned char bytes[most];
};
static __global__ void write_bytes(const __grid_constant__ written_bytes w) {
  for (int i = static_cast<int>(threadIdx.x); i < w.n; i += static_cast<int>(blockDim.x))
    w.to[i] = w.bytes[i];
}

template <class T>
__global__ void add_elements(T* to, const __grid_constant__ strided_axes to_axes, const T* from,
                             const __grid_constant__ strided_axes from_axes, index_t n) {
  const index_t step = index_t{blockDim.x} * gridDim.x;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    T& target = to[element_offset(i, to_axes)];
    const T& term = from[element_offset(i, from_axes)];
    if constexpr (std::same_as<T, bf16>) {
      const float sum = __uint_as_float(std::uint32_t{target.bits} << 16) +
                        __uint_as_float(std::uint32_t{term.bits} << 16);
      target.bits = __bfloat16_as_ushort(__float2bfloat16_rn(sum));
    } else {
      target += term;
    }
  }
}

/// f(a number as wide as an element, blocks for n elements)
template <class F>
void launch_by_width(index_t n, std::size_t element_bytes, F f) {
  const auto blocks = static_cast<unsigned>(std::min<index_t>((n + 255) / 256, 132 * 32));
  switch (element_bytes) {
    case 2:
      f(std::uint16_t{}, blocks);
      break;
    case 4:
      f(std::uint32_t{}, blocks);
      break;
    default:
      f(std::uint64_t{}, blocks);
  }
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

SSMLIB_INLINE void elements<cuda>::copy(void* to, const strided_axes& to_axes, const void* from,
                                        const strided_axes& from_axes, std::size_t element_bytes) {
  const index_t n = element_count(to_axes.extents);
  const cudaStream_t stream = cuda::current().stream();
  if (to_axes.are_dense() && from_axes.are_dense()) {
    return cuda::current().copy(to, from, static_cast<std::size_t>(n) * element_bytes,
                                cudaMemcpyDeviceToDevice);
  }
  launch_by_width(n, element_bytes, [&](auto bits, unsigned blocks) {
    using Bits = decltype(bits);
    copy_elements<Bits><<<blocks, 256, 0, stream>>>(static_cast<Bits*>(to), to_axes,
                                                    static_cast<const Bits*>(from), from_axes, n);
  });
}

SSMLIB_INLINE void elements<cuda>::fill(void* to, const strided_axes& axes, const void* value,
                                        std::size_t element_bytes) {
  const index_t n = element_count(axes.extents);
  const cudaStream_t stream = cuda::current().stream();
  launch_by_width(n, element_bytes, [&](auto bits, unsigned blocks) {
    using Bits = decltype(bits);
    std::memcpy(&bits, value, sizeof(Bits));
    fill_elements<Bits><<<blocks, 256, 0, stream>>>(static_cast<Bits*>(to), axes, bits, n);
  });
}

SSMLIB_INLINE void elements<cuda>::write(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  const cuda::context ctx = cuda::current();
  if (bytes > std::size_t{256} << 10) {
    ctx.copy(to, from, bytes, cudaMemcpyHostToDevice);
    return ctx.synchronize();
  }
  ctx.note_host_copy();
  written_bytes w;
  for (std::size_t at = 0; at < bytes; at += written_bytes::most) {
    const std::size_t n = std::min(bytes - at, written_bytes::most);
    w.to = static_cast<unsigned char*>(to) + at;
    w.n = static_cast<int>(n);
    std::memcpy(w.bytes, static_cast<const unsigned char*>(from) + at, n);
    write_bytes<<<1, 256, 0, ctx.stream()>>>(w);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
}

template <class T>
void elements<cuda>::add(T* to, const strided_axes& to_axes, const T* from,
                         const strided_axes& from_axes) {
  const index_t n = element_count(to_axes.extents);
  const auto blocks = static_cast<unsigned>(std::min<index_t>((n + 255) / 256, 132 * 32));
  add_elements<T><<<blocks, 256, 0, cuda::current().stream()>>>(to, to_axes, from, from_axes, n);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_elements, void elements<cuda>::add<T>(T*, const strided_axes&, const T*, \
                                                                const strided_axes&))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::detail
