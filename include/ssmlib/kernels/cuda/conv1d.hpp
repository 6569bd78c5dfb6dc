#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Causal depthwise convolution along time on CUDA, per sequence:
///
///     pre[t, c] = bias[c] + sum over j in [0, width) of weight[c, j] x[t - (width - 1) + j, c]
///     y[t, c]   = pre[t, c] or silu(pre[t, c])
///
/// Inputs before a sequence are its initial state. A token's bits depend on its `width` inputs
/// alone.

namespace ssm::kernels::cuda {

enum class conv1d_activation { none, silu };

template <class T>
struct conv1d_problem {
  view<const T, 2> x;                ///< (tokens, channels), unit inner stride
  view<const accum_t<T>, 2> weight;  ///< (channels, width)
  const accum_t<T>* bias = nullptr;  ///< (channels), or absent
  conv1d_activation activation = conv1d_activation::silu;
  view<const T, 3> initial{};  ///< (sequences, width - 1, channels), oldest first; absent: zeros
  const index_t* offsets = nullptr;  ///< sequences + 1 tokens, on the device; null: rectangular
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of the longest sequence; of each one where offsets is null

  [[nodiscard]] index_t tokens() const { return x.extents[0]; }
  [[nodiscard]] index_t channels() const { return x.extents[1]; }
  [[nodiscard]] index_t width() const { return weight.extents[1]; }
};

/// Gradients; absent ones are not stored. Overwritten, or added to where `add` is set.
template <class T>
struct conv1d_gradients {
  view<T, 2> x{};                ///< (tokens, channels)
  accum_t<T>* weight = nullptr;  ///< (channels, width), dense
  accum_t<T>* bias = nullptr;    ///< (channels)
  view<T, 3> initial{};          ///< (sequences, width - 1, channels)
  bool add = false;
};

/// @param y      (tokens, channels), unit inner stride
/// @param final  (sequences, width - 1, channels): the inputs that the next token meets, oldest
///               first; absent, or `initial` itself
/// @throws shape_error  the sizes do not fit.
/// @cost  x is read once and y written once.
template <class T>
void conv1d_forward(cudaStream_t stream, const conv1d_problem<T>& p, view<T, 2> y,
                    view<T, 3> final);

/// `final` alone; of x no more than the rows that it takes is read.
template <class T>
void conv1d_final(cudaStream_t stream, const conv1d_problem<T>& p, view<T, 3> final);

/// Adds the gradient of the final inputs to those of the tokens and of the initial state that they
/// were; absent ones are left out. Only the sequences of the problem are read.
/// @throws shape_error  the sizes do not fit.
template <class T>
void conv1d_final_vjp(cudaStream_t stream, const conv1d_problem<T>& p, view<const T, 3> d_final,
                      view<T, 2> dx, view<T, 3> d_initial);

template <class T>
[[nodiscard]] std::size_t conv1d_backward_workspace_bytes(const conv1d_problem<T>& p);

/// @param dy       (tokens, channels), unit inner stride
/// @param d_final  (sequences, width - 1, channels) or absent
/// @throws shape_error  the sizes do not fit.
/// @cost  x and dy are read once and dx written once; sums over tokens have a fixed order.
template <class T>
void conv1d_backward(cudaStream_t stream, const conv1d_problem<T>& p, view<const T, 2> dy,
                     view<const T, 3> d_final, const conv1d_gradients<T>& d, void* workspace);

}  // namespace ssm::kernels::cuda
