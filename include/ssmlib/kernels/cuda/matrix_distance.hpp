#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

/// @file
/// How far two mixers' T x T matrices are from each other, tile by tile. The products of queries
/// and keys come from elsewhere (cuBLASLt); what makes entries of them, the distance and its
/// gradient is one kernel each, so that no matrix is ever whole in memory. All pointers are to
/// device memory; tokens count over the batch.

namespace ssm::kernels::cuda {

/// A rectangle of the matrices of `sequences` sequences of `length` tokens each, the first of which
/// begins at `token`: the rows [row, row + rows) and columns [column, column + columns) of each.
struct matrix_place {
  index_t token = 0, sequences = 1, length = 0;
  index_t row = 0, rows = 0, column = 0, columns = 0;

  [[nodiscard]] index_t entries() const { return sequences * rows * columns; }
};

enum class matrix_form {
  plain,          ///< entries are the products themselves
  semiseparable,  ///< alpha a[t, s] weight_s product for s <= t, + D for s = t
  softmax,        ///< exp(alpha product - log_sum_t) where the mask keeps s
};

/// The entries of one place: products, and what makes entries of them. An operand with G heads
/// serves head h of `heads` with its head h * G / heads.
template <Real R>
struct matrix_tile {
  matrix_form form = matrix_form::plain;
  const R* products = nullptr;
  std::array<index_t, 3> strides{};  ///< of products: by sequence, head, row; columns are dense
  int product_heads = 1, heads = 1;
  R alpha = 1;
  /// semiseparable: the decay a[t, s] is exp(decay_t - decay_s) where resets_t = resets_s, else 0;
  /// (tokens, decay_heads), or absent: 1
  const double* decay = nullptr;
  const std::int32_t* resets = nullptr;
  int decay_heads = 1;
  view<const R, 2> weight;  ///< (tokens, decay_heads), or absent: 1
  const R* diagonal = nullptr;
  int diagonal_heads = 1;
  /// softmax: (heads, tokens)
  const R* log_sum = nullptr;
  index_t tokens = 0;
  bool causal = false;
  index_t window = 0;  ///< keep t - window < s; 0: all
};

/// The sequences of a batch, as everywhere: offsets == nullptr for a rectangle.
struct matrix_sequences {
  const index_t* offsets = nullptr;
  index_t sequences = 0, max_length = 0;
};

/// sums[t, h] = log_a[first + 1, h] + ... + log_a[t, h] over t's sequence, -infinity left out and
/// counted in resets[t, h]. Both are (tokens, heads).
template <Real R>
void sum_log_decays(cudaStream_t stream, const matrix_sequences& s, view<const R, 2> log_a,
                    double* sums, std::int32_t* resets);
/// The same of log gamma[h] for each token.
template <Real R>
void sum_constant_decays(cudaStream_t stream, const matrix_sequences& s, view<const R, 1> gamma,
                         double* sums, std::int32_t* resets);

/// out[i, t, h, s] = the entries: (sequences, rows, heads, columns), dense.
template <Real R>
void matrix_entries(cudaStream_t stream, const matrix_place& place, const matrix_tile<R>& tile,
                    R* out);

/// Two matrices at one place. `heads` is the larger of their numbers of heads: head h of it is
/// compared.
template <Real R>
struct matrix_pair {
  matrix_place place;
  matrix_tile<R> student, teacher;
  int heads = 1;
};

/// squares[t, h] += the sum of (student - teacher)^2 over the place's part of row t; (tokens,
/// heads), each by one block and in one order.
template <Real R>
void add_matrix_distances(cudaStream_t stream, const matrix_pair<R>& p, double* squares);
/// norms[i, h] = the root of the sum of squares[t, h] over the tokens of sequence i.
template <Real R>
void matrix_norms(cudaStream_t stream, const matrix_sequences& s, int heads, const R* squares,
                  R* norms);
/// factors[i] = upstream / (count norms[i]), 0 where that norm is.
template <Real R>
void matrix_factors(cudaStream_t stream, index_t n, const double* norms, const R* upstream,
                    double count, R* factors);

/// What the gradients of a student's operands need beside products, all (tokens, its heads): with
/// d = the gradient of the entries and y = alpha a product d,
///   row       sum over s < t of y weight_s; for softmax the sum over s of d times the entry
///   column    sum over t > s of y
///   diagonal, d_diagonal    y and d of s = t
struct matrix_sums {
  double *row = nullptr, *column = nullptr, *diagonal = nullptr, *d_diagonal = nullptr;
};

template <class T>
struct matrix_gradient {
  using real = accum_t<T>;
  matrix_pair<real> pair;
  const real* factors;  ///< (sequences of the place, heads)
  matrix_sums sums;
  T* d_products;  ///< as pair.student.products; overwritten
};

/// Bytes that add_matrix_gradient works in.
template <class T>
[[nodiscard]] std::size_t matrix_gradient_workspace_bytes(const matrix_gradient<T>& g);
/// d_products = the gradient of the place's products for the gradient
/// d[t, s] = sum over h of factors[h] (student - teacher) of the entries, h the heads that share
/// the student's; adds to the sums, but for softmax, whose sums it reads.
template <class T>
void add_matrix_gradient(cudaStream_t stream, const matrix_gradient<T>& g, void* workspace);
/// Adds a softmax student's sums alone, which all places need before the first gradient.
template <class T>
void add_matrix_row_sums(cudaStream_t stream, const matrix_gradient<T>& g);

/// The gradients of the operands of a semiseparable matrix from the sums of all places, absent ones
/// skipped. d_log_a at u is the sum of y weight over all s < u <= t: a sum of whole rows less one
/// of whole columns, in double, so that what stands in both cancels.
template <Real R>
struct decay_gradients {
  int heads = 1;  ///< of the sums
  int decay_heads = 1;
  view<const R, 2> weight;       ///< (tokens, decay_heads), or absent
  view<const R, 1> gamma;        ///< (decay_heads), or absent
  view<R, 2> d_log_a, d_weight;  ///< (tokens, decay_heads)
  view<R, 1> d_gamma;            ///< (decay_heads)
  view<R, 1> d_diagonal;         ///< (any number of heads)
};
/// Overwrites them.
template <Real R>
void finish_decay_gradients(cudaStream_t stream, const matrix_sequences& s, index_t tokens,
                            const matrix_sums& sums, const decay_gradients<R>& g);

/// Outputs of two layers, (tokens, features), as hidden-state alignment compares them.
template <class T>
struct state_pair {
  view<const T, 2> student, teacher;
};
/// distances[t] = || student_t - teacher_t ||_2
template <class T>
void state_distances(cudaStream_t stream, const state_pair<T>& p, double* distances);
/// d_student += f_t (student_t - teacher_t), d_teacher -= it, with f_t = upstream / (count
/// distances[t]), 0 where that distance is. Either may be absent.
template <class T>
void state_distances_vjp(cudaStream_t stream, const state_pair<T>& p, const double* distances,
                         const accum_t<T>* upstream, double count, view<T, 2> d_student,
                         view<T, 2> d_teacher);

}  // namespace ssm::kernels::cuda
