#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/optimizer.hpp>
#include <ssmlib/kernels/cuda/rows.cuh>

namespace ssm::kernels::cuda {

namespace detail {

/// A block's piece of a tensor.
template <class Entry>
struct tensor_part {
  Entry tensor;
  index_t begin;
  int size;

  /// All threads look at some of the tensors, so that finding one takes one round trip to memory.
  SSMLIB_DEVICE static tensor_part of(const tensor_table<Entry>& t, index_t piece) {
    __shared__ index_t found;
    for (index_t i = threadIdx.x; i < t.count; i += row_threads)
      if (t.first[i] <= piece && piece < t.first[i + 1]) found = i;
    __syncthreads();
    tensor_part r;
    r.tensor = t.tensors[found];
    r.begin = (piece - t.first[found]) * tensor_piece;
    r.size = static_cast<int>(min(tensor_piece, r.tensor.size - r.begin));
    return r;
  }
};

SSMLIB_DEVICE bool is_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

/// The products are kept from being fused with anything but what the CPU fuses.
SSMLIB_DEVICE float product(float x, float y) {
  return __fmul_rn(x, y);
}
SSMLIB_DEVICE double product(double x, double y) {
  return __dmul_rn(x, y);
}
SSMLIB_DEVICE float exact_ratio(float x, float y) {
  return __fdiv_rn(x, y);
}
SSMLIB_DEVICE double exact_ratio(double x, double y) {
  return __ddiv_rn(x, y);
}
SSMLIB_DEVICE float exact_root(float x) {
  return __fsqrt_rn(x);
}
SSMLIB_DEVICE double exact_root(double x) {
  return __dsqrt_rn(x);
}

template <class R>
SSMLIB_DEVICE void adamw_update(const adamw_step<R>& c, R scale, R keep, R g, R& m, R& v, R& w) {
  g = product(g, scale);
  m = fma(c.beta1, m, product(c.rest1, g));
  v = fma(c.beta2, v, product(product(c.rest2, g), g));
  const R size = fma(c.root_factor, exact_root(v), c.epsilon);
  w = fma(-c.rate, exact_ratio(m, size), product(keep, w));
}

/// Unroll times Count values of a thread, on their way at once.
template <int Count, int Unroll, class R>
SSMLIB_DEVICE void adamw_piece(const tensor_part<adamw_tensor<R>>& p, const adamw_step<R>& c,
                               R scale) {
  using values = numbers<R, Count>;
  const R keep = p.tensor.decays ? c.keep : R(1);
  const R* gradient = p.tensor.gradient + p.begin;
  R *first = p.tensor.first + p.begin, *second = p.tensor.second + p.begin;
  R* value = p.tensor.value + p.begin;
  bf16* copy = p.tensor.copy ? p.tensor.copy + p.begin : nullptr;
  constexpr int step = row_threads * Count;
  for (int i = static_cast<int>(threadIdx.x) * Count; i < p.size; i += Unroll * step) {
    values g[Unroll], m[Unroll], v[Unroll], w[Unroll];
#pragma unroll
    for (int u = 0; u < Unroll; ++u) {
      const int at = i + u * step, valid = p.size - at;
      g[u] = load_numbers<Count>(gradient + at, valid, true);
      m[u] = load_numbers<Count>(first + at, valid, true);
      v[u] = load_numbers<Count>(second + at, valid, true);
      w[u] = load_numbers<Count>(value + at, valid, true);
    }
#pragma unroll
    for (int u = 0; u < Unroll; ++u) {
      const int at = i + u * step, valid = p.size - at;
      numbers<bf16, Count> rounded{};
#pragma unroll
      for (int e = 0; e < Count; ++e) {
        adamw_update(c, scale, keep, g[u].v[e], m[u].v[e], v[u].v[e], w[u].v[e]);
        rounded.v[e] = narrow<bf16>(static_cast<float>(w[u].v[e]));
      }
      store_numbers<Count>(first + at, m[u], valid, true);
      store_numbers<Count>(second + at, v[u], valid, true);
      store_numbers<Count>(value + at, w[u], valid, true);
      if (copy) store_numbers<Count>(copy + at, rounded, valid, true);
    }
  }
}

template <class R>
__global__ void __launch_bounds__(row_threads)
    adamw_kernel(const tensor_table<adamw_tensor<R>> t, const adamw_step<R> c,
                 const double* gradient_scale) {
  const double scale = gradient_scale ? *gradient_scale : 1.0;
  if (!isfinite(scale)) return;
  const auto p = tensor_part<adamw_tensor<R>>::of(t, blockIdx.x);
  const auto& x = p.tensor;
  constexpr int count = 16 / static_cast<int>(sizeof(R));
  if (is_aligned(x.gradient) && is_aligned(x.first) && is_aligned(x.second) &&
      is_aligned(x.value) && is_aligned(x.copy)) {
    adamw_piece<count, 2>(p, c, static_cast<R>(scale));
  } else {
    adamw_piece<1, 4>(p, c, static_cast<R>(scale));
  }
}

/// The sum of x over a block, in a fixed tree; thread 0 has it.
SSMLIB_DEVICE double block_sum(double x) {
  __shared__ double shared[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return threadIdx.x < 32 ? warp_sum(threadIdx.x < blockDim.x / 32 ? shared[threadIdx.x] : 0.0)
                          : 0.0;
}

template <int Count, class R>
SSMLIB_DEVICE double squares_of(const R* x, int size) {
  constexpr int step = row_threads * Count,
                unroll = static_cast<int>(tensor_piece) / 4 / row_threads;
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x) * Count; i < size; i += unroll * step) {
    numbers<R, Count> v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      v[u] = load_numbers<Count>(x + i + u * step, size - i - u * step, true);
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
#pragma unroll
      for (int e = 0; e < Count; ++e)
        sum = fma(static_cast<double>(v[u].v[e]), static_cast<double>(v[u].v[e]), sum);
    }
  }
  return sum;
}

template <class R>
__global__ void __launch_bounds__(row_threads)
    squares_kernel(const tensor_table<adamw_tensor<R>> t, double* sums) {
  const auto p = tensor_part<adamw_tensor<R>>::of(t, blockIdx.x);
  const R* x = p.tensor.gradient + p.begin;
  constexpr int count = 16 / static_cast<int>(sizeof(R));
  const double sum = block_sum(is_aligned(p.tensor.gradient) ? squares_of<count>(x, p.size)
                                                             : squares_of<1>(x, p.size));
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class Sum>
__global__ void __launch_bounds__(1024)
    gradient_norm_kernel(const Sum* sums, index_t pieces, const gradient_norm_result to) {
  double sum = 0;
#pragma unroll 8
  for (index_t i = threadIdx.x; i < pieces; i += 1024)
    sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  double scale = to.factor;
  if (to.divisor) scale = *to.divisor > 0 ? scale / *to.divisor : 0.0;
  const double norm = fabs(scale) * sqrt(sum);
  if (to.sum_of_squares) *to.sum_of_squares = sum;
  if (to.norm) *to.norm = norm;
  if (to.gradient_scale == nullptr) return;
  if (to.largest > 0 && norm > to.largest) scale *= to.largest / norm;
  *to.gradient_scale = isfinite(norm) ? scale : nan("");
}

template <int Count, class From, class To>
SSMLIB_DEVICE void cast_piece(const From* from, To* to, int size) {
  constexpr int step = row_threads * Count, unroll = 4;
  for (int i = static_cast<int>(threadIdx.x) * Count; i < size; i += unroll * step) {
    numbers<From, Count> x[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      x[u] = load_numbers<Count>(from + i + u * step, size - i - u * step, true);
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      numbers<To, Count> y;
#pragma unroll
      for (int e = 0; e < Count; ++e)
        y.v[e] = narrow<To>(widen(x[u].v[e]));
      store_numbers<Count>(to + i + u * step, y, size - i - u * step, true);
    }
  }
}

template <class From, class To>
__global__ void __launch_bounds__(row_threads)
    cast_kernel(const tensor_table<cast_tensor<From, To>> t) {
  const auto p = tensor_part<cast_tensor<From, To>>::of(t, blockIdx.x);
  const From* from = p.tensor.from + p.begin;
  To* to = p.tensor.to + p.begin;
  if (is_aligned(p.tensor.from) && is_aligned(p.tensor.to)) {
    cast_piece<8>(from, to, p.size);
  } else {
    cast_piece<1>(from, to, p.size);
  }
}

}  // namespace detail

template <Real R>
void adamw(cudaStream_t stream, const tensor_table<adamw_tensor<R>>& t, const adamw_step<R>& step,
           const double* gradient_scale) {
  if (t.pieces == 0) return;
  detail::adamw_kernel<R>
      <<<detail::row_blocks("adamw", t.pieces), detail::row_threads, 0, stream>>>(t, step,
                                                                                  gradient_scale);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Real R>
std::size_t gradient_norm_workspace_bytes(const tensor_table<adamw_tensor<R>>& t) {
  return static_cast<std::size_t>(t.pieces) * sizeof(double);
}

template <Real R>
void gradient_norm(cudaStream_t stream, const tensor_table<adamw_tensor<R>>& t,
                   const gradient_norm_result& to, void* workspace) {
  auto* sums = static_cast<double*>(workspace);
  if (t.pieces > 0) {
    detail::squares_kernel<R>
        <<<detail::row_blocks("gradient_norm", t.pieces), detail::row_threads, 0, stream>>>(t,
                                                                                            sums);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  detail::gradient_norm_kernel<<<1, 1024, 0, stream>>>(sums, t.pieces, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class From, class To>
void cast_tensors(cudaStream_t stream, const tensor_table<cast_tensor<From, To>>& t) {
  if (t.pieces == 0) return;
  detail::cast_kernel<From, To>
      <<<detail::row_blocks("cast_tensors", t.pieces), detail::row_threads, 0, stream>>>(t);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(R)                                                                  \
  SSMLIB_INSTANTIATE(cuda_optimizer,                                                           \
                     void adamw<R>(cudaStream_t, const tensor_table<adamw_tensor<R>>&,         \
                                   const adamw_step<R>&, const double*));                      \
  SSMLIB_INSTANTIATE(cuda_optimizer, std::size_t gradient_norm_workspace_bytes<R>(             \
                                         const tensor_table<adamw_tensor<R>>&));               \
  SSMLIB_INSTANTIATE(cuda_optimizer,                                                           \
                     void gradient_norm<R>(cudaStream_t, const tensor_table<adamw_tensor<R>>&, \
                                           const gradient_norm_result&, void*))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

SSMLIB_INSTANTIATE(cuda_optimizer,
                   void cast_tensors<float, bf16>(cudaStream_t,
                                                  const tensor_table<cast_tensor<float, bf16>>&));
SSMLIB_INSTANTIATE(cuda_optimizer,
                   void cast_tensors<bf16, float>(cudaStream_t,
                                                  const tensor_table<cast_tensor<bf16, float>>&));

}  // namespace ssm::kernels::cuda
