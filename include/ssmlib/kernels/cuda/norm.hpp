#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Normalisations of token rows on CUDA; every row is read once. Statistics are float (double for
/// double) and computed again in the backward pass.

namespace ssm::kernels::cuda {

/// Where silu(gate) enters a gated norm: norm(x) * silu(gate), or norm(x * silu(gate)).
enum class gate_order { none, norm_first, gate_first };

template <class T>
struct rms_norm_problem {
  view<const T, 2> x;        ///< (tokens, width), unit inner stride
  view<const T, 2> gate{};   ///< (tokens, width), or absent
  const accum_t<T>* weight;  ///< (width), or (group) for all groups
  index_t group;             ///< features that are normalised together; divides the width
  index_t weight_step;       ///< group, or 0 where the groups share the weight
  accum_t<T> eps;
};

/// Gradients; absent ones are not stored. Overwritten, or added to where `add` is set.
template <class T>
struct rms_norm_gradients {
  view<T, 2> x{}, gate{};        ///< (tokens, width)
  accum_t<T>* weight = nullptr;  ///< as the weight
  bool add = false;
};

template <class T>
struct layer_norm_problem {
  view<const T, 2> x;                ///< (tokens, width), unit inner stride
  const accum_t<T>* weight;          ///< (width)
  const accum_t<T>* bias = nullptr;  ///< (width), or absent
  accum_t<T> eps;
};

template <class T>
struct layer_norm_gradients {
  view<T, 2> x{};  ///< (tokens, width)
  accum_t<T>*weight = nullptr, *bias = nullptr;
  bool add = false;
};

/// y = x rsqrt(mean(x^2) + eps) weight over groups of features, gated as `order` says.
/// @throws shape_error  the sizes do not fit.
/// @source Zhang and Sennrich 2019, arXiv:1910.07467; the gate: Dao and Gu 2024, arXiv:2405.21060.
template <class T>
void rms_norm(cudaStream_t stream, gate_order order, const rms_norm_problem<T>& p, view<T, 2> y);

template <class T>
[[nodiscard]] std::size_t rms_norm_vjp_workspace_bytes(const rms_norm_problem<T>& p);

/// Sums over tokens have an order that the sizes fix.
template <class T>
void rms_norm_vjp(cudaStream_t stream, gate_order order, const rms_norm_problem<T>& p,
                  view<const T, 2> dy, const rms_norm_gradients<T>& d, void* workspace);

/// y = (x - mean(x)) rsqrt(var(x) + eps) weight + bias.
/// @throws shape_error  the sizes do not fit.
/// @source Ba, Kiros and Hinton 2016, arXiv:1607.06450.
template <class T>
void layer_norm(cudaStream_t stream, const layer_norm_problem<T>& p, view<T, 2> y);

template <class T>
[[nodiscard]] std::size_t layer_norm_vjp_workspace_bytes(const layer_norm_problem<T>& p);

template <class T>
void layer_norm_vjp(cudaStream_t stream, const layer_norm_problem<T>& p, view<const T, 2> dy,
                    const layer_norm_gradients<T>& d, void* workspace);

}  // namespace ssm::kernels::cuda
