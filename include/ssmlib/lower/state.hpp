#pragma once

#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/state_positions.hpp>

#include <algorithm>
#include <concepts>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace ssm {

/// @file
/// One state for every mixer. A state is a value: copying copies the elements (a fork), == compares
/// what a later advance can see. It is made for a number of sequences and the longest rollback;
/// every one has
///
///   sequences(), position(i), max_rollback(), can_roll_back(i)
///   rollback(n) / rollback(span of n per sequence)
///
/// and `advance(mixer * X, state)` runs any number of new tokens from any position. States whose
/// advance() for a few tokens keeps its memory where it is have skip(layout) too: what a graph that
/// repeats an advance() leaves to the host.

namespace detail {

/// Calls f(i, n[i]) for all sequences after all counts have been checked.
template <class F>
void roll_back_each(state_positions& positions, std::span<const index_t> n, F f) {
  positions.check_rollback(n);
  for (index_t i = 0; i < positions.sequences(); ++i) {
    const index_t count = n[static_cast<std::size_t>(i)];
    if (count == 0) continue;
    f(i, count);
    positions.rollback(i, count);
  }
}

/// The same count for every sequence.
[[nodiscard]] inline std::vector<index_t> same_count(index_t sequences, index_t n) {
  return std::vector<index_t>(static_cast<std::size_t>(sequences), n);
}

template <Floating T, Backend B, int R>
[[nodiscard]] bool equal_elements(const tensor<T, R, B>& a, const tensor<T, R, B>& b) {
  if (a.extents() != b.extents()) return false;
  bool same = true;
  on_host(a).zip_with(on_host(b), [&](const T& x, const T& y) { same = same && x == y; });
  return same;
}

/// (b, T, ...) -> (1, tokens, ...)
template <Floating T, Backend B, int R>
[[nodiscard]] tensor<T, R, B> as_packed(const tensor<T, R, B>& t) {
  shape<R> extents = t.extents();
  extents[1] *= extents[0];
  extents[0] = 1;
  bool mergeable = t.extent(0) <= 1 || t.strides()[0] == t.strides()[1] * t.extent(1);
  return (mergeable ? t : t.clone()).template reshape<R>(extents);
}

/// The product restricted to the tokens [begin, end) of the packed batch, as one sequence.
template <MatrixMixer M, int R, class Alg>
[[nodiscard]] mix<M, 4, Alg> slice_tokens(const mix<M, R, Alg>& e, index_t begin, index_t end) {
  mix<M, 4, Alg> part{e.mixer, e.x, e.algorithm};
  decltype(part)::operands(part, [&](std::string_view, auto& t, operand kind) {
    if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
      if (kind == operand::per_token && t) t = as_packed(t).slice(1, begin, end);
    }
  });
  part.mixer.layout = sequence_layout::rectangular(1, end - begin);
  return part;
}

}  // namespace detail

/// The state of a recurrent mixer: one (key size x features) matrix a head, in the element type of
/// the mixer. Rollback policy `snapshot`: the states before each of the last max_rollback tokens.
///
/// It is numbers only and keeps no record of the mixer: any recurrent mixer of the same element
/// type and sizes may advance it, so that linear attention, say, can go on by retention. Take care
/// that this is meant; a model_state does know its model.
/// @cost memory (1 + max_rollback) * sequences * H * N * features
template <Floating T, Backend B = cpu>
class matrix_state {
 public:
  matrix_state() = default;
  matrix_state(index_t sequences, index_t heads, index_t key_size, index_t features,
               index_t max_rollback)
      : positions_(sequences, max_rollback),
        value_(tensor<accum_t<T>, 4, B>::zeros(sequences, heads, key_size, features)) {
    if (max_rollback > 0) {
      snapshots_ = tensor<accum_t<T>, 4, B>(max_rollback * sequences, heads, key_size, features);
    }
  }
  matrix_state(const matrix_state& other)
      : positions_(other.positions_),
        value_(other.value_.clone()),
        snapshots_(other.snapshots_.clone()) {}
  matrix_state(matrix_state&&) = default;
  matrix_state& operator=(matrix_state other) {
    positions_ = std::move(other.positions_);
    value_ = std::move(other.value_);
    snapshots_ = std::move(other.snapshots_);
    return *this;
  }

  [[nodiscard]] index_t sequences() const { return positions_.sequences(); }
  [[nodiscard]] index_t position(index_t i) const { return positions_[i]; }
  [[nodiscard]] index_t max_rollback() const { return positions_.max_rollback(); }
  [[nodiscard]] index_t can_roll_back(index_t i) const { return positions_.undoable(i); }
  /// (sequences, H, key size, features)
  [[nodiscard]] const tensor<accum_t<T>, 4, B>& value() const { return value_; }

  /// Undoes the last n tokens. @throws value_error  more than can be undone; nothing changes then.
  void rollback(index_t n) { rollback(detail::same_count(sequences(), n)); }
  void rollback(std::span<const index_t> n) {
    detail::roll_back_each(positions_, n, [&](index_t i, index_t count) {
      const index_t row = (positions_[i] - count) % max_rollback() * sequences() + i;
      value_.slice(0, i, i + 1).copy_from(snapshots_.slice(0, row, row + 1));
    });
  }

  /// Counts the tokens of an advance() that a recorded graph has run.
  void skip(const sequence_layout& layout) { positions_.advance(layout); }

  /// Whether they fit the same products, but for the number of sequences.
  [[nodiscard]] bool same_sizes(const matrix_state& other) const {
    return std::ranges::equal(std::span(value_.extents()).subspan(1),
                              std::span(other.value_.extents()).subspan(1));
  }
  friend bool operator==(const matrix_state& a, const matrix_state& b) {
    return a.positions_ == b.positions_ && detail::equal_elements(a.value_, b.value_);
  }

  /// For kernels that move the state themselves: where it and its snapshots are. They leave the
  /// positions to skip().
  [[nodiscard]] carry<T, B> whole() const {
    return {value_, value_, snapshots_, max_rollback(), positions_.all().data()};
  }

  template <RecurrentMixer M, int R, class Alg>
  friend tensor<typename M::value_type, R, typename M::backend> advance(
      const mix<M, R, Alg>& e, matrix_state<typename M::value_type, typename M::backend>& state,
      const typename M::backend::context& ctx);

 private:
  detail::state_positions positions_;
  tensor<accum_t<T>, 4, B> value_;
  tensor<accum_t<T>, 4, B> snapshots_;
};

/// A state for mixer * X with `sequences` sequences, empty.
/// @param prototype  any product of the type and feature sizes that will be advanced
template <RecurrentMixer M, int R, class Alg>
[[nodiscard]] matrix_state<typename M::value_type, typename M::backend> make_state(
    const mix<M, R, Alg>& prototype, index_t sequences, index_t max_rollback = 0) {
  return {sequences, prototype.heads(), prototype.mixer.key_size(),
          prototype.mixer.state_features(prototype.x.extent(3)), max_rollback};
}

/// Runs the new tokens that e's operands hold, one layout sequence for each of the state's, from
/// where the state stands.
///
/// Pieces of at most 16 tokens a sequence run one token after another: each token has the same
/// bits whatever the split and whatever else is in the batch. Longer ones run by e's algorithm.
/// @return the rows that one pass over everything would give
/// @throws shape_error  another number of sequences, heads or features than the state has.
template <RecurrentMixer M, int R, class Alg>
[[nodiscard]] tensor<typename M::value_type, R, typename M::backend> advance(
    const mix<M, R, Alg>& e, matrix_state<typename M::value_type, typename M::backend>& state,
    const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  using T = typename M::value_type;
  using B = typename M::backend;
  const typename B::scope scope(ctx);
  const sequence_layout layout = layout_of(e.mixer);
  state.positions_.check_layout(layout);
  const shape<4> wanted{state.sequences(), e.heads(), e.mixer.key_size(),
                        e.mixer.state_features(e.x.extent(3))};
  if (state.value_.extents() != wanted) {
    throw shape_error("ssm: advance: the state is " + to_string<4>(state.value_.extents()) +
                      ", the mixer needs " + to_string<4>(wanted) +
                      ", (sequences x heads x key size x features)");
  }
  tensor<T, 4, B> y(e.extents());
  const index_t longest = layout.max_length();
  if (longest <= 16) {
    eval_into(e.with(alg::recurrent{}), y, state.whole(), ctx);
  } else if (state.max_rollback() == 0) {
    eval_into(e, y, state.whole(), ctx);
  } else {
    // The last max_rollback tokens of each sequence go one by one, for their snapshots.
    const tensor<T, 4, B> rows = detail::as_packed(y);
    for (index_t i = 0; i < layout.sequences(); ++i) {
      const index_t begin = layout.begin(i), end = layout.end(i);
      const index_t middle = std::max(begin, end - std::max<index_t>(state.max_rollback(), 1));
      const tensor<accum_t<T>, 4, B> value = state.value_.slice(0, i, i + 1);
      if (middle > begin) {
        eval_into(detail::slice_tokens(e, begin, middle), rows.slice(1, begin, middle),
                  {value, value, {}, 0, nullptr}, ctx);
      }
      if (end > middle) {
        // Rows of sequence i within the ring: one sequence of a batch of `sequences`.
        const index_t first = state.positions_[i] + (middle - begin);
        tensor<accum_t<T>, 4, B> ring(
            shape<4>{state.max_rollback(), wanted[1], wanted[2], wanted[3]});
        eval_into(detail::slice_tokens(e, middle, end).with(alg::recurrent{}),
                  rows.slice(1, middle, end), {value, value, ring, state.max_rollback(), &first},
                  ctx);
        for (index_t p = first; p < first + (end - middle); ++p) {
          const index_t slot = p % state.max_rollback();
          const index_t row = slot * state.sequences() + i;
          state.snapshots_.slice(0, row, row + 1).copy_from(ring.slice(0, slot, slot + 1));
        }
      }
    }
  }
  state.positions_.advance(layout);
  return detail::demote<R>(y);
}

/// The state of a causal mixer that has no better one: the operands of all tokens so far. Advancing
/// multiplies by the last rows of dense(), the quadratic reference. Where the mixer does not say
/// that it is causal (causality_of), every new column of dense() is looked at: above the diagonal
/// it must be zero.
/// @cost O(position^2) an advance; for references and mixers under construction.
template <MatrixMixer M>
class history_state {
 public:
  using value_type = typename M::value_type;
  using backend = typename M::backend;

  history_state(index_t sequences, index_t max_rollback)
      : positions_(sequences, max_rollback), tokens_(static_cast<std::size_t>(sequences)) {}
  history_state(const history_state& other)
      : positions_(other.positions_), tokens_(other.tokens_) {}
  history_state(history_state&&) = default;
  history_state& operator=(const history_state&) = default;
  history_state& operator=(history_state&&) = default;

  [[nodiscard]] index_t sequences() const { return positions_.sequences(); }
  [[nodiscard]] index_t position(index_t i) const { return positions_[i]; }
  [[nodiscard]] index_t max_rollback() const { return positions_.max_rollback(); }
  [[nodiscard]] index_t can_roll_back(index_t i) const { return positions_.undoable(i); }

  void rollback(index_t n) { rollback(detail::same_count(sequences(), n)); }
  void rollback(std::span<const index_t> n) {
    detail::roll_back_each(positions_, n, [&](index_t i, index_t count) {
      auto& kept = tokens_[static_cast<std::size_t>(i)];
      kept.front() = detail::slice_tokens(kept.front(), 0, positions_[i] - count);
    });
  }
  friend bool operator==(const history_state& a, const history_state& b) {
    if (!(a.positions_ == b.positions_)) return false;
    for (std::size_t i = 0; i < a.tokens_.size(); ++i) {
      if (a.tokens_[i].size() != b.tokens_[i].size()) return false;
      if (a.tokens_[i].empty()) continue;
      if (!same_operands(a.tokens_[i].front(), b.tokens_[i].front())) return false;
    }
    return true;
  }

  template <MatrixMixer N, int R, class Alg>
  friend tensor<typename N::value_type, R, typename N::backend> advance(
      const mix<N, R, Alg>& e, history_state<N>& state, const typename N::backend::context& ctx);

 private:
  using product = mix<M, 4, alg::quadratic>;

  // f(a's operand, b's operand) in order, for operands of one type.
  template <class F>
  static void zip_operands(product& a, product& b, F f) {
    index_t index = 0;
    product::operands(a, [&](std::string_view, auto& left, operand kind) {
      index_t other = 0;
      product::operands(b, [&](std::string_view, auto& right, operand) {
        if (other++ != index) return;
        if constexpr (std::same_as<decltype(left), decltype(right)>) f(left, right, kind);
      });
      ++index;
    });
  }
  static bool same_operands(product a, product b) {
    bool same = true;
    zip_operands(a, b, [&](auto& left, auto& right, operand) {
      same = same && detail::equal_elements(left, right);
    });
    return same;
  }
  static product joined(product past, product fresh) {
    const index_t before = past.x.extent(1);
    product all = fresh;
    zip_operands(all, past, [&](auto& to, auto& from, operand kind) {
      if constexpr (std::remove_cvref_t<decltype(to)>::rank >= 2) {
        if (kind != operand::per_token || !to) return;
        auto extents = to.extents();
        const index_t added = extents[1];
        extents[1] += before;
        std::remove_cvref_t<decltype(to)> both(extents);
        both.slice(1, 0, before).copy_from(from);
        both.slice(1, before, before + added).copy_from(to);
        to = both;
      }
    });
    all.mixer.layout = sequence_layout::rectangular(1, all.x.extent(1));
    return all;
  }

  detail::state_positions positions_;
  std::vector<std::vector<product>> tokens_;  // none or one product a sequence
};

namespace detail {

/// Throws where token t < s of the one sequence of m depends on token s, s >= begin.
template <MatrixMixer M>
void check_no_future(const M& m, index_t begin) {
  const tensor<double, 4> dense = m.dense();
  for (index_t h = 0; h < dense.extent(1); ++h) {
    for (index_t s = begin; s < dense.extent(3); ++s) {
      for (index_t t = 0; t < s; ++t) {
        const double entry = dense(0, h, t, s);
        if (entry < 0 || entry > 0) throw_not_causal_entry(t, s);  // NaN: 0 / 0 of an empty row
      }
    }
  }
}

}  // namespace detail

/// @throws value_error  the mixer is known not to be causal.
template <MatrixMixer M, int R, class Alg>
requires(!RecurrentMixer<M>)
    [[nodiscard]] history_state<M> make_state(const mix<M, R, Alg>& prototype, index_t sequences,
                                              index_t max_rollback = 0) {
  if (causality_of(prototype.mixer) == causality::not_causal)
    detail::throw_not_causal("make_state");
  return {sequences, max_rollback};
}

/// @throws value_error  a token depends on one to come; the state is as it was.
template <MatrixMixer M, int R, class Alg>
[[nodiscard]] tensor<typename M::value_type, R, typename M::backend> advance(
    const mix<M, R, Alg>& e, history_state<M>& state,
    const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  using T = typename M::value_type;
  using B = typename M::backend;
  const typename B::scope scope(ctx);
  const sequence_layout layout = layout_of(e.mixer);
  state.positions_.check_layout(layout);
  const causality known = causality_of(e.mixer);
  if (known == causality::not_causal) detail::throw_not_causal("advance");
  tensor<T, 4, B> y(e.extents());
  const tensor<T, 4, B> rows = detail::as_packed(y);
  auto tokens = state.tokens_;
  for (index_t i = 0; i < layout.sequences(); ++i) {
    const index_t begin = layout.begin(i), end = layout.end(i);
    if (begin == end) continue;
    auto& kept = tokens[static_cast<std::size_t>(i)];
    auto all = detail::slice_tokens(e, begin, end).with(alg::quadratic{});
    if (kept.empty()) {
      // Own copies: the caller may reuse its tensors.
      decltype(all)::operands(all, [](std::string_view, auto& t, operand) { t = t.clone(); });
    } else {
      all = history_state<M>::joined(kept.front(), all);
    }
    const index_t before = all.x.extent(1) - (end - begin);
    if (known == causality::unknown) detail::check_no_future(all.mixer, before);
    const tensor<T, 4, B> out = eval(all, ctx);
    rows.slice(1, begin, end).copy_from(out.slice(1, before, out.extent(1)));
    kept.assign(1, all);
  }
  state.tokens_ = std::move(tokens);
  state.positions_.advance(layout);
  return detail::demote<R>(y);
}

namespace detail {
/// Whether advance(e, S&) exists.
template <class S, class E>
concept StateOf = std::convertible_to < S&,
        history_state<typename E::mixer_type>
& > || requires(const E& e, S& state) {
  requires std::convertible_to<S&, decltype(make_state(e, index_t{1}))&>;
};
}  // namespace detail

/// advance of a state of another mixer is refused with a sentence.
template <MatrixMixer M, int R, class Alg, class S>
requires(!std::is_const_v<S> && !detail::StateOf<S, mix<M, R, Alg>>)
    tensor<typename M::value_type, R, typename M::backend> advance(
        const mix<M, R, Alg>&, S&,
        const typename M::backend::context& = default_context<typename M::backend>()) {
  static_assert(detail::StateOf<S, mix<M, R, Alg>>,
                "ssm: advance(mixer * X, state): the state is one of another kind of mixer or "
                "element type; make it with make_state(mixer * X, sequences)");
  return {};
}

}  // namespace ssm
