#pragma once

#include <ssmlib/tensor/cuda_elements.hpp>

#include <cstddef>

namespace ssm::detail {

/// Memory that a kernel works in, from the context's pool: freed in the order of its stream, so
/// that it may be destroyed as soon as the kernel is launched. No bytes: no memory, a null pointer.
class cuda_workspace {
 public:
  /// @throws backend_error  out of memory.
  cuda_workspace(const cuda::context& ctx, std::size_t bytes) {
    if (bytes == 0) return;
    const cuda::scope scope(ctx);
    const workspace_scope counted;
    buffer_ = buffer<cuda>(bytes);
  }
  /// Aligned to 256 bytes, as everything from a pool is.
  [[nodiscard]] void* data() const { return buffer_.data(); }

 private:
  buffer<cuda> buffer_;
};

}  // namespace ssm::detail
