#pragma once

#include <ssmlib/lower/state.hpp>

#include <algorithm>
#include <concepts>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

namespace ssm {

namespace detail {
[[noreturn]] void throw_foreign_layer_state(bool holds_nothing);
}  // namespace detail

/// The state of any layer, as a value: copying it forks it.
class any_state {
 public:
  any_state() = default;
  template <class S>
  requires(!std::same_as<std::remove_cvref_t<S>, any_state>) explicit any_state(S state)
      : held_(std::make_unique<holder<S>>(std::move(state))) {}
  any_state(const any_state& other) : held_(other.held_ ? other.held_->clone() : nullptr) {}
  any_state(any_state&&) = default;
  any_state& operator=(any_state other) {
    held_ = std::move(other.held_);
    return *this;
  }

  /// False for layers without a state (MLPs).
  explicit operator bool() const { return held_ != nullptr; }
  void rollback(std::span<const index_t> n) {
    if (held_) held_->rollback(n);
  }
  /// For graphs that repeat a step, as states have them; see lower/state.hpp. A layer without a
  /// state needs nothing.
  [[nodiscard]] bool can_skip() const { return !held_ || held_->can_skip(); }
  /// @pre can_skip()
  void skip(const sequence_layout& layout) {
    if (held_) held_->skip(layout);
  }
  bool reserve(index_t tokens) { return held_ && held_->reserve(tokens); }
  friend bool operator==(const any_state& a, const any_state& b) {
    if (!a.held_ || !b.held_) return !a.held_ && !b.held_;
    return a.held_->equals(*b.held_);
  }
  /// Whether both hold nothing, or states of one type.
  [[nodiscard]] bool same_type(const any_state& other) const {
    if (!held_ || !other.held_) return !held_ && !other.held_;
    return held_->type() == other.held_->type();
  }
  /// Whether their sizes agree too, but for the number of sequences; for states that have a
  /// function same_sizes(other) to ask. @pre same_type(other)
  [[nodiscard]] bool same_sizes(const any_state& other) const {
    return !held_ || held_->same_sizes(*other.held_);
  }
  /// @throws value_error  the state was not made from an S, or has been moved from.
  template <class S>
  [[nodiscard]] S& as() {
    if (!held_ || held_->type() != typeid(S)) detail::throw_foreign_layer_state(!held_);
    return static_cast<holder<S>*>(held_.get())->state;
  }

 private:
  struct base {
    virtual ~base() = default;
    [[nodiscard]] virtual std::unique_ptr<base> clone() const = 0;
    virtual void rollback(std::span<const index_t> n) = 0;
    [[nodiscard]] virtual bool can_skip() const = 0;
    virtual void skip(const sequence_layout& layout) = 0;
    virtual bool reserve(index_t tokens) = 0;
    [[nodiscard]] virtual bool equals(const base& other) const = 0;
    [[nodiscard]] virtual const std::type_info& type() const = 0;
    [[nodiscard]] virtual bool same_sizes(const base& other) const = 0;
  };
  template <class S>
  struct holder final : base {
    explicit holder(S s) : state(std::move(s)) {}
    [[nodiscard]] std::unique_ptr<base> clone() const override {
      return std::make_unique<holder>(state);
    }
    void rollback(std::span<const index_t> n) override { state.rollback(n); }
    [[nodiscard]] bool can_skip() const override {
      return requires(S & s, const sequence_layout& layout) {
        s.skip(layout);
      };
    }
    void skip(const sequence_layout& layout) override {
      if constexpr (requires { state.skip(layout); }) state.skip(layout);
    }
    bool reserve(index_t tokens) override {
      if constexpr (requires {
                      { state.reserve(tokens) } -> std::same_as<bool>;
                    }) {
        return state.reserve(tokens);
      } else {
        return false;
      }
    }
    [[nodiscard]] bool equals(const base& other) const override {
      return other.type() == typeid(S) && static_cast<const holder&>(other).state == state;
    }
    [[nodiscard]] const std::type_info& type() const override { return typeid(S); }
    [[nodiscard]] bool same_sizes(const base& other) const override {
      if constexpr (requires { state.same_sizes(state); }) {
        return state.same_sizes(static_cast<const holder&>(other).state);
      } else {
        return true;
      }
    }
    S state;
  };

  std::unique_ptr<base> held_;
};

/// The state of a model: those of its layers, and the positions. A value: copying is a fork.
class model_state {
 public:
  model_state() = default;
  /// @param pattern  of the model, a letter a layer; shared by what has layers of the same sizes
  model_state(std::shared_ptr<const std::string> pattern, index_t sequences, index_t max_rollback,
              std::vector<any_state> layers)
      : pattern_(std::move(pattern)),
        positions_(sequences, max_rollback),
        layers_(std::move(layers)) {}

  [[nodiscard]] index_t sequences() const { return positions_.sequences(); }
  [[nodiscard]] index_t position(index_t i) const { return positions_[i]; }
  [[nodiscard]] index_t max_rollback() const { return positions_.max_rollback(); }
  [[nodiscard]] index_t can_roll_back(index_t i) const { return positions_.undoable(i); }

  /// Undoes the last n tokens of every sequence, or n[i] of sequence i.
  /// @throws value_error  more than can be undone; nothing changes then.
  void rollback(index_t n) { rollback(detail::same_count(sequences(), n)); }
  void rollback(std::span<const index_t> n) {
    detail::roll_back_each(positions_, n, [](index_t, index_t) {});
    for (any_state& layer : layers_)
      layer.rollback(n);
  }
  /// Room for `tokens` tokens of every sequence in all layers whose memory grows with them.
  /// @return  whether some of it is elsewhere now
  bool reserve(index_t tokens) {
    bool moved = false;
    for (any_state& layer : layers_)
      moved = layer.reserve(tokens) || moved;
    return moved;
  }
  /// Whether every layer can do what skip() asks.
  [[nodiscard]] bool can_skip() const {
    return std::ranges::all_of(layers_, [](const any_state& layer) { return layer.can_skip(); });
  }
  /// Counts the tokens of an advance() that a recorded graph has run. @pre can_skip()
  void skip(const sequence_layout& layout) {
    positions_.advance(layout);
    for (any_state& layer : layers_)
      layer.skip(layout);
  }
  friend bool operator==(const model_state& a, const model_state& b) {
    return a.pattern() == b.pattern() && a.positions_ == b.positions_ && a.layers_ == b.layers_;
  }

  /// For models: the layers' states, and the record of new tokens.
  [[nodiscard]] std::vector<any_state>& layers() { return layers_; }
  [[nodiscard]] detail::state_positions& positions() { return positions_; }

  /// For models, before anything advances: whether the state was made with this very pattern, and
  /// if not, whether it fits.
  [[nodiscard]] bool is_of(const std::shared_ptr<const std::string>& pattern) const {
    return pattern_ == pattern;
  }
  /// @param pattern  of the model that is to advance
  /// @param wanted   states of its layers, of any number of sequences
  /// @throws value_error  the state is of another model or has been moved from. @throws shape_error
  ///                      a layer keeps other sizes than the model's.
  void check_model(std::string_view pattern, std::span<const any_state> wanted) const;

 private:
  [[nodiscard]] std::string_view pattern() const {
    return pattern_ ? std::string_view(*pattern_) : std::string_view();
  }

  std::shared_ptr<const std::string> pattern_;
  detail::state_positions positions_;
  std::vector<any_state> layers_;
};

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/model/model_state_impl.hpp>
#endif
