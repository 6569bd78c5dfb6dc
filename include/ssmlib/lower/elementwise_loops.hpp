#pragma once

#include <ssmlib/kernels/cpu/elementwise_functions.hpp>
#include <ssmlib/lower/streams.hpp>

#include <algorithm>
#include <array>
#include <concepts>

/// @file
/// The inner loops of elementwise expressions: one row at a time, one pack at a time, forward and
/// backward. Leaves are numbered from left to right; `First` is the number of an expression's
/// first.

namespace ssm::detail {

/// Where a leaf's row begins, and its distance between elements: 1, 0 (repeated) or any other.
template <std::size_t N>
struct row_cursors {
  std::array<const void*, N> data;
  std::array<index_t, N> step;
};

/// Lanes i .. i + count - 1 of a row; lanes beyond `count` hold zeros or repeated elements.
template <Real T, class S>
[[nodiscard]] SSMLIB_ALWAYS_INLINE simd::pack<T> load_lanes(const void* row, index_t step,
                                                            index_t i, index_t count) {
  using P = simd::pack<T>;
  const S* p = static_cast<const S*>(row);
  if (step == 1 && count == P::width) return simd::load_widened(p + i);
  if (step == 0) return P(static_cast<T>(*p));
  alignas(simd::native_bytes) T lanes[P::width] = {};
  for (index_t j = 0; j < count; ++j)
    lanes[j] = static_cast<T>(p[(i + j) * step]);
  return P::load(lanes);
}

// ---- forward ------------------------------------------------------------------------------------

/// The values of a node and of everything under it.
template <class E, Real T>
struct node_values {
  simd::pack<T> y;
};
template <class Op, class A, Real T>
struct node_values<unary_expression<Op, A>, T> {
  simd::pack<T> y;
  node_values<A, T> a;
};
template <class Op, class A, class B, Real T>
struct node_values<binary_expression<Op, A, B>, T> {
  simd::pack<T> y;
  node_values<A, T> a;
  node_values<B, T> b;
};

template <class E>
inline constexpr std::size_t leaf_count = elementwise_traits<E>::leaves;

template <std::size_t First, Real T, class E, std::size_t N>
SSMLIB_ALWAYS_INLINE void forward(const E& e, const row_cursors<N>& rows, index_t i, index_t count,
                                  node_values<E, T>& v) {
  using kernels::elementwise_functions::apply;
  if constexpr (std::same_as<E, constant>) {
    v.y = simd::pack<T>(static_cast<T>(e.value));
  } else if constexpr (!ElementwiseExpression<E>) {
    v.y = load_lanes<T, typename E::value_type>(rows.data[First], rows.step[First], i, count);
  } else if constexpr (requires { e.b; }) {
    forward<First>(e.a, rows, i, count, v.a);
    forward<First + leaf_count<decltype(e.a)>>(e.b, rows, i, count, v.b);
    v.y = apply(e.op, v.a.y, v.b.y);
  } else {
    forward<First>(e.a, rows, i, count, v.a);
    v.y = apply(e.op, v.a.y);
  }
}

/// `out` may be an operand: a pack is read before it is written.
template <class E, Real T, std::size_t N>
void evaluate_row(const E& e, const row_cursors<N>& rows, index_t begin, index_t end, T* out,
                  index_t out_step) {
  constexpr index_t width = simd::pack<T>::width;
  for (index_t i = begin; i < end; i += width) {
    const index_t count = std::min(width, end - i);
    node_values<E, T> v;
    forward<0>(e, rows, i, count, v);
    if (out_step == 1 && count == width) {
      v.y.store(out + i);
    } else {
      for (index_t j = 0; j < count; ++j)
        out[(i + j) * out_step] = v.y[static_cast<int>(j)];
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

/// What becomes of a leaf's gradient.
enum class gradient_sink {
  none,     ///< not wanted
  add,      ///< added, element by element
  add_row,  ///< the leaf is one element a row: the row's sum is added
  store     ///< the leaf is repeated along rows: stored whole, to be reduced afterwards
};

template <std::size_t N, Real T>
struct gradient_cursors {
  std::array<void*, N> data;
  std::array<index_t, N> step;
  std::array<gradient_sink, N> sink;
  std::array<simd::pack<T>, N> row_sum;
};

template <Real T, class S>
SSMLIB_ALWAYS_INLINE void add_lanes(S* p, index_t step, index_t count, simd::pack<T> d) {
  if constexpr (std::same_as<S, T>) {
    if (step == 1 && count == simd::pack<T>::width) return (simd::pack<T>::load(p) + d).store(p);
  }
  alignas(simd::native_bytes) T lanes[simd::pack<T>::width];
  d.store(lanes);
  for (index_t j = 0; j < count; ++j) {
    p[j * step] = static_cast<S>(static_cast<T>(p[j * step]) + lanes[j]);
  }
}

template <std::size_t Leaf, class S, Real T, std::size_t N>
SSMLIB_ALWAYS_INLINE void take_gradient(gradient_cursors<N, T>& to, index_t i, index_t count,
                                        simd::pack<T> d) {
  const index_t step = to.step[Leaf];
  switch (to.sink[Leaf]) {
    case gradient_sink::none:
      return;
    case gradient_sink::add:
      return add_lanes<T>(static_cast<S*>(to.data[Leaf]) + i * step, step, count, d);
    case gradient_sink::add_row:
      // Lanes beyond the row's end may hold anything, NaN included.
      if (count != simd::pack<T>::width) {
        alignas(simd::native_bytes) T lanes[simd::pack<T>::width];
        d.store(lanes);
        d = simd::pack<T>::load_part(lanes, count);
      }
      to.row_sum[Leaf] += d;
      return;
    case gradient_sink::store:
      if (count == simd::pack<T>::width) {
        d.store(static_cast<T*>(to.data[Leaf]) + i);
      } else {
        d.store_part(static_cast<T*>(to.data[Leaf]) + i, count);
      }
  }
}

template <std::size_t First, class E, Real T, std::size_t N>
SSMLIB_ALWAYS_INLINE void backward(const E& e, const node_values<E, T>& v, simd::pack<T> d,
                                   gradient_cursors<N, T>& to, index_t i, index_t count) {
  using namespace kernels::elementwise_functions;
  if constexpr (std::same_as<E, constant>) {
  } else if constexpr (!ElementwiseExpression<E>) {
    take_gradient<First, typename E::value_type>(to, i, count, d);
  } else if constexpr (requires { e.b; }) {
    const pair_of_gradients<T> both = pull(e.op, v.a.y, v.b.y, d);
    backward<First>(e.a, v.a, both.a, to, i, count);
    backward<First + leaf_count<decltype(e.a)>>(e.b, v.b, both.b, to, i, count);
  } else {
    backward<First>(e.a, v.a, d * slope(e.op, v.a.y, v.y), to, i, count);
  }
}

/// The values are computed again, so nothing is kept between the passes. The last row of `rows`
/// is dy.
template <class E, Real T, std::size_t N>
void differentiate_row(const E& e, const row_cursors<N + 1>& rows, index_t begin, index_t end,
                       gradient_cursors<N, T>& to) {
  constexpr index_t width = simd::pack<T>::width;
  for (index_t i = begin; i < end; i += width) {
    const index_t count = std::min(width, end - i);
    node_values<E, T> v;
    forward<0>(e, rows, i, count, v);
    const simd::pack<T> d = load_lanes<T, T>(rows.data[N], rows.step[N], i, count);
    backward<0>(e, v, d, to, i, count);
  }
}

}  // namespace ssm::detail
