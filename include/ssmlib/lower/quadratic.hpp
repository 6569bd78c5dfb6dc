#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/kernels/cpu/gemm.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <string_view>
#include <type_traits>

namespace ssm {

/// A node that brings its own gradient of dense(): dense_vjp(d_dense, gradient_node) adds to the
/// operands of gradient_node (absent tensors are skipped). Optional; see apply_mixer_vjp below.
template <class M>
concept HasDenseVjp = requires(const M& m, const tensor<double, 4>& d, M& gradients) {
  m.dense_vjp(d, gradients);
};

namespace detail {

template <Real T>
[[nodiscard]] view<T, 2> rows_of(const tensor<T, 4>& t, index_t b, index_t h, index_t begin,
                                 index_t end) {
  return {t.data() + b * t.strides()[0] + begin * t.strides()[1] + h * t.strides()[2],
          {end - begin, t.extent(3)},
          {t.strides()[1], t.strides()[3]}};
}

template <Floating T, Backend B = cpu>
void refuse_carry(const carry<T, B>& c) {
  if (c.initial || c.final || c.snapshots) {
    throw value_error(
        "ssm: this algorithm of this mixer has no initial or final state; use alg::recurrent or "
        "alg::chunked, or advance()");
  }
}

/// f(batch, local rows begin, end, index of the block's row 0 in dense()) per sequence.
template <class M, class F>
void for_each_block(const M& m, index_t length, F f) {
  const sequence_layout layout = layout_of(m);
  for (index_t i = 0; i < layout.sequences(); ++i) {
    const index_t begin = layout.begin(i), end = layout.end(i);
    if (begin == end) continue;
    if (m.layout) {
      // Packed: dense() counts over all tokens; the operands may still be a rectangle.
      f(begin / length, begin % length, begin % length + (end - begin), index_t{0}, begin);
    } else {
      f(i, index_t{0}, length, i, index_t{0});
    }
  }
}

}  // namespace detail

/// The reference that every mixer has: materialise dense(), multiply. y is overwritten.
/// @cost O(T^2) time and memory.
template <MatrixMixer M>
void apply_mixer(const cpu::context& ctx, alg::quadratic, const M& m,
                 const tensor<typename M::value_type, 4>& x,
                 const tensor<typename M::value_type, 4>& y,
                 const carry<typename M::value_type>& c) {
  using T = typename M::value_type;
  detail::refuse_carry(c);
  const tensor<T, 4> dense = cast<T>(m.dense());
  const index_t heads = y.extent(2);
  detail::for_each_block(
      m, x.extent(1), [&](index_t b, index_t begin, index_t end, index_t block, index_t row) {
        const index_t n = end - begin;
        for (index_t h = 0; h < heads; ++h) {
          const index_t hm = group_of(h, heads, dense.extent(1));
          const view<T, 2> matrix{
              &dense(block, hm, row, row), {n, n}, {dense.strides()[2], index_t{1}}};
          kernels::gemm<T>(ctx, T(1), matrix,
                           detail::rows_of(x, b, group_of(h, heads, x.extent(2)), begin, end), T(0),
                           detail::rows_of(y, b, h, begin, end));
        }
      });
}

/// The gradient of the reference. X: dX = M^T dY. Operands: dM = dY X^T goes through the node's
/// dense_vjp where it has one, else through central differences of dense(), which needs nothing
/// from the node but costs two dense() an element: for references and small problems.
/// Everything is added; absent gradient tensors are skipped.
template <MatrixMixer M>
void apply_mixer_vjp(const cpu::context& ctx, alg::quadratic, const M& m,
                     const tensor<typename M::value_type, 4>& x,
                     const tensor<typename M::value_type, 4>& dy, M& dm,
                     const tensor<typename M::value_type, 4>& dx,
                     const carry_gradient<typename M::value_type>& c) {
  using T = typename M::value_type;
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  const tensor<double, 4> exact = m.dense();
  const tensor<T, 4> dense = cast<T>(exact);
  auto d_dense = tensor<double, 4>::zeros(exact.extents());
  const index_t heads = dy.extent(2);
  detail::for_each_block(
      m, x.extent(1), [&](index_t b, index_t begin, index_t end, index_t block, index_t row) {
        const index_t n = end - begin;
        for (index_t h = 0; h < heads; ++h) {
          const index_t hm = group_of(h, heads, dense.extent(1));
          const index_t hx = group_of(h, heads, x.extent(2));
          const view<T, 2> matrix{
              &dense(block, hm, row, row), {n, n}, {index_t{1}, dense.strides()[2]}};  // M^T
          if (dx) {
            kernels::gemm<T>(ctx, T(1), matrix, detail::rows_of(dy, b, h, begin, end), T(1),
                             detail::rows_of(dx, b, hx, begin, end));
          }
          for (index_t t = 0; t < n; ++t) {
            for (index_t s = 0; s < n; ++s) {
              double sum = 0;
              for (index_t p = 0; p < x.extent(3); ++p) {
                sum += static_cast<double>(dy(b, begin + t, h, p)) *
                       static_cast<double>(x(b, begin + s, hx, p));
              }
              d_dense(block, hm, row + t, row + s) += sum;
            }
          }
        }
      });
  if constexpr (HasDenseVjp<M>) {
    m.dense_vjp(d_dense, dm);
  } else {
    // Walk the operands of a private copy and of the gradients in step.
    M probe = m;
    M::operands(probe, [](std::string_view, auto& t, operand) { t = t.clone(); });
    index_t index = 0;
    M::operands(probe, [&](std::string_view, auto& value, operand) {
      const index_t mine = index++;
      index_t other = 0;
      M::operands(dm, [&](std::string_view, auto& gradient, operand) {
        if constexpr (std::same_as<decltype(gradient), decltype(value)>) {
          if (other++ != mine || !gradient) return;
          auto sum = std::remove_cvref_t<decltype(gradient)>(gradient.extents());
          for (index_t i = 0; i < value.size(); ++i) {
            T& element = value.data()[i];
            const T saved = element;
            const T step = static_cast<T>(std::is_same_v<T, double> ? 1e-6 : 1e-3) *
                           std::max(T(1), std::abs(saved));
            element = saved + step;
            const double high = static_cast<double>(element);
            const tensor<double, 4> above = probe.dense();
            element = saved - step;
            const double low = static_cast<double>(element);
            const tensor<double, 4> below = probe.dense();
            element = saved;
            double slope = 0;
            for (index_t j = 0; j < above.size(); ++j) {
              slope += (above.data()[j] - below.data()[j]) * d_dense.data()[j];
            }
            sum.data()[i] = static_cast<T>(slope / (high - low));
          }
          detail::add_to(gradient, sum);
        } else {
          ++other;
        }
      });
    });
  }
}

}  // namespace ssm
