#pragma once

#include <ssmlib/kernels/cpu/ssd_parts.hpp>

namespace ssm::kernels {

/// A ring of states for rollback: before the token at position p of sequence i is taken, the state
/// goes to row (p mod slots) * sequences + i of `ring`, (slots * sequences, heads, key size,
/// features). Positions count from first_position[i], or 0.
template <Real T>
struct state_snapshots {
  view<T, 4> ring;
  index_t slots = 0;
  const index_t* first_position = nullptr;
};

namespace detail {

/// One token for `Packs` registers of features: state = a state + k x^T, out = alpha q^T state.
/// `part` < 0: whole registers; else the number of lanes of the only one.
template <int Packs, Real T>
SSMLIB_ALWAYS_INLINE void recurrent_columns(view<T, 2> state, T a, const T* q, const T* k, T weight,
                                            const T* x, T alpha, T d, T* out, index_t part) {
  using pack = simd::pack<T>;
  const auto load = [part](const T* from) SSMLIB_LAMBDA_INLINE {
    return part < 0 ? pack::load(from) : pack::load_part(from, part);
  };
  pack value[Packs], sum[Packs];
  simd::unroll<Packs>([&](auto c) SSMLIB_LAMBDA_INLINE {
    value[c] = load(x + c * pack::width);
    sum[c] = pack(T(0));
  });
  for (index_t n = 0; n < state.extents[0]; ++n) {
    const pack qn(q[n]), kn(weight * k[n]);
    T* row = state.data + n * state.strides[0];
    simd::unroll<Packs>([&](auto c) SSMLIB_LAMBDA_INLINE {
      // A reset forgets whatever was there, infinities too.
      const pack old = a == T(0) ? pack(T(0)) : pack(a) * load(row + c * pack::width);
      const pack s = simd::fma(kn, value[c], old);
      if (part < 0) {
        s.store(row + c * pack::width);
      } else {
        s.store_part(row, part);
      }
      sum[c] = simd::fma(qn, s, sum[c]);
    });
  }
  simd::unroll<Packs>([&](auto c) SSMLIB_LAMBDA_INLINE {
    const pack y = simd::fma(pack(d), value[c], pack(alpha) * sum[c]);
    if (part < 0) {
      y.store(out + c * pack::width);
    } else {
      y.store_part(out, part);
    }
  });
}

/// One token of one head.
template <Real T>
void recurrent_token(view<T, 2> state, T a, const T* q, const T* k, T weight, const T* x, T alpha,
                     T d, T* out) {
  constexpr index_t w = simd::pack<T>::width;
  const index_t features = state.extents[1];
  const auto columns = [&](index_t c) {
    return view<T, 2>{state.data + c, state.extents, state.strides};
  };
  index_t c = 0;
  for (; c + 4 * w <= features; c += 4 * w) {
    recurrent_columns<4>(columns(c), a, q, k, weight, x + c, alpha, d, out + c, -1);
  }
  for (; c + w <= features; c += w) {
    recurrent_columns<1>(columns(c), a, q, k, weight, x + c, alpha, d, out + c, -1);
  }
  if (c < features) {
    recurrent_columns<1>(columns(c), a, q, k, weight, x + c, alpha, d, out + c, features - c);
  }
}

}  // namespace detail

/// The recurrence of ssd_problem, token by token, in this order of operations for every token: its
/// bits depend on the token and the state alone, not on how a sequence is split into calls.
///
/// @param y  (tokens, heads, features), overwritten
/// @cost   tokens * heads * 5 key_size features flops; memory: the states.
template <Real T>
void linear_recurrence(const cpu::context& ctx, const ssd_problem<T>& p, view<T, 3> y,
                       const ssd_states<T>& states, const state_snapshots<T>& snapshots = {}) {
  const index_t keys = p.key_size(), features = p.features();
  const detail::ssd_lanes lanes(p.heads, features);
  const auto lane_task = [&](index_t task) {
    const index_t i = task / lanes.count(), lane = task % lanes.count(), h = lanes.head(lane);
    const index_t column = lanes.from(lane), width = lanes.width(lane);
    const auto group = [&](index_t groups) { return detail::head_group(h, p.heads, groups); };
    const scratch<T> own(states.final ? 0 : keys * width);
    const view<T, 2> state = states.final ? detail::state_matrix(states.final, i, h, column, width)
                                          : detail::matrix(own.data(), keys, width, width);
    if (!states.initial) {
      for (index_t n = 0; n < keys; ++n) {
        std::fill_n(state.data + n * state.strides[0], width, T(0));
      }
    } else {
      const view<const T, 2> from = detail::state_matrix(states.initial, i, h, column, width);
      if (from.data != state.data) detail::copy_matrix<T>(from, state);
    }
    const T d = p.d ? p.d(group(p.d.extent(0))) : T(0);
    const T gamma = p.gamma ? p.gamma(group(p.gamma.extent(0))) : T(1);
    for (index_t t = p.offsets[i]; t < p.offsets[i + 1]; ++t) {
      if (snapshots.ring) {
        const index_t position =
            t - p.offsets[i] +
            (snapshots.first_position != nullptr ? snapshots.first_position[i] : 0);
        const index_t row = position % snapshots.slots * p.sequences + i;
        detail::copy_matrix<T>(state, detail::state_matrix(snapshots.ring, row, h, column, width));
      }
      const T a = p.log_a ? std::exp(p.log_a(t, group(p.log_a.extent(1)))) : gamma;
      const T weight = p.weight ? p.weight(t, group(p.weight.extent(1))) : T(1);
      detail::recurrent_token<T>(
          state, a, &p.q(t, group(p.q.extent(1)), 0), &p.k(t, group(p.k.extent(1)), 0), weight,
          &p.x(t, group(p.x.extent(1)), column), p.alpha, d, &y(t, h, column));
    }
  };
  const index_t tasks = p.sequences * lanes.count();
  if (tasks == 0) return;
  // Enough work a task to be worth handing out: about 10 us.
  const index_t tokens = std::max<index_t>(1, p.offsets[p.sequences] - p.offsets[0]);
  const index_t work = tokens * p.heads * keys * features;
  ctx.parallel_ranges(tasks, std::clamp<index_t>(work / 40000, 1, tasks), 1,
                      [&](index_t begin, index_t end) {
                        for (index_t task = begin; task < end; ++task)
                          lane_task(task);
                      });
}

}  // namespace ssm::kernels
