#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Sums and largest elements of rows, and softmax of rows, on CUDA. Rows lie one after another in
/// memory; few long ones are cut into pieces for the whole card. Sums are accumulated in double;
/// their order depends on the sizes only. Nothing is allocated and the host does not wait.

namespace ssm::kernels::cuda {

/// Row r is x[r length .. (r + 1) length).
template <class T>
struct row_problem {
  const T* x = nullptr;
  index_t rows = 0, length = 0;
};

/// Bytes of device memory that any function here works in, for rows of this number and length.
template <class Index>
[[nodiscard]] std::size_t row_workspace_bytes(Index rows, Index length);

/// y[r] = scale times the sum of row r.
/// @param workspace  row_workspace_bytes(rows, length) bytes, aligned to 16
/// @cost  one read
template <class T>
void sum_rows(cudaStream_t stream, const row_problem<T>& p, double scale, T* y, void* workspace);
/// dx[.., i] += scale dy[r]: dx has a row for each element of dy, in dense order of its first three
/// axes. @cost  one read, one write
template <class T>
void add_to_rows(cudaStream_t stream, const T* dy, double scale, view<T, 4> dx);

/// y[r] = the largest element of row r; NaN where there is one. @pre length > 0 @cost  one read
template <class T>
void max_rows(cudaStream_t stream, const row_problem<T>& p, T* y, void* workspace);
/// dx[.., i] += dy[r] at the first of the largest elements of row r, or at the first NaN.
template <class T>
void max_rows_vjp(cudaStream_t stream, const row_problem<T>& p, const T* dy, view<T, 4> dx,
                  void* workspace);

/// y = exp(x - largest of the row), divided by the row's sum. Entries of -infinity become 0.
/// @cost  one read, one write; two reads of rows with more than 8192 elements (4096 of double)
template <class T>
void softmax_rows(cudaStream_t stream, const row_problem<T>& p, T* y, void* workspace);
/// dx += y (dy - y . dy), row by row.
/// @param y  the rows of the forward pass's result
/// @cost  three reads, one write; five reads of rows with more than 4096 elements (8192 of bf16,
///        2048 of double)
template <class T>
void softmax_rows_vjp(cudaStream_t stream, const row_problem<T>& y, const T* dy, view<T, 4> dx,
                      void* workspace);

}  // namespace ssm::kernels::cuda
