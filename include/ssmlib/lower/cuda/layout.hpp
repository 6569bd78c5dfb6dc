#pragma once

#include <ssmlib/tensor/cuda_elements.hpp>
#include <ssmlib/tensor/layout.hpp>

#include <memory>
#include <utility>

namespace ssm::detail {

/// The offsets and positions of a layout on the device.
struct cuda_layout_copy final : layout_copy {
  tensor<index_t, 1, cuda> offsets;    ///< sequences + 1; absent for a rectangle
  tensor<index_t, 1, cuda> positions;  ///< (sequences), of the first tokens
};

/// n numbers from the host, which does not wait for the device.
[[nodiscard]] inline tensor<index_t, 1, cuda> queue_copy(const cuda::context& ctx,
                                                         const index_t* numbers, index_t n) {
  const cuda::scope scope(ctx);
  const tensor<index_t, 1, cuda> there(n);
  elements<cuda>::write(there.data(), numbers, static_cast<std::size_t>(n) * sizeof(index_t));
  return there;
}

/// A layout as the CUDA kernels take it: a rectangle is `offsets` == nullptr. What the layout has
/// no copy of is copied, without waiting for the device. Keep it alive until the kernels that read
/// it are launched.
struct device_layout {
  device_layout(const cuda::context& ctx, const sequence_layout& layout)
      : copy(std::dynamic_pointer_cast<const cuda_layout_copy>(layout.copy())),
        sequences(layout.sequences()),
        max_length(layout.max_length()),
        tokens(layout.tokens()) {
    if (is_rectangle(layout)) return;
    storage = copy ? copy->offsets : queue_copy(ctx, layout.offsets(), sequences + 1);
    offsets = storage.data();
  }
  /// Where the sequences' first tokens stand, which the host knows as `positions`.
  [[nodiscard]] tensor<index_t, 1, cuda> positions(const cuda::context& ctx,
                                                   const index_t* host) const {
    return copy ? copy->positions : queue_copy(ctx, host, sequences);
  }

  /// All sequences have the same number of tokens. @pre they lie one after the other from token 0
  [[nodiscard]] static bool is_rectangle(const sequence_layout& layout) {
    for (index_t i = 1; i < layout.sequences(); ++i) {
      if (layout.length(i) != layout.length(0)) return false;
    }
    return layout.sequences() == 0 || layout.begin(0) == 0;
  }

  std::shared_ptr<const cuda_layout_copy> copy;  ///< the layout's, if it has one
  tensor<index_t, 1, cuda> storage;              ///< absent for a rectangle
  const index_t* offsets = nullptr;  ///< on the device: sequences + 1, or null for a rectangle
  index_t sequences = 0;
  index_t max_length = 0;  ///< tokens of the longest sequence
  index_t tokens = 0;      ///< of all sequences
};

}  // namespace ssm::detail

namespace ssm {

/// The layout with a copy of its numbers on the device, for all layers of a model.
[[nodiscard]] inline sequence_layout apply_layout(const cuda::context& ctx,
                                                  const sequence_layout& layout) {
  const index_t n = layout.sequences();
  auto copy = std::make_shared<detail::cuda_layout_copy>();
  if (!detail::device_layout::is_rectangle(layout)) {
    copy->offsets = detail::queue_copy(ctx, layout.offsets(), n + 1);
  }
  const tensor<index_t, 1> first(n);
  for (index_t i = 0; i < n; ++i)
    first(i) = layout.first_position(i);
  copy->positions = detail::queue_copy(ctx, first.data(), n);
  return layout.with_copy(std::move(copy));
}

}  // namespace ssm
