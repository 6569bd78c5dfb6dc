#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/distill/weight_transfer.hpp>

#include <string>

namespace ssm::detail {

SSMLIB_INLINE void require_equal(const char* operation, const char* what, index_t actual,
                                 index_t wanted) {
  if (actual == wanted) return;
  throw shape_error("ssm: " + std::string(operation) + ": the student's " + what + " is " +
                    std::to_string(actual) + ", wanted the teacher's " + std::to_string(wanted));
}

SSMLIB_INLINE void require_no_bias(const char* operation, const attention_options& teacher) {
  if (!teacher.bias) return;
  throw value_error("ssm: " + std::string(operation) +
                    ": the teacher's projections have biases, for which the student has no place; "
                    "wanted an attention without, set attention.bias = false");
}

}  // namespace ssm::detail
