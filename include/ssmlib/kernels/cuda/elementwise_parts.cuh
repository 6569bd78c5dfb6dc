#pragma once

#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/elementwise.hpp>
#include <ssmlib/kernels/cuda/elementwise_functions.cuh>

#include <cstdint>

/// @file
/// What one thread of an elementwise kernel does: places, loads, values and gradients.

namespace ssm::kernels::cuda {

namespace detail {

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

/// A place in the result, axis by axis. Axes in use are the last ones: those before are not even
/// multiplied, because addresses would take longer than the memory.
struct element_place {
  index_t at[4];

  [[nodiscard]] SSMLIB_DEVICE index_t offset(const shape<4>& strides,
                                             const shape<4>& extents) const {
    index_t offset = at[3] * strides[3];
    if (extents[2] != 1 || extents[1] != 1 || extents[0] != 1) offset += at[2] * strides[2];
    if (extents[1] != 1 || extents[0] != 1) {
      offset += at[1] * strides[1] + at[0] * strides[0];
    }
    return offset;
  }
};
/// The i-th place in dense order.
SSMLIB_DEVICE element_place place_of(index_t i, const shape<4>& extents) {
  element_place p{};
  const bool outer = extents[1] != 1 || extents[0] != 1;
  if (!outer && extents[2] == 1) {
    p.at[3] = i;
    return p;
  }
  index_t next = split(i, extents[3]);
  p.at[3] = i;
  if (!outer) {
    p.at[2] = next;
    return p;
  }
  i = split(next, extents[2]);
  p.at[2] = next;
  p.at[0] = split(i, extents[1]);
  p.at[1] = i;
  return p;
}
/// Where the i-th group of Width neighbours in a row begins.
template <int Width>
SSMLIB_DEVICE element_place group_place(index_t i, const shape<4>& extents) {
  element_place p =
      place_of(i, shape<4>{extents[0], extents[1], extents[2], (extents[3] + Width - 1) / Width});
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
    const T* const p = static_cast<const T*>(in.data[K]) + place.offset(in.strides[K], in.extents);
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

}  // namespace detail
}  // namespace ssm::kernels::cuda
