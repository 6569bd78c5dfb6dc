#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

/// @file
/// What stands between the products of an MLP, on CUDA. All rows have unit inner stride.
/// Gradients that are absent are not computed; they are overwritten, or added to where `add` is
/// set.

namespace ssm::kernels::cuda {

/// y = silu(gate) up. All (tokens, width).
/// @throws shape_error  the sizes differ.
template <class T>
void swiglu(cudaStream_t stream, view<const T, 2> gate, view<const T, 2> up, view<T, 2> y);

/// d_gate = dy up silu'(gate), d_up = dy silu(gate); they may be the gate and up themselves.
template <class T>
void swiglu_vjp(cudaStream_t stream, view<const T, 2> gate, view<const T, 2> up,
                view<const T, 2> dy, view<T, 2> d_gate, view<T, 2> d_up, bool add);

/// y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Both (tokens, width).
/// @throws shape_error  the sizes differ.
/// @source Hendrycks and Gimpel 2016, arXiv:1606.08415.
template <class T>
void gelu_tanh(cudaStream_t stream, view<const T, 2> x, view<T, 2> y);

template <class T>
void gelu_tanh_vjp(cudaStream_t stream, view<const T, 2> x, view<const T, 2> dy, view<T, 2> dx,
                   bool add);

}  // namespace ssm::kernels::cuda
