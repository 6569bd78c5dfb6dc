#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/loss_values.hpp>

#include <algorithm>
#include <cstdint>

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int value_threads = 256;

[[nodiscard]] inline unsigned value_blocks(index_t n) {
  return static_cast<unsigned>(
      std::clamp<index_t>((n + value_threads - 1) / value_threads, 1, 132 * 8));
}

/// f(i) for this thread's part of [0, n).
template <class F>
SSMLIB_DEVICE void for_values(index_t n, F f) {
  const index_t step = index_t{blockDim.x} * gridDim.x;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step)
    f(i);
}

template <class R>
__global__ void __launch_bounds__(value_threads)
    scale_values_kernel(index_t n, const double* from, double factor, double divisor, R* to) {
  for_values(n, [&](index_t i) { to[i] = static_cast<R>(0.0 + factor * from[i] / divisor); });
}

template <class R>
__global__ void __launch_bounds__(value_threads)
    gather_values_kernel(index_t n, const R* from, const std::int32_t* index, R* to) {
  for_values(n, [&](index_t i) { to[i] = from[index[i]]; });
}

template <class T>
__global__ void __launch_bounds__(value_threads)
    scale_gradient_kernel(index_t n, const T* from, const accum_t<T>* factor, T* to, bool add,
                          bool aligned) {
  constexpr int vector = 16 / sizeof(T);
  const accum_t<T> g = *factor;
  for_values((n + vector - 1) / vector, [&](index_t i) {
    const index_t first = i * vector;
    const int valid = static_cast<int>(min(index_t{vector}, n - first));
    const auto x = load_numbers<vector>(from + first, valid, aligned);
    numbers<T, vector> y{};
    if (add) y = load_numbers<vector>(to + first, valid, aligned);
#pragma unroll
    for (int e = 0; e < vector; ++e)
      y.v[e] = narrow<T>(add ? fma(g, widen(x.v[e]), widen(y.v[e])) : g * widen(x.v[e]));
    store_numbers(to + first, y, valid, aligned);
  });
}

/// What a kernel takes of four scores or of their gradients: std::array is for the host.
template <class R>
struct score_views {
  view<R, 1> policy_chosen, policy_rejected, reference_chosen, reference_rejected;
};
template <class R>
[[nodiscard]] score_views<R> views_of(const std::array<view<R, 1>, 4>& v) {
  return {v[0], v[1], v[2], v[3]};
}
template <class R>
SSMLIB_DEVICE double score(const view<R, 1>& v, index_t i) {
  return static_cast<double>(v.data[i * v.strides[0]]);
}

template <class R>
__global__ void __launch_bounds__(value_threads)
    preference_kernel(const score_views<const R> s, index_t pairs, double beta, double* margins,
                      R* loss) {
  __shared__ double shared[value_threads / 32];
  double sum = 0;
  for_values(pairs, [&](index_t i) {
    const double chosen = score(s.policy_chosen, i) - score(s.reference_chosen, i);
    const double rejected = score(s.policy_rejected, i) - score(s.reference_rejected, i);
    const double m = beta * (chosen - rejected);
    margins[i] = m;
    sum += max(-m, 0.0) + log1p(exp(-fabs(m)));
  });
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_sum(threadIdx.x < value_threads / 32 ? shared[threadIdx.x] : 0.0);
  if (threadIdx.x == 0) *loss = static_cast<R>(sum / static_cast<double>(max(pairs, index_t{1})));
}

template <class R>
__global__ void __launch_bounds__(value_threads)
    preference_vjp_kernel(index_t pairs, double beta, const double* margins, const R* d_loss,
                          const score_views<R> d) {
  const double g = static_cast<double>(*d_loss) / static_cast<double>(pairs) * beta;
  for_values(pairs, [&](index_t i) {
    const R change = static_cast<R>(g / (1 + exp(margins[i])));
    const auto add = [i](const view<R, 1>& to, R x) {
      if (to.data) to.data[i * to.strides[0]] += x;
    };
    add(d.policy_chosen, -change);
    add(d.policy_rejected, change);
    add(d.reference_chosen, change);
    add(d.reference_rejected, -change);
  });
}

}  // namespace detail

template <Real R>
void scale_values(cudaStream_t stream, index_t n, const double* from, double factor, double divisor,
                  R* to) {
  if (n == 0) return;
  detail::scale_values_kernel<R>
      <<<detail::value_blocks(n), detail::value_threads, 0, stream>>>(n, from, factor, divisor, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Real R>
void gather_values(cudaStream_t stream, index_t n, const R* from, const std::int32_t* index,
                   R* to) {
  if (n == 0) return;
  detail::gather_values_kernel<R>
      <<<detail::value_blocks(n), detail::value_threads, 0, stream>>>(n, from, index, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Real R>
void preference(cudaStream_t stream, const preference_problem<R>& p, double* margins, R* loss) {
  detail::preference_kernel<R><<<1, detail::value_threads, 0, stream>>>(
      detail::views_of(p.scores), p.scores[0].extents[0], p.beta, margins, loss);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Real R>
void preference_vjp(cudaStream_t stream, index_t pairs, double beta, const double* margins,
                    const R* d_loss, const std::array<view<R, 1>, 4>& d_scores) {
  if (pairs == 0) return;
  // One thread has a pair: scores that share memory are added to in order.
  detail::preference_vjp_kernel<R>
      <<<detail::value_blocks(pairs), detail::value_threads, 0, stream>>>(
          pairs, beta, margins, d_loss, detail::views_of(d_scores));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Floating T>
void scale_gradient(cudaStream_t stream, index_t n, const T* from, const accum_t<T>* factor, T* to,
                    bool add) {
  if (n == 0) return;
  constexpr index_t vector = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<std::uintptr_t>(from) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(to) % 16 == 0;
  detail::scale_gradient_kernel<T>
      <<<detail::value_blocks((n + vector - 1) / vector), detail::value_threads, 0, stream>>>(
          n, from, factor, to, add, aligned);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
SSMLIB_INSTANTIATE(cuda_loss_values, void scale_gradient<bf16>(cudaStream_t, index_t, const bf16*,
                                                               const float*, bf16*, bool));
SSMLIB_INSTANTIATE(cuda_loss_values, void scale_gradient<float>(cudaStream_t, index_t, const float*,
                                                                const float*, float*, bool));
SSMLIB_INSTANTIATE(cuda_loss_values,
                   void scale_gradient<double>(cudaStream_t, index_t, const double*, const double*,
                                               double*, bool));

#define SSMLIB_DETAIL_LIST(R)                                                                      \
  SSMLIB_INSTANTIATE(cuda_loss_values, void scale_values<R>(cudaStream_t, index_t, const double*,  \
                                                            double, double, R*));                  \
  SSMLIB_INSTANTIATE(cuda_loss_values, void gather_values<R>(cudaStream_t, index_t, const R*,      \
                                                             const std::int32_t*, R*));            \
  SSMLIB_INSTANTIATE(cuda_loss_values,                                                             \
                     void preference<R>(cudaStream_t, const preference_problem<R>&, double*, R*)); \
  SSMLIB_INSTANTIATE(cuda_loss_values,                                                             \
                     void preference_vjp<R>(cudaStream_t, index_t, double, const double*,          \
                                            const R*, const std::array<view<R, 1>, 4>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
