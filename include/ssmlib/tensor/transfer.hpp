#pragma once

#include <ssmlib/tensor/cuda_elements.hpp>

#include <concepts>

namespace ssm {

/// A copy of a tensor on another backend, dense. To the device it is queued on the context's
/// stream; to the host it waits for all work before it.
/// @throws backend_error  out of memory, or an earlier error of the stream.
template <Backend To, Element T, int R, Backend From>
[[nodiscard]] tensor<T, R, To> to(const tensor<T, R, From>& t,
                                  const cuda::context& ctx = default_context<cuda>()) {
  static_assert(!std::same_as<To, From>,
                "ssm: to<backend>(tensor) copies between backends; clone() copies on one");
  const cuda::scope scope(ctx);
  if constexpr (std::same_as<To, cuda>) {
    return detail::elements<cuda>::from_host(t);
  } else {
    return detail::elements<cuda>::to_host(t);
  }
}

}  // namespace ssm
