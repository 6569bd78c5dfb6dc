#pragma once

#include <ssmlib/tensor/shape.hpp>

#include <type_traits>

namespace ssm {

/// What kernels receive: a pointer with extents and strides (in elements). Owns nothing, is
/// trivially copyable, and never enters a node. A default view has no data: kernels read that as
/// "absent" for optional inputs and "not wanted" for gradients.
template <class T, int R>
struct view {
  T* data = nullptr;
  shape<R> extents{};
  shape<R> strides{};

  template <class... I>
  requires(sizeof...(I) == R) T& operator()(I... i) const {
    index_t offset = 0;
    int d = 0;
    ((offset += static_cast<index_t>(i) * strides[static_cast<std::size_t>(d++)]), ...);
    return data[offset];
  }

  [[nodiscard]] index_t extent(int d) const { return extents[static_cast<std::size_t>(d)]; }
  [[nodiscard]] index_t stride(int d) const { return strides[static_cast<std::size_t>(d)]; }
  [[nodiscard]] index_t size() const { return element_count(extents); }
  explicit operator bool() const { return data != nullptr; }

  operator view<const T, R>() const requires(!std::is_const_v<T>) {
    return {data, extents, strides};
  }
};
static_assert(std::is_trivially_copyable_v<view<float, 4>>);

}  // namespace ssm
