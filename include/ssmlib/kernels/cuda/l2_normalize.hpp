#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

/// @file
/// Vectors of unit length on CUDA. All rows have unit inner stride.
/// Gradients that are absent are not computed; they are overwritten, or added to where `add` is
/// set.

namespace ssm::kernels::cuda {

/// y = x / sqrt(|x|^2 + eps) for every (token, head); with eps = 0 a zero vector stays zero.
/// @param x, y  (tokens, heads, N); y may be x
/// @throws shape_error  the sizes differ.
/// @cost   x is read once where a vector has at most 2 KiB.
template <class T>
void l2_normalize(cudaStream_t stream, view<const T, 3> x, accum_t<T> eps, view<T, 3> y);

/// dx = (dy - y (y . dy)) / sqrt(|x|^2 + eps).
template <class T>
void l2_normalize_vjp(cudaStream_t stream, view<const T, 3> x, accum_t<T> eps, view<const T, 3> dy,
                      view<T, 3> dx, bool add);

}  // namespace ssm::kernels::cuda
