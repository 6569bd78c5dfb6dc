#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/ssd_backward.hpp>

#include <algorithm>

namespace ssm::kernels {

/// Gradients with respect to the states. Absent: zero, and not wanted.
template <Real T>
struct ssd_state_gradients {
  view<const T, 4> initial;  ///< the forward pass's initial state
  view<const T, 4> d_final;
  view<T, 4> d_initial;  ///< added to
};

namespace detail {

/// What the tasks of one wave of sequences share. Everything but the stored states is of the size
/// of one panel.
template <Real T>
struct ssd_backward_wave {
  const ssd_backward_run<T>& run;
  const ssd_state_gradients<T>& states;
  ssd_wave wave;
  index_t keys = run.p.key_size(), chunk = run.chunk, slots = wave.panel / chunk;
  index_t step = run.forward.score_step(), score_size = chunk * step;
  index_t state_size = keys * run.p.features(), lanes = run.lanes.count(), tasks = run.tasks();
  bool direct_x = run.g.x && run.g.x.extent(1) == run.p.heads;

  scratch<index_t> stored_at{wave.count() + 1};  // panels of the sequences before, in the wave
  scratch<T> stored{(count_panels(), stored_at[wave.count()]) * run.p.heads * state_size};
  scratch<T> d_state{wave.count() * run.p.heads * state_size};
  scratch<T> scores{wave.count() * slots * run.pairs * score_size};
  scratch<T> d_scores{wave.count() * slots * tasks * score_size};
  scratch<T> dq{wave.count() * wave.panel * tasks * keys};
  scratch<T> dk{wave.count() * wave.panel * tasks * keys};
  scratch<T> d_log_a{wave.count() * wave.panel * lanes};
  scratch<T> d_weight{wave.count() * wave.panel * lanes};
  scratch<T> dx{run.g.x && !direct_x ? wave.count() * wave.panel * run.p.heads * run.p.features()
                                     : 0};
  scratch<double> skip{wave.count() * lanes}, decay{wave.count() * lanes};

  [[nodiscard]] index_t begin(index_t i) const { return run.p.offsets[wave.first + i]; }
  [[nodiscard]] index_t end(index_t i) const { return run.p.offsets[wave.first + i + 1]; }
  /// Where a lane's part of a (heads x key size x features) block begins.
  [[nodiscard]] index_t lane_at(index_t lane, index_t rows) const {
    return run.lanes.head(lane) * rows * run.p.features() + rows * run.lanes.from(lane);
  }

  void count_panels() {
    stored_at[0] = 0;
    for (index_t i = 0; i < wave.count(); ++i) {
      stored_at[i + 1] = stored_at[i] + (end(i) - begin(i) + wave.panel - 1) / wave.panel;
    }
  }

  /// The states at the starts of the panels, and the gradient of the last state.
  void sweep(index_t i, index_t lane) const;
  /// The backward pass of one panel for the lanes of one task.
  void task_vjp(index_t i, index_t task, index_t from) const;
  /// Adds what the tasks have left for one chunk to the gradients, in the order of the tasks.
  void reduce(index_t i, index_t slot, index_t from) const;
  void add_parameters() const;
};

template <Real T>
void ssd_backward_wave<T>::sweep(index_t i, index_t lane) const {
  const index_t h = run.lanes.head(lane), width = run.lanes.width(lane), size = keys * width;
  const index_t column = run.lanes.from(lane), sequence = wave.first + i;
  skip[i * lanes + lane] = decay[i * lanes + lane] = 0.0;
  T* d = d_state.data() + i * run.p.heads * state_size + lane_at(lane, keys);
  if (states.d_final) {
    copy_matrix<T>(state_matrix(states.d_final, sequence, h, column, width),
                   matrix(d, keys, width, width));
  } else {
    std::fill_n(d, size, T(0));
  }
  if (begin(i) == end(i)) return;
  const auto slot = [&](index_t panel) {
    return stored.data() + (stored_at[i] + panel) * run.p.heads * state_size + lane_at(lane, keys);
  };
  T* state = slot(0);
  if (states.initial) {
    copy_matrix<T>(state_matrix(states.initial, sequence, h, column, width),
                   matrix(state, keys, width, width));
  } else {
    std::fill_n(state, size, T(0));
  }
  const index_t panels = stored_at[i + 1] - stored_at[i];
  if (panels == 1) return;
  ssd_backward_work<T> work(chunk, step, width, keys, 0);
  for (index_t panel = 1; panel < panels; ++panel) {
    for (index_t c = 0; c < slots; ++c) {
      const index_t t = begin(i) + (panel - 1) * wave.panel + c * chunk;
      work.decays.set(run.p, t, chunk, h);
      T* next = slot(panel);
      run.replay(work, t, lane, c == 0 ? state : next, next);
    }
    state = slot(panel);
  }
}

template <Real T>
void ssd_backward_wave<T>::task_vjp(index_t i, index_t task, index_t from) const {
  const index_t first = begin(i) + from, stop = std::min(end(i), first + wave.panel);
  if (first >= stop) return;
  const index_t chunks = (stop - first + chunk - 1) / chunk, pair = task / run.blocks;
  ssd_backward_work<T> work(chunk, step, run.p.features(), keys, chunks);
  for (index_t lane = run.first_lane(task); lane < run.end_lane(task); ++lane) {
    const index_t h = run.lanes.head(lane), width = run.lanes.width(lane), size = keys * width;
    const T* state = stored.data() + lane_at(lane, keys) +
                     (stored_at[i] + from / wave.panel) * run.p.heads * state_size;
    for (index_t c = 1; c < chunks; ++c) {
      T* next = work.states.data() + c * size;
      work.decays.set(run.p, first + (c - 1) * chunk, chunk, h);
      run.replay(work, first + (c - 1) * chunk, lane, c == 1 ? state : next - size, next);
    }
    double d_skip = 0.0, d_decay = 0.0;
    for (index_t c = chunks - 1; c >= 0; --c) {
      const index_t t = first + c * chunk, n = std::min(chunk, stop - t);
      const index_t at = (i * tasks + task) * slots + c;
      const index_t row = (i * lanes + lane) * wave.panel + c * chunk;
      ssd_chunk_sums<T> out{d_scores.data() + at * score_size,
                            dq.data() + at * chunk * keys,
                            dk.data() + at * chunk * keys,
                            d_log_a.data() + row,
                            d_weight.data() + row,
                            {},
                            T(1),
                            lane == run.first_lane(task)};
      if (direct_x) {
        out.x = group_rows(run.g.x, t, n, h, run.lanes.from(lane), width);
      } else if (run.g.x) {
        T* base = dx.data() + i * wave.panel * run.p.heads * run.p.features();
        out.x = matrix(base + lane_at(lane, wave.panel) + c * chunk * width, n, width, width);
        out.x_beta = T(0);
      }
      work.decays.set(run.p, t, n, h);
      T skip_here = T(0);
      run.chunk_vjp(
          work, t, lane, scores.data() + ((i * slots + c) * run.pairs + pair) * score_size,
          c == 0 ? state : work.states.data() + c * size,
          d_state.data() + i * run.p.heads * state_size + lane_at(lane, keys), out, skip_here);
      d_skip += static_cast<double>(skip_here);
      for (index_t r = 0; r < n; ++r)
        d_decay += static_cast<double>(out.log_a[r]);
    }
    skip[i * lanes + lane] += d_skip;
    decay[i * lanes + lane] += d_decay;
  }
}

template <Real T>
void ssd_backward_wave<T>::reduce(index_t i, index_t slot, index_t from) const {
  const ssd_problem<T>& p = run.p;
  const ssd_gradients<T>& g = run.g;
  const index_t t = begin(i) + from + slot * chunk, n = std::min(chunk, end(i) - t);
  if (n <= 0) return;
  const auto at = [&](index_t task) { return (i * tasks + task) * slots + slot; };
  for (index_t pair = 0; pair < run.pairs; ++pair) {
    const index_t gq = head_group(pair, run.pairs, p.q.extent(1));
    const index_t gk = head_group(pair, run.pairs, p.k.extent(1));
    const index_t first = pair * run.blocks;
    const view<T, 2> ds = matrix(d_scores.data() + at(first) * score_size, n, n, step);
    for (index_t r = 0; r < n; ++r) {
      for (index_t b = 1; b < run.blocks; ++b) {
        const T* more = d_scores.data() + at(first + b) * score_size + r * step;
        T* sum = ds.data + r * step;
        simd::map<T>(r + 1, sum, more, sum, [](simd::pack<T> u, simd::pack<T> v) { return u + v; });
      }
    }
    if (g.q) {
      const view<T, 2> to = group_rows(g.q, t, n, gq);
      gemm_lower_left<T>(T(1), ds, group_rows(p.k, t, n, gk), T(1), to);
      for (index_t b = 0; b < run.blocks; ++b) {
        add_matrix<T>(matrix(dq.data() + at(first + b) * chunk * keys, n, keys, keys), to);
      }
    }
    if (g.k) {
      const view<T, 2> to = group_rows(g.k, t, n, gk);
      gemm_upper_left<T>(T(1), transposed(view<const T, 2>(ds)), group_rows(p.q, t, n, gq), T(1),
                         to);
      for (index_t b = 0; b < run.blocks; ++b) {
        add_matrix<T>(matrix(dk.data() + at(first + b) * chunk * keys, n, keys, keys), to);
      }
    }
  }
  for (index_t lane = 0; lane < lanes; ++lane) {
    const index_t h = run.lanes.head(lane), width = run.lanes.width(lane);
    const index_t row = (i * lanes + lane) * wave.panel + slot * chunk;
    const auto add = [&](const view<T, 2>& to, const scratch<T>& sums) {
      if (!to) return;
      const index_t group = head_group(h, p.heads, to.extent(1));
      for (index_t r = 0; r < n; ++r)
        to(t + r, group) += sums[row + r];
    };
    add(g.log_a, d_log_a);
    add(g.weight, d_weight);
    if (g.x && !direct_x) {
      const T* base = dx.data() + i * wave.panel * p.heads * p.features();
      add_matrix<T>(
          matrix(base + lane_at(lane, wave.panel) + slot * chunk * width, n, width, width),
          group_rows(g.x, t, n, head_group(h, p.heads, g.x.extent(1)), run.lanes.from(lane),
                     width));
    }
  }
}

template <Real T>
void ssd_backward_wave<T>::add_parameters() const {
  const ssd_problem<T>& p = run.p;
  for (index_t i = 0; i < wave.count(); ++i) {
    for (index_t lane = 0; lane < lanes; ++lane) {
      const index_t h = run.lanes.head(lane), width = run.lanes.width(lane);
      if (run.g.d) {
        run.g.d(head_group(h, p.heads, run.g.d.extent(0))) +=
            static_cast<T>(skip[i * lanes + lane]);
      }
      if (run.g.gamma) {
        const index_t group = head_group(h, p.heads, run.g.gamma.extent(0));
        run.g.gamma(group) +=
            static_cast<T>(decay[i * lanes + lane] / static_cast<double>(p.gamma(group)));
      }
      if (states.d_initial) {
        const T* d = d_state.data() + i * p.heads * state_size + lane_at(lane, keys);
        add_matrix<T>(matrix(d, keys, width, width), state_matrix(states.d_initial, wave.first + i,
                                                                  h, run.lanes.from(lane), width));
      }
    }
  }
}

}  // namespace detail

/// The vector-Jacobian product of ssd_forward. Gradients are added to.
///
/// The gradient of a log decay is a sum over the pairs of tokens on its two sides, never the
/// difference of two large sums. Results do not depend on the number of threads.
/// @cost   about 2.5 times ssd_forward; memory: a state a head for every 256 tokens (or the chunk,
///         if longer), and panels of that many tokens.
template <Real T>
void ssd_vjp(const cpu::context& ctx, const ssd_problem<T>& p, index_t chunk, view<const T, 3> dy,
             const ssd_gradients<T>& g, const ssd_state_gradients<T>& states) {
  if (p.sequences == 0 || p.heads == 0) return;
  index_t longest = 1;
  for (index_t i = 0; i < p.sequences; ++i) {
    longest = std::max(longest, p.offsets[i + 1] - p.offsets[i]);
  }
  const detail::ssd_backward_run<T> run{p, g, std::min(chunk, longest), dy};
  const index_t budget = run.panel_tokens();
  for (index_t first = 0; first < p.sequences;) {
    const detail::ssd_backward_wave<T> w{
        run, states,
        detail::next_wave(p.offsets, p.sequences, first, run.tasks(), budget, run.chunk)};
    const index_t count = w.wave.count(), slots = w.slots;
    ctx.parallel_for(count * w.lanes,
                     [&](index_t task) { w.sweep(task / w.lanes, task % w.lanes); });
    const index_t panels = (w.wave.longest + w.wave.panel - 1) / w.wave.panel;
    for (index_t from = (panels - 1) * w.wave.panel; from >= 0; from -= w.wave.panel) {
      ctx.parallel_for(count * slots * run.pairs, [&](index_t task) {
        const index_t i = task / (slots * run.pairs);
        const index_t t = w.begin(i) + from + task / run.pairs % slots * run.chunk;
        if (t >= w.end(i)) return;
        run.forward.score(t, std::min(run.chunk, w.end(i) - t), task % run.pairs,
                          w.scores.data() + task * w.score_size);
      });
      ctx.parallel_for(count * w.tasks,
                       [&](index_t task) { w.task_vjp(task / w.tasks, task % w.tasks, from); });
      ctx.parallel_for(count * slots,
                       [&](index_t task) { w.reduce(task / slots, task % slots, from); });
    }
    w.add_parameters();
    first = w.wave.last;
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(                                                                             \
      ssd, void ssd_vjp<T>(const cpu::context&, const ssd_problem<T>&, index_t, view<const T, 3>, \
                           const ssd_gradients<T>&, const ssd_state_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
