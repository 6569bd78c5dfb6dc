#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <cstdint>
#include <cstring>
#include <string>

namespace ssm::detail {

/// f(number of elements, offsets of the first in both, strides in both) for each innermost row.
template <class F>
void for_each_row(const strided_axes& a, const strided_axes& b, F f) {
  for (index_t i = 0; i < a.extents[0]; ++i) {
    for (index_t j = 0; j < a.extents[1]; ++j) {
      for (index_t k = 0; k < a.extents[2]; ++k) {
        f(a.extents[3], i * a.strides[0] + j * a.strides[1] + k * a.strides[2],
          i * b.strides[0] + j * b.strides[1] + k * b.strides[2]);
      }
    }
  }
}

/// f(a number as wide as an element)
template <class F>
void with_width(std::size_t element_bytes, F f) {
  switch (element_bytes) {
    case 2:
      return f(std::uint16_t{});
    case 4:
      return f(std::uint32_t{});
    default:
      return f(std::uint64_t{});
  }
}

SSMLIB_INLINE void elements<cpu>::copy(void* to, const strided_axes& to_axes, const void* from,
                                       const strided_axes& from_axes, std::size_t element_bytes) {
  if (to_axes.are_dense() && from_axes.are_dense()) {
    std::memmove(to, from,
                 static_cast<std::size_t>(element_count(to_axes.extents)) * element_bytes);
    return;
  }
  const index_t to_step = to_axes.strides[3], from_step = from_axes.strides[3];
  with_width(element_bytes, [&](auto bits) {
    using T = decltype(bits);
    for_each_row(to_axes, from_axes, [&](index_t n, index_t to_offset, index_t from_offset) {
      auto* a = static_cast<char*>(to) + to_offset * index_t{sizeof(T)};
      const auto* b = static_cast<const char*>(from) + from_offset * index_t{sizeof(T)};
      if (to_step == 1 && from_step == 1) {
        std::memcpy(a, b, static_cast<std::size_t>(n) * sizeof(T));
        return;
      }
      for (index_t l = 0; l < n; ++l) {
        std::memcpy(a + l * to_step * index_t{sizeof(T)}, b + l * from_step * index_t{sizeof(T)},
                    sizeof(T));
      }
    });
  });
}

SSMLIB_INLINE void elements<cpu>::fill(void* to, const strided_axes& axes, const void* value,
                                       std::size_t element_bytes) {
  with_width(element_bytes, [&](auto bits) {
    using T = decltype(bits);
    std::memcpy(&bits, value, sizeof(T));
    for_each_row(axes, axes, [&](index_t n, index_t offset, index_t) {
      auto* a = static_cast<char*>(to) + offset * index_t{sizeof(T)};
      const index_t step = axes.strides[3] * index_t{sizeof(T)};
      if (step == sizeof(T)) {
        for (index_t l = 0; l < n; ++l)
          std::memcpy(a + l * index_t{sizeof(T)}, &bits, sizeof(T));
      } else {
        for (index_t l = 0; l < n; ++l)
          std::memcpy(a + l * step, &bits, sizeof(T));
      }
    });
  });
}

SSMLIB_INLINE bool reshaped_strides(std::span<const index_t> old_extents,
                                    std::span<const index_t> old_strides,
                                    std::span<const index_t> extents, std::span<index_t> strides) {
  std::size_t i = old_extents.size(), j = extents.size();
  while (j > 0) {
    index_t want = extents[j - 1], have = 1, step = 0;
    // Take old axes until they hold at least one new axis; they must be mergeable.
    std::size_t group_end = j;
    if (i == 0) {
      strides[--j] = 1;
      if (extents[j] != 1) return false;
      continue;
    }
    step = old_strides[i - 1];
    have = old_extents[i - 1];
    --i;
    while (have != want) {
      if (have < want) {
        if (i == 0) return false;
        if (old_extents[i - 1] != 1 && have != 1 && old_strides[i - 1] != step * have) {
          return false;
        }
        if (have == 1) step = old_strides[i - 1];
        have *= old_extents[--i];
      } else {
        if (j <= 1) return false;
        --j;
        want *= extents[j - 1];
      }
    }
    index_t s = step;
    for (std::size_t d = group_end; d-- > j - 1;) {
      strides[d] = s;
      s *= extents[d];
    }
    --j;
  }
  while (i > 0) {
    if (old_extents[--i] != 1) return false;
  }
  return true;
}

SSMLIB_INLINE void check_extents(std::span<const index_t> extents) {
  for (const index_t e : extents) {
    if (e < 0) {
      throw shape_error("ssm: tensor" + to_string(extents) +
                        ": an extent is negative; extents are counts");
    }
  }
}

SSMLIB_INLINE void check_copy(std::span<const index_t> from, std::span<const index_t> to) {
  if (!std::equal(from.begin(), from.end(), to.begin())) {
    throw shape_error("ssm: copy_from: the source is " + to_string(from) + ", the destination is " +
                      to_string(to) + "; reshape or slice one of them");
  }
}

SSMLIB_INLINE void throw_slice(int axis, index_t begin, index_t end,
                               std::span<const index_t> extents) {
  throw shape_error("ssm: slice(axis " + std::to_string(axis) + ", " + std::to_string(begin) +
                    ", " + std::to_string(end) + ") of " + to_string(extents) +
                    " is out of range; wanted 0 <= begin <= end <= extent");
}

SSMLIB_INLINE void throw_reshape(std::span<const index_t> from, std::span<const index_t> to,
                                 bool same_count) {
  throw shape_error("ssm: reshape of " + to_string(from) + " to " + to_string(to) +
                    (same_count ? ": the strides do not allow it; call contiguous() first"
                                : ": the numbers of elements differ"));
}

}  // namespace ssm::detail
