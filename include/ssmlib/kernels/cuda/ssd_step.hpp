#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

namespace ssm::kernels::cuda {

/// The last inputs of every sequence: the one at position p lies in row p mod `rows`. Inputs before
/// position 0 are zeros, whatever is stored.
template <class T>
struct step_ring {
  view<T, 3> inputs;  // (sequences, rows, channels) before the convolution, unit inner stride
  view<T, 3> dt;      // (sequences, rows, heads), unit inner stride; where tokens are replayed
};

/// The next 1 to 16 tokens of every sequence through Mamba-2 between its two projections:
///
///     [x, B, C] = silu(conv(xbc)),   w = clamp(softplus(dt + dt_bias), low, high)
///     S = exp(a w) S + w B x^T,      y = (C^T S + d x) silu(z)
///
/// for every head h of `heads`, with S (key size x features) and B, C of group h * groups / heads.
/// Channels of xbc are x of every head, B of every group, C of every group. All pointers are to
/// device memory. Tokens are packed as offsets say; without offsets, `max_length` of each sequence.
template <class T, class S>
struct ssd_step_problem {
  using real = accum_t<T>;

  index_t heads = 0, groups = 1, features = 0, key_size = 0;
  index_t sequences = 0, max_length = 0;  // max_length: of the longest sequence, at least
  const index_t* offsets = nullptr;       // (sequences + 1) or absent

  view<const T, 2> xbc;  // (tokens, heads * features + 2 * groups * key_size), unit inner stride
  view<const T, 2> dt;   // (tokens, heads), unit inner stride
  view<const T, 2> z;    // (tokens, heads * features), unit inner stride, or absent: no gate
  const real* taps = nullptr;  // of tap j and channel c at j * tap_step + c * tap_channel; the last
                               // tap is for the token itself; 1 <= width
  index_t tap_step = 0, tap_channel = 1;  // a step of 0: the number of channels
  const real* conv_bias = nullptr;        // (channels) or absent
  index_t width = 4;
  bool activate = true;           // silu after the convolution
  const real* a = nullptr;        // (heads), < 0 for a stable recurrence
  bool a_is_log = false;          // `a` holds log(-a)
  const real* dt_bias = nullptr;  // (heads) or absent
  const real* d = nullptr;        // (heads) or absent
  real low = real(0), high = std::numeric_limits<real>::infinity();

  step_ring<T> ring;                  // rows >= width - 1 + max_length (+ max_pending)
  const index_t* position = nullptr;  // (sequences): tokens taken before this call
  view<S, 4> state;                   // (sequences, heads, key size, features), unit inner stride
  view<T, 2> y;                       // (tokens, heads * features), unit inner stride

  /// Rollback by snapshots: before the token at position p of sequence i is taken, the state goes
  /// to row (p mod slots) * sequences + i. Of a call's tokens, the last `slots` leave theirs.
  view<S, 4> snapshots;  // (slots * sequences, heads, key size, features), unit inner stride
  index_t slots = 0;

  /// Rollback by replay: the state stands pending[i] tokens before position[i], whose inputs are
  /// in the ring. They are applied and the state is stored; the new tokens then only leave their
  /// outputs and their inputs. Whoever accepts n of the new tokens sets pending to n and adds n to
  /// the position. Absent: the state after the new tokens is stored.
  const std::int32_t* pending = nullptr;  // (sequences)
  index_t max_pending = 0;                // at most 16

  /// Lets states, rings, positions, pending counts and parameters be read, and replayed tokens be
  /// taken, before the kernel ahead in the stream has finished. Set it where that kernel wrote none
  /// of them, as behind the projection of a model.
  bool early = false;
};

/// The outputs, new states and ring rows of ssd_step_problem.
///
/// A token's output and state have the same bits however its sequence is split into calls and
/// whatever else is in the batch: the operations of a token have one order, and a state of S is
/// rounded to S after every token. The state is read and written once a call, replay included.
/// Decays within 1/1024 of 1 are applied as S + (expm1(log a) S + w B x^T). Features and key sizes
/// (64, 64), (64, 128), (64, 256), (128, 128) with width <= 4 and 16-byte aligned states take the
/// kernel that holds the state in registers; all others the general one. Nothing is allocated and
/// the host does not wait: a graph can capture it; positions and pending counts are read on the
/// device.
/// @throws shape_error  sizes that do not fit together.
/// @throws value_error  more than 16 tokens, or a ring too short for them.
/// @cost   5 key_size features flops a token and head; reads and writes the state once.
/// @source Dao and Gu 2024, arXiv:2405.21060, section 6; replay: Wang et al. 2024,
///         arXiv:2408.15237, section 4.
template <class T, class S>
void ssd_step_forward(cudaStream_t stream, const ssd_step_problem<T, S>& p);

}  // namespace ssm::kernels::cuda
