#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

/// @file
/// Rotary position embedding on CUDA: feature pairs turned by an angle that grows with the
/// position.
/// @source Su et al. 2021, arXiv:2104.09864, section 3.2.

namespace ssm::kernels::cuda {

/// Positions of packed tokens: first_position[i] + t for token t of sequence i.
struct rope_positions {
  const index_t* offsets = nullptr;  ///< sequences + 1 tokens, on the device; null: rectangular
  const index_t* first_position = nullptr;  ///< (sequences), on the device; null: zeros
  index_t sequences = 0;
  index_t max_length = 0;  ///< of each sequence where offsets is null
};

/// Cosines and sines, with angles in double.
/// @param frequency  (pairs) radians a token, on the device
/// @param table      (tokens, 2, pairs), unit inner stride
template <class R>
void rope_table(cudaStream_t stream, view<const double, 1> frequency, const rope_positions& p,
                view<R, 3> table);

template <class T>
struct rope_problem {
  view<const accum_t<T>, 3> table;  ///< of rope_table
  bool interleaved = false;         ///< pairs (2i, 2i + 1), else (i, i + pairs)
  bool backwards = false;           ///< turns the other way, which is the gradient
  bool add = false;                 ///< y += that
};

/// y = every head of x turned by its token's angles; features beyond the pairs are copied.
/// @param x  (tokens, H, D), unit inner stride; y too, and it may be x itself
/// @throws shape_error  the sizes do not fit.
/// @cost  x is read once and y written once.
template <class T>
void rope_rotate(cudaStream_t stream, const rope_problem<T>& p, view<const T, 3> x, view<T, 3> y);

}  // namespace ssm::kernels::cuda
