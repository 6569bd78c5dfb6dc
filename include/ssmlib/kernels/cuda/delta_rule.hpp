#pragma once

#include <ssmlib/kernels/cuda/gated_linear.hpp>

/// @file
/// The gated delta rule on CUDA. All pointers are to device memory.

namespace ssm::kernels::cuda {

/// For every head, with S (N x P) and a_t = exp(log_decay_t):
///
///     S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,     y_t = alpha S_t^T q_t
///
/// Heads, groups and sequences as in gated_linear_problem.
template <class T>
struct delta_rule_problem {
  using real = accum_t<T>;

  view<const T, 3> q, k;                ///< (tokens, groups, N), unit inner stride; N <= 256
  view<const T, 3> v;                   ///< (tokens, groups, P), unit inner stride
  view<const real, 2> log_decay, beta;  ///< (tokens, groups)
  real alpha = real(1);
  index_t heads = 0;
  const index_t* offsets = nullptr;  ///< sequences + 1 token offsets, or absent
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of a sequence, without offsets
};

/// Gradients, each head's own; absent views are not wanted. Overwritten, or added to where `add` is
/// set.
template <class T>
struct delta_rule_gradients {
  using real = accum_t<T>;

  view<T, 3> q{}, k{};                ///< (tokens, H, N), unit inner stride
  view<T, 3> v{};                     ///< (tokens, H, P), unit inner stride
  view<real, 2> log_decay{}, beta{};  ///< (tokens, H)
  view<real, 4> initial{};            ///< (sequences, H, N, P)
  bool add = false;
};

/// Bytes of device memory that delta_rule_chunked works in.
template <class T>
[[nodiscard]] std::size_t delta_rule_workspace_bytes(const delta_rule_problem<T>& p);

/// y (tokens, H, P) and the final states by chunks of 64 tokens: the inverse of each chunk's unit
/// lower triangular system is formed in the accumulator's type, then chunks follow each other as
/// products with the state.
///
/// bf16 multiplies on tensor cores (operands bf16, the inverse included; sums and states float);
/// float and double do not. The same inputs give the same bits.
/// @param workspace  delta_rule_workspace_bytes(p) bytes, aligned to 256
/// @throws shape_error  sizes do not fit together, or N > 256.
/// @cost   T H (6 N P + 128 (3 N + 2 P)) flops.
/// @source Yang et al. 2024, arXiv:2406.06484, section 3.2; with decays: arXiv:2412.06464.
template <class T>
void delta_rule_chunked(cudaStream_t stream, const delta_rule_problem<T>& p, view<T, 3> y,
                        const gated_states<T>& states, void* workspace);

/// The same token by token, in one order: a token's bits depend on its operands and the state
/// before it only. Needs no workspace.
/// @throws shape_error  sizes do not fit together, or N > 256.
template <class T>
void delta_rule_recurrent(cudaStream_t stream, const delta_rule_problem<T>& p, view<T, 3> y,
                          const gated_states<T>& states, const state_ring<T>& ring);

/// Bytes of device memory that delta_rule_vjp works in.
template <class T>
[[nodiscard]] std::size_t delta_rule_vjp_workspace_bytes(const delta_rule_problem<T>& p);

/// The gradient of sum(dy y) + sum(d_final final). Nothing is kept of the forward pass.
/// @param initial  what the forward pass began with, or absent
/// @param d_final  (sequences, H, N, P) or absent: zero
/// @param workspace  delta_rule_vjp_workspace_bytes(p) bytes, aligned to 256
/// @throws shape_error  sizes do not fit together, or N > 256.
/// @cost   T H (18 N P + 128 (8 N + 7 P)) flops.
template <class T>
void delta_rule_vjp(cudaStream_t stream, const delta_rule_problem<T>& p, view<const T, 3> dy,
                    view<const accum_t<T>, 4> initial, view<const accum_t<T>, 4> d_final,
                    const delta_rule_gradients<T>& d, void* workspace);

}  // namespace ssm::kernels::cuda
