#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

/// @file
/// The product with T x T matrices that stand in memory, in double: the reference of every other
/// product.

namespace ssm::kernels::cuda {

/// y_t = sum over the tokens s of t's sequence of matrix[., head, t, s] x_s.
template <class T>
struct dense_product_problem {
  view<const double, 4> matrix;      ///< (sequences or 1, groups, rows, rows)
  view<const T, 4> x;                ///< (b, time, groups, features)
  bool packed = false;               ///< one matrix of all tokens; else one a sequence, rows from 0
  const index_t* offsets = nullptr;  ///< device, sequences + 1; null: all have max_length tokens
  index_t sequences = 0;
  index_t max_length = 0;
};

/// @param y  (b, time, heads, features), overwritten
/// @cost  a multiplication in double for each kept pair of tokens, head and feature
template <class T>
void dense_product(cudaStream_t stream, const dense_product_problem<T>& p, view<T, 4> y);

}  // namespace ssm::kernels::cuda
