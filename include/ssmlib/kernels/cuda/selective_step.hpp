#pragma once

#include <ssmlib/kernels/cuda/selective.hpp>

#include <cuda_runtime_api.h>

/// @file
/// The selective scan of Mamba-1 token by token: for advancing a state by a few tokens, and as the
/// evaluation whose bits do not depend on how a sequence is cut.

namespace ssm::kernels::cuda {

/// A ring of states for rollback: before the token at position p of sequence i is taken, the state
/// goes to row (p mod slots) * sequences + i. Of a call's tokens, the last `slots` leave theirs.
template <class T>
struct selective_snapshots {
  view<accum_t<T>, 3> ring;  ///< (slots * sequences, D, N)
  index_t slots = 0;
  const index_t* first_position = nullptr;  ///< (sequences), on the device; absent: 0
};

/// y and the final states of selective_problem.
///
/// A token's output and state have the same bits however its sequence is split into calls and
/// whatever else is in the batch: the sum over states is a tree that N fixes. The state is read
/// once and written once a call. Nothing is allocated and the host does not wait: a graph can
/// capture it; offsets and positions are read on the device.
/// @param y      (tokens, D), unit inner stride, overwritten
/// @param final  (sequences, D, N) or absent; may be `initial`
/// @throws shape_error  the sizes do not fit, or N is above 1,024.
/// @cost   tokens D N exponentials, one token after the other
template <class T>
void selective_recurrence(cudaStream_t stream, const selective_problem<T>& p, view<T, 2> y,
                          view<accum_t<T>, 3> final, const selective_snapshots<T>& snapshots = {});

}  // namespace ssm::kernels::cuda
