#pragma once

#include <ssmlib/tensor/tensor.hpp>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <span>
#include <utility>

namespace ssm {

namespace detail {
/// What a backend keeps of a layout where its kernels read it.
struct layout_copy {
  virtual ~layout_copy() = default;
};
}  // namespace detail

/// How sequences lie in a batch: packed one after another along time, with no padding. Sequence i
/// is the tokens [begin(i), end(i)); its first token has position first_position(i) (0 for whole
/// sequences). A rectangular (b, T, ...) tensor is b sequences of length T, because batch and time
/// are its two outer axes.
///
/// Every mixer, layer and model takes one. Nothing crosses a boundary, to the bit.
/// A default layout is "none": nodes read it as the rectangle that their operands have.
class sequence_layout {
 public:
  sequence_layout() = default;

  /// `sequences` sequences of `length` tokens each. @throws shape_error  a negative count.
  [[nodiscard]] static sequence_layout rectangular(index_t sequences, index_t length);

  /// Sequences of these lengths. @throws shape_error  a negative length.
  [[nodiscard]] static sequence_layout from_lengths(std::span<const index_t> lengths);
  [[nodiscard]] static sequence_layout from_lengths(std::initializer_list<index_t> lengths) {
    return from_lengths(std::span<const index_t>(lengths.begin(), lengths.size()));
  }

  /// The same sequences, each starting at the given position (of its first token here).
  /// @throws shape_error  another number of positions than sequences.
  [[nodiscard]] sequence_layout at_positions(std::span<const index_t> first) const;

  /// For backends: the same layout with their own copy of its numbers beside it, so that a model
  /// makes one for all its layers.
  [[nodiscard]] sequence_layout with_copy(std::shared_ptr<const detail::layout_copy> copy) const {
    sequence_layout layout = *this;
    layout.copy_ = std::move(copy);
    return layout;
  }
  [[nodiscard]] const std::shared_ptr<const detail::layout_copy>& copy() const { return copy_; }

  explicit operator bool() const { return static_cast<bool>(offsets_); }
  [[nodiscard]] index_t sequences() const { return offsets_ ? offsets_.extent(0) - 1 : 0; }
  [[nodiscard]] index_t tokens() const { return offsets_ ? offsets_(sequences()) : 0; }
  [[nodiscard]] index_t begin(index_t i) const { return offsets_(i); }
  [[nodiscard]] index_t end(index_t i) const { return offsets_(i + 1); }
  [[nodiscard]] index_t length(index_t i) const { return end(i) - begin(i); }
  [[nodiscard]] index_t first_position(index_t i) const { return first_ ? first_(i) : 0; }
  [[nodiscard]] index_t max_length() const {
    index_t n = 0;
    for (index_t i = 0; i < sequences(); ++i)
      n = std::max(n, length(i));
    return n;
  }
  /// sequences() + 1 offsets, for kernels.
  [[nodiscard]] const index_t* offsets() const { return offsets_.data(); }

 private:
  explicit sequence_layout(index_t sequences) : offsets_(shape<1>{sequences + 1}) {}

  tensor<index_t, 1> offsets_;
  tensor<index_t, 1> first_;
  std::shared_ptr<const detail::layout_copy> copy_;
};

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/tensor/layout_impl.hpp>
#endif
