#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Causal softmax attention of a few new tokens over cached keys and values.

namespace ssm::kernels::cuda {

/// Keys and values of the tokens so far: the token at position p of a sequence lies in row p mod
/// `rows`. With a window, rows >= window - 1 + new tokens of a call are enough; without, a row for
/// every token. Unit inner strides, any others: heads may lie before or behind the rows.
template <class T>
struct attention_cache {
  view<T, 4> keys;    ///< (sequences, rows, Hk, D)
  view<T, 4> values;  ///< (sequences, rows, Hv, P)
};

/// y = softmax(scale q k^T) v for the new tokens of every sequence over all its tokens so far, the
/// new ones up to itself included; head h of `heads` uses head h * G / heads of an operand with G
/// heads. Innermost strides are 1. All pointers are to device memory.
template <class T>
struct attention_decode_problem {
  view<const T, 3> q;  ///< (new tokens, Hq, D)
  view<const T, 3> k;  ///< (new tokens, Hk, D)
  view<const T, 3> v;  ///< (new tokens, Hv, P)
  index_t heads = 0;   ///< of the result
  attention_cache<T> cache;
  const index_t* position = nullptr;  ///< (sequences): tokens that each sequence has had
  const index_t* offsets = nullptr;   ///< sequences + 1; null: all have max_length new tokens
  index_t sequences = 0;
  index_t max_length = 0;  ///< new tokens of the longest sequence, at least
  index_t max_keys = 0;    ///< tokens of the longest sequence after the call, at least; 0: `rows`
  double scale = 1.0;
  index_t window = 0;  ///< keep t - window < s <= t; 0: all s <= t
};

/// Bytes of working memory of attention_decode, aligned to 256. Depends on sizes only.
template <class T>
[[nodiscard]] std::size_t attention_decode_workspace_bytes(const attention_decode_problem<T>& p);

/// Writes y (new tokens, heads, P), and the new keys and values to the cache; the positions are the
/// caller's to move.
///
/// Keys are cut into segments at fixed positions (256 tokens, from 4,096 on 512, from 32,768 on
/// 1,024), and the segments' results are added in an order that positions fix: a token has the same
/// bits however its sequence is split into calls and whatever else is in the batch. bf16 with D = P
/// in {32, 64, 96, 128, 192, 256} and 16-byte aligned rows of the cache takes the tensor cores, all
/// else a general kernel. The host does not wait and knows no position: a graph captured for
/// `max_keys` serves all of them up to there.
/// @pre    position + new tokens <= max_keys, and <= rows where there is no window
/// @throws shape_error, value_error  sizes that do not fit together, or a cache that is too short
/// @cost   reads each visible key and value once for up to 64 (32 where D > 128) query heads and
///         tokens that share it; workspace: P + 2 numbers a query head and segment
/// @source Dao et al. 2023, "Flash-Decoding for long-context inference"
template <class T>
void attention_decode(cudaStream_t stream, const attention_decode_problem<T>& p, view<T, 3> y,
                      void* workspace);

}  // namespace ssm::kernels::cuda
