#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

namespace ssm::detail {

/// The gradient of an operand for kernels that overwrite theirs: `get()` is memory of its own,
/// which finish() adds to the target. Absent stays absent.
/// @cost one more tensor, and a kernel that reads two and writes one
template <Floating T, int R>
class added_gradient {
 public:
  explicit added_gradient(const tensor<T, R, cuda>& target) : target_(target) {
    if (target) own_ = tensor<T, R, cuda>(target.extents());
  }
  [[nodiscard]] const tensor<T, R, cuda>& get() const { return own_; }
  /// (b, T, ...) -> (tokens, ...)
  [[nodiscard]] view<T, R - 1> tokens() const {
    if (!own_) return {};
    return own_.template reshape<R - 1>(merge_batch(own_.extents())).view();
  }
  void finish() const {
    if (target_) add_to(target_, own_);
  }

 private:
  tensor<T, R, cuda> target_, own_;
};

/// What a call without any token leaves behind: the final state is the initial one, or zero.
template <Floating T>
void carry_over(const carry<T, cuda>& c) {
  if (!c.final) return;
  if (!c.initial) {
    c.final.fill(accum_t<T>(0));
  } else if (c.initial.data() != c.final.data()) {
    c.final.copy_from(c.initial);
  }
}

}  // namespace ssm::detail
