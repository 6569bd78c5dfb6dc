#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/distill/mohawk.hpp>

#include <string>

namespace ssm {

SSMLIB_INLINE std::string to_string(mohawk_stage stage) {
  switch (stage) {
    case mohawk_stage::matrix_orientation:
      return "stage 1, matrix orientation";
    case mohawk_stage::hidden_state_alignment:
      return "stage 2, hidden-state alignment";
    default:
      return "stage 3, distillation";
  }
}

namespace detail {

SSMLIB_INLINE void throw_unlike_layers(const std::string& teacher, const std::string& student) {
  throw shape_error("ssm: mohawk: the teacher is \"" + teacher + "\", the student \"" + student +
                    "\"; wanted as many layers, and a mixer where the teacher has one");
}

SSMLIB_INLINE void throw_nothing_replaced(const std::string& teacher, const std::string& student) {
  throw value_error("ssm: mohawk: every mixer of the student \"" + student +
                    "\" is the same function as that of the teacher \"" + teacher +
                    "\"; wanted another type or other options in at least one layer, or stage 3 "
                    "alone");
}

}  // namespace detail
}  // namespace ssm
