#pragma once

#include <ssmlib/kernels/cuda/conv1d.hpp>

#include <cuda_runtime_api.h>

/// @file
/// The causal depthwise convolution of conv1d.hpp for new tokens of sequences whose last inputs lie
/// in a ring.

namespace ssm::kernels::cuda {

template <class T>
struct conv1d_step_problem {
  view<const T, 2> x;                ///< (tokens, channels), unit inner stride
  view<const accum_t<T>, 2> weight;  ///< (channels, width)
  const accum_t<T>* bias = nullptr;  ///< (channels), or absent
  conv1d_activation activation = conv1d_activation::silu;
  /// (sequences, rows, channels), unit inner stride: the input at position p lies in row p mod
  /// `rows`, rows >= width - 1. Inputs before position 0 are zeros, whatever is stored.
  view<T, 3> ring;
  const index_t* position = nullptr;  ///< (sequences): tokens taken before this call, on the device
  const index_t* offsets = nullptr;   ///< sequences + 1 tokens, on the device; null: rectangular
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of the longest sequence; of each one where offsets is null

  [[nodiscard]] index_t tokens() const { return x.extents[0]; }
  [[nodiscard]] index_t channels() const { return x.extents[1]; }
  [[nodiscard]] index_t width() const { return weight.extents[1]; }
};

/// The outputs of the new tokens, whose inputs go to the ring; the positions are the caller's to
/// move.
///
/// A token's bits depend on its `width` inputs alone. Nothing is allocated and the host does not
/// wait: a graph can capture it; offsets and positions are read on the device.
/// @param y  (tokens, channels), unit inner stride; not x itself
/// @throws shape_error  the sizes do not fit, or the ring is shorter than width - 1.
/// @cost  up to 64 tokens of a sequence take one launch, more of them two; x is read once, its last
///        rows twice.
template <class T>
void conv1d_step(cudaStream_t stream, const conv1d_step_problem<T>& p, view<T, 2> y);

}  // namespace ssm::kernels::cuda
