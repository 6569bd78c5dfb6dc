#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/lower/elementwise_loops.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <type_traits>
#include <utility>

namespace ssm {

namespace detail {

/// f(number, tensor) for each leaf; the number is a compile-time constant.
template <std::size_t First = 0, class E, class F>
void number_leaves(E& e, F&& f) {
  if constexpr (std::same_as<std::remove_const_t<E>, constant>) {
  } else if constexpr (!ElementwiseExpression<std::remove_const_t<E>>) {
    f(std::integral_constant<std::size_t, First>{}, e);
  } else {
    number_leaves<First>(e.a, f);
    if constexpr (requires { e.b; }) {
      number_leaves<First + leaf_count<std::remove_cvref_t<decltype(e.a)>>>(e.b, f);
    }
  }
}

template <class E>
void evaluate_to(const E& e, const tensor<typename E::value_type, E::rank>& out,
                 const cpu::context& ctx) {
  using T = typename E::value_type;
  constexpr std::size_t n = leaf_count<E>;
  stream_walk<n + 1> walk;
  std::array<const void*, n> base{};
  std::array<index_t, n> size{};
  walk.extents = aligned_extents(out.extents());
  walk.strides[n] = aligned_strides(out);
  number_leaves(e, [&](auto leaf, const auto& t) {
    walk.strides[leaf] = aligned_strides(t);
    base[leaf] = t.data();
    size[leaf] = static_cast<index_t>(sizeof(*t.data()));
  });
  walk.merge();
  row_cursors<n> steps{};
  for (std::size_t k = 0; k < n; ++k)
    steps.step[k] = walk.strides[k][3];
  walk.for_each_row(ctx, false, [&](const auto& offsets, index_t begin, index_t end) {
    row_cursors<n> rows = steps;
    for (std::size_t k = 0; k < n; ++k) {
      rows.data[k] = static_cast<const char*>(base[k]) + offsets[k] * size[k];
    }
    evaluate_row<E, T>(e, rows, begin, end, out.data() + offsets[n], walk.strides[n][3]);
  });
}

/// Adds the sums of `full` (dense, of the walk's extents) over the repeated axes to `gradient`.
/// The order of the sums depends on the shapes only; they are accumulated in double.
template <Real T, Element S, int R>
void add_reduced(const cpu::context& ctx, const shape<4>& extents, const T* full,
                 const tensor<S, R>& gradient) {
  stream_walk<2> walk{extents, {dense_strides(extents), {}}};
  const shape<4> small = aligned_extents(gradient.extents()), dense = dense_strides(small);
  for (std::size_t d = 0; d < 4; ++d)
    walk.strides[1][d] = small[d] == 1 ? 0 : dense[d];
  walk.merge();
  const shape<4>&n = walk.extents, &from = walk.strides[0], &to = walk.strides[1];
  const index_t count = element_count(small);

  // Tasks share either the kept elements (no further memory) or, for short gradients, the repeated
  // axis (a partial sum each).
  std::size_t kept = 3, repeated = 3;
  index_t most_kept = 0, most_repeated = 0;
  for (std::size_t d = 0; d < 4; ++d) {
    if (to[d] != 0 && n[d] > most_kept) most_kept = n[kept = d];
    if (to[d] == 0 && n[d] > most_repeated) most_repeated = n[repeated = d];
  }
  const bool share_kept = count >= 4096 && most_kept >= 16;
  const std::size_t axis = share_kept ? kept : repeated;
  const index_t work = element_count(n) / stream_walk<2>::task_elements;
  const index_t pieces = std::clamp<index_t>(work, 1, std::min<index_t>(16, n[axis]));
  const index_t partials = share_kept ? 1 : pieces;
  const scratch<double> sums(partials * count);
  std::fill_n(sums.data(), partials * count, 0.0);

  ctx.parallel_for(pieces, [&](index_t piece) {
    shape<4> begin{}, end = n;
    begin[axis] = n[axis] * piece / pieces;
    end[axis] = n[axis] * (piece + 1) / pieces;
    double* sum = sums.data() + (share_kept ? 0 : piece * count);
    for (index_t i0 = begin[0]; i0 < end[0]; ++i0) {
      for (index_t i1 = begin[1]; i1 < end[1]; ++i1) {
        for (index_t i2 = begin[2]; i2 < end[2]; ++i2) {
          const T* row = full + i0 * from[0] + i1 * from[1] + i2 * from[2];
          double* target = sum + i0 * to[0] + i1 * to[1] + i2 * to[2];
          if (to[3] == 0) {
            double total = 0;
            for (index_t i3 = begin[3]; i3 < end[3]; ++i3)
              total += static_cast<double>(row[i3]);
            *target += total;
          } else {  // kept, and dense
            for (index_t i3 = begin[3]; i3 < end[3]; ++i3) {
              target[i3] += static_cast<double>(row[i3]);
            }
          }
        }
      }
    }
  });
  for (index_t piece = 1; piece < partials; ++piece) {
    for (index_t i = 0; i < count; ++i)
      sums[i] += sums[piece * count + i];
  }
  index_t i = 0;  // zip_with walks in dense order
  gradient.zip_with(gradient, [&](S& g, const S&) {
    g = static_cast<S>(
        static_cast<accum_t<S>>(static_cast<double>(static_cast<accum_t<S>>(g)) + sums[i++]));
  });
}

/// Whether the rows of a gradient pass may be done in any order: no gradient overlaps another
/// except as the very same elements.
template <class E>
[[nodiscard]] bool gradients_are_separate(const E& gradients) {
  bool separate = true;
  number_leaves(gradients, [&](auto i, const auto& a) {
    number_leaves(gradients, [&](auto j, const auto& b) {
      if constexpr (std::remove_cvref_t<decltype(i)>::value <
                    std::remove_cvref_t<decltype(j)>::value) {
        if (a && b && !same_elements(a, b) && may_overlap(a, b)) separate = false;
      }
    });
  });
  return separate;
}

/// One backward pass: the streams are the leaves, dy, and the gradients.
template <class E>
class gradient_pass {
  using T = typename E::value_type;
  static constexpr std::size_t n = leaf_count<E>;

 public:
  gradient_pass(const E& e, const tensor<T, E::rank>& dy, const E& gradients)
      : e_(e), gradients_(gradients), extents_(aligned_extents(e.extents())) {
    walk_.extents = extents_;
    walk_.strides[n] = aligned_strides(dy);
    base_[n] = dy.data();
    size_[n] = sizeof(T);
    number_leaves(e, [&](auto k, const auto& t) {
      walk_.strides[k] = aligned_strides(t);
      base_[k] = t.data();
      size_[k] = sizeof(*t.data());
    });
    number_leaves(gradients, [&](auto k, const auto& g) {
      if (!g) return;
      walk_.strides[n + 1 + k] = aligned_strides(g);
      to_.data[k] = g.data();
      size_[n + 1 + k] = sizeof(*g.data());
      to_.sink[k] = gradient_sink::add;
    });
    walk_.merge();
    for (std::size_t k = 0; k < n; ++k)
      choose_sink(k);
  }

  void run(const cpu::context& ctx) {
    walk_.for_each_row(ctx, !gradients_are_separate(gradients_),
                       [&](const auto& offsets, index_t begin, index_t end) {
                         differentiate(offsets, begin, end);
                       });
    number_leaves(gradients_, [&](auto k, const auto& g) {
      if (whole_[k]) add_reduced(ctx, extents_, whole_[k].data(), g);
    });
  }

 private:
  void choose_sink(std::size_t k) {
    if (to_.sink[k] == gradient_sink::none) return;
    shape<4>& strides = walk_.strides[n + 1 + k];
    bool outer_repeated = false;
    for (std::size_t d = 0; d < 3; ++d) {
      outer_repeated = outer_repeated || (walk_.extents[d] > 1 && strides[d] == 0);
    }
    const bool row_repeated = walk_.extents[3] > 1 && strides[3] == 0;
    if (!outer_repeated && !row_repeated) return;
    if (!outer_repeated && walk_.row_length() <= walk_.longest_row) {
      to_.sink[k] = gradient_sink::add_row;
      return;
    }
    to_.sink[k] = gradient_sink::store;
    whole_[k] = tensor<T, 1>(shape<1>{element_count(extents_)});
    to_.data[k] = whole_[k].data();
    size_[n + 1 + k] = sizeof(T);
    strides = dense_strides(walk_.extents);
  }

  void differentiate(const std::array<index_t, 2 * n + 1>& offsets, index_t begin, index_t end) {
    row_cursors<n + 1> rows;
    gradient_cursors<n, T> to = to_;
    for (std::size_t k = 0; k <= n; ++k) {
      rows.data[k] = static_cast<const char*>(base_[k]) + offsets[k] * size_[k];
      rows.step[k] = walk_.strides[k][3];
    }
    for (std::size_t k = 0; k < n; ++k) {
      to.data[k] = static_cast<char*>(to_.data[k]) + offsets[n + 1 + k] * size_[n + 1 + k];
      to.step[k] = walk_.strides[n + 1 + k][3];
      to.row_sum[k] = simd::pack<T>(T(0));
    }
    differentiate_row<E, T, n>(e_, rows, begin, end, to);
    number_leaves(gradients_, [&](auto k, const auto& g) {
      using S = typename std::remove_cvref_t<decltype(g)>::value_type;
      if (to.sink[k] != gradient_sink::add_row) return;
      S& element = *static_cast<S*>(to.data[k]);
      element = static_cast<S>(static_cast<T>(element) + simd::horizontal_sum(to.row_sum[k]));
    });
  }

  const E& e_;
  const E& gradients_;
  shape<4> extents_;
  stream_walk<2 * n + 1> walk_;
  std::array<const void*, n + 1> base_{};
  std::array<index_t, 2 * n + 1> size_{};
  gradient_cursors<n, T> to_{};
  std::array<tensor<T, 1>, n> whole_{};
};

}  // namespace detail

/// Evaluates an elementwise expression in one pass. @return its value, a new dense tensor.
/// @cost one read of every operand, one write; large results in parallel.
template <ElementwiseExpression E>
requires std::same_as<typename E::backend, cpu>
[[nodiscard]] tensor<typename E::value_type, E::rank> eval(
    const E& e, const cpu::context& ctx = default_context<cpu>()) {
  tensor<typename E::value_type, E::rank> out(e.extents());
  detail::evaluate_to(e, out, ctx);
  return out;
}

/// The same; on backends that compute from bf16, rounded to an element type.
template <Floating To, ElementwiseExpression E>
requires std::same_as<typename E::backend, cpu>
[[nodiscard]] tensor<To, E::rank> eval_as(const E& e,
                                          const cpu::context& ctx = default_context<cpu>()) {
  static_assert(std::same_as<To, typename E::value_type>,
                "ssm: on the CPU an expression has the element type of its operands, and float for "
                "bf16; convert the result with cast");
  return eval(e, ctx);
}

/// Evaluates into a given tensor, which may be an operand: `assign(x, x * scale + bias)`. Where it
/// overlaps an operand at other places, the result is computed aside and copied.
/// @throws shape_error  the destination has another shape.
template <ElementwiseExpression E>
void assign(const tensor<typename E::value_type, E::rank>& out, const E& e,
            const cpu::context& ctx = default_context<cpu>()) {
  if (out.extents() != e.extents()) {
    throw shape_error("ssm: assign: the expression is " + to_string<E::rank>(e.extents()) +
                      ", the destination is " + to_string<E::rank>(out.extents()) +
                      "; wanted the same");
  }
  bool safe = true;
  detail::number_leaves(e, [&](auto, const auto& t) {
    safe = safe && (detail::same_elements(t, out) || !detail::may_overlap(t, out));
  });
  if (safe) {
    detail::evaluate_to(e, out, ctx);
  } else {
    out.copy_from(eval(e, ctx));
  }
}

/// Adds the vector-Jacobian product of an elementwise expression to `gradients`, an expression of
/// the same type whose tensors are gradients; absent tensors are not computed. The gradient of a
/// repeated operand is summed over its repetitions in an order that depends on the shapes only.
/// @pre no gradient overlaps an operand or dy.
/// @throws shape_error  dy is not of the result's shape.
template <ElementwiseExpression E>
void vjp_into(const E& e, const tensor<typename E::value_type, E::rank>& dy, const E& gradients,
              const cpu::context& ctx = default_context<cpu>()) {
  if (dy.extents() != e.extents()) {
    throw shape_error("ssm: vjp: the expression is " + to_string<E::rank>(e.extents()) +
                      ", dy is " + to_string<E::rank>(dy.extents()) + "; wanted the same");
  }
  if (dy.size() == 0) return;
  detail::gradient_pass<E>(e, dy, gradients).run(ctx);
}

/// The vector-Jacobian product: an expression of the same type whose tensors are the gradients of
/// sum(dy * e), for example `g.a` and `g.b`.
template <ElementwiseExpression E>
[[nodiscard]] E vjp(const E& e, const tensor<typename E::value_type, E::rank>& dy,
                    const cpu::context& ctx = default_context<cpu>()) {
  E gradients = zeros_like(e);
  vjp_into(e, dy, gradients, ctx);
  return gradients;
}

}  // namespace ssm
