#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/distill/matrix_orientation.hpp>

#include <string>

namespace ssm::detail {

SSMLIB_INLINE void require_same_sequences(const sequence_layout& student,
                                          const sequence_layout& teacher) {
  bool same = student.sequences() == teacher.sequences();
  for (index_t i = 0; same && i < student.sequences(); ++i)
    same = student.end(i) == teacher.end(i);
  if (same) return;
  throw shape_error("ssm: matrix_orientation_loss: the student has " +
                    std::to_string(student.sequences()) + " sequences of " +
                    std::to_string(student.tokens()) + " tokens, the teacher " +
                    std::to_string(teacher.sequences()) + " of " +
                    std::to_string(teacher.tokens()) + "; give both the same input");
}

}  // namespace ssm::detail
