#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// The selective scan of Mamba-1 on CUDA. For channel c, state n and token t of a sequence,
///
///     delta_t = softplus(dt_t + dt_bias)                      (or without either)
///     h_t[n]  = exp(delta_t a[n]) h_{t-1}[n] + delta_t b_t[n] u_t
///     y_t     = (sum over n of c_t[n] h_t[n] + skip u_t) silu(gate_t)
///
/// @source Gu and Dao 2023, arXiv:2312.00752, section 3.

namespace ssm::kernels::cuda {

/// What the scan reads. Inner strides of tokens' rows are 1; states are float (double for double).
template <class T>
struct selective_problem {
  using real = accum_t<T>;
  view<const T, 2> dt;            ///< (tokens, D)
  view<const real, 2> a;          ///< (D, N)
  view<const T, 3> c;             ///< (tokens, Gc, N)
  view<const T, 3> b;             ///< (tokens, Gb, N); one of Gc, Gb divides the other
  view<const T, 2> u;             ///< (tokens, D)
  view<const T, 2> gate{};        ///< (tokens, D), or absent
  const real* skip = nullptr;     ///< (D), or absent
  const real* dt_bias = nullptr;  ///< (D), or absent
  bool softplus = true;
  view<const real, 3> initial{};     ///< (sequences, D, N), or absent: zero
  const index_t* offsets = nullptr;  ///< sequences + 1 tokens, on the device; null: rectangular
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of the longest sequence; of each one where offsets is null

  [[nodiscard]] index_t tokens() const { return dt.extents[0]; }
  [[nodiscard]] index_t channels() const { return dt.extents[1]; }
  [[nodiscard]] index_t states() const { return a.extents[1]; }
};

/// Gradients; absent ones are not stored. Overwritten, or added to where `add` is set.
template <class T>
struct selective_gradients {
  using real = accum_t<T>;
  view<T, 2> dt{};          ///< (tokens, D)
  view<real, 2> a{};        ///< (D, N)
  view<T, 3> c{};           ///< (tokens, Gc, N)
  view<T, 3> b{};           ///< (tokens, Gb, N)
  view<T, 2> u{};           ///< (tokens, D)
  view<T, 2> gate{};        ///< (tokens, D)
  real* skip = nullptr;     ///< (D)
  real* dt_bias = nullptr;  ///< (D)
  view<real, 3> initial{};  ///< (sequences, D, N)
  bool add = false;
};

/// Cuts of time that run side by side; the cuts after the first cost their exponentials twice.
/// 0: as many as fill the device. 1: a token's bits do not depend on the length of its sequence.
struct selective_options {
  index_t segments = 0;
  /// Channels of a warp of the forward pass with up to 16 states, 16 or 8. With 8 there are more
  /// warps and more traffic with shared memory. 0: chosen by the sizes.
  index_t warp_channels = 0;
};

/// Tokens between the states that a forward pass may keep for the backward pass.
inline constexpr index_t selective_checkpoint_tokens = 16;

/// Numbers in the optional buffer of states: (tokens / 16 + sequences, D, N).
template <class T>
[[nodiscard]] index_t selective_checkpoint_size(const selective_problem<T>& p) {
  return (p.tokens() / selective_checkpoint_tokens + p.sequences) * p.channels() * p.states();
}

template <class T>
[[nodiscard]] std::size_t selective_forward_workspace_bytes(const selective_problem<T>& p,
                                                            const selective_options& o = {});
template <class T>
[[nodiscard]] std::size_t selective_backward_workspace_bytes(const selective_problem<T>& p,
                                                             const selective_options& o = {});

/// @param y            (tokens, D), overwritten
/// @param final        (sequences, D, N) or absent; may be `initial`
/// @param checkpoints  selective_checkpoint_size numbers for the backward pass, or null
/// @throws shape_error  the sizes do not fit, or N is above 256.
/// @cost  tokens D N exponentials, about twice that where time is cut.
template <class T>
void selective_forward(cudaStream_t stream, const selective_problem<T>& p, view<T, 2> y,
                       view<accum_t<T>, 3> final, accum_t<T>* checkpoints, void* workspace,
                       const selective_options& o = {});

/// @param dy           (tokens, D)
/// @param d_final      (sequences, D, N) or absent
/// @param checkpoints  of the forward pass, or null: computed in the workspace
/// @throws shape_error  the sizes do not fit, or N is above 256.
/// @cost  2 tokens D N exponentials, one more where the checkpoints are absent or time is cut;
///        workspace: 2 N numbers for each token and 64 channels.
template <class T>
void selective_backward(cudaStream_t stream, const selective_problem<T>& p, view<const T, 2> dy,
                        view<const accum_t<T>, 3> d_final, const accum_t<T>* checkpoints,
                        const selective_gradients<T>& d, void* workspace,
                        const selective_options& o = {});

}  // namespace ssm::kernels::cuda
