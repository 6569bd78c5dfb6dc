#pragma once

#include <ssmlib/tensor/layout.hpp>

#include <algorithm>
#include <span>

namespace ssm::detail {

/// Positions and rollback budget of a batch of sequences: the part all states share.
class state_positions {
 public:
  state_positions() = default;
  state_positions(index_t sequences, index_t max_rollback);
  state_positions(const state_positions& other)
      : position_(other.position_.clone()),
        undoable_(other.undoable_.clone()),
        max_rollback_(other.max_rollback_) {}
  state_positions(state_positions&&) = default;
  state_positions& operator=(state_positions other) {
    position_ = other.position_;
    undoable_ = other.undoable_;
    max_rollback_ = other.max_rollback_;
    return *this;
  }

  [[nodiscard]] index_t sequences() const { return position_ ? position_.extent(0) : 0; }
  [[nodiscard]] index_t max_rollback() const { return max_rollback_; }
  [[nodiscard]] index_t operator[](index_t i) const { return position_(i); }
  [[nodiscard]] index_t undoable(index_t i) const { return undoable_(i); }
  [[nodiscard]] std::span<const index_t> all() const {
    return {position_.data(), static_cast<std::size_t>(sequences())};
  }

  void advance(index_t i, index_t tokens) {
    position_(i) += tokens;
    undoable_(i) = std::min(max_rollback_, undoable_(i) + tokens);
  }
  void advance(const sequence_layout& layout) {
    for (index_t i = 0; i < layout.sequences(); ++i)
      advance(i, layout.length(i));
  }
  /// @throws value_error  n is negative or more than can be undone; nothing has changed then.
  void check_rollback(index_t i, index_t n) const;
  void check_rollback(std::span<const index_t> n) const;
  void rollback(index_t i, index_t n) {
    position_(i) -= n;
    undoable_(i) -= n;
  }
  /// @throws shape_error  the layout has another number of sequences.
  void check_layout(const sequence_layout& layout) const;
  friend bool operator==(const state_positions& a, const state_positions& b) {
    return std::ranges::equal(a.all(), b.all());
  }

 private:
  tensor<index_t, 1> position_, undoable_;
  index_t max_rollback_ = 0;
};

}  // namespace ssm::detail

#ifndef SSMLIB_COMPILED
#include <ssmlib/lower/state_positions_impl.hpp>
#endif
