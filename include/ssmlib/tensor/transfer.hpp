#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <concepts>
#include <cstddef>

namespace ssm {

/// A copy of a tensor on another backend, dense. To the device it is queued on the context's
/// stream; to the host it waits for all work before it.
/// @throws backend_error  out of memory, or an earlier error of the stream.
template <Backend To, Element T, int R, Backend From>
[[nodiscard]] tensor<T, R, To> to(const tensor<T, R, From>& t,
                                  const cuda::context& ctx = default_context<cuda>()) {
  static_assert(!std::same_as<To, From>,
                "ssm: to<backend>(tensor) copies between backends; "
                "clone() copies on one");
  if (!t) return {};
  const cuda_scope scope(ctx);
  const tensor<T, R, From> dense = t.contiguous();
  tensor<T, R, To> out(t.extents());
  constexpr bool to_device = std::same_as<To, cuda>;
  SSMLIB_CHECK_CUDA(
      cudaMemcpyAsync(out.data(), dense.data(), static_cast<std::size_t>(t.size()) * sizeof(T),
                      to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, ctx.stream()));
  // From pageable memory the call has taken what it needs when it returns.
  if (!to_device) ctx.synchronize();
  return out;
}

}  // namespace ssm
