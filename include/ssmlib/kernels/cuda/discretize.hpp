#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Step sizes and log decays of Mamba-2 on CUDA. All rows have unit inner stride.
/// Gradients that are absent are not computed; they are overwritten, or added to where `add` is
/// set.

namespace ssm::kernels::cuda {

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
