#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/elementwise.hpp>
#include <ssmlib/kernels/cuda/elementwise_functions.cuh>

#include <algorithm>
#include <cstdint>

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int elementwise_threads = 256;

template <class To, class R>
SSMLIB_DEVICE To round_to(R x) {
  if constexpr (std::is_same_v<To, double>) {
    return x;
  } else {
    return narrow<To>(static_cast<float>(x));
  }
}

/// i / n, with the remainder left in i.
SSMLIB_DEVICE index_t split(index_t& i, index_t n) {
  index_t quotient;
  if (((i | n) >> 32) == 0) {
    quotient = static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(n);
  } else {
    quotient = i / n;
  }
  i -= quotient * n;
  return quotient;
}

/// A place in the result, axis by axis.
struct element_place {
  index_t at[4];

  [[nodiscard]] SSMLIB_DEVICE index_t offset(const shape<4>& strides) const {
    return at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2] + at[3] * strides[3];
  }
};
/// The i-th place in dense order; axes of extent 1 cost nothing.
SSMLIB_DEVICE element_place place_of(index_t i, const shape<4>& extents) {
  element_place p{};
#pragma unroll
  for (int d = 3; d > 0; --d) {
    if (extents[d] == 1) continue;
    const index_t next = split(i, extents[d]);
    p.at[d] = i;
    i = next;
  }
  p.at[0] = i;
  return p;
}
/// Where the i-th group of Width neighbours in a row begins.
template <int Width>
SSMLIB_DEVICE element_place group_place(index_t i, const shape<4>& extents) {
  const index_t groups = (extents[3] + Width - 1) / Width;
  const shape<4> rows{extents[0], extents[1], extents[2], groups};
  element_place p = place_of(i, rows);
  p.at[3] *= Width;
  return p;
}

// ---- values and gradients of one element: leaves are numbered from left to right ----------------

template <class F, class R>
struct form_values {
  R y;
};
template <class Op, class A, class R>
struct form_values<form::unary<Op, A>, R> {
  R y;
  form_values<A, R> a;
};
template <class Op, class A, class B, class R>
struct form_values<form::binary<Op, A, B>, R> {
  R y;
  form_values<A, R> a;
  form_values<B, R> b;
};

template <std::size_t First, class R>
SSMLIB_DEVICE void form_forward(constant c, const R*, form_values<constant, R>& v) {
  v.y = static_cast<R>(c.value);
}
template <std::size_t First, class T, class R>
SSMLIB_DEVICE void form_forward(form::leaf<T>, const R* leaves, form_values<form::leaf<T>, R>& v) {
  v.y = leaves[First];
}
template <std::size_t First, class Op, class A, class R>
SSMLIB_DEVICE void form_forward(const form::unary<Op, A>& f, const R* leaves,
                                form_values<form::unary<Op, A>, R>& v) {
  form_forward<First>(f.a, leaves, v.a);
  v.y = elementwise_functions::apply(f.op, v.a.y);
}
template <std::size_t First, class Op, class A, class B, class R>
SSMLIB_DEVICE void form_forward(const form::binary<Op, A, B>& f, const R* leaves,
                                form_values<form::binary<Op, A, B>, R>& v) {
  form_forward<First>(f.a, leaves, v.a);
  form_forward<First + form::traits<A>::leaves>(f.b, leaves, v.b);
  v.y = elementwise_functions::apply(f.op, v.a.y, v.b.y);
}

template <std::size_t First, class R>
SSMLIB_DEVICE void form_backward(constant, const form_values<constant, R>&, R, R*) {}
template <std::size_t First, class T, class R>
SSMLIB_DEVICE void form_backward(form::leaf<T>, const form_values<form::leaf<T>, R>&, R d,
                                 R* gradients) {
  gradients[First] = d;
}
template <std::size_t First, class Op, class A, class R>
SSMLIB_DEVICE void form_backward(const form::unary<Op, A>& f,
                                 const form_values<form::unary<Op, A>, R>& v, R d, R* gradients) {
  form_backward<First>(f.a, v.a, d * elementwise_functions::slope(f.op, v.a.y, v.y), gradients);
}
template <std::size_t First, class Op, class A, class B, class R>
SSMLIB_DEVICE void form_backward(const form::binary<Op, A, B>& f,
                                 const form_values<form::binary<Op, A, B>, R>& v, R d,
                                 R* gradients) {
  const auto both = elementwise_functions::pull(f.op, v.a.y, v.b.y, d);
  form_backward<First>(f.a, v.a, both.a, gradients);
  form_backward<First + form::traits<A>::leaves>(f.b, v.b, both.b, gradients);
}

/// f.operator()<number, T>() for each leaf of a form.
template <class F, std::size_t First = 0>
struct for_each_leaf_type {
  template <class G>
  SSMLIB_DEVICE static void call(G&) {}  // a constant
};
template <class T, std::size_t First>
struct for_each_leaf_type<form::leaf<T>, First> {
  template <class G>
  SSMLIB_DEVICE static void call(G& g) {
    g.template visit<First, T>();
  }
};
template <class Op, class A, std::size_t First>
struct for_each_leaf_type<form::unary<Op, A>, First> : for_each_leaf_type<A, First> {};
template <class Op, class A, class B, std::size_t First>
struct for_each_leaf_type<form::binary<Op, A, B>, First> {
  template <class G>
  SSMLIB_DEVICE static void call(G& g) {
    for_each_leaf_type<A, First>::call(g);
    for_each_leaf_type<B, First + form::traits<A>::leaves>::call(g);
  }
};

// ---- kernels ------------------------------------------------------------------------------------

/// Width neighbours of each operand: leaves[place][operand]; zeros beyond `valid`.
template <class F, int Width>
struct load_operands {
  using real = typename form::traits<F>::real;
  static constexpr std::size_t count = form::traits<F>::leaves;

  const elementwise_operands<F>& in;
  const element_place& place;
  int valid;
  real (&leaves)[Width][count];

  template <std::size_t K, class T>
  SSMLIB_DEVICE void visit() {
    const T* const p = static_cast<const T*>(in.data[K]) + place.offset(in.strides[K]);
    if constexpr (Width == 1) {
      leaves[0][K] = widen(*p);
    } else if (in.strides[K][3] == 0) {
      const real x = widen(*p);
#pragma unroll
      for (int i = 0; i < Width; ++i)
        leaves[i][K] = x;
    } else {
      const auto x = load_numbers<Width>(p, valid, true);
#pragma unroll
      for (int i = 0; i < Width; ++i)
        leaves[i][K] = widen(x.v[i]);
    }
  }
};

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
    store_numbers<Width>(p.y + place.offset(p.y_strides), y, valid, true);
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
    T* const to = static_cast<T*>(p.gradients[K]) + place.offset(p.gradient_strides[K]);
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
    const auto dy = load_numbers<Width>(p.dy + place.offset(p.dy_strides), valid, true);
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

template <class F, class To>
__global__ void __launch_bounds__(elementwise_threads)
    elementwise_reduction_kernel(const __grid_constant__ elementwise_gradient_problem<F, To> p,
                                 const __grid_constant__ reduction_plan plan, std::size_t leaf,
                                 double* partial) {
  using real = typename form::traits<F>::real;
  constexpr std::size_t count = form::traits<F>::leaves;
  __shared__ double sums[elementwise_threads];
  const int thread = static_cast<int>(threadIdx.x), lanes = elementwise_threads / plan.kept_lanes;
  const int kept = plan.kept_innermost ? thread % plan.kept_lanes : thread / lanes;
  const int lane = plan.kept_innermost ? thread / plan.kept_lanes : thread % lanes;
  double& mine = sums[kept * lanes + lane];
  for (index_t unit = blockIdx.x; unit < plan.tiles * plan.pieces; unit += gridDim.x) {
    index_t piece = unit;
    const index_t j = split(piece, plan.pieces) * plan.kept_lanes + kept;
    const element_place base = place_of(::min(j, plan.sums - 1), plan.kept);
    const index_t end = plan.terms * (piece + 1) / plan.pieces;
    double sum = 0;
    for (index_t r = plan.terms * piece / plan.pieces + lane; j < plan.sums && r < end;
         r += lanes) {
      element_place place = place_of(r, plan.repeated);
#pragma unroll
      for (int d = 0; d < 4; ++d)
        place.at[d] += base.at[d];
      real leaves[1][count], gradients[count];
      load_operands<F, 1> load{p.in, place, 1, leaves};
      for_each_leaf_type<F>::call(load);
      form_values<F, real> v;
      form_forward<0>(p.in.formula, leaves[0], v);
      form_backward<0>(p.in.formula, v, static_cast<real>(widen(p.dy[place.offset(p.dy_strides)])),
                       gradients);
#pragma unroll
      for (std::size_t k = 0; k < count; ++k)
        if (k == leaf) sum += static_cast<double>(gradients[k]);
    }
    mine = sum;
    for (int half = lanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) mine += (&mine)[half];
    }
    if (lane == 0 && j < plan.sums) {
      if (plan.pieces == 1) {
        add_sum<F, To> add{p, leaf, base.offset(p.gradient_strides[leaf]), mine};
        for_each_leaf_type<F>::call(add);
      } else {
        partial[piece * plan.sums + j] = mine;
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
  for (index_t j = (index_t{blockIdx.x} * elementwise_threads + threadIdx.x) / 32; j < plan.sums;
       j += step) {
    double sum = 0;
    for (index_t piece = lane; piece < plan.pieces; piece += 32)
      sum += partial[piece * plan.sums + j];
    sum = warp_sum(sum);
    if (lane == 0) {
      add_sum<F, To> add{p, leaf, place_of(j, plan.kept).offset(p.gradient_strides[leaf]), sum};
      for_each_leaf_type<F>::call(add);
    }
  }
}

// ---- which accesses -----------------------------------------------------------------------------

/// Whether rows can be read 16 bytes at a time: innermost elements are neighbours, or one.
inline bool rows_are_wide(const void* data, const shape<4>& extents, const shape<4>& strides,
                          std::size_t bytes, bool may_repeat) {
  bool wide = reinterpret_cast<std::uintptr_t>(data) % 16 == 0 &&
              (strides[3] == 1 || (may_repeat && strides[3] == 0));
  if (strides[3] == 0 && may_repeat) return true;  // read one by one
  for (std::size_t d = 0; d < 3; ++d) {
    wide = wide && (extents[d] == 1 || strides[d] * static_cast<index_t>(bytes) % 16 == 0);
  }
  return wide;
}

/// f(number, bytes of an element) for each leaf of a form.
template <class F, std::size_t First = 0, class G>
void leaf_bytes(std::type_identity<F>, G g) {
  if constexpr (requires {
                  F::a;
                  F::b;
                }) {
    leaf_bytes<decltype(F::a), First>(std::type_identity<decltype(F::a)>{}, g);
    constexpr std::size_t next = First + form::traits<decltype(F::a)>::leaves;
    leaf_bytes<decltype(F::b), next>(std::type_identity<decltype(F::b)>{}, g);
  } else if constexpr (requires { F::a; }) {
    leaf_bytes<decltype(F::a), First>(std::type_identity<decltype(F::a)>{}, g);
  } else if constexpr (form::traits<F>::leaves == 1) {
    g(First, form::traits<F>::bytes);
  }
}

template <class F>
[[nodiscard]] bool operands_are_wide(const elementwise_operands<F>& in) {
  bool wide = true;
  leaf_bytes(std::type_identity<F>{}, [&](std::size_t k, std::size_t bytes) {
    wide = wide && rows_are_wide(in.data[k], in.extents, in.strides[k], bytes, true);
  });
  return wide;
}

/// Elements of 16 bytes of the smallest type; 1 where rows are shorter than that.
template <class F, class To>
inline constexpr int elementwise_width = static_cast<int>(16 / std::min(form::traits<F>::bytes,
                                                                        sizeof(To)));

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
                    detail::rows_are_wide(p.y, p.in.extents, p.y_strides, sizeof(To), false);
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
              detail::rows_are_wide(p.dy, p.in.extents, p.dy_strides, sizeof(To), false);
  detail::leaf_bytes(std::type_identity<F>{}, [&](std::size_t k, std::size_t bytes) {
    if (p.gradients[k] == nullptr) return;
    wide = wide &&
           detail::rows_are_wide(p.gradients[k], p.in.extents, p.gradient_strides[k], bytes, false);
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
  const detail::reduction_plan plan(p.in.extents, p.gradient_strides[leaf]);
  auto* const partial = static_cast<double*>(workspace);
  const auto blocks =
      static_cast<unsigned>(std::min<index_t>(plan.tiles * plan.pieces, index_t{1} << 30));
  detail::elementwise_reduction_kernel<F, To>
      <<<blocks, detail::elementwise_threads, 0, stream>>>(p, plan, leaf, partial);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (plan.pieces == 1) return;
  detail::elementwise_pieces_kernel<F, To>
      <<<detail::elementwise_blocks(plan.sums * 32), detail::elementwise_threads, 0, stream>>>(
          p, plan, leaf, partial);
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
