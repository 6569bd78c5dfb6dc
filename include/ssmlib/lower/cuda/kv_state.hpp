#pragma once

#include <ssmlib/kernels/cuda/attention_decode.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/softmax.hpp>
#include <ssmlib/lower/kv_state.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <utility>

namespace ssm {

/// On CUDA: one tensor (sequences, heads, rows, size) of keys and one of values, with as many rows
/// for every sequence as the longest needs. With a window of w tokens the rows are a ring of w - 1
/// + max(64, max_rollback), else they double when they are full.
///
/// Rollback policy: attention only moves its length.
/// @cost memory sequences * rows * (Hk * D + Hv * P)
template <Floating T>
class kv_state<T, cuda> {
 public:
  kv_state() = default;
  /// @param sizes   key heads, key size, value heads, features
  /// @param window  0: none
  kv_state(const shape<4>& sizes, index_t window, index_t sequences, index_t max_rollback)
      : positions_(sequences, max_rollback), sizes_(sizes), window_(window) {
    if (window > 0) grow(window - 1 + std::max(step, max_rollback));
  }
  kv_state(const kv_state& other)
      : positions_(other.positions_),
        sizes_(other.sizes_),
        window_(other.window_),
        keys_(other.keys_.clone()),
        values_(other.values_.clone()) {}
  kv_state(kv_state&&) = default;
  kv_state& operator=(kv_state other) {
    positions_ = std::move(other.positions_);
    sizes_ = other.sizes_;
    window_ = other.window_;
    keys_ = std::move(other.keys_);
    values_ = std::move(other.values_);
    return *this;
  }

  [[nodiscard]] index_t sequences() const { return positions_.sequences(); }
  [[nodiscard]] index_t position(index_t i) const { return positions_[i]; }
  [[nodiscard]] index_t max_rollback() const { return positions_.max_rollback(); }
  [[nodiscard]] index_t can_roll_back(index_t i) const { return positions_.undoable(i); }
  [[nodiscard]] index_t window() const { return window_; }

  /// Room for `tokens` tokens in every sequence, so that steps up to there keep the cache where it
  /// is. @return  whether the cache is elsewhere now
  bool reserve(index_t tokens) {
    if (window_ != 0 || tokens <= rows()) return false;
    grow(round_up(tokens, step));
    return true;
  }
  /// Counts the tokens of an advance() that a recorded graph has run.
  void skip(const sequence_layout& layout) { positions_.advance(layout); }

  /// Undoes the last n tokens. @throws value_error  more than can be undone; nothing changes then.
  void rollback(index_t n) { rollback(detail::same_count(sequences(), n)); }
  void rollback(std::span<const index_t> n) {
    detail::roll_back_each(positions_, n, [](index_t, index_t) {});
  }

  /// Whether every later advance gives the same: equal sizes, positions, and elements in reach.
  /// @cost the elements in reach are copied to the host
  friend bool operator==(const kv_state& a, const kv_state& b) {
    if (!(a.positions_ == b.positions_) || !a.same_sizes(b)) return false;
    for (index_t i = 0; i < a.sequences(); ++i) {
      if (a.position(i) == 0) continue;
      if (!detail::equal_elements(a.in_reach(a.keys_, i), b.in_reach(b.keys_, i)) ||
          !detail::equal_elements(a.in_reach(a.values_, i), b.in_reach(b.values_, i))) {
        return false;
      }
    }
    return true;
  }

  /// Whether they fit the same products, but for the number of sequences.
  [[nodiscard]] bool same_sizes(const kv_state& other) const {
    return window_ == other.window_ && sizes_ == other.sizes_;
  }

  template <Floating U, int R, class Alg>
  friend tensor<U, R, cuda> advance(const mix<softmax_mixer<U, cuda>, R, Alg>& e,
                                    kv_state<U, cuda>& state, const cuda::context& ctx);

 private:
  /// New tokens that a ring takes at once; also what rows are rounded up to.
  static constexpr index_t step = 64;

  [[nodiscard]] index_t rows() const { return keys_ ? keys_.extent(2) : 0; }

  /// More rows. @pre no ring has wrapped around
  void grow(index_t rows_wanted) {
    const auto larger = [&](tensor<T, 4, cuda>& t, index_t heads, index_t size) {
      auto fresh = tensor<T, 4, cuda>::zeros(sequences(), heads, rows_wanted, size);
      if (t) fresh.slice(2, 0, t.extent(2)).copy_from(t);
      return fresh;
    };
    auto keys = larger(keys_, sizes_[0], sizes_[1]);
    values_ = larger(values_, sizes_[2], sizes_[3]);
    keys_ = std::move(keys);
  }
  void make_room(index_t longest) {
    if (window_ == 0 && longest > rows()) grow(round_up(std::max(longest, 2 * rows()), step));
  }
  /// Tokens of the longest sequence after a call.
  [[nodiscard]] index_t longest_after(const sequence_layout& layout) const {
    index_t longest = 0;
    for (index_t i = 0; i < sequences(); ++i)
      longest = std::max(longest, positions_[i] + layout.length(i));
    return longest;
  }
  [[nodiscard]] bool is_empty() const {
    return std::ranges::all_of(positions_.all(), [](index_t p) { return p == 0; });
  }

  /// f(first, last) for the runs of neighbouring rows that hold the tokens [begin, end).
  template <class F>
  void for_each_run(index_t begin, index_t end, F f) const {
    while (begin < end) {
      const index_t next = std::min(end, begin - begin % rows() + rows());
      f(begin, next);
      begin = next;
    }
  }
  /// The elements of sequence i that a later token can see, (1, heads, tokens, size).
  [[nodiscard]] tensor<T, 4, cuda> in_reach(const tensor<T, 4, cuda>& cache, index_t i) const {
    const index_t end = positions_[i];
    const index_t begin = window_ == 0 ? 0 : std::max<index_t>(0, end - (window_ - 1));
    const tensor<T, 4, cuda> seen(1, cache.extent(1), end - begin, cache.extent(3));
    for_each_run(begin, end, [&](index_t first, index_t last) {
      const index_t row = first % rows();
      seen.slice(2, first - begin, last - begin)
          .copy_from(cache.slice(0, i, i + 1).slice(2, row, row + (last - first)));
    });
    return seen;
  }

  /// Keeps the first tokens of `count` empty sequences from i on: `length` of each, one sequence
  /// after the other from row `begin` of `fresh` (tokens, heads, size).
  void keep_first(const tensor<T, 4, cuda>& cache, const tensor<T, 3, cuda>& fresh, index_t i,
                  index_t count, index_t begin, index_t length) const {
    for_each_run(std::max<index_t>(0, length - rows()), length, [&](index_t first, index_t last) {
      const auto part = cache.slice(0, i, i + count);
      const shape<4> extents{count, fresh.extent(1), last - first, fresh.extent(2)};
      const index_t token = fresh.strides()[0];
      detail::elements<cuda>::copy(
          part.data() + first % rows() * part.strides()[2], {extents, part.strides()},
          fresh.data() + (begin + first) * token,
          {extents, {length * token, fresh.strides()[1], token, fresh.strides()[2]}}, sizeof(T));
    });
  }
  void keep_first(const tensor<T, 3, cuda>& k, const tensor<T, 3, cuda>& v,
                  const sequence_layout& layout) const {
    if (detail::device_layout::is_rectangle(layout)) {
      keep_first(keys_, k, 0, sequences(), 0, layout.max_length());
      keep_first(values_, v, 0, sequences(), 0, layout.max_length());
      return;
    }
    for (index_t i = 0; i < sequences(); ++i) {
      keep_first(keys_, k, i, 1, layout.begin(i), layout.length(i));
      keep_first(values_, v, i, 1, layout.begin(i), layout.length(i));
    }
  }

  /// Rows of sequences [i, i + count), (count, rows, heads, size).
  [[nodiscard]] static view<T, 4> cache_rows(const tensor<T, 4, cuda>& cache, index_t i,
                                             index_t count) {
    const shape<4>&n = cache.extents(), &s = cache.strides();
    return {cache.data() + i * s[0], {count, n[2], n[1], n[3]}, {s[0], s[2], s[1], s[3]}};
  }
  /// Runs p's tokens over the cache of p.sequences sequences from i on, whose positions are on the
  /// device.
  void run(const cuda::context& ctx, kernels::cuda::attention_decode_problem<T> p, view<T, 3> y,
           index_t i, const tensor<index_t, 1, cuda>& positions) const {
    p.position = positions.data();
    p.cache = {cache_rows(keys_, i, p.sequences), cache_rows(values_, i, p.sequences)};
    const detail::cuda_workspace workspace(ctx,
                                           kernels::cuda::attention_decode_workspace_bytes<T>(p));
    kernels::cuda::attention_decode<T>(ctx.stream(), p, y, workspace.data());
  }
  /// Many tokens of one sequence after others, so many at once as a ring takes.
  void run_long(const cuda::context& ctx, kernels::cuda::attention_decode_problem<T> p,
                view<T, 3> y, index_t i, index_t begin, index_t end) const {
    const auto piece = [](auto all, index_t first, index_t n) {
      all.data += first * all.strides[0];
      all.extents[0] = n;
      return all;
    };
    const auto whole = p;
    p.sequences = 1;
    p.offsets = nullptr;
    for (index_t t = begin; t < end; t += step) {
      p.max_length = std::min(step, end - t);
      p.q = piece(whole.q, t, p.max_length);
      p.k = piece(whole.k, t, p.max_length);
      p.v = piece(whole.v, t, p.max_length);
      const index_t position = positions_[i] + (t - begin);
      p.max_keys = position + p.max_length;
      run(ctx, p, piece(y, t, p.max_length), i, detail::queue_copy(ctx, &position, 1));
    }
  }

  detail::state_positions positions_;
  shape<4> sizes_{};
  index_t window_ = 0;
  tensor<T, 4, cuda> keys_, values_;  // absent: no rows yet
};

/// A state for softmax attention with `sequences` sequences, empty.
/// @param prototype  any product with the head counts, feature sizes and window to be advanced
template <Floating T, int R, class Alg>
[[nodiscard]] kv_state<T, cuda> make_state(const mix<softmax_mixer<T, cuda>, R, Alg>& prototype,
                                           index_t sequences, index_t max_rollback = 0) {
  const tensor<T, 4, cuda>& k = prototype.mixer.logits.k;
  const tensor<T, 4, cuda>& v = prototype.x;
  return {{k.extent(2), k.extent(3), v.extent(2), v.extent(3)},
          prototype.mixer.window,
          sequences,
          max_rollback};
}

/// Runs the new tokens that e's operands hold, one layout sequence for each of the state's, from
/// where the state stands.
///
/// Pieces of at most 16 tokens a sequence have the same bits whatever the split and whatever else
/// is in the batch. The first tokens of all sequences, if they are more, run by alg::tiled; later
/// long pieces 64 tokens at a time, one sequence after the other.
/// @return the rows that one pass over everything would give
/// @throws value_error  the mixer is not causal: its rows depend on tokens to come.
/// @throws shape_error  another number of sequences, heads or features, or another window, than the
///                      state has.
template <Floating T, int R, class Alg>
[[nodiscard]] tensor<T, R, cuda> advance(const mix<softmax_mixer<T, cuda>, R, Alg>& e,
                                         kv_state<T, cuda>& state,
                                         const cuda::context& ctx = default_context<cuda>()) {
  const cuda::scope scope(ctx);
  const softmax_mixer<T, cuda>& m = e.mixer;
  if (!m.is_causal) {
    throw value_error(
        "ssm: advance: softmax without a mask needs the tokens to come; add `+ causal` or "
        "`+ window(w)` to its logits");
  }
  const sequence_layout layout = layout_of(m);
  state.positions_.check_layout(layout);
  const shape<4> wanted{m.logits.k.extent(2), m.logits.k.extent(3), e.x.extent(2), e.x.extent(3)};
  if (state.sizes_ != wanted || state.window_ != m.window) {
    throw shape_error("ssm: advance: the state is " + to_string<4>(state.sizes_) + " with window " +
                      std::to_string(state.window_) + ", the mixer needs " + to_string<4>(wanted) +
                      " with window " + std::to_string(m.window) +
                      ", (key heads x key size x value heads x features)");
  }
  const tensor<T, 4, cuda> y(e.extents());
  if (y.size() == 0) return detail::demote<R>(y);
  const index_t longest = state.longest_after(layout);
  state.make_room(longest);
  const detail::cuda_attention<T> call(ctx, m, e.x, y.extent(2));
  kernels::cuda::attention_decode_problem<T> p;
  p.q = call.p.q;
  p.k = call.p.k;
  p.v = call.p.v;
  p.heads = call.p.heads;
  p.offsets = call.p.offsets;
  p.sequences = call.p.sequences;
  p.max_length = call.p.max_length;
  // Where the host does not know the positions, they may be anywhere in the cache.
  p.max_keys = call.layout.copy ? 0 : longest;
  p.scale = call.p.scale;
  p.window = call.p.window;
  const tensor<T, 3, cuda> rows = y.template reshape<3>(detail::merge_batch(y.extents()));
  if (p.max_length <= 16) {
    state.run(ctx, p, rows.view(), 0, call.layout.positions(ctx, state.positions_.all().data()));
  } else if (state.is_empty()) {
    kernels::cuda::attention_forward<T>(ctx.stream(), call.p, rows.view(), {});
    state.keep_first(call.k, call.v, layout);
  } else {
    for (index_t i = 0; i < layout.sequences(); ++i)
      state.run_long(ctx, p, rows.view(), i, layout.begin(i), layout.end(i));
  }
  state.positions_.advance(layout);
  return detail::demote<R>(y);
}

}  // namespace ssm
