#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

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
  /// Nothing is filled yet: what adds to a part first may overwrite it.
  static void zero(const buffer<cuda>& b) {
    if (b.bytes() == 0) return;
    b.head()->unwritten = std::make_unique<unwritten_memory>(static_cast<index_t>(b.bytes()));
  }
  static void settle(const buffer<cuda>& b, const memory_part& part) {
    if (b.head() == nullptr || !b.head()->unwritten) return;
    const auto rows = rows_in(b, part);
    if (!rows || !b.head()->unwritten->is_written(*rows)) fill_unwritten(b);
  }
  [[nodiscard]] static bool is_unwritten(const buffer<cuda>& b, const memory_part& part) {
    if (b.head() == nullptr || !b.head()->unwritten) return false;
    const auto rows = rows_in(b, part);
    return rows && b.head()->unwritten->is_unwritten(*rows);
  }
  static void mark_written(const buffer<cuda>& b, const memory_part& part) {
    if (!is_unwritten(b, part)) return;
    b.head()->unwritten->write(*rows_in(b, part));
    if (b.head()->unwritten->is_complete()) b.head()->unwritten.reset();
  }
  template <class T, int R>
  static tensor<T, R, cuda> from_host(const tensor<T, R, cpu>& t);
  template <class T, int R>
  static tensor<T, R, cpu> to_host(const tensor<T, R, cuda>& t);

 private:
  static std::optional<memory_rows> rows_in(const buffer<cuda>& b, const memory_part& part) {
    const auto* data = static_cast<const std::byte*>(part.data);
    return rows_of(data - static_cast<const std::byte*>(b.data()), part.axes.extents,
                   part.axes.strides, static_cast<index_t>(part.element_bytes));
  }
  /// Zeros, on the current context's stream, where nothing has been written.
  static void fill_unwritten(const buffer<cuda>& b);
};

/// Parts that have been written are set aside meanwhile: few buffers are read before all of them
/// has been.
inline void elements<cuda>::fill_unwritten(const buffer<cuda>& b) {
  const auto unwritten = std::move(b.head()->unwritten);
  const cuda::context ctx = cuda::current();
  const cudaStream_t stream = ctx.stream();
  std::size_t kept = 0;
  for (const memory_rows& r : unwritten->written())
    kept += static_cast<std::size_t>(r.bytes());
  const buffer<cuda> aside = kept > 0 ? buffer<cuda>(kept) : buffer<cuda>();
  const auto copy_parts = [&](bool back) {
    if (ctx.is_dry_run()) return;
    auto* there = static_cast<std::byte*>(aside.data());
    for (const memory_rows& r : unwritten->written()) {
      auto* here = static_cast<std::byte*>(b.data()) + r.begin;
      const auto length = static_cast<std::size_t>(r.length),
                 rows = static_cast<std::size_t>(r.rows);
      const std::size_t step = r.rows > 1 ? static_cast<std::size_t>(r.step) : length;
      SSMLIB_CHECK_CUDA(cudaMemcpy2DAsync(back ? here : there, back ? step : length,
                                          back ? there : here, back ? length : step, length, rows,
                                          cudaMemcpyDeviceToDevice, stream));
      there += r.bytes();
    }
  };
  copy_parts(false);
  SSMLIB_CHECK_CUDA(cudaMemsetAsync(b.data(), 0, b.bytes(), stream));
  copy_parts(true);
}

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
  const std::size_t bytes = static_cast<std::size_t>(t.size()) * sizeof(T);
  if (ctx.is_dry_run())
    std::memset(static_cast<void*>(out.data()), 0, bytes);  // what is read of results is 0
  ctx.copy(out.data(), dense.data(), bytes, cudaMemcpyDeviceToHost);
  ctx.synchronize();
  return out;
}

}  // namespace ssm::detail

#if defined(__CUDACC__) && !defined(SSMLIB_COMPILED)
#include <ssmlib/tensor/cuda_elements.cuh>
#endif
