#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/ssd_parts.hpp>

#include <optional>

namespace ssm::kernels {

namespace detail {

/// What is wanted of ssd_forward, and the memory that its tasks share.
template <Real T>
struct ssd_forward_run {
  const ssd_problem<T>& p;
  index_t chunk;
  view<T, 3> y;
  ssd_states<T> states;
  ssd_lanes lanes{p.heads, p.features()};

  [[nodiscard]] index_t score_step() const { return round_up(chunk, gemm_tile<T>::cols); }
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
  /// One chunk of one lane: its outputs from the state before it, then the state after it.
  void advance(const ssd_decays<T>& decays, index_t begin, index_t lane, const T* scores, T* work,
               T* state, bool state_is_zero, bool want_state) const;
};

/// mixed[i, j] = alpha decay(i, j) weight_j scores[i, j], plus d on the diagonal.
template <Real T>
void mix_scores(const ssd_decays<T>& decays, const T* scores, index_t step, T alpha, T d,
                T* mixed) {
  using pack = simd::pack<T>;
  for (index_t i = 0; i < decays.size(); ++i) {
    const T* from = scores + i * step;
    T* to = mixed + i * step;
    for (index_t j = 0; j <= i; j += pack::width) {
      const pack w = pack::load(decays.weight() + j) * pack(alpha) * decays.between(i, j);
      // Scores above the diagonal are not set: they may be anything.
      simd::select(w == pack(T(0)), pack(T(0)), w * pack::load(from + j)).store(to + j);
    }
    to[i] += d;
  }
}

template <Real T>
void ssd_forward_run<T>::advance(const ssd_decays<T>& decays, index_t begin, index_t lane,
                                 const T* scores, T* work, T* state, bool state_is_zero,
                                 bool want_state) const {
  const index_t n = decays.size(), h = lanes.head(lane), width = lanes.width(lane);
  const index_t gq = head_group(h, p.heads, p.q.extent(1));
  const index_t gk = head_group(h, p.heads, p.k.extent(1));
  const index_t gx = head_group(h, p.heads, p.x.extent(1));
  const view<const T, 2> x = group_rows(p.x, begin, n, gx, lanes.from(lane), width);
  const view<T, 2> out = group_rows(y, begin, n, h, lanes.from(lane), width);
  const view<T, 2> s = matrix(state, p.key_size(), width, width);
  if (!state_is_zero) {
    gemm<T>(p.alpha, group_rows(p.q, begin, n, gq), s, T(0), out);
    scaled_rows<T>(out, decays.from_start(), out);
  }
  const T d = p.d ? p.d(head_group(h, p.heads, p.d.extent(0))) : T(0);
  mix_scores(decays, scores, score_step(), p.alpha, d, work);
  gemm_lower_left<T>(T(1), matrix(work, n, n, score_step()), x, T(state_is_zero ? 0 : 1), out);
  if (!want_state) return;
  const view<T, 2> scaled = matrix(work, n, width, width);
  scaled_rows<T>(x, decays.weighted_to_end(), scaled);
  gemm<T>(T(1), transposed(group_rows(p.k, begin, n, gk)), scaled,
          state_is_zero ? T(0) : decays.total(), s);
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
  const index_t score_size = chunk * run.score_step();
  const index_t state_size = p.key_size() * p.features();
  // Rows of x and y that stay in the caches while the heads take turns on them.
  const index_t budget =
      std::clamp<index_t>((index_t{1} << 17) / (p.heads * p.features() + 1), 256, 4096);
  for (index_t first = 0; first < p.sequences;) {
    const detail::ssd_wave wave =
        detail::next_wave(p.offsets, p.sequences, first, lanes, budget, chunk);
    const index_t slots = wave.panel / chunk;
    const scratch<T> scores(shared ? wave.count() * slots * pairs * score_size : 0);
    const scratch<T> state(wave.count() * p.heads * state_size);
    for (index_t from = 0; from == 0 || from < wave.longest; from += wave.panel) {
      if (shared) {
        ctx.parallel_for(wave.count() * slots * pairs, [&](index_t task) {
          const index_t begin = p.offsets[wave.first + task / (slots * pairs)];
          const index_t end = p.offsets[wave.first + task / (slots * pairs) + 1];
          const index_t t = begin + from + task / pairs % slots * chunk;
          if (t >= end) return;
          run.score(t, std::min(chunk, end - t), task % pairs, scores.data() + task * score_size);
        });
      }
      ctx.parallel_for(wave.count() * lanes, [&](index_t task) {
        const index_t i = task / lanes, lane = task % lanes, sequence = wave.first + i;
        const index_t begin = p.offsets[sequence], end = p.offsets[sequence + 1];
        if (from > 0 && begin + from >= end) return;
        const index_t h = run.lanes.head(lane), width = run.lanes.width(lane);
        T* s = state.data() + i * p.heads * state_size + h * state_size +
               p.key_size() * run.lanes.from(lane);
        bool zero = from == 0;
        if (from == 0 && states.initial) {
          zero = false;
          detail::copy_matrix<T>(
              detail::state_matrix(states.initial, sequence, h, run.lanes.from(lane), width),
              detail::matrix(s, p.key_size(), width, width));
        }
        detail::ssd_decays<T> decays(chunk);
        const scratch<T> work(std::max(score_size, chunk * width));
        std::optional<scratch<T>> own_scores;
        if (!shared) own_scores.emplace(score_size);
        const index_t stop = std::min(end, begin + from + wave.panel);
        for (index_t t = begin + from; t < stop; t += chunk) {
          const index_t n = std::min(chunk, stop - t), pair = lane / run.lanes_per_pair();
          const T* chunk_scores;
          if (shared) {
            chunk_scores = scores.data() +
                           ((i * slots + (t - begin - from) / chunk) * pairs + pair) * score_size;
          } else {
            run.score(t, n, pair, own_scores->data());
            chunk_scores = own_scores->data();
          }
          decays.set(p, t, n, h);
          const bool more = t + n < end || states.final;
          run.advance(decays, t, lane, chunk_scores, work.data(), s, zero, more);
          zero = false;
        }
        if (!states.final || stop < end) return;
        if (zero) std::fill_n(s, p.key_size() * width, T(0));
        detail::copy_matrix<T>(
            detail::matrix(s, p.key_size(), width, width),
            detail::state_matrix(states.final, sequence, h, run.lanes.from(lane), width));
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
