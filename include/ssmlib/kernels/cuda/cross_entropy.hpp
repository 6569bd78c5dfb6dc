#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

/// @file
/// Losses of rows of logits on CUDA: log-sums, gradients of the softmax, divergences. What is kept
/// of a row is double. Rows have unit inner stride and any outer one; all pointers are to device
/// memory.

namespace ssm::kernels::cuda {

/// Logits and the targets of their rows.
template <class T>
struct cross_entropy_problem {
  view<const T, 2> logits;                ///< (tokens, V)
  const std::int32_t* targets = nullptr;  ///< (tokens)
  std::int32_t ignore_index = -100;       ///< rows with this target do not count
  accum_t<T> scale = 1;                   ///< > 0, multiplies the logits: 1 / temperature
};

/// What a row's gradient is multiplied by: factor values[t step] / divisor.
template <class R>
struct row_factor {
  const R* values;                  ///< (tokens), or one number
  index_t step = 0;                 ///< 1: a number a token, 0: one for all
  double factor = 1;                ///< of the host
  const double* divisor = nullptr;  ///< one number, such as the counted tokens; below 1 it is 1
};

/// log_sum = log(sum of e^(scale z)), log_probability = scale z[target] - log_sum; zeros where the
/// row does not count, NaN where the target is outside the row.
/// @param log_sum, log_probability  (tokens), either may be null
/// @throws value_error  the scale is not positive.
/// @cost   one pass over the logits of counted rows.
template <class T>
void cross_entropy(cudaStream_t stream, const cross_entropy_problem<T>& p, double* log_sum,
                   double* log_probability);

/// d_logits = g (softmax(scale z) - onehot(target)), zeros where the row does not count.
/// @param log_sum   of cross_entropy
/// @param d_logits  (tokens, V); may be the logits themselves unless `add` is set
/// @throws shape_error  the sizes do not fit. @throws value_error  `add` into the logits.
template <class T>
void cross_entropy_vjp(cudaStream_t stream, const cross_entropy_problem<T>& p,
                       const double* log_sum, const row_factor<accum_t<T>>& g, view<T, 2> d_logits,
                       bool add);

/// Two models' logits of the same tokens; of different vocabularies the common first entries count.
template <class T>
struct kl_divergence_problem {
  view<const T, 2> student, teacher;   ///< (tokens, V), (tokens, V')
  const std::int32_t* mask = nullptr;  ///< (tokens), 0 does not count; absent: all count
  accum_t<T> scale = 1;                ///< > 0, of both: 1 / temperature
};

/// What the backward pass needs, (tokens) each; zeros where the row does not count.
struct kl_divergence_rows {
  double *student_log_sum, *teacher_log_sum;
  double* divergence;  ///< KL(teacher || student)
};

/// The log-sums and divergences of all rows.
/// @throws shape_error  the numbers of tokens differ. @throws value_error  the scale is not > 0.
/// @cost   one pass over the logits of both.
template <class T>
void kl_divergence(cudaStream_t stream, const kl_divergence_problem<T>& p,
                   const kl_divergence_rows& rows);

/// d_student = g (p_student - p_teacher) and
/// d_teacher = g p_teacher (log p_teacher - log p_student - KL), which are the gradients with
/// respect to scale z: the caller's g holds the scale. Zeros beyond the common vocabulary.
/// @param d_student, d_teacher  as the logits, or absent; may be the logits unless `add` is set
/// @throws shape_error  the sizes do not fit. @throws value_error  `add` into the logits.
template <class T>
void kl_divergence_vjp(cudaStream_t stream, const kl_divergence_problem<T>& p,
                       const kl_divergence_rows& rows, const row_factor<accum_t<T>>& g,
                       view<T, 2> d_student, view<T, 2> d_teacher, bool add);

/// Numbers of tokens, of which those with a target and a mask that is not 0 count.
template <class R>
struct token_values {
  const R* values;  ///< (tokens)
  index_t tokens;
  const std::int32_t* targets = nullptr;  ///< (tokens), or absent
  std::int32_t ignore_index = -100;
  const std::int32_t* mask = nullptr;  ///< (tokens), or absent
};

/// Where sums go, one double each; any but `sum` and `count` may be null.
struct token_sums {
  double *sum, *count;
  double* loss = nullptr;  ///< loss_factor sum / divisor
  double factor = 1;       ///< of the sum: -1 for log probabilities
  double loss_factor = 1;  ///< temperature^2 for distillation
  double divide_by = 0;    ///< the divisor; 0: the count, at least 1
  bool add = false;        ///< to the sum and the count that are there
};

template <class R>
[[nodiscard]] std::size_t sum_tokens_workspace_bytes(const token_values<R>& v);

/// The sum over the tokens that count, and their number, in an order that `tokens` fixes.
template <class R>
void sum_tokens(cudaStream_t stream, const token_values<R>& v, const token_sums& to,
                void* workspace);

/// to[i] = the sum over the counted tokens of sequence i.
/// @param offsets  (sequences + 1) tokens; null: sequences of tokens / sequences each
template <class R>
void sum_sequences(cudaStream_t stream, const token_values<R>& v, const index_t* offsets,
                   index_t sequences, double* to);

}  // namespace ssm::kernels::cuda
