#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ssm::kernels::cuda {

/// The next token of every row of logits: the most likely one (the first of equals) at temperature
/// 0, else a draw from the softmax of logits / temperature after the filters top_k, top_p and
/// min_p, in this order. All pointers are to device memory.
template <class T>
struct sample_problem {
  view<const T, 2> logits;  // (rows, vocabulary), unit inner stride; finite
  float temperature = 0;
  index_t top_k = 0;   // keep the k most likely, of equals the first; 0: all
  double top_p = 1.0;  // keep the fewest tokens whose probabilities reach p
  double min_p = 0.0;  // drop tokens less likely than min_p times the most likely
  std::uint64_t seed = 0;
  const index_t* sequence = nullptr;  // (rows) that a draw is for, or absent: the row
  const index_t* position = nullptr;  // (rows) that a draw is for, or absent: 0
  int purpose = 0;                    // 0 to 3, of the draw: independent draws of one position
  std::int32_t* tokens = nullptr;     // (rows)
};

/// Tokens of sample_problem.
///
/// The draw is the number that random_draw(seed, sequence, position, purpose) names. Weights are
/// float exponentials in fixed point, 2^-44 of the most likely one, and their sums are exact: the
/// same logits give the same token whatever the batch. Nothing is allocated and the host does not
/// wait: a graph can capture it.
/// @throws shape_error  no vocabulary, or 2^31 entries.
/// @throws value_error  an option outside its range.
/// @cost   one pass over the logits at temperature 0, about 12 with all filters.
template <class T>
void sample_forward(cudaStream_t stream, const sample_problem<T>& p);

/// What a step of `tokens` new tokens a sequence leaves for the next one and for sampling:
///
///     position[i] += tokens,   row i * tokens + j is of sequence i at position[i] - tokens + j + 1
///
/// @param position       (sequences)
/// @param row_sequence   (sequences * tokens)
/// @param row_position   (sequences * tokens): how many tokens there are before the row's draw
template <class Index>
void count_tokens(cudaStream_t stream, Index* position, index_t sequences, index_t tokens,
                  Index* row_sequence, Index* row_position);

}  // namespace ssm::kernels::cuda
