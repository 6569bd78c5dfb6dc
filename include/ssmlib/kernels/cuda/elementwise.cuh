#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/elementwise_parts.cuh>

#include <algorithm>

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int elementwise_threads = 256;

template <class F, class To, int Width>
__global__ void __launch_bounds__(elementwise_threads)
    elementwise_forward_kernel(const __grid_constant__ elementwise_problem<F, To> p,
                               index_t groups) {
  using real = typename form::traits<F>::real;
  const index_t step = index_t{gridDim.x} * elementwise_threads;
  for (index_t i = index_t{blockIdx.x} * elementwise_threads + threadIdx.x; i < groups; i += step) {
    const element_place place = group_place<Width>(i, p.in.extents);
    const int valid = static_cast<int>(::min(index_t{Width}, p.in.extents[3] - place.at[3]));
    real leaves[Width][form::traits<F>::leaves];
    load_operands<F, Width> load{p.in, place, valid, leaves};
    for_each_leaf_type<F>::call(load);
    numbers<To, Width> y;
#pragma unroll
    for (int k = 0; k < Width; ++k) {
      form_values<F, real> v;
      form_forward<0>(p.in.formula, leaves[k], v);
      y.v[k] = round_to<To>(v.y);
    }
    store_numbers<Width>(p.y + place.offset(p.y_strides, p.in.extents), y, valid, true);
  }
}

/// Adds Width neighbours to each gradient that is given.
template <class F, class To, int Width>
struct add_gradients {
  using real = typename form::traits<F>::real;
  static constexpr std::size_t count = form::traits<F>::leaves;

  const elementwise_gradient_problem<F, To>& p;
  const element_place& place;
  int valid;
  real (&sums)[Width][count];

  template <std::size_t K, class T>
  SSMLIB_DEVICE void visit() {
    if (p.gradients[K] == nullptr) return;
    T* const to =
        static_cast<T*>(p.gradients[K]) + place.offset(p.gradient_strides[K], p.in.extents);
    numbers<T, Width> g = load_numbers<Width>(static_cast<const T*>(to), valid, true);
#pragma unroll
    for (int i = 0; i < Width; ++i)
      g.v[i] = round_to<T>(widen(g.v[i]) + sums[i][K]);
    store_numbers<Width>(to, g, valid, true);
  }
};

template <class F, class To, int Width>
__global__ void __launch_bounds__(elementwise_threads)
    elementwise_backward_kernel(const __grid_constant__ elementwise_gradient_problem<F, To> p,
                                index_t groups) {
  using real = typename form::traits<F>::real;
  constexpr std::size_t count = form::traits<F>::leaves;
  const index_t step = index_t{gridDim.x} * elementwise_threads;
  for (index_t i = index_t{blockIdx.x} * elementwise_threads + threadIdx.x; i < groups; i += step) {
    const element_place place = group_place<Width>(i, p.in.extents);
    const int valid = static_cast<int>(::min(index_t{Width}, p.in.extents[3] - place.at[3]));
    real leaves[Width][count], gradients[Width][count];
    load_operands<F, Width> load{p.in, place, valid, leaves};
    for_each_leaf_type<F>::call(load);
    const auto dy =
        load_numbers<Width>(p.dy + place.offset(p.dy_strides, p.in.extents), valid, true);
#pragma unroll
    for (int k = 0; k < Width; ++k) {
      form_values<F, real> v;
      form_forward<0>(p.in.formula, leaves[k], v);
      form_backward<0>(p.in.formula, v, static_cast<real>(widen(dy.v[k])), gradients[k]);
    }
    add_gradients<F, To, Width> add{p, place, valid, gradients};
    for_each_leaf_type<F>::call(add);
  }
}

/// The gradient of operand `leaf`, of type S: the whole sum added to it, or a piece stored.
template <class F, class To>
struct add_sum {
  const elementwise_gradient_problem<F, To>& p;
  std::size_t leaf;
  index_t offset;
  double sum;

  template <std::size_t K, class T>
  SSMLIB_DEVICE void visit() {
    if (K != leaf) return;
    T& g = static_cast<T*>(p.gradients[K])[offset];
    g = round_to<T>(static_cast<double>(widen(g)) + sum);
  }
};

/// Adds what belongs to a group of sums, `valid` of them, from `from`.
template <class F, class To>
SSMLIB_DEVICE void add_group(const elementwise_gradient_problem<F, To>& p,
                             const reduction_plan& plan, std::size_t leaf, index_t group, int k,
                             double sum) {
  element_place place = place_of(group, plan.kept);
  place.at[3] = plan.kept_innermost ? place.at[3] * plan.width + k : 0;
  if (place.at[3] >= p.in.extents[3]) return;
  add_sum<F, To> add{p, leaf, place.offset(p.gradient_strides[leaf], p.in.extents), sum};
  for_each_leaf_type<F>::call(add);
}

template <class F, class To, int Width>
__global__ void __launch_bounds__(elementwise_threads, 2)
    elementwise_reduction_kernel(const __grid_constant__ elementwise_gradient_problem<F, To> p,
                                 const __grid_constant__ reduction_plan plan, std::size_t leaf,
                                 double* partial) {
  using real = typename form::traits<F>::real;
  constexpr std::size_t count = form::traits<F>::leaves;
  __shared__ double sums[Width][elementwise_threads];
  const int thread = static_cast<int>(threadIdx.x), lanes = elementwise_threads / plan.kept_lanes;
  const int kept = plan.kept_innermost ? thread % plan.kept_lanes : thread / lanes;
  const int lane = plan.kept_innermost ? thread / plan.kept_lanes : thread % lanes;
  const int mine = kept * lanes + lane, width = plan.sums();
  for (index_t unit = blockIdx.x; unit < plan.tiles * plan.pieces; unit += gridDim.x) {
    index_t piece = unit;
    const index_t group = split(piece, plan.pieces) * plan.kept_lanes + kept;
    const element_place base = place_of(::min(group, plan.groups - 1), plan.kept);
    const index_t end = group < plan.groups ? plan.terms * (piece + 1) / plan.pieces : 0;
    double sum[Width] = {};
#pragma unroll 2
    for (index_t r = plan.terms * piece / plan.pieces + lane; r < end; r += lanes) {
      element_place place = place_of(r, plan.repeated);
#pragma unroll
      for (int d = 0; d < 4; ++d)
        place.at[d] += base.at[d];
      place.at[3] *= Width;
      const int valid = static_cast<int>(::min(index_t{Width}, p.in.extents[3] - place.at[3]));
      real leaves[Width][count];
      load_operands<F, Width> load{p.in, place, valid, leaves};
      for_each_leaf_type<F>::call(load);
      const auto dy =
          load_numbers<Width>(p.dy + place.offset(p.dy_strides, p.in.extents), valid, true);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        real gradients[count];
        form_values<F, real> v;
        form_forward<0>(p.in.formula, leaves[i], v);
        form_backward<0>(p.in.formula, v, static_cast<real>(widen(dy.v[i])), gradients);
        real d = 0;
#pragma unroll
        for (std::size_t k = 0; k < count; ++k)
          if (k == leaf) d = gradients[k];
        if (i < valid) sum[i] += static_cast<double>(d);
      }
    }
    if (!plan.kept_innermost) {  // all neighbours belong to one sum
#pragma unroll
      for (int i = 1; i < Width; ++i)
        sum[0] += sum[i];
    }
#pragma unroll
    for (int i = 0; i < Width; ++i)
      sums[i][mine] = sum[i];
    for (int half = lanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) {
        for (int i = 0; i < width; ++i)
          sums[i][mine] += sums[i][mine + half];
      }
    }
    if (lane == 0 && group < plan.groups) {
      for (int i = 0; i < width; ++i) {
        if (plan.pieces == 1) {
          add_group(p, plan, leaf, group, i, sums[i][mine]);
        } else {
          partial[(piece * plan.groups + group) * width + i] = sums[i][mine];
        }
      }
    }
    __syncthreads();
  }
}

/// Adds the pieces of each sum, a warp for each.
template <class F, class To>
__global__ void __launch_bounds__(elementwise_threads)
    elementwise_pieces_kernel(const __grid_constant__ elementwise_gradient_problem<F, To> p,
                              const __grid_constant__ reduction_plan plan, std::size_t leaf,
                              const double* partial) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const index_t step = index_t{gridDim.x} * (elementwise_threads / 32);
  const index_t count = plan.groups * plan.sums();
  for (index_t j = (index_t{blockIdx.x} * elementwise_threads + threadIdx.x) / 32; j < count;
       j += step) {
    double sum = 0;
    for (index_t piece = lane; piece < plan.pieces; piece += 32)
      sum += partial[piece * count + j];
    sum = warp_sum(sum);
    if (lane == 0) {
      index_t k = j;
      const index_t group = split(k, plan.sums());
      add_group(p, plan, leaf, group, static_cast<int>(k), sum);
    }
  }
}

// ---- launches -----------------------------------------------------------------------------------

[[nodiscard]] inline unsigned elementwise_blocks(index_t groups) {
  return static_cast<unsigned>(std::min<index_t>(
      (groups + elementwise_threads - 1) / elementwise_threads, index_t{1} << 30));
}

/// launch(width) with a width that all streams allow.
template <int Width, class L>
void launch_groups(const shape<4>& n, bool wide, L launch) {
  const auto with = [&](auto width) {
    constexpr int W = decltype(width)::value;
    const index_t groups = n[0] * n[1] * n[2] * ((n[3] + W - 1) / W);
    launch(width, groups, elementwise_blocks(groups));
  };
  if (wide && n[3] >= Width) {
    with(std::integral_constant<int, Width>{});
  } else {
    with(std::integral_constant<int, 1>{});
  }
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace detail

template <class F, Floating To>
void elementwise_forward(cudaStream_t stream, const elementwise_problem<F, To>& p) {
  if (element_count(p.in.extents) == 0) return;
  const bool wide = detail::operands_are_wide(p.in) &&
                    detail::rows_are_wide(p.y, p.in.extents, p.y_strides, sizeof(To));
  detail::launch_groups<detail::elementwise_width<F, To>>(
      p.in.extents, wide, [&](auto width, index_t groups, unsigned blocks) {
        detail::elementwise_forward_kernel<F, To, decltype(width)::value>
            <<<blocks, detail::elementwise_threads, 0, stream>>>(p, groups);
      });
}

template <class F, Floating To>
void elementwise_backward(cudaStream_t stream, const elementwise_gradient_problem<F, To>& p) {
  if (element_count(p.in.extents) == 0) return;
  bool wide = detail::operands_are_wide(p.in) &&
              detail::rows_are_wide(p.dy, p.in.extents, p.dy_strides, sizeof(To));
  detail::leaf_bytes(std::type_identity<F>{}, [&](std::size_t k, std::size_t bytes) {
    if (p.gradients[k] == nullptr) return;
    wide =
        wide && detail::rows_are_wide(p.gradients[k], p.in.extents, p.gradient_strides[k], bytes);
  });
  detail::launch_groups<detail::elementwise_width<F, To>>(
      p.in.extents, wide, [&](auto width, index_t groups, unsigned blocks) {
        detail::elementwise_backward_kernel<F, To, decltype(width)::value>
            <<<blocks, detail::elementwise_threads, 0, stream>>>(p, groups);
      });
}

template <class F, Floating To>
void elementwise_reduction(cudaStream_t stream, const elementwise_gradient_problem<F, To>& p,
                           std::size_t leaf, void* workspace) {
  if (element_count(p.in.extents) == 0) return;
  const detail::reduction_plan plan(p, leaf);
  auto* const partial = static_cast<double*>(workspace);
  const auto blocks =
      static_cast<unsigned>(std::min<index_t>(plan.tiles * plan.pieces, index_t{1} << 30));
  const auto launch = [&](auto width) {
    detail::elementwise_reduction_kernel<F, To, decltype(width)::value>
        <<<blocks, detail::elementwise_threads, 0, stream>>>(p, plan, leaf, partial);
  };
  if (plan.width == 1) {
    launch(std::integral_constant<int, 1>{});
  } else {
    launch(std::integral_constant<int, detail::elementwise_width<F, To>>{});
  }
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (plan.pieces == 1) return;
  detail::elementwise_pieces_kernel<F, To>
      <<<detail::elementwise_blocks(plan.groups * plan.sums() * 32), detail::elementwise_threads, 0,
         stream>>>(p, plan, leaf, partial);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(To, ...)                                                            \
  SSMLIB_INSTANTIATE(cuda_elementwise,                                                         \
                     void elementwise_forward<__VA_ARGS__, To>(                                \
                         cudaStream_t, const elementwise_problem<__VA_ARGS__, To>&));          \
  SSMLIB_INSTANTIATE(cuda_elementwise,                                                         \
                     void elementwise_backward<__VA_ARGS__, To>(                               \
                         cudaStream_t, const elementwise_gradient_problem<__VA_ARGS__, To>&)); \
  SSMLIB_INSTANTIATE(cuda_elementwise,                                                         \
                     void elementwise_reduction<__VA_ARGS__, To>(                              \
                         cudaStream_t, const elementwise_gradient_problem<__VA_ARGS__, To>&,   \
                         std::size_t, void*));
SSMLIB_DETAIL_FORMS(SSMLIB_DETAIL_LIST)
#undef SSMLIB_DETAIL_LIST

// Conversions.
#define SSMLIB_DETAIL_LIST(From, To)                                 \
  SSMLIB_INSTANTIATE(cuda_elementwise,                               \
                     void elementwise_forward<form::leaf<From>, To>( \
                         cudaStream_t, const elementwise_problem<form::leaf<From>, To>&))
SSMLIB_DETAIL_LIST(bf16, float);
SSMLIB_DETAIL_LIST(bf16, double);
SSMLIB_DETAIL_LIST(float, bf16);
SSMLIB_DETAIL_LIST(float, double);
SSMLIB_DETAIL_LIST(double, bf16);
SSMLIB_DETAIL_LIST(double, float);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
