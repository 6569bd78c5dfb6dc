#pragma once

#include <ssmlib/base/types.hpp>

#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>

namespace ssm {

/// Base of everything that the library throws. Every message is one sentence: the operation, the
/// actual sizes, the wanted sizes, what to do.
class error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Sizes that do not fit together. Thrown when a node is built, in Release too.
class shape_error : public error {
 public:
  using error::error;
};

/// A value outside its range: an option, a position, a rollback longer than the state keeps.
class value_error : public error {
 public:
  using error::error;
};

/// A backend that failed: out of memory, no device.
class backend_error : public error {
 public:
  using error::error;
};

/// A file that cannot be read or written, or whose content is not what it should be.
class io_error : public error {
 public:
  using error::error;
};

/// A result that is not a number where training cannot go on.
class numeric_error : public error {
 public:
  using error::error;
};

/// "(2 x 37 x 64)": how every message prints a shape.
[[nodiscard]] std::string to_string(std::span<const index_t> extents);

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/base/error_impl.hpp>
#endif
