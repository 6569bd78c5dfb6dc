#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/mixer/panels.hpp>
#include <ssmlib/nn/pass.hpp>

#include <cmath>
#include <memory>
#include <vector>

namespace ssm {

namespace detail {

/// Adds the squared entries of student - teacher to `sums`, per head; both are tiles (rows, heads,
/// columns), heads broadcast to the larger count.
template <Real T>
void add_squared_differences(const cpu::context& ctx, const tensor<T, 3>& student,
                             const tensor<T, 3>& teacher, std::vector<double>& sums) {
  using P = simd::pack<T>;
  const index_t rows = student.extent(0), columns = student.extent(2);
  const index_t heads = static_cast<index_t>(sums.size());
  // One sum a row, so that the order of the additions is not that of the threads.
  const auto row_sums = tensor<double, 2>(heads, rows);
  for_row_blocks(ctx, rows, heads, [&](index_t h, index_t r0, index_t r1) {
    const index_t hs = group_of(h, heads, student.extent(1));
    const index_t ht = group_of(h, heads, teacher.extent(1));
    for (index_t r = r0; r < r1; ++r) {
      const T* m = &student(r, hs, 0);
      const T* a = &teacher(r, ht, 0);
      P sum(T(0));
      index_t s = 0;
      for (; s + P::width <= columns; s += P::width) {
        const P d = P::load(m + s) - P::load(a + s);
        sum = simd::fma(d, d, sum);
      }
      if (s < columns) {
        const P d = P::load_part(m + s, columns - s) - P::load_part(a + s, columns - s);
        sum = simd::fma(d, d, sum);
      }
      row_sums(h, r) = static_cast<double>(simd::horizontal_sum(sum));
    }
  });
  for (index_t h = 0; h < heads; ++h) {
    for (index_t r = 0; r < rows; ++r)
      sums[static_cast<std::size_t>(h)] += row_sums(h, r);
  }
}

/// to[i] += f (x[i] - y[i])
template <Real T>
void add_scaled_difference(index_t n, T f, const T* x, const T* y, T* to) {
  using P = simd::pack<T>;
  index_t i = 0;
  for (; i + P::width <= n; i += P::width)
    simd::fma(P(f), P::load(x + i) - P::load(y + i), P::load(to + i)).store(to + i);
  for (; i < n; ++i)
    to[i] = simd::fma(f, x[i] - y[i], to[i]);
}

/// The gradient of the student's tile: student - teacher with its factor per head, summed over
/// the heads that share one of the student's. Where heads are one to one, it replaces `teacher`.
template <Real T>
[[nodiscard]] tensor<T, 3> folded_difference(const cpu::context& ctx, const tensor<T, 3>& student,
                                             const tensor<T, 3>& teacher,
                                             const std::vector<T>& factor) {
  using P = simd::pack<T>;
  const index_t heads = static_cast<index_t>(factor.size()), own = student.extent(1);
  const index_t columns = student.extent(2);
  const bool in_place = own == heads && teacher.extent(1) == heads;
  const tensor<T, 3> out = in_place ? teacher : tensor<T, 3>(student.extents());
  for_row_blocks(ctx, student.extent(0), own, [&](index_t g, index_t r0, index_t r1) {
    const index_t first = g * heads / own, last = (g + 1) * heads / own;
    for (index_t r = r0; r < r1; ++r) {
      for (index_t h = first; h < last; ++h) {
        const T* m = &student(r, g, 0);
        const T* a = &teacher(r, group_of(h, heads, teacher.extent(1)), 0);
        const T f = factor[static_cast<std::size_t>(h)];
        if (h == first) {
          simd::map<T>(columns, m, a, &out(r, g, 0),
                       [f](P x, P y) SSMLIB_LAMBDA_INLINE { return P(f) * (x - y); });
        } else {
          add_scaled_difference(columns, f, m, a, &out(r, g, 0));
        }
      }
    }
  });
  return out;
}

/// f(row, row_end, s0, s1) for tiles that cover sequence i of both matrices. They are as small as
/// the matrices allow, so that what is computed of a tile is still in the cache when it is used.
template <Real T, class F>
void for_each_tile(const matrix_panels<T>& a, const matrix_panels<T>& b, index_t i, F f) {
  constexpr index_t columns = 64;
  constexpr index_t entries = index_t{1} << 19;
  const index_t begin = a.layout().begin(i), end = a.layout().end(i);
  const bool causal = a.is_causal() && b.is_causal();
  const bool cut = a.has_cheap_rows() && b.has_cheap_rows();
  const index_t heads = std::max(a.heads(), b.heads());
  const index_t rows = cut ? std::max<index_t>(256, entries / (columns * heads)) : end - begin;
  for (index_t s0 = begin; s0 < end; s0 += columns) {
    for (index_t row = causal ? s0 : begin; row < end; row += rows)
      f(row, std::min(end, row + rows), s0, std::min(end, s0 + columns));
  }
}

}  // namespace detail

/// MOHAWK stage 1, matrix orientation: the mean over sequences and heads of the Frobenius norm
///
///     || M_student - M_teacher ||_F        (a norm, not its square)
///
/// computed 64 columns at a time. Where head counts differ, a head is compared with the head of
/// the other mixer that owns it (h * G / H).
///
/// @param teacher, student  panels of two mixers over the same tokens
/// @return (1); recorded on p.tape: backward() adds to the gradients of the student's operands
/// @throws shape_error  other sequences, or head counts where neither divides the other.
/// @cost   O(T^2) time, one sweep over the panels forward and one or two backward; O(T) memory
/// @source Bick et al. 2024 (MOHAWK), arXiv:2408.10189, section 4.1.
template <Real T>
[[nodiscard]] tensor<T, 1> matrix_orientation_loss(const pass<T>& p,
                                                   std::shared_ptr<const matrix_panels<T>> teacher,
                                                   std::shared_ptr<matrix_panels<T>> student) {
  const sequence_layout& layout = student->layout();
  const sequence_layout& other = teacher->layout();
  bool same = layout.sequences() == other.sequences();
  for (index_t i = 0; same && i < layout.sequences(); ++i)
    same = layout.end(i) == other.end(i);
  if (!same) {
    throw shape_error("ssm: matrix_orientation_loss: the student has " +
                      std::to_string(layout.sequences()) + " sequences of " +
                      std::to_string(layout.tokens()) + " tokens, the teacher " +
                      std::to_string(other.sequences()) + " of " + std::to_string(other.tokens()) +
                      "; give both the same input");
  }
  const index_t heads =
      detail::join_heads("matrix_orientation_loss", student->heads(), teacher->heads());
  auto norms = std::make_shared<std::vector<double>>();  // sequence-major
  double total = 0;
  for (index_t i = 0; i < layout.sequences(); ++i) {
    std::vector<double> sums(static_cast<std::size_t>(heads), 0.0);
    detail::for_each_tile(
        *teacher, *student, i, [&](index_t row, index_t row_end, index_t s0, index_t s1) {
          detail::add_squared_differences(p.ctx, student->tile(p.ctx, i, row, row_end, s0, s1),
                                          teacher->tile(p.ctx, i, row, row_end, s0, s1), sums);
        });
    for (const double sum : sums) {
      norms->push_back(std::sqrt(sum));
      total += norms->back();
    }
  }
  const double count = static_cast<double>(std::max<std::size_t>(norms->size(), 1));
  auto loss = tensor<T, 1>::full({1}, static_cast<T>(total / count));
  if (p.tape == nullptr) return loss;
  p.tape->record(loss, [loss, norms, count, heads, teacher, student, t = p.tape, &ctx = p.ctx] {
    const sequence_layout& sequences = student->layout();
    const double upstream = static_cast<double>(t->gradient(loss)(0));
    for (index_t i = 0; i < sequences.sequences(); ++i) {
      std::vector<T> factor;
      for (index_t h = 0; h < heads; ++h) {
        const double norm = (*norms)[static_cast<std::size_t>(i * heads + h)];
        factor.push_back(norm > 0 ? static_cast<T>(upstream / (norm * count)) : T(0));
      }
      // Rows first, for mixers whose gradient needs whole-row sums; then the gradient.
      for (const bool second : {false, true}) {
        if (!second && !student->needs_row_sums()) continue;
        detail::for_each_tile(*teacher, *student, i,
                              [&](index_t row, index_t row_end, index_t s0, index_t s1) {
                                const tensor<T, 3> m = student->tile(ctx, i, row, row_end, s0, s1);
                                const tensor<T, 3> d = detail::folded_difference(
                                    ctx, m, teacher->tile(ctx, i, row, row_end, s0, s1), factor);
                                if (second) {
                                  student->add_vjp(ctx, i, row, s0, m, d);
                                } else {
                                  student->observe(ctx, i, row, s0, m, d);
                                }
                              });
      }
    }
  });
  return loss;
}

#define SSMLIB_DETAIL_LIST(T)                                                                   \
  SSMLIB_INSTANTIATE(distillation, tensor<T, 1> matrix_orientation_loss<T>(                     \
                                       const pass<T>&, std::shared_ptr<const matrix_panels<T>>, \
                                       std::shared_ptr<matrix_panels<T>>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
