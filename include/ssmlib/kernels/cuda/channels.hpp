#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

/// @file
/// Products of features, channel by channel, on CUDA: what takes a mask that only multiplies
/// through L o (Q K^T), some channels (n, p) at a time. Operands are (batch, time, heads, features)
/// of any strides; an operand with G heads serves head h of H with its head h * G / H.

namespace ssm::kernels::cuda {

/// The key features [first, first + count) of u beside all features of v.
template <class T>
struct channel_problem {
  view<const T, 4> u, v;
  index_t first = 0, count = 0;
  accum_t<T> scale = accum_t<T>(1);
};

/// z[.., h, j P + p] = scale u[.., first + j] v[.., p]; z is (b, T, H, count P), overwritten.
template <class T>
void outer_channels(cudaStream_t stream, const channel_problem<T>& p, view<accum_t<T>, 4> z);

/// to[.., first + j] += scale times the sum over p, and over the heads of a group of `to`, of
/// z[.., j P + p] v[.., p]. Only the shape of p.u is read.
template <class T>
void add_channels_to_u(cudaStream_t stream, const channel_problem<T>& p,
                       view<const accum_t<T>, 4> z, view<accum_t<T>, 4> to);

/// to[.., p] += scale times the sum over j, and over the heads of a group of `to`, of
/// u[.., first + j] z[.., j P + p]. Only the shape of p.v is read.
template <class T>
void add_channels_to_v(cudaStream_t stream, const channel_problem<T>& p,
                       view<const accum_t<T>, 4> z, view<accum_t<T>, 4> to);

}  // namespace ssm::kernels::cuda
