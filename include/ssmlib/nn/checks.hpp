#pragma once

#include <ssmlib/tensor/tensor.hpp>

#include <string>

namespace ssm::detail {

/// Throws unless a parameter is of the wanted shape and dense. Absent parameters pass.
template <Element T, int R, Backend B>
void check_parameter(const char* operation, const char* name, const tensor<T, R, B>& t,
                     const shape<R>& wanted) {
  if (!t) return;
  if (t.extents() != wanted) {
    throw shape_error("ssm: " + std::string(operation) + ": " + name + " is " +
                      to_string<R>(t.extents()) + ", wanted " + to_string<R>(wanted));
  }
  if (!t.is_contiguous()) {
    throw shape_error("ssm: " + std::string(operation) + ": " + name + " of " +
                      to_string<R>(t.extents()) + " is strided; wanted dense, call contiguous()");
  }
}

/// Throws unless two operands have the same shape.
template <Element T, Element U, int R, Backend B>
void check_same_shape(const char* operation, const char* a_name, const tensor<T, R, B>& a,
                      const char* b_name, const tensor<U, R, B>& b) {
  if (a.extents() == b.extents()) return;
  throw shape_error("ssm: " + std::string(operation) + ": " + a_name + " is " +
                    to_string<R>(a.extents()) + ", " + b_name + " is " + to_string<R>(b.extents()) +
                    "; wanted the same shape");
}

}  // namespace ssm::detail
