#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

/// @file
/// Products with causal Toeplitz matrices L[t, s] = kernel[t - s] on CUDA, by themselves or over a
/// gram matrix:
///
///     y = L x,     y = (L o alpha Q K^T) x
///
/// in tiles for short sequences, through Fourier transforms for long ones. A transform mixes all
/// tokens of a sequence, so its rounding error is relative to the largest values of a column, and
/// outputs before a changed token agree to rounding, not to the bit.
///
/// The definitions need cuFFT: what includes toeplitz.cuh links with it.

namespace ssm::kernels::cuda {

enum class toeplitz_path {
  automatic,  ///< by the sizes
  direct,     ///< in tiles
  transforms
};

/// Head h of `heads` uses head h * G / heads of an operand with G heads. Views of tokens have a
/// unit inner stride.
template <class T>
struct toeplitz_problem {
  view<const accum_t<T>, 2> kernel;  ///< (G, distances), at least max_length distances
  view<const T, 3> x;                ///< (tokens, G, P)
  view<const T, 3> q{}, k{};         ///< (tokens, G, N); absent: the matrix is L itself
  accum_t<T> alpha = accum_t<T>(1);  ///< of alpha q . k
  index_t heads = 0;
  const index_t* offsets = nullptr;  ///< sequences + 1 tokens, on the device; null: rectangular
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of the longest sequence, at least
  /// The numbers of `offsets` where the host can read them, or null. With them a sequence gets
  /// transforms of its own size, with plans for each size and count; without, all get transforms of
  /// max_length.
  const index_t* host_offsets = nullptr;
  toeplitz_path path = toeplitz_path::automatic;
};

/// Gradients; absent ones are not computed. Overwritten, or added to where `add` is set. x, q, k
/// are (tokens, G, features) for any G that divides the heads: the heads of a group are summed.
template <class T>
struct toeplitz_gradients {
  view<accum_t<T>, 2> kernel{};  ///< as the problem's kernel; zeros beyond the longest sequence
  view<T, 3> x{}, q{}, k{};
  bool add = false;
};

/// Plans of Fourier transforms, made when first asked for and kept: a cache for one device and one
/// stream at a time, which the caller owns. R is float or double.
template <class R>
class toeplitz_plans {
 public:
  /// `batch` transforms of `size` reals, each in place in size + 2 reals.
  struct plan {
    bool inverse;
    index_t size, batch;
    int handle;
    std::size_t workspace;  // bytes
  };

  toeplitz_plans() = default;
  toeplitz_plans(toeplitz_plans&& other) noexcept;
  toeplitz_plans& operator=(toeplitz_plans&& other) noexcept;
  ~toeplitz_plans();

  /// @throws backend_error  cuFFT cannot make the plan.
  const plan& get(bool inverse, index_t size, index_t batch);

 private:
  std::vector<plan> plans_;
};

/// Bytes of device memory that toeplitz_product works in; makes the plans that it needs.
template <class T>
[[nodiscard]] std::size_t toeplitz_product_workspace_bytes(const toeplitz_problem<T>& p,
                                                           toeplitz_plans<accum_t<T>>& plans);

/// y (tokens, heads, P) is overwritten in the rows of sequences. Sums and transforms are float, for
/// double double. The host does not wait, and once toeplitz_product_workspace_bytes has made the
/// plans nothing is allocated: then a graph can capture it.
/// @param workspace  toeplitz_product_workspace_bytes(p, plans) bytes, aligned to 256
/// @throws shape_error, backend_error  sizes that do not fit; cuFFT fails.
/// @cost   direct: T^2 (N + P) flops a head; transforms: O(T log T) a column of x, N columns for
///         each over a gram matrix, and some 100 MB of working memory (more where N columns do
///         not fit)
template <class T>
void toeplitz_product(cudaStream_t stream, const toeplitz_problem<T>& p, view<T, 3> y,
                      toeplitz_plans<accum_t<T>>& plans, void* workspace);

template <class T>
[[nodiscard]] std::size_t toeplitz_product_vjp_workspace_bytes(const toeplitz_problem<T>& p,
                                                               const toeplitz_gradients<T>& g,
                                                               toeplitz_plans<accum_t<T>>& plans);

/// dx = L^T dy, dkernel[d] = the sum over t and columns of dy[t] x[t - d], and over a gram matrix
/// the gradients of q and k as well.
template <class T>
void toeplitz_product_vjp(cudaStream_t stream, const toeplitz_problem<T>& p, view<const T, 3> dy,
                          const toeplitz_gradients<T>& g, toeplitz_plans<accum_t<T>>& plans,
                          void* workspace);

}  // namespace ssm::kernels::cuda
