#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/reduce_parts.cuh>

/// @file
/// The launch functions of reduce.hpp.

namespace ssm::kernels::cuda {

namespace detail {

template <class T>
SSMLIB_DEVICE T rounded(double x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return narrow<T>(static_cast<float>(x));
  }
}

template <class T>
struct store_sum_of_row {
  T* y;
  double scale;
  SSMLIB_DEVICE void operator()(index_t row, const typename sum_operation<T>::state& s) const {
    y[row] = rounded<T>(scale * s.sum);
  }
};
template <class T>
struct store_largest {
  T* y;
  SSMLIB_DEVICE void operator()(index_t row, const typename peak_operation<T>::state& s) const {
    y[row] = narrow<T>(s.value);
  }
};
template <class T>
struct add_at_largest {
  const T* dy;
  view<T, 4> dx;
  SSMLIB_DEVICE void operator()(index_t row, const typename largest_operation<T>::state& s) const {
    T& target = row_of(dx, row)[s.at * dx.strides[3]];
    target = narrow<T>(widen(target) + widen(dy[row]));
  }
};
template <class State>
struct keep_state {
  State* to;
  SSMLIB_DEVICE void operator()(index_t row, const State& s) const { to[row] = s; }
};

template <class T>
__global__ void __launch_bounds__(row_block)
    add_to_rows_kernel(const T* dy, double scale, const __grid_constant__ view<T, 4> dx,
                       index_t rows, index_t groups, bool aligned) {
  constexpr int V = row_group<T>;
  const index_t threads = index_t{gridDim.x} * row_block;
  for (index_t i = index_t{blockIdx.x} * row_block + threadIdx.x; i < rows * groups; i += threads) {
    const index_t row = i / groups, at = (i - row * groups) * V;
    const T d = rounded<T>(scale * static_cast<double>(widen(dy[row])));
    accum_t<T> x[V];
#pragma unroll
    for (int k = 0; k < V; ++k)
      x[k] = widen(d);
    add_group(dx, row, at, x, static_cast<int>(min(index_t{V}, dx.extents[3] - at)), aligned);
  }
}

/// A row in the registers of `lanes` threads, Groups groups each.
template <class T, int Groups>
__global__ void __launch_bounds__(row_block)
    softmax_rows_kernel(const T* x, T* y, const __grid_constant__ row_plan plan, bool y_aligned) {
  using A = accum_t<T>;
  using op = softmax_operation<T>;
  constexpr int V = row_group<T>;
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes;
  const index_t units = (plan.rows + plan.rows_a_block() - 1) / plan.rows_a_block();
  for (index_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const index_t row = unit * plan.rows_a_block() + threadIdx.x / plan.lanes;
    const index_t groups = row < plan.rows ? plan.groups : 0;
    const auto valid_of = [&](int k) {
      return static_cast<int>(min(index_t{V}, plan.length - (lane + k * plan.lanes) * V));
    };
    numbers<T, V> own[Groups];
#pragma unroll
    for (int k = 0; k < Groups; ++k) {
      const index_t g = lane + k * plan.lanes;
      if (g >= groups) continue;
      own[k] = load_numbers<V>(x + row * plan.length + g * V, valid_of(k), plan.aligned);
    }
    A largest = -std::numeric_limits<A>::infinity();
#pragma unroll
    for (int k = 0; k < Groups; ++k) {
      if (lane + k * plan.lanes >= groups) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (i < valid_of(k)) largest = larger_or_nan(largest, widen(own[k].v[i]));
      }
    }
    const double all = merge_lanes<op>({static_cast<double>(largest), 0.0}, plan.lanes).largest;
    double sum = 0;
    A values[Groups][V];
#pragma unroll
    for (int k = 0; k < Groups; ++k) {
      if (lane + k * plan.lanes >= groups) continue;
      A copy[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        values[k][i] =
            i < valid_of(k) ? exponential_for<T>(widen(own[k].v[i]) - static_cast<A>(all)) : A(0);
        copy[i] = values[k][i];
      }
      sum += static_cast<double>(group_sum(copy));
    }
    sum = merge_lanes<sum_operation<T>>({sum}, plan.lanes).sum;
    const A scale = static_cast<A>(1.0 / sum);
#pragma unroll
    for (int k = 0; k < Groups; ++k) {
      const index_t g = lane + k * plan.lanes;
      if (g >= groups) continue;
      numbers<T, V> out;
#pragma unroll
      for (int i = 0; i < V; ++i)
        out.v[i] = narrow<T>(values[k][i] * scale);
      store_numbers<V>(y + row * plan.length + g * V, out, valid_of(k), y_aligned);
    }
  }
}

/// The second reading of long rows.
template <class T>
__global__ void __launch_bounds__(row_block)
    softmax_write_kernel(const T* x, T* y, const __grid_constant__ row_plan plan,
                         const typename softmax_operation<T>::state* states, bool y_aligned) {
  using A = accum_t<T>;
  constexpr int V = row_group<T>;
  for (index_t unit = blockIdx.x; unit < plan.rows * plan.pieces; unit += gridDim.x) {
    const index_t row = unit / plan.pieces, piece = unit % plan.pieces;
    const index_t end = plan.groups * (piece + 1) / plan.pieces;
    const A largest = static_cast<A>(states[row].largest),
            scale = static_cast<A>(1.0 / states[row].sum);
#pragma unroll 2
    for (index_t g = plan.groups * piece / plan.pieces + threadIdx.x; g < end; g += row_block) {
      const int valid = static_cast<int>(min(index_t{V}, plan.length - g * V));
      const index_t at = row * plan.length + g * V;
      const auto v = load_numbers<V>(x + at, valid, plan.aligned);
      numbers<T, V> out;
#pragma unroll
      for (int i = 0; i < V; ++i)
        out.v[i] = narrow<T>(exponential_for<T>(widen(v.v[i]) - largest) * scale);
      store_numbers<V>(y + at, out, valid, y_aligned);
    }
  }
}

template <class T>
SSMLIB_DEVICE double group_dot(const numbers<T, row_group<T>>& a,
                               const numbers<T, row_group<T>>& b) {
  accum_t<T> v[row_group<T>];
#pragma unroll
  for (int i = 0; i < row_group<T>; ++i)
    v[i] = widen(a.v[i]) * widen(b.v[i]);
  return static_cast<double>(group_sum(v));
}
template <class T>
SSMLIB_DEVICE void add_softmax_group(const view<T, 4>& dx, index_t row, index_t at,
                                     const numbers<T, row_group<T>>& y,
                                     const numbers<T, row_group<T>>& dy, accum_t<T> mean, int valid,
                                     bool aligned) {
  accum_t<T> x[row_group<T>];
#pragma unroll
  for (int i = 0; i < row_group<T>; ++i)
    x[i] = widen(y.v[i]) * (widen(dy.v[i]) - mean);
  add_group(dx, row, at, x, valid, aligned);
}

template <class T, int Groups>
__global__ void __launch_bounds__(row_block)
    softmax_rows_vjp_kernel(const T* y, const T* dy, const __grid_constant__ view<T, 4> dx,
                            const __grid_constant__ row_plan plan, bool dx_aligned) {
  constexpr int V = row_group<T>;
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes;
  const index_t units = (plan.rows + plan.rows_a_block() - 1) / plan.rows_a_block();
  for (index_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const index_t row = unit * plan.rows_a_block() + threadIdx.x / plan.lanes;
    const index_t groups = row < plan.rows ? plan.groups : 0;
    numbers<T, V> own_y[Groups], own_dy[Groups];
    double sum = 0;
#pragma unroll
    for (int k = 0; k < Groups; ++k) {
      const index_t g = lane + k * plan.lanes, at = row * plan.length + g * V;
      if (g >= groups) continue;
      const int valid = static_cast<int>(min(index_t{V}, plan.length - g * V));
      own_y[k] = load_numbers<V>(y + at, valid, plan.aligned);
      own_dy[k] = load_numbers<V>(dy + at, valid, plan.aligned);
      sum += group_dot<T>(own_y[k], own_dy[k]);
    }
    const auto mean = static_cast<accum_t<T>>(merge_lanes<sum_operation<T>>({sum}, plan.lanes).sum);
#pragma unroll
    for (int k = 0; k < Groups; ++k) {
      const index_t g = lane + k * plan.lanes;
      if (g >= groups) continue;
      const int valid = static_cast<int>(min(index_t{V}, plan.length - g * V));
      add_softmax_group<T>(dx, row, g * V, own_y[k], own_dy[k], mean, valid, dx_aligned);
    }
  }
}

/// Sums of y . dy over pieces of long rows, then the same pieces of dx.
template <class T, bool Write>
__global__ void __launch_bounds__(row_block)
    softmax_long_vjp_kernel(const T* y, const T* dy, const __grid_constant__ view<T, 4> dx,
                            const __grid_constant__ row_plan plan,
                            typename sum_operation<T>::state* sums, bool dx_aligned) {
  constexpr int V = row_group<T>;
  for (index_t unit = blockIdx.x; unit < plan.rows * plan.pieces; unit += gridDim.x) {
    const index_t row = unit / plan.pieces, piece = unit % plan.pieces;
    const index_t end = plan.groups * (piece + 1) / plan.pieces;
    const auto mean = Write ? static_cast<accum_t<T>>(sums[row].sum) : accum_t<T>(0);
    double sum = 0;
#pragma unroll 2
    for (index_t g = plan.groups * piece / plan.pieces + threadIdx.x; g < end; g += row_block) {
      const int valid = static_cast<int>(min(index_t{V}, plan.length - g * V));
      const index_t at = row * plan.length + g * V;
      const auto a = load_numbers<V>(y + at, valid, plan.aligned);
      const auto b = load_numbers<V>(dy + at, valid, plan.aligned);
      if constexpr (Write) {
        add_softmax_group<T>(dx, row, g * V, a, b, mean, valid, dx_aligned);
      } else {
        sum += group_dot<T>(a, b);
      }
    }
    if constexpr (!Write) {
      sum = merge_lanes<sum_operation<T>>({sum}, row_block).sum;
      if (threadIdx.x == 0) sums[unit].sum = sum;
    }
  }
}

/// f(a constant number of groups a lane) with the fewest that hold a row, or false.
template <int Most, class F>
bool with_groups(const row_plan& plan, F f) {
  const index_t wanted = (plan.groups + plan.lanes - 1) / plan.lanes;
  if (wanted > Most) return false;
  if (wanted <= 1) {
    f(std::integral_constant<int, 1>{});
  } else if (wanted <= 2) {
    f(std::integral_constant<int, 2>{});
  } else if (wanted <= 4 || Most == 4) {
    f(std::integral_constant<int, 4>{});
  } else {
    f(std::integral_constant<int, Most>{});
  }
  return true;
}

/// Bytes of a state at most; those of rows begin after those of pieces.
inline constexpr std::size_t largest_state = 16;
/// Elements of a row that is not cut, and not read twice, of any type.
inline constexpr index_t never_long = 2048;

}  // namespace detail

template <class Index>
std::size_t row_workspace_bytes(Index rows, Index length) {
  if (length <= detail::never_long) return 0;
  return static_cast<std::size_t>(detail::row_plan::most_pieces + rows) * detail::largest_state;
}

template <class T>
void sum_rows(cudaStream_t stream, const row_problem<T>& p, double scale, T* y, void* workspace) {
  detail::reduce<detail::sum_operation<T>>(stream, p, detail::store_sum_of_row<T>{y, scale},
                                           workspace);
}
template <class T>
void add_to_rows(cudaStream_t stream, const T* dy, double scale, view<T, 4> dx) {
  if (dx.size() == 0) return;
  const index_t rows = dx.extents[0] * dx.extents[1] * dx.extents[2];
  const index_t groups = (dx.extents[3] + detail::row_group<T> - 1) / detail::row_group<T>;
  const index_t blocks = (rows * groups + detail::row_block - 1) / detail::row_block;
  detail::add_to_rows_kernel<T><<<detail::row_blocks_for(blocks), detail::row_block, 0, stream>>>(
      dy, scale, dx, rows, groups, detail::rows_are_groups(dx));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void max_rows(cudaStream_t stream, const row_problem<T>& p, T* y, void* workspace) {
  detail::reduce<detail::peak_operation<T>>(stream, p, detail::store_largest<T>{y}, workspace);
}
template <class T>
void max_rows_vjp(cudaStream_t stream, const row_problem<T>& p, const T* dy, view<T, 4> dx,
                  void* workspace) {
  detail::reduce<detail::largest_operation<T>>(stream, p, detail::add_at_largest<T>{dy, dx},
                                               workspace);
}

template <class T>
void softmax_rows(cudaStream_t stream, const row_problem<T>& p, T* y, void* workspace) {
  using namespace detail;
  if (p.rows * p.length == 0) return;
  const bool y_aligned = (p.rows == 1 || p.length % row_group<T> == 0) &&
                         reinterpret_cast<std::uintptr_t>(y) % 16 == 0;
  const row_plan whole = row_plan::of(p, 2, false);
  constexpr int most = sizeof(T) == 2 ? 4 : 8;  // more would leave a block too few neighbours
  const bool fits = with_groups<most>(whole, [&](auto groups) {
    softmax_rows_kernel<T, groups()>
        <<<row_blocks_for(whole.units()), row_block, 0, stream>>>(p.x, y, whole, y_aligned);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  });
  if (fits) return;
  using op = softmax_operation<T>;
  const row_plan plan = row_plan::of(p, 4);
  auto* states = static_cast<typename op::state*>(workspace);
  auto* of_rows = states + (plan.pieces > 1 ? p.rows * plan.pieces : 0);
  reduce<op>(stream, p, keep_state<typename op::state>{of_rows}, workspace);
  softmax_write_kernel<T><<<row_blocks_for(p.rows * plan.pieces), row_block, 0, stream>>>(
      p.x, y, plan, of_rows, y_aligned);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void softmax_rows_vjp(cudaStream_t stream, const row_problem<T>& y, const T* dy, view<T, 4> dx,
                      void* workspace) {
  using namespace detail;
  if (y.rows * y.length == 0) return;
  const bool aligned = reinterpret_cast<std::uintptr_t>(dy) % 16 == 0;
  const bool dx_aligned = rows_are_groups(dx);
  row_plan whole = row_plan::of(y, 2, false);
  whole.aligned = whole.aligned && aligned;
  const bool fits = with_groups<4>(whole, [&](auto groups) {
    softmax_rows_vjp_kernel<T, groups()>
        <<<row_blocks_for(whole.units()), row_block, 0, stream>>>(y.x, dy, dx, whole, dx_aligned);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  });
  if (fits) return;
  using op = sum_operation<T>;
  row_plan plan = row_plan::of(y, 4);
  plan.aligned = plan.aligned && aligned;
  auto* parts = static_cast<typename op::state*>(workspace);
  auto* of_rows = parts + (plan.pieces > 1 ? y.rows * plan.pieces : 0);
  const unsigned blocks = row_blocks_for(y.rows * plan.pieces);
  softmax_long_vjp_kernel<T, false>
      <<<blocks, row_block, 0, stream>>>(y.x, dy, dx, plan, parts, dx_aligned);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (plan.pieces > 1) {
    merge_pieces_kernel<op><<<row_blocks_for(y.rows), row_block, 0, stream>>>(
        parts, y.rows, plan.pieces, keep_state<typename op::state>{of_rows});
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  softmax_long_vjp_kernel<T, true>
      <<<blocks, row_block, 0, stream>>>(y.x, dy, dx, plan, of_rows, dx_aligned);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

SSMLIB_INSTANTIATE(cuda_reduce, std::size_t row_workspace_bytes<index_t>(index_t, index_t));
#define SSMLIB_DETAIL_LIST(T)                                                                   \
  SSMLIB_INSTANTIATE(cuda_reduce,                                                               \
                     void sum_rows<T>(cudaStream_t, const row_problem<T>&, double, T*, void*)); \
  SSMLIB_INSTANTIATE(cuda_reduce,                                                               \
                     void add_to_rows<T>(cudaStream_t, const T*, double, view<T, 4>));          \
  SSMLIB_INSTANTIATE(cuda_reduce,                                                               \
                     void max_rows<T>(cudaStream_t, const row_problem<T>&, T*, void*));         \
  SSMLIB_INSTANTIATE(cuda_reduce, void max_rows_vjp<T>(cudaStream_t, const row_problem<T>&,     \
                                                       const T*, view<T, 4>, void*));           \
  SSMLIB_INSTANTIATE(cuda_reduce,                                                               \
                     void softmax_rows<T>(cudaStream_t, const row_problem<T>&, T*, void*));     \
  SSMLIB_INSTANTIATE(cuda_reduce, void softmax_rows_vjp<T>(cudaStream_t, const row_problem<T>&, \
                                                           const T*, view<T, 4>, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
