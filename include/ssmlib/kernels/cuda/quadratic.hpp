#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

/// @file
/// Masked products of a gram matrix by their definition, and the gram matrix by associativity, on
/// CUDA:
///
///     y = (L o alpha Q K^T) x,     y = alpha Q (K^T x)
///
/// The T x T matrix exists tile by tile in shared memory only. These are the references for other
/// algorithms, and what serves masks that have none.

namespace ssm::kernels::cuda {

/// For packed sequences: head h of `heads` uses head h * G / heads of an operand with G heads.
/// Views are (tokens, G, features) with a unit inner stride.
template <class T>
struct quadratic_problem {
  view<const T, 3> q{}, k{};  ///< both absent, with a mask: the matrix is the mask itself
  view<const T, 3> x;
  accum_t<T> alpha = accum_t<T>(1);
  index_t heads = 0;
  const index_t* offsets = nullptr;  ///< sequences + 1 tokens, on the device; null: rectangular
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of the longest sequence, at least
};

/// With d = t - s, and 0 for d < 0 except in `none`:
enum class quadratic_mask_kind {
  none,           ///< 1 everywhere
  causal,         ///< 1
  window,         ///< 1 for d < window
  decay,          ///< gamma^d
  semiseparable,  ///< exp(log_a[s + 1] + ... + log_a[t]) weight[s]
  toeplitz        ///< kernel[d]
};

/// Entries L[t, s] of a mask; heads are shared as those of the operands.
template <class T>
struct quadratic_mask {
  using real = accum_t<T>;

  quadratic_mask_kind kind = quadratic_mask_kind::none;
  index_t window = 0;            ///< at least 1
  view<const real, 1> gamma{};   ///< (G), in [0, 1]
  view<const real, 2> log_a{};   ///< (tokens, G), at most 0; below -10,000 as -10,000
  view<const real, 2> weight{};  ///< (tokens, G), or absent: 1
  view<const real, 2> kernel{};  ///< (G, distances), at least max_length distances
};

/// Gradients; absent ones are not computed. Overwritten, or added to where `add` is set. q, k, x
/// are (tokens, G, features) for any G that divides the heads: the heads of a group are summed.
template <class T>
struct quadratic_gradients {
  using real = accum_t<T>;

  view<T, 3> q{}, k{}, x{};
  view<real, 1> gamma{};            ///< as the mask's operands
  view<real, 2> log_a{}, weight{};  ///< absent where the mask's operand is
  view<real, 2> kernel{};
  bool add = false;
};

/// Bytes of device memory that masked_quadratic works in.
template <class T>
[[nodiscard]] std::size_t masked_quadratic_workspace_bytes(const quadratic_problem<T>& p,
                                                           const quadratic_mask<T>& mask);

/// y = (L o alpha Q K^T) x; y (tokens, heads, P) is overwritten in the rows of sequences.
///
/// Sums are float, for double double, in an order that the sizes fix; running sums of log decays
/// are double for every type. Nothing is allocated and the host does not wait.
/// @param workspace  masked_quadratic_workspace_bytes(p, mask) bytes, aligned to 256
/// @throws shape_error, value_error  operands that do not fit together, or that the mask lacks
/// @cost   2 (N + P) flops a head and pair of tokens in a 64 x 64 tile that is not all zeros (32 x
///         32 for double), without matrix instructions
template <class T>
void masked_quadratic(cudaStream_t stream, const quadratic_problem<T>& p,
                      const quadratic_mask<T>& mask, view<T, 3> y, void* workspace);

template <class T>
[[nodiscard]] std::size_t masked_quadratic_vjp_workspace_bytes(const quadratic_problem<T>& p,
                                                               const quadratic_mask<T>& mask,
                                                               const quadratic_gradients<T>& g);

/// The gradients of sum(dy * y) for the operands and for the mask's numbers. The gradient of a log
/// decay is a sum over the pairs of tokens on its two sides.
/// @cost   each of q, k, x as the forward; the mask's numbers 2 (N + P) flops a pair
template <class T>
void masked_quadratic_vjp(cudaStream_t stream, const quadratic_problem<T>& p,
                          const quadratic_mask<T>& mask, view<const T, 3> dy,
                          const quadratic_gradients<T>& g, void* workspace);

/// Bytes of device memory that gram_associative and gram_associative_vjp work in.
template <class T>
[[nodiscard]] std::size_t gram_associative_workspace_bytes(const quadratic_problem<T>& p);

/// y = alpha Q (K^T x) for every sequence and head, not causal; y is overwritten.
/// @cost   4 N P flops a token and head; N P numbers a sequence and head of working memory
template <class T>
void gram_associative(cudaStream_t stream, const quadratic_problem<T>& p, view<T, 3> y,
                      void* workspace);

/// The gradients for q, k and x.
template <class T>
void gram_associative_vjp(cudaStream_t stream, const quadratic_problem<T>& p, view<const T, 3> dy,
                          const quadratic_gradients<T>& g, void* workspace);

}  // namespace ssm::kernels::cuda
