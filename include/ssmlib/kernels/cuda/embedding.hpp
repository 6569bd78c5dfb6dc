#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>

namespace ssm::kernels::cuda {

/// position = that of the first id outside [0, limit) which is not `ignored`, or -1; one number on
/// the device.
/// @param ids  (n), on the device
template <class I>
void first_id_outside(cudaStream_t stream, const I* ids, index_t n, index_t limit,
                      std::optional<I> ignored, std::int64_t* position);

/// y[t, :] = table[ids[t], :]; a row of NaN where the id is outside the table, which
/// first_id_outside finds.
/// @param table  (vocabulary, width), unit inner stride, of T or of float master weights
/// @param ids    (tokens), on the device
/// @param y      (tokens, width), unit inner stride
/// @throws shape_error  the widths differ.
template <class T, class S>
void embedding(cudaStream_t stream, view<const S, 2> table, const std::int32_t* ids, view<T, 2> y);

template <class T>
struct embedding_vjp_problem {
  const std::int32_t* ids;  ///< (tokens), on the device; ids outside the table take no part
  view<const T, 2> dy;      ///< (tokens, width), unit inner stride
};

/// About 16 bytes a token and a sixteenth of dy's size in accum_t<T>.
template <class T>
[[nodiscard]] std::size_t embedding_vjp_workspace_bytes(const embedding_vjp_problem<T>& p,
                                                        index_t vocabulary);

/// d_table[ids[t], :] += dy[t, :]. Tokens are sorted by id, equal ids in order; each 32 neighbours
/// of the sorted list are summed in order, and the sums of an id in order again: the ids fix the
/// result to the last bit.
/// @param d_table  (vocabulary, width), unit inner stride
/// @param add      else the table is zero before
/// @throws shape_error  the widths differ, or 2^31 tokens.
/// @cost   dy is read once; rows of the table that tokens have are read and written once.
template <class T>
void embedding_vjp(cudaStream_t stream, const embedding_vjp_problem<T>& p,
                   view<accum_t<T>, 2> d_table, bool add, void* workspace);

}  // namespace ssm::kernels::cuda
