#pragma once

#include <ssmlib/base/error.hpp>
#include <ssmlib/base/types.hpp>

#include <array>
#include <span>
#include <string>

namespace ssm {

/// The extents of a tensor of rank R, outermost first: (batch, time, head, feature).
template <int R>
using shape = std::array<index_t, static_cast<std::size_t>(R)>;

template <int R>
[[nodiscard]] std::string to_string(const shape<R>& extents) {
  return to_string(std::span<const index_t>(extents));
}

template <std::size_t R>
[[nodiscard]] index_t element_count(const std::array<index_t, R>& extents) {
  index_t n = 1;
  for (const index_t e : extents)
    n *= e;
  return n;
}

/// Strides of a dense tensor, last index fastest, in elements.
template <std::size_t R>
[[nodiscard]] std::array<index_t, R> dense_strides(const std::array<index_t, R>& extents) {
  std::array<index_t, R> strides{};
  index_t step = 1;
  for (std::size_t i = R; i-- > 0;) {
    strides[i] = step;
    step *= extents[i];
  }
  return strides;
}

}  // namespace ssm
