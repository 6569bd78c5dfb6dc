#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <string>

/// @file
/// Functions of the elements of rows, 16 bytes of a row to a thread where the rows are aligned.

namespace ssm::kernels::cuda::detail {

inline constexpr int row_threads = 256;
/// Elements of 16 bytes.
template <class T>
inline constexpr int row_vector = 16 / static_cast<int>(sizeof(T));

/// i / d for i >= 0; of 32-bit numbers where they fit, which takes a third of the time.
SSMLIB_DEVICE index_t quotient(index_t i, index_t d) {
  if ((i | d) >> 32) return i / d;
  return static_cast<index_t>(static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(d));
}

/// Up to Count neighbours of a row in the type that T computes in, zeros beyond `valid`.
template <int Count, class T, class V>
SSMLIB_DEVICE numbers<accum_t<T>, Count> read_row(const V& x, index_t row, index_t column,
                                                  int valid) {
  const T* p = x.data + row * x.strides[0] + column;
  const auto words = load_numbers<Count>(p, valid, true);
  numbers<accum_t<T>, Count> r;
#pragma unroll
  for (int e = 0; e < Count; ++e)
    r.v[e] = widen(words.v[e]);
  return r;
}

/// Stores them, or adds them to what is there.
template <int Count, class T>
SSMLIB_DEVICE void write_row(const view<T, 2>& y, index_t row, index_t column, int valid,
                             numbers<accum_t<T>, Count> x, bool add) {
  if (add) {
    const auto old = read_row<Count, T>(y, row, column, valid);
#pragma unroll
    for (int e = 0; e < Count; ++e)
      x.v[e] += old.v[e];
  }
  T* to = y.data + row * y.strides[0] + column;
  if constexpr (std::is_same_v<T, bf16> && Count == 8) {
    // A compiler that sees numbers of 16 bits here stores them one by one.
    if (valid == Count) {
      *reinterpret_cast<uint4*>(to) = {pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]),
                                       pack_bf16(x.v[4], x.v[5]), pack_bf16(x.v[6], x.v[7])};
      return;
    }
  }
  numbers<T, Count> words;
#pragma unroll
  for (int e = 0; e < Count; ++e)
    words.v[e] = narrow<T>(x.v[e]);
  store_numbers<Count>(to, words, valid, true);
}

template <int Count, class F>
__global__ void __launch_bounds__(row_threads)
    rows_kernel(index_t rows, index_t width, const __grid_constant__ F f) {
  const index_t i = index_t{blockIdx.x} * row_threads + threadIdx.x;
  const index_t vectors = (width + Count - 1) / Count, total = rows * vectors;
  if (i >= total) return;
  const index_t row = quotient(i, vectors);
  const index_t column = (i - row * vectors) * Count;
  f.template run<Count>(row, column, static_cast<int>(min(index_t{Count}, width - column)));
}

[[nodiscard]] inline unsigned row_blocks(const char* name, index_t blocks) {
  if (blocks > 0x7fffffff) {
    throw shape_error("ssm: " + std::string(name) + ": " + std::to_string(blocks) +
                      " blocks of threads are more than one launch has; split the rows");
  }
  return static_cast<unsigned>(blocks);
}

/// f.run<Count>(row, column, valid) for all elements, Count at a time if `aligned`, else singly.
template <int Count, class F>
void for_rows(const char* name, cudaStream_t stream, index_t rows, index_t width, bool aligned,
              const F& f) {
  if (rows * width == 0) return;
  const index_t threads = rows * (aligned ? (width + Count - 1) / Count : width);
  const unsigned blocks = row_blocks(name, (threads + row_threads - 1) / row_threads);
  if (aligned) {
    rows_kernel<Count><<<blocks, row_threads, 0, stream>>>(rows, width, f);
  } else {
    rows_kernel<1><<<blocks, row_threads, 0, stream>>>(rows, width, f);
  }
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

/// Whether rows of all these views, those that are there, can be read Count numbers at a time.
template <int Count, class... V>
[[nodiscard]] bool all_aligned(const V&... v) {
  return ((v.data == nullptr || rows_are_aligned(v.data, v.strides[0], Count)) && ...);
}

template <class A, class B>
void check_same_extents(const char* name, const char* what, const A& x, const B& y) {
  if (y.data == nullptr || x.extents == y.extents) return;
  throw shape_error("ssm: " + std::string(name) + ": " + what + " is " + to_string(y.extents) +
                    "; wanted " + to_string(x.extents) + " as its input");
}

}  // namespace ssm::kernels::cuda::detail
