#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/lower/tokens.hpp>

namespace ssm::detail {

/// The gradient of an operand (b, T, G, ...) that serves H heads, for kernels whose tasks are
/// heads: (tokens, H, ...), each head's own. Where H > G it is a zeroed stand-in, and finish() adds
/// the heads of a group in order. Absent stays absent.
template <Real T, int R>
class head_gradients {
 public:
  head_gradients(const tensor<T, R>& target, index_t heads) : tokens_(target) {
    if (!target || target.extent(2) == heads) {
      rows_ = tokens_.get();
      return;
    }
    auto extents = tokens_.get().extents();
    extents[1] = heads;
    rows_ = tensor<T, R - 1>::zeros(extents);
    stands_in_ = true;
  }
  [[nodiscard]] const tensor<T, R - 1>& get() const { return rows_; }
  void finish() const {
    if (stands_in_) {
      const index_t heads = rows_.extent(1), groups = tokens_.get().extent(1);
      for (index_t h = 0; h < heads; ++h) {
        const index_t g = group_of(h, heads, groups);
        add_to(tokens_.get().slice(1, g, g + 1), rows_.slice(1, h, h + 1));
      }
    }
    tokens_.finish();
  }

 private:
  output_tokens<T, R> tokens_;
  tensor<T, R - 1> rows_;
  bool stands_in_ = false;
};

/// A result (b, T, H, P) for kernels that overwrite (tokens, H, P): the tensor itself, or a
/// stand-in that finish() copies back where its strides do not allow it.
template <Real T>
class result_tokens {
 public:
  explicit result_tokens(const tensor<T, 4>& target)
      : target_(target), whole_(is_token_major(target) ? target : tensor<T, 4>(target.extents())) {
    rows_ = whole_.template reshape<3>(merge_batch(whole_.extents()));
  }
  [[nodiscard]] const tensor<T, 3>& get() const { return rows_; }
  void finish() const {
    if (whole_.data() != target_.data()) target_.copy_from(whole_);
  }

 private:
  tensor<T, 4> target_, whole_;
  tensor<T, 3> rows_;
};

/// For algorithms that do not see every state.
template <Real T>
void refuse_snapshots(const carry<T>& c) {
  if (c.snapshots) {
    throw value_error(
        "ssm: only alg::recurrent keeps snapshots of the state; use it, or advance()");
  }
}

}  // namespace ssm::detail
