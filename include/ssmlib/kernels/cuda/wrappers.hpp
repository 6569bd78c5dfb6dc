#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// What stands around a product with any matrix, on CUDA: a skip connection, and the division by
/// row sums. Operands are (batch, time, heads, features) of any strides; an operand with G heads
/// serves head h of H with its head h * G / H. Sums have one fixed order.

namespace ssm::kernels::cuda {

/// y[.., h, p] += d[h] x[.., h, p]
template <class T>
void add_skip(cudaStream_t stream, view<const accum_t<T>, 1> d, view<const T, 4> x, view<T, 4> y);

template <class T>
[[nodiscard]] std::size_t add_skip_vjp_workspace_bytes(view<const T, 4> dy);

/// Adds the gradients of sum(dy * y) of add_skip to dd and dx; an absent one is skipped.
template <class T>
void add_skip_vjp(cudaStream_t stream, view<const accum_t<T>, 1> d, view<const T, 4> x,
                  view<const T, 4> dy, view<accum_t<T>, 1> dd, view<T, 4> dx, void* workspace);

/// wide = x, then one feature of the value 1, then zeros. @pre wide has at least one feature more.
template <class T>
void append_ones(cudaStream_t stream, view<const T, 4> x, view<T, 4> wide);

/// y[.., p] = wide[.., p] / wide[.., P] for the P features of y.
template <class T>
void divide_rows(cudaStream_t stream, view<const T, 4> wide, view<T, 4> y);

/// The gradient of divide_rows with respect to `wide`, in its place; features after P get zero.
template <class T>
void divide_rows_vjp(cudaStream_t stream, view<const T, 4> dy, view<T, 4> wide);

}  // namespace ssm::kernels::cuda
