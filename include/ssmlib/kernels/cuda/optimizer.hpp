#pragma once

#include <ssmlib/base/types.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

/// @file
/// What an optimiser does to all tensors of a model, in one launch: the caller keeps a table of the
/// tensors in device memory. A block has 8192 values of one tensor.
///
///     std::vector<adamw_tensor<float>> table = ...;
///     std::vector<index_t> first = first_pieces(table);   // both are copied to the device, once
///     tensor_table<adamw_tensor<float>> t{device_table, device_first, table.size(), first.back()};

namespace ssm::kernels::cuda {

inline constexpr index_t tensor_piece = 8192;  ///< values

/// A list of tensors that one launch works on.
template <class Entry>
struct tensor_table {
  const Entry* tensors;   ///< (count), on the device
  const index_t* first;   ///< first_pieces of them, (count + 1), on the device
  index_t count, pieces;  ///< pieces: the last of `first`
};

/// The number of each tensor's first piece, and of all pieces.
template <class Entry>
[[nodiscard]] std::vector<index_t> first_pieces(const std::vector<Entry>& tensors) {
  std::vector<index_t> first{0};
  for (const Entry& t : tensors)
    first.push_back(first.back() + (t.size + tensor_piece - 1) / tensor_piece);
  return first;
}

/// A parameter with its gradient and moments, all dense.
template <Real R>
struct adamw_tensor {
  const R* gradient;
  R *first, *second, *value;
  bf16* copy;  ///< of the new values, or null
  index_t size;
  bool decays;
};

/// The constants of one AdamW step, as kernels/cpu/optimizer.hpp has them.
template <Real R>
struct adamw_step {
  R beta1, beta2;
  R rest1, rest2;  ///< 1 - beta1 and 1 - beta2, each rounded once
  R keep;          ///< 1 - learning rate * weight decay, for tensors that decay
  R rate;          ///< learning rate / (1 - beta1^t)
  R root_factor;   ///< 1 / sqrt(1 - beta2^t)
  R epsilon;
};

/// m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
/// w = keep w - rate m / (root_factor sqrt(v) + epsilon); g is scaled first. Every operation
/// rounds as the CPU's with fused multiply-adds does. Nothing changes if the scale is not finite.
/// @param gradient_scale  one number on the device, or null: 1
/// @cost  4 reads and 3 writes a value.
template <Real R>
void adamw(cudaStream_t stream, const tensor_table<adamw_tensor<R>>& t, const adamw_step<R>& step,
           const double* gradient_scale);

/// Where the norm of the gradients goes, one number on the device each; any may be null.
struct gradient_norm_result {
  double* sum_of_squares = nullptr;
  double* norm = nullptr;            ///< |scale| sqrt(sum_of_squares)
  double* gradient_scale = nullptr;  ///< scale min(1, largest / norm); NaN if norm is not finite
  double factor = 1;                 ///< scale is factor / divisor
  const double* divisor = nullptr;   ///< such as the counted tokens; where it is 0 the scale is 0
  double largest = 0;                ///< 0: no limit
};

template <Real R>
[[nodiscard]] std::size_t gradient_norm_workspace_bytes(const tensor_table<adamw_tensor<R>>& t);

/// The norm of all gradients as one vector, in double and in an order that the sizes fix.
/// @cost  one read a value.
template <Real R>
void gradient_norm(cudaStream_t stream, const tensor_table<adamw_tensor<R>>& t,
                   const gradient_norm_result& to, void* workspace);

/// A tensor and its copy of another type, such as master weights and working weights.
template <class From, class To>
struct cast_tensor {
  const From* from;
  To* to;
  index_t size;
};

/// to = from, rounded to nearest, for all tensors.
template <class From, class To>
void cast_tensors(cudaStream_t stream, const tensor_table<cast_tensor<From, To>>& t);

}  // namespace ssm::kernels::cuda
