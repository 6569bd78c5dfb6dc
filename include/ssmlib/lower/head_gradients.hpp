#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/lower/tokens.hpp>

#include <algorithm>
#include <cstddef>

namespace ssm::detail {

/// The gradient of an operand (b, T, G, ...) that serves H heads, for kernels whose tasks are
/// heads: (tokens, H, ...), each head's own. Where H > G it is a zeroed stand-in, and finish() adds
/// the heads of a group in order. Absent stays absent.
template <Floating T, int R, Backend B = cpu>
class head_gradients {
 public:
  head_gradients(const tensor<T, R, B>& target, index_t heads) : tokens_(target) {
    if (!target || target.extent(2) == heads) {
      rows_ = tokens_.get();
      return;
    }
    auto extents = tokens_.get().extents();
    extents[1] = heads;
    rows_ = tensor<T, R - 1, B>::zeros(extents);
    stands_in_ = true;
  }
  [[nodiscard]] const tensor<T, R - 1, B>& get() const { return rows_; }
  void finish() const {
    if (stands_in_) {
      const tensor<T, R - 1, B>& groups = tokens_.get();
      const index_t each = rows_.extent(1) / std::max<index_t>(1, groups.extent(1));
      shape<R> extents{rows_.extent(0), groups.extent(1), each};
      for (std::size_t d = 3; d < R; ++d)
        extents[d] = rows_.extents()[d - 1];
      const tensor<T, R, B> heads = rows_.template reshape<R>(extents);
      extents[2] = 1;
      const tensor<T, R, B> to = groups.template reshape<R>(extents);
      for (index_t i = 0; i < each; ++i)
        add_to(to, heads.slice(2, i, i + 1));
    }
    tokens_.finish();
  }

 private:
  output_tokens<T, R, B> tokens_;
  tensor<T, R - 1, B> rows_;
  bool stands_in_ = false;
};

/// A result (b, T, H, P) for kernels that overwrite (tokens, H, P): the tensor itself, or a
/// stand-in that finish() copies back where its strides do not allow it.
template <Floating T, Backend B = cpu>
class result_tokens {
 public:
  explicit result_tokens(const tensor<T, 4, B>& target)
      : target_(target),
        whole_(is_token_major(target) ? target : tensor<T, 4, B>(target.extents())) {
    rows_ = whole_.template reshape<3>(merge_batch(whole_.extents()));
  }
  [[nodiscard]] const tensor<T, 3, B>& get() const { return rows_; }
  void finish() const {
    if (whole_.data() != target_.data()) target_.copy_from(whole_);
  }

 private:
  tensor<T, 4, B> target_, whole_;
  tensor<T, 3, B> rows_;
};

/// For algorithms that do not see every state.
template <Floating T, Backend B>
void refuse_snapshots(const carry<T, B>& c) {
  if (c.snapshots) {
    throw value_error(
        "ssm: only alg::recurrent keeps snapshots of the state; use it, or advance()");
  }
}

}  // namespace ssm::detail
