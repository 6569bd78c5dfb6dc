#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/pass.hpp>
#include <ssmlib/train/token_loss.hpp>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace ssm {

/// distances[t] = || student_t - teacher_t ||_2 for rows (tokens, d).
template <Real T>
void apply_state_distances(const cpu::context& ctx, const tensor<T, 2>& student,
                           const tensor<T, 2>& teacher, const tensor<double, 1>& distances) {
  ctx.parallel_ranges(student.extent(0), 64, 1, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      double sum = 0;
      for (index_t c = 0; c < student.extent(1); ++c) {
        const double d = static_cast<double>(student(t, c)) - static_cast<double>(teacher(t, c));
        sum += d * d;
      }
      distances(t) = std::sqrt(sum);
    }
  });
}
/// Adds the gradients of d_loss times the mean of the distances; either may be absent.
template <Real T>
void apply_state_distances_vjp(const cpu::context& ctx, const tensor<T, 2>& student,
                               const tensor<T, 2>& teacher, const tensor<double, 1>& distances,
                               const tensor<T, 1>& d_loss, const tensor<T, 2>& d_student,
                               const tensor<T, 2>& d_teacher) {
  const double upstream =
      static_cast<double>(d_loss(0)) / static_cast<double>(std::max<index_t>(student.extent(0), 1));
  ctx.parallel_ranges(student.extent(0), 64, 1, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      if (!(distances(t) > 0)) continue;  // the norm's subgradient at 0
      const T factor = static_cast<T>(upstream / distances(t));
      for (index_t c = 0; c < student.extent(1); ++c) {
        const T d = factor * (student(t, c) - teacher(t, c));
        if (d_student) d_student(t, c) += d;
        if (d_teacher) d_teacher(t, c) -= d;
      }
    }
  });
}

/// MOHAWK stage 2, hidden-state alignment: the mean over tokens of the Euclidean distance
///
///     || y_student - y_teacher ||_2        (a norm over features, not its square)
///
/// @param student, teacher  (b, T, d): the outputs of two layers for the same input
/// @return (1); recorded on p.tape for whichever of the two it wants
/// @throws shape_error  the shapes differ.
/// @cost   O(tokens d); the distances are kept for the backward pass
/// @source Bick et al. 2024 (MOHAWK), arXiv:2408.10189, section 4.2.
template <Floating T, Backend B = cpu>
[[nodiscard]] tensor<accum_t<T>, 1, B> hidden_state_alignment_loss(
    const pass<T, B>& p, const std::type_identity_t<tensor<T, 3, B>>& student,
    const std::type_identity_t<tensor<T, 3, B>>& teacher) {
  if (student.extents() != teacher.extents()) {
    throw shape_error("ssm: hidden_state_alignment_loss: the student's states are " +
                      to_string<3>(student.extents()) + ", the teacher's " +
                      to_string<3>(teacher.extents()) + "; wanted the same");
  }
  const typename B::scope scope(p.ctx);
  const tensor<T, 2, B> s = detail::input_tokens(student), q = detail::input_tokens(teacher);
  const tensor<double, 1, B> distances(s.extent(0));
  apply_state_distances(p.ctx, s, q, distances);
  const index_t count = std::max<index_t>(s.extent(0), 1);
  const tensor<accum_t<T>, 1, B> loss =
      detail::make_token_loss<T, B>(p.ctx, distances, 1, 1, static_cast<double>(count), count).loss;
  if (p.tape == nullptr || !(p.tape->wants(student) || p.tape->wants(teacher))) return loss;
  p.tape->record(loss, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3, B> ds(t->gradient(student)), dq(t->gradient(teacher));
    apply_state_distances_vjp(ctx, s, q, distances, t->gradient(loss), ds.get(), dq.get());
    ds.finish();
    dq.finish();
  });
  return loss;
}

#define SSMLIB_DETAIL_LIST(T)                                                        \
  SSMLIB_INSTANTIATE(distillation, tensor<T, 1> hidden_state_alignment_loss<T, cpu>( \
                                       const pass<T>&, const tensor<T, 3>&, const tensor<T, 3>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
