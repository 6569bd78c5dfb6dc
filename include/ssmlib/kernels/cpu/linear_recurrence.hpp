#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/ssd_parts.hpp>

#include <algorithm>
#include <cmath>

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

/// What a token does to the state: state = a state + k x^T.
///
/// A decay near 1 is applied as state + (a - 1) state, its small change added to that of k x^T
/// before the one rounding to the state's precision: otherwise, where a - 1 is about the spacing of
/// T, rounding a state is biased and the bias grows with the length.
template <Real T>
struct recurrent_decay {
  T factor;  ///< a, or a - 1
  bool near_one;

  static recurrent_decay from_log(T log_a) {
    const T a = std::exp(log_a);
    return is_near_one(a) && log_a != T(0) ? recurrent_decay{std::expm1(log_a), true}
                                           : recurrent_decay{a, false};
  }
  static recurrent_decay from_value(T a) {
    return is_near_one(a) && a != T(1) ? recurrent_decay{a - T(1), true}
                                       : recurrent_decay{a, false};
  }

 private:
  /// Nearer than 1/1024: farther away the past is forgotten before the bias matters.
  static bool is_near_one(T a) { return a > T(1) - T(1) / T(1024); }
};

/// The operands of one token of one head.
template <Real T>
struct recurrent_operands {
  recurrent_decay<T> decay;
  const T *q, *k, *x;
  T weight, alpha, d;
};

/// One token for `Packs` registers of features, or for the first `part` >= 0 lanes of a register.
template <int Packs, bool NearOne, Real T>
SSMLIB_ALWAYS_INLINE void recurrent_columns(view<T, 2> state, const recurrent_operands<T>& o,
                                            index_t column, T* out, index_t part) {
  using pack = simd::pack<T>;
  const auto load = [part](const T* from) SSMLIB_LAMBDA_INLINE {
    return part < 0 ? pack::load(from) : pack::load_part(from, part);
  };
  const auto store = [part](pack value, T* to) SSMLIB_LAMBDA_INLINE {
    part < 0 ? value.store(to) : value.store_part(to, part);
  };
  const pack factor(o.decay.factor);
  pack value[Packs], sum[Packs];
  simd::unroll<Packs>([&](auto c) SSMLIB_LAMBDA_INLINE {
    value[c] = load(o.x + column + c * pack::width);
    sum[c] = pack(T(0));
  });
  for (index_t n = 0; n < state.extents[0]; ++n) {
    const pack qn(o.q[n]), kn(o.weight * o.k[n]);
    T* row = state.data + n * state.strides[0] + column;
    simd::unroll<Packs>([&](auto c) SSMLIB_LAMBDA_INLINE {
      pack s = load(row + c * pack::width);
      if constexpr (NearOne) {
        s += simd::fma(kn, value[c], factor * s);
      } else {
        // A reset forgets whatever was there, infinities too.
        s = o.decay.factor == T(0) ? kn * value[c] : simd::fma(kn, value[c], factor * s);
      }
      store(s, row + c * pack::width);
      sum[c] = simd::fma(qn, s, sum[c]);
    });
  }
  simd::unroll<Packs>([&](auto c) SSMLIB_LAMBDA_INLINE {
    store(simd::fma(pack(o.d), value[c], pack(o.alpha) * sum[c]), out + column + c * pack::width);
  });
}

/// One token of one head.
template <bool NearOne, Real T>
void recurrent_token(view<T, 2> state, const recurrent_operands<T>& o, T* out) {
  constexpr index_t w = simd::pack<T>::width;
  const index_t features = state.extents[1];
  index_t c = 0;
  for (; c + 4 * w <= features; c += 4 * w)
    recurrent_columns<4, NearOne>(state, o, c, out, -1);
  for (; c + w <= features; c += w)
    recurrent_columns<1, NearOne>(state, o, c, out, -1);
  if (c < features) recurrent_columns<1, NearOne>(state, o, c, out, features - c);
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
    const auto gamma =
        detail::recurrent_decay<T>::from_value(p.gamma ? p.gamma(group(p.gamma.extent(0))) : T(1));
    for (index_t t = p.offsets[i]; t < p.offsets[i + 1]; ++t) {
      if (snapshots.ring) {
        const index_t position =
            t - p.offsets[i] +
            (snapshots.first_position != nullptr ? snapshots.first_position[i] : 0);
        const index_t row = position % snapshots.slots * p.sequences + i;
        detail::copy_matrix<T>(state, detail::state_matrix(snapshots.ring, row, h, column, width));
      }
      const detail::recurrent_operands<T> o{
          p.log_a ? detail::recurrent_decay<T>::from_log(p.log_a(t, group(p.log_a.extent(1))))
                  : gamma,
          &p.q(t, group(p.q.extent(1)), 0),
          &p.k(t, group(p.k.extent(1)), 0),
          &p.x(t, group(p.x.extent(1)), column),
          p.weight ? p.weight(t, group(p.weight.extent(1))) : T(1),
          p.alpha,
          d};
      if (o.decay.near_one) {
        detail::recurrent_token<true>(state, o, &y(t, h, column));
      } else {
        detail::recurrent_token<false>(state, o, &y(t, h, column));
      }
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

#define SSMLIB_DETAIL_LIST(T)                                                                \
  SSMLIB_INSTANTIATE(                                                                        \
      ssd, void linear_recurrence<T>(const cpu::context&, const ssd_problem<T>&, view<T, 3>, \
                                     const ssd_states<T>&, const state_snapshots<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
