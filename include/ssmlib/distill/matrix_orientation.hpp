#pragma once

#include <ssmlib/mixer/panels.hpp>
#include <ssmlib/nn/pass.hpp>

#include <cmath>
#include <memory>
#include <vector>

namespace ssm {

namespace detail {

/// difference = student - teacher, both (rows, heads, columns), heads broadcast to the larger
/// count; adds the squared entries per head to `sums`.
template <Real T>
[[nodiscard]] tensor<T, 3> matrix_difference(const cpu::context& ctx, const tensor<T, 3>& student,
                                             const tensor<T, 3>& teacher,
                                             std::vector<double>& sums) {
  const index_t heads = std::max(student.extent(1), teacher.extent(1));
  tensor<T, 3> d(student.extent(0), heads, student.extent(2));
  ctx.parallel_for(heads, [&](index_t h) {
    const index_t hs = group_of(h, heads, student.extent(1));
    const index_t ht = group_of(h, heads, teacher.extent(1));
    double sum = 0;
    for (index_t r = 0; r < d.extent(0); ++r) {
      const T* m = &student(r, hs, 0);
      const T* a = &teacher(r, ht, 0);
      T* out = &d(r, h, 0);
      double row = 0;
      for (index_t s = 0; s < d.extent(2); ++s) {
        out[s] = m[s] - a[s];
        row += static_cast<double>(out[s]) * static_cast<double>(out[s]);
      }
      sum += row;
    }
    sums[static_cast<std::size_t>(h)] += sum;
  });
  return d;
}

/// Sums the heads of d that share one of `heads` heads, each with its factor.
template <Real T>
[[nodiscard]] tensor<T, 3> fold_heads(const tensor<T, 3>& d, index_t heads,
                                      const std::vector<T>& factor) {
  auto out = tensor<T, 3>::zeros(d.extent(0), heads, d.extent(2));
  for (index_t r = 0; r < d.extent(0); ++r) {
    for (index_t h = 0; h < d.extent(1); ++h) {
      const T f = factor[static_cast<std::size_t>(h)];
      T* to = &out(r, group_of(h, d.extent(1), heads), 0);
      const T* from = &d(r, h, 0);
      for (index_t s = 0; s < d.extent(2); ++s)
        to[s] += f * from[s];
    }
  }
  return out;
}

template <Real T, class F>
void for_each_panel(const matrix_panels<T>& a, const matrix_panels<T>& b, index_t i, F f) {
  constexpr index_t columns = 64;
  const sequence_layout& layout = a.layout();
  const bool causal = a.is_causal() && b.is_causal();
  for (index_t s0 = layout.begin(i); s0 < layout.end(i); s0 += columns) {
    f(causal ? s0 : layout.begin(i), s0, std::min(layout.end(i), s0 + columns));
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
    detail::for_each_panel(*teacher, *student, i, [&](index_t row, index_t s0, index_t s1) {
      (void)detail::matrix_difference(p.ctx, student->panel(p.ctx, i, row, s0, s1),
                                      teacher->panel(p.ctx, i, row, s0, s1), sums);
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
    std::vector<double> unused(static_cast<std::size_t>(heads));
    for (index_t i = 0; i < sequences.sequences(); ++i) {
      std::vector<T> factor;
      for (index_t h = 0; h < heads; ++h) {
        const double norm = (*norms)[static_cast<std::size_t>(i * heads + h)];
        factor.push_back(norm > 0 ? static_cast<T>(upstream / (norm * count)) : T(0));
      }
      // Rows first, for mixers whose gradient needs whole-row sums; then the gradient.
      for (const bool second : {false, true}) {
        if (!second && !student->needs_row_sums()) continue;
        detail::for_each_panel(*teacher, *student, i, [&](index_t row, index_t s0, index_t s1) {
          const tensor<T, 3> m = student->panel(ctx, i, row, s0, s1);
          const tensor<T, 3> d = detail::fold_heads(
              detail::matrix_difference(ctx, m, teacher->panel(ctx, i, row, s0, s1), unused),
              student->heads(), factor);
          if (second) {
            student->add_vjp(ctx, i, row, s0, d);
          } else {
            student->observe(ctx, i, row, s0, m, d);
          }
        });
      }
    }
  });
  return loss;
}

}  // namespace ssm
