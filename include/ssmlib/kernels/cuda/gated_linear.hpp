#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Gated linear attention on CUDA: a gate per key channel. All pointers are to device memory.

namespace ssm::kernels::cuda {

/// For every head, with S (N x P) and a_t = exp(log_gate_t) channel by channel:
///
///     S_t = diag(a_t) S_{t-1} + k_t v_t^T,     y_t = alpha S_t^T q_t
///
/// Head h reads group h * groups / heads of each operand. Sequence i owns rows offsets[i] to
/// offsets[i + 1]; without offsets, `sequences` sequences of `max_length` tokens lie one after the
/// other. Sequences may be empty.
template <class T>
struct gated_linear_problem {
  using real = accum_t<T>;

  view<const T, 3> q, k;         ///< (tokens, groups, N), unit inner stride; N <= 256
  view<const real, 3> log_gate;  ///< (tokens, groups, N), unit inner stride; -infinity resets
  view<const T, 3> v;            ///< (tokens, groups, P), unit inner stride
  real alpha = real(1);
  index_t heads = 0;
  const index_t* offsets = nullptr;  ///< sequences + 1 token offsets, or absent
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of a sequence, without offsets
};

/// States before the first and after the last token, (sequences, H, N, P). Absent: zero, and not
/// wanted. They may be one.
template <class T>
struct gated_states {
  view<const accum_t<T>, 4> initial{};
  view<accum_t<T>, 4> final{};
};

/// Where the states before the last `slots` tokens of each sequence go: the one before the token at
/// position p of sequence i to row (p mod slots) * sequences + i.
template <class T>
struct state_ring {
  view<accum_t<T>, 4> rows{};  ///< (slots * sequences, H, N, P), or absent
  index_t slots = 0;
  const index_t* first_position = nullptr;  ///< (sequences)
};

/// Gradients, each head's own; absent views are not wanted. Overwritten, or added to where `add` is
/// set.
template <class T>
struct gated_linear_gradients {
  using real = accum_t<T>;

  view<T, 3> q{}, k{};       ///< (tokens, H, N), unit inner stride
  view<real, 3> log_gate{};  ///< (tokens, H, N), unit inner stride
  view<T, 3> v{};            ///< (tokens, H, P), unit inner stride
  view<real, 4> initial{};   ///< (sequences, H, N, P)
  bool add = false;
};

/// Bytes of device memory that gated_linear_chunked works in.
template <class T>
[[nodiscard]] std::size_t gated_linear_workspace_bytes(const gated_linear_problem<T>& p);

/// y (tokens, H, P) and the final states by chunks of 64 tokens; inside a chunk, sub-blocks of 16
/// hold products of gates and never quotients, so nothing overflows and resets are exact.
///
/// bf16 multiplies on tensor cores (operands bf16, sums and states float, the state that a chunk
/// reads rounded to bf16); float and double do not. The same inputs give the same bits.
/// @param workspace  gated_linear_workspace_bytes(p) bytes, aligned to 256
/// @throws shape_error  sizes do not fit together, or N > 256.
/// @cost   4 T H N P + 128 T H (N + P) flops.
/// @source Yang et al. 2024, arXiv:2312.06635, section 4.
template <class T>
void gated_linear_chunked(cudaStream_t stream, const gated_linear_problem<T>& p, view<T, 3> y,
                          const gated_states<T>& states, void* workspace);

/// The same token by token, in one order: a token's bits depend on its operands and the state
/// before it only. Needs no workspace.
/// @throws shape_error  sizes do not fit together, or N > 256.
/// @cost   reads and writes the states once; meant for a few tokens.
template <class T>
void gated_linear_recurrent(cudaStream_t stream, const gated_linear_problem<T>& p, view<T, 3> y,
                            const gated_states<T>& states, const state_ring<T>& ring);

/// Bytes of device memory that gated_linear_vjp works in.
template <class T>
[[nodiscard]] std::size_t gated_linear_vjp_workspace_bytes(const gated_linear_problem<T>& p);

/// The gradient of sum(dy y) + sum(d_final final). Nothing is kept of the forward pass.
///
/// The gradient of a gate is a sum over the pairs of tokens on its two sides, without differences.
/// @param initial  what the forward pass began with, or absent
/// @param d_final  (sequences, H, N, P) or absent: zero
/// @param workspace  gated_linear_vjp_workspace_bytes(p) bytes, aligned to 256
/// @throws shape_error  sizes do not fit together, or N > 256.
/// @cost   12 T H N P + 512 T H (N + P) flops.
template <class T>
void gated_linear_vjp(cudaStream_t stream, const gated_linear_problem<T>& p, view<const T, 3> dy,
                      view<const accum_t<T>, 4> initial, view<const accum_t<T>, 4> d_final,
                      const gated_linear_gradients<T>& d, void* workspace);

}  // namespace ssm::kernels::cuda
