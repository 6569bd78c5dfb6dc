#pragma once

#include <ssmlib/tensor/tensor.hpp>

#include <array>
#include <utility>

namespace ssm::detail {

template <std::size_t R>
[[nodiscard]] std::array<index_t, R - 1> merge_batch(const std::array<index_t, R>& extents) {
  std::array<index_t, R - 1> merged{};
  merged[0] = extents[0] * extents[1];
  for (std::size_t d = 2; d < R; ++d)
    merged[d - 1] = extents[d];
  return merged;
}

/// Whether batch and time merge into one token axis and the last axis has unit stride: what the
/// CPU kernels ask of their operands.
template <Floating T, Backend B, int R>
[[nodiscard]] bool is_token_major(const tensor<T, R, B>& t) {
  const bool unit = t.extent(R - 1) <= 1 || t.strides()[R - 1] == 1;
  return unit &&
         (t.extent(0) <= 1 || t.extent(1) <= 1 || t.strides()[0] == t.strides()[1] * t.extent(1));
}

/// (b, T, ...) -> (tokens, ...) for reading; shares the elements where the strides allow it, which
/// they do for tensors and for their feature slices, else copies. Absent stays absent.
template <Floating T, Backend B, int R>
[[nodiscard]] tensor<T, R - 1, B> input_tokens(const tensor<T, R, B>& t) {
  if (!t) return {};
  const tensor<T, R, B> usable = is_token_major(t) ? t : t.clone();
  return usable.template reshape<R - 1>(merge_batch(usable.extents()));
}

/// (b, T, ...) -> (tokens, ...) for adding to. Where the strides do not allow sharing, `tokens` is
/// a zeroed stand-in and finish() adds it to the target.
template <Floating T, int R, Backend B = cpu>
class output_tokens {
 public:
  explicit output_tokens(const tensor<T, R, B>& target) : target_(target) {
    if (!target) return;
    if (is_token_major(target)) {
      tokens_ = target.template reshape<R - 1>(merge_batch(target.extents()));
    } else {
      stand_in_ = tensor<T, R, B>::zeros(target.extents());
      tokens_ = stand_in_.template reshape<R - 1>(merge_batch(target.extents()));
    }
  }
  [[nodiscard]] const tensor<T, R - 1, B>& get() const { return tokens_; }
  void finish() const {
    if (stand_in_) add_to(target_, stand_in_);
  }

 private:
  tensor<T, R, B> target_, stand_in_;
  tensor<T, R - 1, B> tokens_;
};

}  // namespace ssm::detail
