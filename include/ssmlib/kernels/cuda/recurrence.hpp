#pragma once

#include <ssmlib/kernels/cuda/ssd.hpp>

#include <cuda_runtime_api.h>

#include <cstdint>

/// @file
/// The scalar-gated recurrence of ssd_problem token by token: for advancing a state by a few
/// tokens, and as the evaluation whose bits do not depend on how a sequence is cut.

namespace ssm::kernels::cuda {

/// A ring of states for rollback: before the token at position p of sequence i is taken, the state
/// goes to row (p mod slots) * sequences + i. Of a call's tokens, the last `slots` leave theirs.
template <class T>
struct recurrence_snapshots {
  view<accum_t<T>, 4> ring;  // (slots * sequences, heads, key size, features), unit inner stride
  index_t slots = 0;
  const index_t* first_position = nullptr;  // (sequences), on the device; absent: 0
};

/// What the latest tokens did to the state, for rollback by replay: the factors of the token at
/// position p are in row p mod `rows`. Inner strides of k and x are 1; groups are the operands'.
template <class T>
struct recurrence_replay {
  using real = accum_t<T>;

  view<T, 4> k;                           // (sequences, rows, groups, key size)
  view<T, 4> x;                           // (sequences, rows, groups, features)
  view<real, 3> log_a;                    // (sequences, rows, groups of log_a or dt), if either
  view<real, 3> weight;                   // (sequences, rows, groups of weight or dt), if either
  const index_t* position = nullptr;      // (sequences): tokens that were accepted, on the device
  const std::int32_t* pending = nullptr;  // (sequences): those of them that the state lacks
  index_t max_pending = 0;
};

/// y (tokens, heads, features) and the final states of ssd_problem.
///
/// A token's output and state have the same bits however its sequence is split into calls, whatever
/// else is in the batch and wherever the operands lie: the sum over keys is a tree that the key
/// size fixes. Decays within 1/1024 of 1 are applied as S + (expm1(log a) S + w k x^T); a decay of
/// 0 forgets infinities too. The state is read once and written once a call. Nothing is allocated
/// and the host does not wait: a graph can capture it; offsets and positions are read on the
/// device.
/// @throws shape_error  sizes that do not fit together, or a key size above 8,192
/// @cost   5 key_size features flops a token and head, one token after the other
template <class T>
void linear_recurrence(cudaStream_t stream, const ssd_problem<T>& p, view<T, 3> y,
                       const ssd_states<T>& states, const recurrence_snapshots<T>& snapshots = {});

/// The same from a state that lacks the last pending[i] accepted tokens of sequence i: these are
/// applied from their stored factors, the state is stored, and then the new tokens leave their
/// outputs and their factors, but not their state. Whoever accepts n of the new tokens sets pending
/// to n and adds n to the position. The bits are those of linear_recurrence.
/// @param state  (sequences, heads, key size, features), unit inner stride
/// @throws value_error  rings shorter than max_pending + max_length rows.
/// @source Wang et al. 2024, arXiv:2408.15237, section 4.
template <class T>
void linear_recurrence_replay(cudaStream_t stream, const ssd_problem<T>& p, view<T, 3> y,
                              view<accum_t<T>, 4> state, const recurrence_replay<T>& replay);

}  // namespace ssm::kernels::cuda
