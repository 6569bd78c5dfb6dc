#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

/// @file
/// What losses on CUDA do with their sums: a few numbers a token or a sequence, so that no loss
/// waits for the host. All pointers are to device memory.

namespace ssm::kernels::cuda {

/// to[i] = factor from[i] / divisor for i in [0, n), rounded once; never a negative zero.
template <Real R>
void scale_values(cudaStream_t stream, index_t n, const double* from, double factor, double divisor,
                  R* to);

/// to[i] = from[index[i]] for i in [0, n).
template <Real R>
void gather_values(cudaStream_t stream, index_t n, const R* from, const std::int32_t* index, R* to);

/// to[i] = factor[0] from[i], or with `add` += that, for i in [0, n); the factor is on the device.
/// @cost  16 bytes at a time where the addresses allow it.
template <Floating T>
void scale_gradient(cudaStream_t stream, index_t n, const T* from, const accum_t<T>* factor, T* to,
                    bool add);

/// Log probabilities of pairs of answers: of the chosen and rejected by the policy, then by the
/// reference.
template <Real R>
struct preference_problem {
  std::array<view<const R, 1>, 4> scores;  ///< (pairs) each
  double beta;
};

/// margins = beta ((policy's chosen - reference's) - (policy's rejected - reference's)),
/// loss = the mean over pairs of -log sigmoid(margin), summed in an order that their number fixes.
/// @param margins  (pairs). @param loss  one number
template <Real R>
void preference(cudaStream_t stream, const preference_problem<R>& p, double* margins, R* loss);

/// Adds the gradients of d_loss times the loss. @param d_scores  as the scores; any may be absent
template <Real R>
void preference_vjp(cudaStream_t stream, index_t pairs, double beta, const double* margins,
                    const R* d_loss, const std::array<view<R, 1>, 4>& d_scores);

}  // namespace ssm::kernels::cuda
