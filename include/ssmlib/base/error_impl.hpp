#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>

namespace ssm {

SSMLIB_INLINE std::string to_string(std::span<const index_t> extents) {
  std::string text = "(";
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (i != 0) text += " x ";
    text += std::to_string(extents[i]);
  }
  return text + ")";
}

}  // namespace ssm
