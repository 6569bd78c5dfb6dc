#pragma once

#include <ssmlib/kernels/cpu/attention_decode.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/lower/state.hpp>

#include <algorithm>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace ssm {

/// The state of causal softmax attention: the keys and values of the tokens so far. One for each
/// backend; that of CUDA is in lower/cuda/kv_state.hpp.
template <Floating T, Backend B = cpu>
class kv_state;

/// On the CPU. With a window of w tokens, a ring of the last ones that can still be seen, w - 1 +
/// max_rollback and a tile.
///
/// Rollback policy: attention only moves its length.
/// @cost memory (tokens kept, rounded up to 96) * (Hk * D + Hv * P) a sequence
template <Real T>
class kv_state<T, cpu> {
 public:
  kv_state() = default;
  /// @param window  0: none
  kv_state(const kernels::attention_cache_shape& shape, index_t window, index_t sequences,
           index_t max_rollback)
      : positions_(sequences, max_rollback),
        shape_(shape),
        window_(window),
        memory_(static_cast<std::size_t>(sequences)),
        caches_(static_cast<std::size_t>(sequences)) {
    if (window > 0) {
      for (index_t i = 0; i < sequences; ++i)
        grow(i, slots_of(window - 1 + ring_step()));
    }
  }
  kv_state(const kv_state& other)
      : positions_(other.positions_),
        shape_(other.shape_),
        window_(other.window_),
        memory_(other.memory_.size()),
        caches_(other.caches_.size()) {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      memory_[i] = {other.memory_[i].keys.clone(), other.memory_[i].values.clone()};
      caches_[i] = {memory_[i].keys.data(), memory_[i].values.data(), other.caches_[i].slots};
    }
  }
  kv_state(kv_state&&) = default;
  kv_state& operator=(kv_state other) {
    positions_ = std::move(other.positions_);
    shape_ = other.shape_;
    window_ = other.window_;
    memory_ = std::move(other.memory_);
    caches_ = std::move(other.caches_);
    return *this;
  }

  [[nodiscard]] index_t sequences() const { return positions_.sequences(); }
  [[nodiscard]] index_t position(index_t i) const { return positions_[i]; }
  [[nodiscard]] index_t max_rollback() const { return positions_.max_rollback(); }
  [[nodiscard]] index_t can_roll_back(index_t i) const { return positions_.undoable(i); }
  [[nodiscard]] index_t window() const { return window_; }

  /// Room for `tokens` tokens in every sequence, so that steps up to there allocate nothing.
  void reserve(index_t tokens) {
    for (index_t i = 0; i < sequences() && window_ == 0; ++i)
      grow(i, slots_of(tokens));
  }

  /// Undoes the last n tokens. @throws value_error  more than can be undone; nothing changes then.
  void rollback(index_t n) {
    for (index_t i = 0; i < sequences(); ++i)
      positions_.check_rollback(i, n);
    for (index_t i = 0; i < sequences(); ++i)
      positions_.rollback(i, n);
  }
  void rollback(std::span<const index_t> n) {
    detail::roll_back_each(positions_, n, [](index_t, index_t) {});
  }

  /// Whether every later advance gives the same: equal sizes, positions, and elements in reach.
  friend bool operator==(const kv_state& a, const kv_state& b) {
    if (!(a.positions_ == b.positions_) || !a.same_sizes(b)) return false;
    for (index_t i = 0; i < a.sequences(); ++i) {
      const index_t end = a.positions_[i];
      const index_t begin = a.window_ == 0 ? 0 : std::max<index_t>(0, end - (a.window_ - 1));
      for (index_t p = begin; p < end; ++p) {
        if (!same_token(a, b, i, p)) return false;
      }
    }
    return true;
  }

  /// Whether they fit the same products, but for the number of sequences.
  [[nodiscard]] bool same_sizes(const kv_state& other) const {
    const auto &a = shape_, &b = other.shape_;
    return window_ == other.window_ && a.k_heads == b.k_heads && a.v_heads == b.v_heads &&
           a.key_size == b.key_size && a.features == b.features;
  }

  template <Real U, int R, class Alg>
  friend tensor<U, R> advance(const mix<softmax_mixer<U, cpu>, R, Alg>& e, kv_state<U>& state,
                              const cpu::context& ctx);

 private:
  static constexpr index_t tile = kernels::attention_cache_shape::tile;
  struct tensors {
    tensor<T, 1> keys, values;
  };

  [[nodiscard]] static index_t slots_of(index_t tokens) { return (tokens + tile - 1) / tile; }
  /// New tokens that a ring takes at once.
  [[nodiscard]] index_t ring_step() const { return std::max(tile, max_rollback()); }

  /// At least `slots` slots in the cache of sequence i. @pre no ring has wrapped around
  void grow(index_t i, index_t slots) {
    auto& mine = memory_[static_cast<std::size_t>(i)];
    auto& cache = caches_[static_cast<std::size_t>(i)];
    if (slots <= cache.slots) return;
    const auto larger = [&](tensor<T, 1>& t, index_t a_slot) {
      auto fresh = tensor<T, 1>::zeros(slots * a_slot);
      if (t) fresh.slice(0, 0, t.size()).copy_from(t);
      t = fresh;
    };
    larger(mine.keys, shape_.template keys_a_slot<T>());
    larger(mine.values, shape_.template values_a_slot<T>());
    cache = {mine.keys.data(), mine.values.data(), slots};
  }
  void make_room(const sequence_layout& layout) {
    for (index_t i = 0; i < sequences() && window_ == 0; ++i) {
      const index_t wanted = slots_of(positions_[i] + layout.length(i));
      const index_t have = caches_[static_cast<std::size_t>(i)].slots;
      if (wanted > have) grow(i, std::max(wanted, have + have / 2));
    }
  }

  static bool same_token(const kv_state& a, const kv_state& b, index_t i, index_t p) {
    const auto& x = a.caches_[static_cast<std::size_t>(i)];
    const auto& y = b.caches_[static_cast<std::size_t>(i)];
    const index_t n = a.shape_.template keys_a_slot<T>(), m = a.shape_.template values_a_slot<T>();
    const T* keys_x = x.keys + p / tile % x.slots * n + p % tile;
    const T* keys_y = y.keys + p / tile % y.slots * n + p % tile;
    for (index_t d = 0; d < n; d += tile) {
      if (keys_x[d] != keys_y[d]) return false;
    }
    const index_t width = a.shape_.template value_width<T>();
    const T* values_x = x.values + p / tile % x.slots * m + p % tile * width;
    const T* values_y = y.values + p / tile % y.slots * m + p % tile * width;
    for (index_t h = 0; h < m; h += tile * width) {
      if (!std::equal(values_x + h, values_x + h + width, values_y + h)) return false;
    }
    return true;
  }

  detail::state_positions positions_;
  kernels::attention_cache_shape shape_;
  index_t window_ = 0;
  std::vector<tensors> memory_;
  std::vector<kernels::attention_cache<T>> caches_;  // what memory_ holds, for the kernel
};

/// A state for softmax attention with `sequences` sequences, empty.
/// @param prototype  any product with the head counts, feature sizes and window to be advanced
template <Real T, int R, class Alg>
[[nodiscard]] kv_state<T> make_state(const mix<softmax_mixer<T, cpu>, R, Alg>& prototype,
                                     index_t sequences, index_t max_rollback = 0) {
  const tensor<T, 4>& k = prototype.mixer.logits.k;
  const tensor<T, 4>& v = prototype.x;
  return {{k.extent(2), v.extent(2), k.extent(3), v.extent(3)},
          prototype.mixer.window,
          sequences,
          max_rollback};
}

/// Runs the new tokens that e's operands hold, one layout sequence for each of the state's, from
/// where the state stands.
///
/// @return the rows that one pass over everything gives with alg::tiled, to the bit: whatever the
///         split, and whatever else is in the batch
/// @throws value_error  the mixer is not causal: its rows depend on tokens to come.
/// @throws shape_error  another number of sequences, heads or features, or another window, than the
///                      state has.
template <Real T, int R, class Alg>
[[nodiscard]] tensor<T, R> advance(const mix<softmax_mixer<T, cpu>, R, Alg>& e, kv_state<T>& state,
                                   const cpu::context& ctx = default_context<cpu>()) {
  const softmax_mixer<T, cpu>& m = e.mixer;
  if (!m.is_causal) {
    throw value_error(
        "ssm: advance: softmax without a mask needs the tokens to come; add `+ causal` or "
        "`+ window(w)` to its logits");
  }
  const sequence_layout layout = layout_of(m);
  state.positions_.check_layout(layout);
  const shape<4> has{state.shape_.k_heads, state.shape_.key_size, state.shape_.v_heads,
                     state.shape_.features};
  const shape<4> wanted{m.logits.k.extent(2), m.logits.k.extent(3), e.x.extent(2), e.x.extent(3)};
  if (has != wanted || state.window_ != m.window) {
    throw shape_error("ssm: advance: the state is " + to_string<4>(has) + " with window " +
                      std::to_string(state.window_) + ", the mixer needs " + to_string<4>(wanted) +
                      " with window " + std::to_string(m.window) +
                      ", (key heads x key size x value heads x features)");
  }
  const tensor<T, 4> y(e.extents());
  if (y.size() == 0) return detail::demote<R>(y);
  state.make_room(layout);
  const index_t step = m.window == 0 ? std::numeric_limits<index_t>::max() : state.ring_step();
  detail::with_attention_tokens(
      m, e.x, y, [&](auto q, auto k, auto v, auto out, const sequence_layout& tokens) {
        kernels::attention_advance<T>(ctx, detail::attention_options_of(m), state.shape_,
                                      state.caches_.data(), state.positions_.all().data(), q, k, v,
                                      out, tokens.offsets(), tokens.sequences(), step);
      });
  for (index_t i = 0; i < layout.sequences(); ++i)
    state.positions_.advance(i, layout.length(i));
  return detail::demote<R>(y);
}

}  // namespace ssm
