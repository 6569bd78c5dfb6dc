#pragma once

#include <ssmlib/base/error.hpp>
#include <ssmlib/expr/algorithm.hpp>

#include <string>

namespace ssm::detail {

/// The chunk is part of the CUDA kernels, so a size can only be refused.
inline void check_chunk(alg::chunked a) {
  if (a.size >= 0) return;
  throw value_error("ssm: alg::chunked{" + std::to_string(a.size) +
                    "}: wanted a chunk of at least 1 token, or 0 for the default");
}

}  // namespace ssm::detail
