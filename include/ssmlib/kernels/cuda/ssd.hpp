#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/rung.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <limits>

namespace ssm::kernels::cuda {

/// A scalar-gated linear recurrence over packed sequences, for every head h of `heads`:
///
///     S_t = a_t S_{t-1} + w_t k_t x_t^T,     y_t = alpha q_t^T S_t + d x_t
///
/// with S (key size x features). a_t is exp(log_a_t), or gamma of the head, or 1; w and d are 1 and
/// 0 where absent. With `dt` the step's discretisation is part of the problem instead: w_t =
/// clamp(softplus(dt_t + dt_bias), low, high), log a_t = a w_t. An operand with G heads serves head
/// h with its head h * G / heads; G divides `heads`. All pointers are to device memory.
///
/// Every sequence counts its tokens from the row offsets[i] of the packed operands; without
/// `offsets`, `sequences` sequences of `max_length` tokens lie one after the other.
template <class T>
struct ssd_problem {
  using real = accum_t<T>;

  index_t heads = 0;
  view<const T, 3> q, k;        // (tokens, groups, key size)
  view<const T, 3> x;           // (tokens, groups, features)
  view<const real, 2> log_a;    // (tokens, groups) or absent
  view<const real, 2> weight;   // (tokens, groups) or absent
  view<const real, 1> gamma;    // (groups) or absent; > 0; not together with log_a
  view<const real, 1> d;        // (groups) or absent
  view<const T, 2> dt;          // (tokens, groups) or absent; not with log_a, gamma, weight
  view<const real, 1> dt_bias;  // (groups) or absent
  view<const real, 1> a;        // (groups), with dt
  real low = real(0), high = std::numeric_limits<real>::infinity();
  real alpha = real(1);
  const index_t* offsets = nullptr;  // of the sequences, one more than there are, on the device
  index_t sequences = 0;
  index_t max_length = 0;    // tokens of the longest sequence, at least
  rung most = rung::sm_90a;  // the launches take the highest rung at most this that fits

  [[nodiscard]] index_t key_size() const { return q.extent(2); }
  [[nodiscard]] index_t features() const { return x.extent(2); }
};

/// States before the first and after the last token, (sequences, heads, key size, features) with a
/// unit inner stride. Absent: zero, and not wanted. They may be the same memory.
template <class T>
struct ssd_states {
  view<const accum_t<T>, 4> initial;
  view<accum_t<T>, 4> final;
};

/// Gradients of the operands, overwritten; absent ones are not computed. Shapes as the operands.
template <class T>
struct ssd_gradients {
  using real = accum_t<T>;

  view<T, 3> q, k, x;
  view<real, 2> log_a, weight;
  view<real, 1> gamma, d;
  view<T, 2> dt;
  view<real, 1> dt_bias, a;
  view<const real, 4> d_final;  // of the final state, or absent: zero
  view<real, 4> d_initial;
};

/// Bytes of device memory that ssd_forward works in. Depends on sizes, strides and alignment.
template <class T>
[[nodiscard]] std::size_t ssd_forward_workspace_bytes(const ssd_problem<T>& p);

/// y (tokens, heads, features) and the final states of ssd_problem, by chunks of tokens: inside a
/// chunk as a masked product of scores, between chunks through the state.
///
/// bf16 with key size <= 128 and 16-byte aligned rows takes the tensor cores, on the sm_80 and the
/// sm_90a rung: products of bf16 rounded once, sums, decays and states in float. Everything else
/// takes general kernels in the accumulator's type. The same inputs give the same bits. Only rows
/// of sequences are written. Nothing is allocated and the host does not wait: a graph can capture
/// it.
/// @param workspace  ssd_forward_workspace_bytes(p) bytes, aligned to 256
/// @throws shape_error  sizes that do not fit together, or a key size beyond shared memory (1,300
///                      in float, 650 in double)
/// @cost   tokens * heads * (2 * 64 (key_size + features) + 4 key_size features) flops; operands
///         are read once when batch * heads fills the card, x and k twice when time is cut.
/// @source Dao and Gu 2024, arXiv:2405.21060, section 6.
template <class T>
void ssd_forward(cudaStream_t stream, const ssd_problem<T>& p, view<T, 3> y,
                 const ssd_states<T>& states, void* workspace);

/// Bytes of device memory that ssd_backward works in. Depends on sizes, strides and alignment.
template <class T>
[[nodiscard]] std::size_t ssd_backward_workspace_bytes(const ssd_problem<T>& p);

/// The gradients of ssd_forward's operands from that of y, dy (tokens, heads, features), and of the
/// final state. States are recomputed: nothing is kept of the forward pass.
///
/// The gradient of a log decay is a sum over the pairs of tokens on its two sides. The same inputs
/// give the same bits; only rows of sequences are written.
/// @param states     the forward pass's initial state; `final` is not read
/// @param workspace  ssd_backward_workspace_bytes(p) bytes, aligned to 256
/// @throws shape_error  sizes that do not fit together, or a key size beyond shared memory
template <class T>
void ssd_backward(cudaStream_t stream, const ssd_problem<T>& p, view<const T, 3> dy,
                  const ssd_states<T>& states, const ssd_gradients<T>& g, void* workspace);

}  // namespace ssm::kernels::cuda
