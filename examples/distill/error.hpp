#pragma once

#include <stdexcept>

namespace demo {

/// Something the user can put right: a bad option, file or folder; the program exits with code 2.
class usage_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace demo
