#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

#include <array>
#include <cstddef>
#include <cstdint>

namespace ssm::detail {

/// Whether nothing has been added to a gradient yet, so that the caller overwrites it: from here on
/// it counts as written. False for an absent one.
template <Floating T, int R>
[[nodiscard]] bool overwrites(const tensor<T, R, cuda>& gradient) {
  const bool first = gradient.is_unwritten();
  if (first) gradient.mark_written();
  return first;
}

/// Whether a kernel that overwrites all of its gradients or adds to all of them has to add. If it
/// has not, they count as written.
template <class... Tensors>
[[nodiscard]] bool must_add(const Tensors&... gradients) {
  bool add = false;
  const std::array<bool, sizeof...(Tensors)> first{overwrites(gradients)...};
  std::size_t i = 0;
  ((add = add || (gradients && !first[i]), ++i), ...);
  i = 0;
  if (add) ((first[i++] ? gradients.fill({}) : void()), ...);
  return add;
}

/// The gradient of an operand for kernels that overwrite theirs: `get()` is the target where
/// nothing has been added to it yet, else memory of its own, which finish() adds. For kernels that
/// add it is the target too, or zeros of its own where the target has gaps that kernels do not
/// take. Absent stays absent.
/// @cost where it is not the target: one more tensor, and a kernel that reads two and writes one
template <Floating T, int R>
class added_gradient {
 public:
  explicit added_gradient(const tensor<T, R, cuda>& target, bool kernel_adds = false)
      : target_(target) {
    if (!target) return;
    const bool fits = has_rows(target);
    if (fits && kernel_adds) {
      own_ = target;
    } else if (fits && overwrites(target)) {
      if (reinterpret_cast<std::uintptr_t>(target.data()) % 16 == 0) {
        own_ = target;
        return;
      }
      target.fill({});
    }
    if (own_) return;
    own_ = tensor<T, R, cuda>(target.extents());
    if (kernel_adds) own_.fill({});
  }
  [[nodiscard]] const tensor<T, R, cuda>& get() const { return own_; }
  /// (b, T, ...) -> (tokens, ...)
  [[nodiscard]] view<T, R - 1> tokens() const {
    if (!own_) return {};
    return own_.template reshape<R - 1>(merge_batch(own_.extents())).view();
  }
  void finish() const {
    if (target_ && !share_storage(target_, own_)) add_to(target_, own_);
  }

 private:
  /// Dense, or tokens of which each begins at a multiple of 16 bytes if the first does.
  [[nodiscard]] static bool has_rows(const tensor<T, R, cuda>& t) {
    if constexpr (R < 3) {
      return t.is_contiguous();
    } else {
      bool whole = is_token_major(t);
      for (int d = 1; d + 1 < R; ++d) {
        const index_t step = t.strides()[static_cast<std::size_t>(d)];
        whole = whole && (t.extent(d) == 1 || step * static_cast<index_t>(sizeof(T)) % 16 == 0);
      }
      return whole || t.is_contiguous();
    }
  }

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
