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
  static void zero(const buffer<cuda>& b) {
    SSMLIB_CHECK_CUDA(cudaMemsetAsync(b.data(), 0, b.bytes(), cuda::current().stream()));
  }
  template <class T, int R>
  static tensor<T, R, cuda> from_host(const tensor<T, R, cpu>& t);
  template <class T, int R>
  static tensor<T, R, cpu> to_host(const tensor<T, R, cuda>& t);
};

/// From the host it is queued on the current context's stream: from pageable memory the call has
/// taken what it needs when it returns.
template <class T, int R>
tensor<T, R, cuda> elements<cuda>::from_host(const tensor<T, R, cpu>& t) {
  if (!t) return {};
  const tensor<T, R, cpu> dense = t.contiguous();
  tensor<T, R, cuda> out(t.extents());
  const cuda::context ctx = cuda::current();
  ctx.note_host_copy();
  SSMLIB_CHECK_CUDA(cudaMemcpyAsync(out.data(), dense.data(),
                                    static_cast<std::size_t>(t.size()) * sizeof(T),
                                    cudaMemcpyHostToDevice, ctx.stream()));
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
