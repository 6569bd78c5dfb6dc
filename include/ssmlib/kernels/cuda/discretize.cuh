#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/discretize.hpp>
#include <ssmlib/kernels/cuda/rows.cuh>

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int discretize_vector = 4;

template <class T>
struct discretize_rows {
  using R = accum_t<T>;
  discretize_problem<T> p;
  view<R, 2> delta, log_a;
  template <int Count>
  SSMLIB_DEVICE void run(index_t row, index_t column, int valid) const {
    auto step = read_row<Count, T>(p.dt, row, column, valid);
    numbers<R, Count> decay{};
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      if (e >= valid) break;
      const R r = p.bias ? step.v[e] + p.bias[column + e] : step.v[e];
      step.v[e] = min(max(softplus(r), p.low), p.high);
      decay.v[e] = step.v[e] * p.a[column + e];
    }
    write_row<Count, R>(delta, row, column, valid, step, false);
    write_row<Count, R>(log_a, row, column, valid, decay, false);
  }
};

template <class T>
struct discretize_vjp_arguments {
  using R = accum_t<T>;
  discretize_problem<T> p;
  view<const R, 2> d_delta, d_log_a;
  view<T, 2> d_dt;
  R* parts;  // (part_count, 2, heads) sums for a and the bias, or absent
  index_t part_count, column_blocks;
  bool add;
};

/// A block has 32 heads and eight tokens at a time of its part.
template <class T>
__global__ void __launch_bounds__(row_threads)
    discretize_vjp_kernel(const __grid_constant__ discretize_vjp_arguments<T> o) {
  using R = accum_t<T>;
  __shared__ R shared[2][8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t part = blockIdx.x / o.column_blocks, heads = o.p.dt.extents[1];
  const index_t h = (blockIdx.x % o.column_blocks) * 32 + lane;
  R d_a = R(0), d_bias = R(0);
  if (h < heads) {
    const R a = o.p.a[h], bias = o.p.bias ? o.p.bias[h] : R(0);
    constexpr int ahead = 4;  // tokens on their way
    const index_t tokens = o.p.dt.extents[0], stride = o.part_count * 8;
    for (index_t first = part * 8 + warp; first < tokens; first += ahead * stride) {
      R dt[ahead], dl[ahead], dd[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const index_t t = min(first + i * stride, tokens - 1);
        dt[i] = widen(o.p.dt.data[t * o.p.dt.strides[0] + h]);
        dl[i] = o.d_log_a.data[t * o.d_log_a.strides[0] + h];
        dd[i] = o.d_delta.data[t * o.d_delta.strides[0] + h];
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const index_t t = first + i * stride;
        if (t >= tokens) break;
        const R r = dt[i] + bias, raw = softplus(r), step = min(max(raw, o.p.low), o.p.high);
        const R slope = r > R(20) ? R(1) : sigmoid(r);
        const R ds = fma(a, dl[i], dd[i]);
        const R dr = raw < o.p.low || raw > o.p.high ? R(0) : ds * slope;
        if (o.d_dt.data) {
          T* to = o.d_dt.data + t * o.d_dt.strides[0] + h;
          *to = narrow<T>(o.add ? widen(*to) + dr : dr);
        }
        d_a = fma(dl[i], step, d_a);
        d_bias += dr;
      }
    }
  }
  if (o.parts == nullptr) return;
  shared[0][warp][lane] = d_a;
  shared[1][warp][lane] = d_bias;
  __syncthreads();
  if (warp > 1 || h >= heads) return;
  R sum = shared[warp][0][lane];
#pragma unroll
  for (int w = 1; w < 8; ++w)
    sum += shared[warp][w][lane];
  o.parts[(part * 2 + warp) * heads + h] = sum;
}

/// a and the bias from the parts, eight of which are on their way at once.
template <class R>
__global__ void __launch_bounds__(row_threads)
    discretize_sum_kernel(const R* parts, index_t part_count, index_t heads, R* a, R* bias,
                          bool add) {
  __shared__ R shared[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t c = index_t{blockIdx.x} * 32 + lane;  // of both, one after the other
  R sum = R(0);
  if (c < 2 * heads) {
#pragma unroll 8
    for (index_t k = warp; k < part_count; k += 8)
      sum += parts[k * 2 * heads + c];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= 2 * heads) return;
#pragma unroll
  for (int w = 1; w < 8; ++w)
    sum += shared[w][lane];
  R* to = c < heads ? a : bias;
  if (to == nullptr) return;
  to += c < heads ? c : c - heads;
  *to = add ? *to + sum : sum;
}

[[nodiscard]] inline index_t discretize_parts(index_t tokens, index_t heads) {
  const index_t column_blocks = std::max<index_t>(1, (heads + 31) / 32);
  return std::clamp<index_t>((tokens + 63) / 64, 1, std::max<index_t>(1, 528 / column_blocks));
}

}  // namespace detail

template <class T>
void discretize(cudaStream_t stream, const discretize_problem<T>& p, view<accum_t<T>, 2> delta,
                view<accum_t<T>, 2> log_a) {
  detail::check_same_extents("discretize", "delta", p.dt, delta);
  detail::check_same_extents("discretize", "log_a", p.dt, log_a);
  constexpr int count = detail::discretize_vector;
  detail::for_rows<count>("discretize", stream, p.dt.extents[0], p.dt.extents[1],
                          detail::all_aligned<count>(p.dt, delta, log_a),
                          detail::discretize_rows<T>{p, delta, log_a});
}

template <class T>
std::size_t discretize_vjp_workspace_bytes(const discretize_problem<T>& p) {
  const index_t tokens = p.dt.extents[0], heads = p.dt.extents[1];
  return static_cast<std::size_t>(detail::discretize_parts(tokens, heads) * 2 * heads) *
         sizeof(accum_t<T>);
}

template <class T>
void discretize_vjp(cudaStream_t stream, const discretize_problem<T>& p,
                    view<const accum_t<T>, 2> d_delta, view<const accum_t<T>, 2> d_log_a,
                    const discretize_gradients<T>& d, void* workspace) {
  using R = accum_t<T>;
  detail::check_same_extents("discretize_vjp", "d_delta", p.dt, d_delta);
  detail::check_same_extents("discretize_vjp", "d_log_a", p.dt, d_log_a);
  detail::check_same_extents("discretize_vjp", "d_dt", p.dt, d.dt);
  const index_t tokens = p.dt.extents[0], heads = p.dt.extents[1];
  if (heads == 0) return;
  const bool sums = d.a != nullptr || d.bias != nullptr;
  const detail::discretize_vjp_arguments<T> o{p,
                                              d_delta,
                                              d_log_a,
                                              d.dt,
                                              sums ? static_cast<R*>(workspace) : nullptr,
                                              detail::discretize_parts(tokens, heads),
                                              (heads + 31) / 32,
                                              d.add};
  detail::discretize_vjp_kernel<T>
      <<<detail::row_blocks("discretize_vjp", o.part_count * o.column_blocks), detail::row_threads,
         0, stream>>>(o);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (!sums) return;
  detail::discretize_sum_kernel<R>
      <<<static_cast<unsigned>((2 * heads + 31) / 32), detail::row_threads, 0, stream>>>(
          o.parts, o.part_count, heads, d.a, d.bias, d.add);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_discretize,                                                              \
                     void discretize<T>(cudaStream_t, const discretize_problem<T>&,                \
                                        view<accum_t<T>, 2>, view<accum_t<T>, 2>));                \
  SSMLIB_INSTANTIATE(cuda_discretize,                                                              \
                     std::size_t discretize_vjp_workspace_bytes<T>(const discretize_problem<T>&)); \
  SSMLIB_INSTANTIATE(cuda_discretize,                                                              \
                     void discretize_vjp<T>(cudaStream_t, const discretize_problem<T>&,            \
                                            view<const accum_t<T>, 2>, view<const accum_t<T>, 2>,  \
                                            const discretize_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
