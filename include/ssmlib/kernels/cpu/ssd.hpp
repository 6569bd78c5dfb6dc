#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/ssd_parts.hpp>

#include <algorithm>
#include <numeric>
#include <optional>

namespace ssm::kernels {

namespace detail {

/// c = alpha left right + beta c for one register tile of `m` rows and `count` columns.
template <Real T>
SSMLIB_ALWAYS_INLINE void store_tile(const left_panel<T>& left, const T* right, index_t m,
                                     index_t count, T alpha, T beta, T* c, index_t c_step) {
  constexpr index_t cols = gemm_tile<T>::cols;
  const auto function = tile_function_for<T>(static_cast<int>(m), left.row_step == 1);
  if (count == cols) return function(left, {}, right, cols, {c, c_step, alpha, beta});
  T whole[gemm_tile<T>::rows * cols] = {};
  for (index_t i = 0; beta != T(0) && i < m; ++i)
    std::copy_n(c + i * c_step, count, whole + i * cols);
  function(left, {}, right, cols, {whole, cols, alpha, beta});
  for (index_t i = 0; i < m; ++i)
    std::copy_n(whole + i * cols, count, c + i * c_step);
}

/// What the lanes of a pair share in one chunk: the scores, and K^T in the panels that a product
/// reads.
template <Real T>
struct ssd_chunk_layout {
  index_t chunk, keys;

  [[nodiscard]] index_t score_step() const { return round_up(chunk, gemm_tile<T>::cols); }
  [[nodiscard]] index_t score_size() const { return chunk * score_step(); }
  [[nodiscard]] index_t shared_size() const {
    // Copies of a panel store whole registers.
    return score_size() + round_up(keys, gemm_tile<T>::rows) * chunk +
           round_up(simd::pack<T>::width, 16);
  }
};

/// What is wanted of ssd_forward, and the memory that its tasks share.
template <Real T>
struct ssd_forward_run {
  const ssd_problem<T>& p;
  index_t chunk;
  view<T, 3> y;
  ssd_states<T> states;
  ssd_lanes lanes{p.heads, p.features()};
  ssd_chunk_layout<T> layout{chunk, p.key_size()};

  [[nodiscard]] index_t score_step() const { return layout.score_step(); }
  /// Pairs of a query head and a key head; consecutive heads share one.
  [[nodiscard]] index_t pairs() const { return std::max(p.q.extent(1), p.k.extent(1)); }
  [[nodiscard]] index_t lanes_per_pair() const { return lanes.count() / pairs(); }

  /// scores[i, j] = q_i . k_j for j <= i.
  void score(index_t begin, index_t n, index_t pair, T* scores) const {
    const index_t gq = head_group(pair, pairs(), p.q.extent(1));
    const index_t gk = head_group(pair, pairs(), p.k.extent(1));
    gemm_lower<T>(T(1), group_rows(p.q, begin, n, gq), transposed(group_rows(p.k, begin, n, gk)),
                  T(0), matrix(scores, n, n, score_step()));
  }
  /// The scores of a chunk and, behind them, panels of K^T.
  void prepare(index_t begin, index_t n, index_t pair, T* shared) const {
    score(begin, n, pair, shared);
    const view<const T, 2> k = group_rows(p.k, begin, n, head_group(pair, pairs(), p.k.extent(1)));
    T* to = shared + layout.score_size();
    for (index_t i = 0; i < p.key_size(); i += gemm_tile<T>::rows) {
      pack_left_panel(k.data + i * k.strides[1], k.strides[1], k.strides[0], n, p.key_size() - i,
                      to + i * n);
    }
  }
};

/// One lane's state and working memory. Right operands are held as products read them, in strips
/// of gemm_tile::cols features: in each strip the state's rows, then those of the chunk's x, so
/// that the outputs of a chunk are one product
///
///     Y = [alpha exp(Lambda) Q | mixed scores] [S; X].
template <Real T>
class ssd_lane {
 public:
  ssd_lane(const ssd_forward_run<T>& run, index_t lane)
      : run_(run),
        h_(run.lanes.head(lane)),
        from_(run.lanes.from(lane)),
        width_(run.lanes.width(lane)),
        keys_(run.p.key_size()),
        strips_((width_ + cols - 1) / cols),
        right_rows_(keys_ + run.chunk),
        left_step_(keys_ + round_up(run.chunk, simd::pack<T>::width)),
        decays_(run.chunk),
        left_(std::min(row_block, run.chunk) * left_step_),
        right_(strips_ * right_rows_ * cols),
        scaled_(strips_ * run.chunk * cols) {}

  /// The state before the next chunk; absent: zero.
  void set_state(view<const T, 2> s) {
    state_is_zero_ = !s;
    if (s) to_strips(s, 0);
  }
  void get_state(view<T, 2> s) const {
    for (index_t i = 0; i < keys_; ++i) {
      for (index_t j = 0; j < width_; ++j) {
        s(i, j) = state_is_zero_ ? T(0) : right(j / cols, i)[j % cols];
      }
    }
  }
  /// One chunk: its outputs from the state before it, then the state after it. `ahead` tokens
  /// follow in this pass.
  void advance(index_t begin, index_t n, index_t ahead, const T* shared, bool want_state);

 private:
  static constexpr index_t cols = gemm_tile<T>::cols, rows = gemm_tile<T>::rows;
  /// Rows of the left operand at a time, which stay in the first cache: whole panels and packs.
  static constexpr index_t row_block = round_up(24, std::lcm(rows, index_t{simd::pack<T>::width}));

  /// Row i of a strip of the right operand.
  [[nodiscard]] T* right(index_t strip, index_t i) const {
    return right_.data() + (strip * right_rows_ + i) * cols;
  }
  void to_strips(view<const T, 2> from, index_t at);
  void set_left(view<const T, 2> q, index_t i0, index_t i1);
  void mix(const T* scores, index_t i0, index_t i1);
  void outputs(view<T, 2> out, index_t i0, view<const T, 2> next_x) const;
  void update(const T* keys, index_t n);

  const ssd_forward_run<T>& run_;
  index_t h_, from_, width_, keys_, strips_, right_rows_, left_step_;
  ssd_decays<T> decays_;
  scratch<T> left_, right_, scaled_;
  bool state_is_zero_ = true;
};

/// Copies rows to the right operand, from its row `at` on; zeros beyond their columns.
template <Real T>
void ssd_lane<T>::to_strips(view<const T, 2> from, index_t at) {
  using pack = simd::pack<T>;
  const index_t whole = width_ / cols;
  for (index_t i = 0; i < from.extents[0]; ++i) {
    const T* row = from.data + i * from.strides[0];
    for (index_t s = 0; s < whole; ++s) {
      for (index_t j = 0; j < cols; j += pack::width)
        pack::load(row + s * cols + j).store(right(s, at + i) + j);
    }
    if (whole == strips_) continue;
    T* strip = right(whole, at + i);
    const index_t rest = width_ - whole * cols;
    std::copy_n(row + whole * cols, rest, strip);
    std::fill(strip + rest, strip + cols, T(0));
  }
}

/// Rows [i0, i1) of Q times alpha exp(Lambda).
template <Real T>
void ssd_lane<T>::set_left(view<const T, 2> q, index_t i0, index_t i1) {
  for (index_t i = i0; i < i1; ++i) {
    const simd::pack<T> f(run_.p.alpha * decays_.from_start()[i]);
    const T* row = q.data + i * q.strides[0];
    T* to = left_.data() + (i - i0) * left_step_;
    if (q.strides[1] == 1) {
      simd::map<T>(keys_, row, to, [f](simd::pack<T> v) { return f * v; });
    } else {
      for (index_t j = 0; j < keys_; ++j)
        to[j] = f[0] * row[j * q.strides[1]];
    }
  }
}

/// mixed[i, j] = alpha decay(i, j) weight_j scores[i, j] for rows [i0, i1), plus d on the
/// diagonal, and zeros up to where a panel of rows ends.
template <Real T>
void ssd_lane<T>::mix(const T* scores, index_t i0, index_t i1) {
  using pack = simd::pack<T>;
  constexpr index_t w = pack::width;
  const ssd_problem<T>& p = run_.p;
  const T d = p.d ? p.d(head_group(h_, p.heads, p.d.extent(0))) : T(0);
  const pack alpha(p.alpha), zero(T(0));
  const index_t step = run_.score_step(), to_step = left_step_;
  const ssd_decay_pairs<T> pairs = decays_.pairs();
  T* const to = left_.data() + keys_ - i0 * to_step;
  for (index_t b0 = i0; b0 < i1; b0 += w) {
    const index_t b1 = std::min(i1, b0 + w);
    const bool whole = pairs.first(b1 - 1) == 0;  // none is cut off from an earlier token
    for (index_t j = 0; j <= b0; j += w) {
      // Scores above the diagonal are not set: they may be anything.
      const auto store = [&](index_t i, pack f) SSMLIB_LAMBDA_INLINE {
        simd::select(f == zero, zero, f * pack::load(scores + i * step + j))
            .store(to + i * to_step + j);
      };
      if (j < b0 && whole) {  // from column to row through the last of the columns
        const pack column = alpha * pack::load(decays_.weighted_to_pack_end() + j);
        T row[w];
        pairs.after(b0, j + w - 1).store(row);
        for (index_t i = b0; i < b1; ++i)
          store(i, column * pack(row[i - b0]));
      } else {
        const pack column = alpha * pack::load(decays_.weight() + j);
        for (index_t i = b0; i < b1; ++i)
          store(i, column * pairs.between(i, j));
      }
    }
    for (index_t i = b0; i < b1; ++i) {
      const index_t end = std::min(i1, i / rows * rows + rows);
      for (index_t j = b0 + w; j < end; j += w)
        zero.store(to + i * to_step + j);
      to[i * to_step + i] += d;
    }
  }
}

/// Rows of `out` from i0 on, as many as the left operand holds. Meanwhile asks for those of x that
/// the next chunk begins with.
template <Real T>
void ssd_lane<T>::outputs(view<T, 2> out, index_t i0, view<const T, 2> next_x) const {
  const index_t i1 = std::min(out.extents[0], i0 + row_block), begin = state_is_zero_ ? keys_ : 0;
  for (index_t k0 = begin; k0 < keys_ + i1; k0 += gemm_tile<T>::depth) {
    for (index_t s = 0; s < strips_; ++s) {
      const index_t count = std::min(cols, width_ - s * cols);
      for (index_t i = i0; i < i1; i += rows) {
        const index_t m = std::min(rows, i1 - i);
        const index_t k1 = std::min(keys_ + i + m, k0 + gemm_tile<T>::depth);
        if (k1 <= k0) continue;
        for (index_t r = i; k0 == begin && r < std::min(i + m, next_x.extents[0]); ++r)
          __builtin_prefetch(next_x.data + r * next_x.strides[0] + s * cols, 0, 2);
        store_tile<T>({left_.data() + (i - i0) * left_step_ + k0, left_step_, 1, k1 - k0},
                      right(s, k0), m, count, T(1), T(k0 == begin ? 0 : 1),
                      out.data + i * out.strides[0] + s * cols, out.strides[0]);
      }
    }
  }
}

template <Real T>
void ssd_lane<T>::update(const T* keys, index_t n) {
  using pack = simd::pack<T>;
  for (index_t s = 0; s < strips_; ++s) {
    for (index_t i = 0; i < n; ++i) {
      const pack f(decays_.weighted_to_end()[i]);
      simd::map<T>(cols, right(s, keys_ + i), scaled_.data() + (s * run_.chunk + i) * cols,
                   [f](pack v) { return f * v; });
    }
  }
  for (index_t k0 = 0; k0 < n; k0 += gemm_tile<T>::depth) {
    const index_t depth = std::min(gemm_tile<T>::depth, n - k0);
    const T beta = k0 > 0 ? T(1) : state_is_zero_ ? T(0) : decays_.total();
    for (index_t s = 0; s < strips_; ++s) {
      for (index_t i = 0; i < keys_; i += rows) {
        store_tile<T>({keys + i * n + k0 * rows, 1, rows, depth},
                      scaled_.data() + (s * run_.chunk + k0) * cols, std::min(rows, keys_ - i),
                      cols, T(1), beta, right(s, i), cols);
      }
    }
  }
}

template <Real T>
void ssd_lane<T>::advance(index_t begin, index_t n, index_t ahead, const T* shared,
                          bool want_state) {
  const ssd_problem<T>& p = run_.p;
  const index_t gx = head_group(h_, p.heads, p.x.extent(1));
  decays_.set(p, begin, n, h_);
  to_strips(group_rows(p.x, begin, n, gx, from_, width_), keys_);
  const view<const T, 2> q = group_rows(p.q, begin, n, head_group(h_, p.heads, p.q.extent(1)));
  const view<T, 2> out = group_rows(run_.y, begin, n, h_, from_, width_);
  const view<const T, 2> next_x = group_rows(p.x, begin + n, ahead, gx, from_, width_);
  for (index_t i0 = 0; i0 < n; i0 += row_block) {
    const index_t i1 = std::min(n, i0 + row_block);
    if (!state_is_zero_) set_left(q, i0, i1);
    mix(shared, i0, i1);
    outputs(out, i0, next_x);
  }
  if (!want_state) return;
  update(shared + run_.layout.score_size(), n);
  state_is_zero_ = false;
}

}  // namespace detail

/// The recurrence of ssd_problem by chunks: inside a chunk as a masked product of scores, between
/// chunks through the state.
///
/// A token's result depends on its own sequence only; it does not depend on the number of threads.
/// @param chunk   tokens a chunk, >= 1
/// @param y       (tokens, heads, features), overwritten
/// @cost   tokens * heads * (2 chunk features / 2 + 4 key_size features) flops and
///         tokens * pairs * chunk * key_size for the scores; memory O(heads * state), not
///         O(tokens).
/// @source Dao and Gu 2024, arXiv:2405.21060, section 6.
template <Real T>
void ssd_forward(const cpu::context& ctx, const ssd_problem<T>& p, index_t chunk, view<T, 3> y,
                 const ssd_states<T>& states) {
  if (p.sequences == 0 || p.heads == 0) return;
  index_t longest = 1;
  for (index_t i = 0; i < p.sequences; ++i) {
    longest = std::max(longest, p.offsets[i + 1] - p.offsets[i]);
  }
  const detail::ssd_forward_run<T> run{p, std::min(chunk, longest), y, states};
  chunk = run.chunk;
  const index_t lanes = run.lanes.count(), pairs = run.pairs();
  const bool shared = run.lanes_per_pair() > 1;
  const index_t shared_size = run.layout.shared_size();
  const index_t state_size = p.key_size() * p.features();
  // Rows of x and y that stay in the caches while the heads take turns on them.
  const index_t budget =
      std::clamp<index_t>((index_t{1} << 17) / (p.heads * p.features() + 1), 512, 4096);
  for (index_t first = 0; first < p.sequences;) {
    const detail::ssd_wave wave =
        detail::next_wave(p.offsets, p.sequences, first, lanes, budget, chunk);
    const index_t slots = wave.panel / chunk;
    const scratch<T> prepared(shared ? wave.count() * slots * pairs * shared_size : 0);
    // Between panels.
    const scratch<T> state(wave.longest > wave.panel ? wave.count() * p.heads * state_size : 0);
    for (index_t from = 0; from == 0 || from < wave.longest; from += wave.panel) {
      if (shared) {
        ctx.parallel_for(wave.count() * slots * pairs, [&](index_t task) {
          const index_t begin = p.offsets[wave.first + task / (slots * pairs)];
          const index_t end = p.offsets[wave.first + task / (slots * pairs) + 1];
          const index_t t = begin + from + task / pairs % slots * chunk;
          if (t >= end) return;
          run.prepare(t, std::min(chunk, end - t), task % pairs,
                      prepared.data() + task * shared_size);
        });
      }
      ctx.parallel_for(wave.count() * lanes, [&](index_t task) {
        const index_t i = task / lanes, lane = task % lanes, sequence = wave.first + i;
        const index_t begin = p.offsets[sequence], end = p.offsets[sequence + 1];
        if (from > 0 && begin + from >= end) return;
        const index_t h = run.lanes.head(lane), width = run.lanes.width(lane);
        const index_t column = run.lanes.from(lane), pair = lane / run.lanes_per_pair();
        const view<T, 2> kept = detail::matrix(
            state.data() + i * p.heads * state_size + h * state_size + p.key_size() * column,
            p.key_size(), width, width);
        detail::ssd_lane<T> work(run, lane);
        if (from > 0) {
          work.set_state(kept);
        } else if (states.initial) {
          work.set_state(detail::state_matrix(states.initial, sequence, h, column, width));
        }
        std::optional<scratch<T>> own;
        if (!shared) own.emplace(shared_size);
        const index_t stop = std::min(end, begin + from + wave.panel);
        for (index_t t = begin + from; t < stop; t += chunk) {
          const index_t n = std::min(chunk, stop - t), slot = (t - begin - from) / chunk;
          const T* ready = prepared.data() + ((i * slots + slot) * pairs + pair) * shared_size;
          if (!shared) {
            run.prepare(t, n, pair, own->data());
            ready = own->data();
          }
          const index_t ahead = std::min(chunk, stop - t - n);
          work.advance(t, n, ahead, ready, t + n < end || states.final);
        }
        if (stop < end) {
          work.get_state(kept);
        } else if (states.final) {
          work.get_state(detail::state_matrix(states.final, sequence, h, column, width));
        }
      });
    }
    first = wave.last;
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(ssd, void ssd_forward<T>(const cpu::context&, const ssd_problem<T>&, index_t, \
                                              view<T, 3>, const ssd_states<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
