#pragma once

#include <ssmlib/tensor/cuda_elements.hpp>
#include <ssmlib/tensor/layout.hpp>

namespace ssm::detail {

/// A layout as the CUDA kernels take it: a rectangle is `offsets` == nullptr, so that nothing is
/// copied; for any other batch the offsets are, without waiting for the device. Keep it alive until
/// the kernels that read it are launched.
struct device_layout {
  device_layout(const cuda::context& ctx, const sequence_layout& layout)
      : sequences(layout.sequences()), max_length(layout.max_length()), tokens(layout.tokens()) {
    if (is_rectangle(layout)) return;
    const cuda::scope scope(ctx);
    storage = tensor<index_t, 1, cuda>(sequences + 1);
    ctx.copy(storage.data(), layout.offsets(),
             static_cast<std::size_t>(sequences + 1) * sizeof(index_t), cudaMemcpyHostToDevice);
    offsets = storage.data();
  }

  /// All sequences have the same number of tokens. @pre they lie one after the other from token 0
  [[nodiscard]] static bool is_rectangle(const sequence_layout& layout) {
    for (index_t i = 1; i < layout.sequences(); ++i) {
      if (layout.length(i) != layout.length(0)) return false;
    }
    return layout.sequences() == 0 || layout.begin(0) == 0;
  }

  tensor<index_t, 1, cuda> storage;  ///< absent for a rectangle
  const index_t* offsets = nullptr;  ///< on the device: sequences + 1, or null for a rectangle
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of the longest sequence
  index_t tokens = 0;      ///< of all sequences
};

}  // namespace ssm::detail
