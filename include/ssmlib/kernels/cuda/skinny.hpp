#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/rung.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

namespace ssm::kernels::cuda {

/// A product of few rows with a large weight matrix, as in decoding, with what stands around it:
///
///     y = f(x) w^T + bias + residual
///     f(x) = x, or x * silu(gate), each then normalised where `normalise` is set:
///     f(x)[i, c] = v[i, c] / sqrt(mean over the group of v[i]^2 + epsilon) * norm_weight[c]
///
/// All pointers are to device memory.
template <class X, class W, class Y>
struct skinny_problem {
  using real = std::conditional_t<std::is_same_v<W, double>, double, float>;

  view<const X, 2> x;          // (m, k), unit inner stride
  view<const W, 2> w;          // (n, k), unit inner stride
  view<Y, 2> y;                // (m, n), unit inner stride; overlaps x and w nowhere
  view<const X, 2> gate;       // (m, k), unit inner stride, or absent
  view<const Y, 2> residual;   // (m, n), unit inner stride, or absent; may be y itself
  const real* bias = nullptr;  // (n) or absent
  bool normalise = false;
  const real* norm_weight = nullptr;  // (k) or absent: ones
  index_t group = 0;  // features that are normalised together, a divisor of k; 0: all
  real epsilon = real(1e-5);

  /// Lets w be read before the kernels ahead in the stream have finished, so that the memory hardly
  /// rests between two products. Set it where none of those since the last synchronisation of the
  /// stream, or start of the graph, writes w.
  bool early = false;

  /// Below sm_90a there are no clusters, and w is read for every eight rows.
  rung most = rung::sm_90a;
};

/// Bytes of device memory that skinny_forward works in: f(x), where blocks do not make it
/// themselves. Depends on sizes, strides and alignment.
template <class X, class W, class Y>
[[nodiscard]] std::size_t skinny_workspace_bytes(const skinny_problem<X, W, Y>& p);

/// The product of skinny_problem for 1 to 64 rows.
///
/// Every y[i, j] has the same bits whatever the other rows and their number: a row decoded alone
/// equals the same row in a batch. With bf16 weights and k a multiple of 8, rows 16-byte aligned,
/// f(x) is rounded to bf16 and takes the tensor cores, with float sums; a float x that is neither
/// gated nor normalised stays float, and takes the general kernel, as all other types do. Nothing
/// is allocated and the host does not wait: a graph can capture it.
/// @param workspace  skinny_workspace_bytes(p) bytes, aligned to 256
/// @throws shape_error  sizes that do not fit together, more than 64 rows, or a strided row.
/// @cost   2 m n k flops; reads w once from device memory for every m, on the sm_90a rung.
template <class X, class W, class Y>
void skinny_forward(cudaStream_t stream, const skinny_problem<X, W, Y>& p, void* workspace);

}  // namespace ssm::kernels::cuda
