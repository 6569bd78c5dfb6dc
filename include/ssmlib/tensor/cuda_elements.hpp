#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/tensor/tensor.hpp>

namespace ssm::detail {

template <>
struct elements<cuda> {
  static void copy(void* to, const strided_axes& to_axes, const void* from,
                   const strided_axes& from_axes, std::size_t element_bytes);
  static void fill(void* to, const strided_axes& axes, const void* value,
                   std::size_t element_bytes);
  template <class T>
  static void add(T* to, const strided_axes& to_axes, const T* from, const strided_axes& from_axes);
  /// Bytes of the host, which may be changed as soon as the call returns: as parameters of kernels,
  /// without waiting for the device, or where they are many (256 KiB) when the device has them. A
  /// cudaMemcpyAsync from pageable memory may read it later.
  static void write(void* to, const void* from, std::size_t bytes);
  static void zero(const buffer<cuda>& b) {
    SSMLIB_CHECK_CUDA(cudaMemsetAsync(b.data(), 0, b.bytes(), cuda::current().stream()));
  }
  template <class T, int R>
  static tensor<T, R, cuda> from_host(const tensor<T, R, cpu>& t);
  template <class T, int R>
  static tensor<T, R, cpu> to_host(const tensor<T, R, cuda>& t);
};

template <class T, int R>
tensor<T, R, cuda> elements<cuda>::from_host(const tensor<T, R, cpu>& t) {
  if (!t) return {};
  const tensor<T, R, cpu> dense = t.contiguous();
  tensor<T, R, cuda> out(t.extents());
  write(out.data(), dense.data(), static_cast<std::size_t>(t.size()) * sizeof(T));
  return out;
}
template <class T, int R>
tensor<T, R, cpu> elements<cuda>::to_host(const tensor<T, R, cuda>& t) {
  if (!t) return {};
  const tensor<T, R, cuda> dense = t.contiguous();
  tensor<T, R, cpu> out(t.extents());
  const cuda::context ctx = cuda::current();
  ctx.note_host_copy();
  SSMLIB_CHECK_CUDA(cudaMemcpyAsync(out.data(), dense.data(),
                                    static_cast<std::size_t>(t.size()) * sizeof(T),
                                    cudaMemcpyDeviceToHost, ctx.stream()));
  ctx.synchronize();
  return out;
}

}  // namespace ssm::detail

#if defined(__CUDACC__) && !defined(SSMLIB_COMPILED)
#include <ssmlib/tensor/cuda_elements.cuh>
#endif
