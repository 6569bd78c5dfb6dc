#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// The small layers on CUDA: gates, unit lengths and step sizes. All rows have unit inner stride.
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

/// delta = clamp(softplus(dt + bias), low, high), a row a token.
template <class T>
struct discretize_problem {
  using real = accum_t<T>;
  view<const T, 2> dt;         ///< (tokens, heads)
  const real* a = nullptr;     ///< (heads)
  const real* bias = nullptr;  ///< (heads), or absent
  real low, high;
};

template <class T>
struct discretize_gradients {
  using real = accum_t<T>;
  view<T, 2> dt{};  ///< (tokens, heads)
  real *a = nullptr, *bias = nullptr;
  bool add = false;
};

/// delta and log_a = a delta, both (tokens, heads).
/// @throws shape_error  the sizes differ.
template <class T>
void discretize(cudaStream_t stream, const discretize_problem<T>& p, view<accum_t<T>, 2> delta,
                view<accum_t<T>, 2> log_a);

template <class T>
[[nodiscard]] std::size_t discretize_vjp_workspace_bytes(const discretize_problem<T>& p);

/// The gradients from those of delta and log_a, (tokens, heads) each. Outside the limits that of dt
/// is zero. Sums over tokens have an order that the sizes fix.
template <class T>
void discretize_vjp(cudaStream_t stream, const discretize_problem<T>& p,
                    view<const accum_t<T>, 2> d_delta, view<const accum_t<T>, 2> d_log_a,
                    const discretize_gradients<T>& d, void* workspace);

}  // namespace ssm::kernels::cuda
