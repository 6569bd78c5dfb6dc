#pragma once

#include <ssmlib/mixer/matrix_panels.hpp>

#include <utility>

namespace ssm::detail {

/// Panels of given matrices (b, H, T, T); no gradients.
template <Real T>
class dense_panels final : public matrix_panels<T> {
 public:
  explicit dense_panels(tensor<T, 4> matrices)
      : matrices_(std::move(matrices)),
        layout_(sequence_layout::rectangular(matrices_.extent(0), matrices_.extent(2))) {
    if (matrices_.extent(2) != matrices_.extent(3)) {
      throw shape_error("ssm: panels of " + to_string<4>(matrices_.extents()) +
                        ": wanted (batch x heads x time x time)");
    }
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return matrices_.extent(1); }
  [[nodiscard]] bool is_causal() const override { return false; }
  [[nodiscard]] bool has_cheap_rows() const override { return true; }
  void tile_into(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                 const tensor<T, 3>& out) const override {
    const index_t begin = layout_.begin(i);
    const index_t s1 = s0 + out.extent(2);
    for_row_blocks(ctx, out.extent(0), heads(), [&](index_t h, index_t r0, index_t r1) {
      for (index_t r = r0; r < r1; ++r) {
        for (index_t s = s0; s < s1; ++s) {
          out(r, h, s - s0) = matrices_(i, h, row + r - begin, s - begin);
        }
      }
    });
  }
  void add_vjp(const cpu::context&, index_t, index_t, index_t, const tensor<T, 3>&,
               const tensor<T, 3>&) override {}

 private:
  tensor<T, 4> matrices_;
  sequence_layout layout_;
};

}  // namespace ssm::detail
