#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/rung.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Softmax attention on CUDA: the problem, and the functions that launch its kernels.
///
/// Query i of a sequence with n queries and m keys stands at position i + m - n among the keys, so
/// that a continuation sees all earlier keys.

namespace ssm::kernels::cuda {

/// y = softmax(scale q k^T + mask) v for packed sequences; head h of `heads` uses head h * G /
/// heads of an operand with G heads. Innermost strides are 1.
template <class T>
struct attention_problem {
  view<const T, 3> q;                ///< (query tokens, Hq, D)
  view<const T, 3> k;                ///< (key tokens, Hk, D)
  view<const T, 3> v;                ///< (key tokens, Hv, P)
  index_t heads = 0;                 ///< of the result
  const index_t* offsets = nullptr;  ///< device, sequences + 1; null: all have max_length queries
  const index_t* key_offsets = nullptr;  ///< the same for keys; null: as the queries'
  index_t sequences = 0;
  index_t max_length = 0;      ///< queries of the longest sequence
  index_t max_key_length = 0;  ///< keys of the longest sequence; 0: max_length
  double scale = 1.0;
  bool causal = false;
  index_t window = 0;        ///< keep t - window < s <= t; 0: all s <= t. With `causal` only.
  rung most = rung::sm_90a;  ///< the launch takes the highest rung at most this that fits
};

/// Softmax statistics: float, and double for double.
template <class T>
using attention_stat = accum_t<T>;

/// Writes y (query tokens, heads, P), rounded once, and, unless absent, log_sum (heads, query
/// tokens): each row's log of the sum of the exponentials of its logits, which the backward takes.
/// A query without keys gets zeros and -infinity.
///
/// The tensor cores' rungs take bf16 with rows of whole 16-byte pieces, a positive scale and head
/// sizes up to 256; everything else is the general kernels'.
///
/// @throws shape_error, value_error  sizes or options that do not fit together
/// @cost   4 heads D flops a kept (query, key) pair; no working memory
/// @source Dao et al. 2022, arXiv:2205.14135; Shah et al. 2024, arXiv:2407.08608 (the sm_90a rung).
template <class T>
void attention_forward(cudaStream_t stream, const attention_problem<T>& problem, view<T, 3> y,
                       view<attention_stat<T>, 2> log_sum);

/// Bytes of working memory that attention_backward needs, aligned to 256.
template <class T>
[[nodiscard]] std::size_t attention_backward_workspace_bytes(const attention_problem<T>& problem);

/// Writes the gradients of sum(dy * y); an absent one is skipped. Each element's sum has one fixed
/// order: repeats give the same bits. The tensor cores' rungs take head sizes up to 128, a head of
/// q for every result head, and as many heads of k as of v.
///
/// @param y, log_sum  results of attention_forward
/// @throws shape_error, value_error  as attention_forward
/// @cost   14 heads D flops a kept (query, key) pair: products are repeated instead of added in
///         an order that varies; working memory two numbers a query and head
template <class T>
void attention_backward(cudaStream_t stream, const attention_problem<T>& problem,
                        view<const T, 3> y, view<const attention_stat<T>, 2> log_sum,
                        view<const T, 3> dy, view<T, 3> dq, view<T, 3> dk, view<T, 3> dv,
                        void* workspace);

}  // namespace ssm::kernels::cuda
