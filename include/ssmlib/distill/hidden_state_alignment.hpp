#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/nn/pass.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace ssm {

/// MOHAWK stage 2, hidden-state alignment: the mean over tokens of the Euclidean distance
///
///     || y_student - y_teacher ||_2        (a norm over features, not its square)
///
/// @param student, teacher  (b, T, d): the outputs of two layers for the same input
/// @return (1); recorded on p.tape for whichever of the two it wants
/// @throws shape_error  the shapes differ.
/// @cost   O(tokens d); the distances are kept for the backward pass
/// @source Bick et al. 2024 (MOHAWK), arXiv:2408.10189, section 4.2.
template <Real T>
[[nodiscard]] tensor<T, 1> hidden_state_alignment_loss(const pass<T>& p,
                                                       const tensor<T, 3>& student,
                                                       const tensor<T, 3>& teacher) {
  if (student.extents() != teacher.extents()) {
    throw shape_error("ssm: hidden_state_alignment_loss: the student's states are " +
                      to_string<3>(student.extents()) + ", the teacher's " +
                      to_string<3>(teacher.extents()) + "; wanted the same");
  }
  const index_t batch = student.extent(0), time = student.extent(1), width = student.extent(2);
  tensor<double, 2> distance(batch, time);
  p.ctx.parallel_ranges(batch * time, 64, 1, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      double sum = 0;
      for (index_t c = 0; c < width; ++c) {
        const double d = static_cast<double>(student(i / time, i % time, c)) -
                         static_cast<double>(teacher(i / time, i % time, c));
        sum += d * d;
      }
      distance(i / time, i % time) = std::sqrt(sum);
    }
  });
  double total = 0;
  for (index_t i = 0; i < distance.size(); ++i)
    total += distance.data()[i];
  const double count = static_cast<double>(std::max<index_t>(batch * time, 1));
  auto loss = tensor<T, 1>::full({1}, static_cast<T>(total / count));
  if (p.tape == nullptr || !(p.tape->wants(student) || p.tape->wants(teacher))) return loss;
  p.tape->record(loss, [=, &ctx = p.ctx, t = p.tape] {
    const double upstream = static_cast<double>(t->gradient(loss)(0)) / count;
    const tensor<T, 3> d_student = t->gradient(student), d_teacher = t->gradient(teacher);
    ctx.parallel_ranges(batch * time, 64, 1, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) {
        const index_t b = i / time, s = i % time;
        if (!(distance(b, s) > 0)) continue;  // the norm's subgradient at 0
        const T factor = static_cast<T>(upstream / distance(b, s));
        for (index_t c = 0; c < width; ++c) {
          const T d = factor * (student(b, s, c) - teacher(b, s, c));
          if (d_student) d_student(b, s, c) += d;
          if (d_teacher) d_teacher(b, s, c) -= d;
        }
      }
    });
  });
  return loss;
}

#define SSMLIB_DETAIL_LIST(T)                                                   \
  SSMLIB_INSTANTIATE(distillation, tensor<T, 1> hidden_state_alignment_loss<T>( \
                                       const pass<T>&, const tensor<T, 3>&, const tensor<T, 3>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
