#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/selective_step.hpp>

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

/// @file
/// A power of two of lanes has a channel, each of them Own consecutive states in registers. Every
/// lane reads its tokens itself: lanes of a channel read the same step and input, lanes of a group
/// the same b and c.

namespace ssm::kernels::cuda {

namespace detail {

/// States of some channels, any strides.
template <class T>
struct channel_states {
  T* data = nullptr;
  index_t row = 0, channel = 0, state = 0;
  bool aligned = false;  // four states can be moved at once

  channel_states() = default;
  explicit channel_states(const view<T, 3>& v)
      : data(v.data), row(v.stride(0)), channel(v.stride(1)), state(v.stride(2)) {
    constexpr index_t size = sizeof(T);
    aligned = state == 1 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0 &&
              row * size % 16 == 0 && channel * size % 16 == 0;
  }
};

template <class T>
struct selective_step_arguments {
  using real = accum_t<T>;
  selective_problem<T> p;
  view<T, 2> y;
  channel_states<const real> a, initial;
  channel_states<real> final, ring;
  index_t slots, channels;
  const index_t* first_position;
  int states, lanes;  // lanes of a channel
};

inline constexpr int selective_step_threads = 128;

/// One lane's share of the states of a channel.
template <class T, int Own>
class selective_lane {
 public:
  using R = accum_t<T>;
  static constexpr int tokens = Own <= 4 ? 4 : 1;  // that are read ahead

  SSMLIB_DEVICE selective_lane(const selective_step_arguments<T>& o, index_t sequence, index_t d,
                               int lane)
      : o_(o), sequence_(sequence), channel_(d), first_(lane * Own) {
    own_ = max(0, min(Own, o.states - first_));
    begin_ = o.p.offsets ? o.p.offsets[sequence] : sequence * o.p.max_length;
    count_ = (o.p.offsets ? o.p.offsets[sequence + 1] : begin_ + o.p.max_length) - begin_;
    const auto group = [&](const view<const T, 3>& v) {
      return v.data + d * v.extents[1] / o.channels * v.strides[1] + first_ * v.strides[2];
    };
    b_ = group(o.p.b);
    c_ = group(o.p.c);
    load(o.a, 0, a_);
#pragma unroll
    for (int i = 0; i < Own; ++i)
      a_[i] *= R(log2_of_e);
    load(o.initial, sequence, h_);
    skip_ = o.p.skip ? o.p.skip[d] : R(0);
    bias_ = o.p.dt_bias ? o.p.dt_bias[d] : R(0);
  }

  SSMLIB_DEVICE void run(int lanes, bool writes) {
    for (index_t t = 0; t < count_; t += tokens) {
      const int n = static_cast<int>(min(index_t{tokens}, count_ - t));
      read(t, n);
#pragma unroll
      for (int e = 0; e < tokens; ++e)
        if (e < n) take(t + e, e, lanes, writes);
    }
    if (writes) store(o_.final, sequence_);
  }

 private:
  SSMLIB_DEVICE void load(const channel_states<const R>& from, index_t row, R (&to)[Own]) const {
    const R* p = from.data + row * from.row + channel_ * from.channel + first_ * from.state;
#pragma unroll
    for (int i = 0; i < Own; ++i)
      to[i] = R(0);
    if (from.data == nullptr) return;
    constexpr int vector = 16 / static_cast<int>(sizeof(R));
#pragma unroll
    for (int i = 0; i < Own; i += vector) {
      if (from.aligned && i + vector <= own_) {
        const auto words = *reinterpret_cast<const numbers<R, vector>*>(p + i);
#pragma unroll
        for (int j = 0; j < vector; ++j)
          to[i + j] = words.v[j];
      } else {
#pragma unroll
        for (int j = 0; j < vector; ++j)
          if (i + j < own_) to[i + j] = p[(i + j) * from.state];
      }
    }
  }
  SSMLIB_DEVICE void store(const channel_states<R>& to, index_t row) const {
    if (to.data == nullptr) return;
    R* p = to.data + row * to.row + channel_ * to.channel + first_ * to.state;
    constexpr int vector = 16 / static_cast<int>(sizeof(R));
#pragma unroll
    for (int i = 0; i < Own; i += vector) {
      if (to.aligned && i + vector <= own_) {
        numbers<R, vector> words;
#pragma unroll
        for (int j = 0; j < vector; ++j)
          words.v[j] = h_[i + j];
        *reinterpret_cast<numbers<R, vector>*>(p + i) = words;
      } else {
#pragma unroll
        for (int j = 0; j < vector; ++j)
          if (i + j < own_) p[(i + j) * to.state] = h_[i + j];
      }
    }
  }
  /// Tokens from t on into registers.
  SSMLIB_DEVICE void read(index_t t, int n) {
#pragma unroll
    for (int e = 0; e < tokens; ++e) {
      const index_t row = begin_ + min(t + e, count_ - 1);
      dt_[e] = o_.p.dt.data[row * o_.p.dt.strides[0] + channel_];
      u_[e] = o_.p.u.data[row * o_.p.u.strides[0] + channel_];
      if (o_.p.gate.data) gate_[e] = o_.p.gate.data[row * o_.p.gate.strides[0] + channel_];
      const T *b = b_ + row * o_.p.b.strides[0], *c = c_ + row * o_.p.c.strides[0];
#pragma unroll
      for (int i = 0; i < Own; ++i) {
        bs_[e][i] = i < own_ ? b[i * o_.p.b.strides[2]] : T();
        cs_[e][i] = i < own_ ? c[i * o_.p.c.strides[2]] : T();
      }
    }
  }
  SSMLIB_DEVICE void take(index_t t, int e, int lanes, bool writes) {
    if (writes && o_.ring.data != nullptr && t >= count_ - o_.slots) {
      const index_t at = (o_.first_position ? o_.first_position[sequence_] : 0) + t;
      store(o_.ring, at % o_.slots * o_.p.sequences + sequence_);
    }
    const R raw = widen(dt_[e]) + bias_, u = widen(u_[e]);
    const R delta = o_.p.softplus ? softplus(raw) : raw, input = delta * u;
    R y = R(0);
#pragma unroll
    for (int i = 0; i < Own; ++i) {
      h_[i] = fma(static_cast<R>(widen(bs_[e][i])), input, power_of_two(delta * a_[i]) * h_[i]);
      if (i < own_) y = fma(static_cast<R>(widen(cs_[e][i])), h_[i], y);
    }
    for (int step = 1; step < lanes; step *= 2)
      y += __shfl_xor_sync(0xffffffffu, y, step);
    y = fma(skip_, u, y);
    if (o_.p.gate.data) y *= silu(static_cast<R>(widen(gate_[e])));
    if (writes && first_ == 0) {
      o_.y.data[(begin_ + t) * o_.y.strides[0] + channel_] = narrow<T>(y);
    }
  }

  const selective_step_arguments<T>& o_;
  index_t sequence_, channel_, begin_, count_;
  int first_, own_;
  const T *b_, *c_;
  R a_[Own], h_[Own], skip_, bias_;
  T dt_[tokens], u_[tokens], gate_[tokens], bs_[tokens][Own], cs_[tokens][Own];
};

/// A warp has 32 / lanes channels of one sequence: its lanes walk through the same tokens.
template <class T, int Own>
__global__ void __launch_bounds__(selective_step_threads)
    selective_step_kernel(const __grid_constant__ selective_step_arguments<T> o) {
  const int a_warp = 32 / o.lanes;
  const index_t pieces = (o.channels + a_warp - 1) / a_warp;
  const index_t warp = index_t{blockIdx.x} * (selective_step_threads / 32) + threadIdx.x / 32;
  if (warp >= o.p.sequences * pieces) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const index_t d = warp % pieces * a_warp + lane / o.lanes;
  // Lanes without a channel repeat the last one, for the sums' sake.
  selective_lane<T, Own> states(o, warp / pieces, min(d, o.channels - 1), lane % o.lanes);
  states.run(o.lanes, d < o.channels);
}

template <class T>
void check_selective_step(const selective_problem<T>& p, const view<T, 2>& y,
                          const view<accum_t<T>, 3>& final, const selective_snapshots<T>& s) {
  const index_t channels = p.channels(), states = p.states(), tokens = p.tokens();
  const auto rows = [&](const auto& v) {
    return v.extents == shape<2>{tokens, channels} && (v.stride(1) == 1 || channels <= 1);
  };
  const auto groups = [&](const view<const T, 3>& v) {
    return v.extent(0) == tokens && v.extent(1) >= 1 && channels % v.extent(1) == 0 &&
           v.extent(2) == states;
  };
  const shape<3> wanted{p.sequences, channels, states};
  const bool fits =
      rows(p.dt) && rows(p.u) && rows(y) && (!p.gate || rows(p.gate)) && groups(p.b) &&
      groups(p.c) && p.a.extent(0) == channels && states <= 1024 &&
      (!p.initial || p.initial.extents == wanted) && (!final || final.extents == wanted) &&
      (!s.ring ||
       (s.slots > 0 && s.ring.extents == shape<3>{s.slots * p.sequences, channels, states})) &&
      (p.offsets != nullptr || tokens == p.sequences * p.max_length);
  if (fits) return;
  throw shape_error("ssm: selective_recurrence: dt is " + to_string(p.dt.extents) + ", a " +
                    to_string(p.a.extents) + ", b " + to_string(p.b.extents) + ", c " +
                    to_string(p.c.extents) + ", u " + to_string(p.u.extents) + ", y " +
                    to_string(y.extents) + " and the final state " + to_string(final.extents) +
                    " for " + std::to_string(p.sequences) +
                    " sequences; wanted rows of the same channels, groups that divide them, at "
                    "most 1024 states, and states of (sequences x channels x states)");
}

}  // namespace detail

template <class T>
void selective_recurrence(cudaStream_t stream, const selective_problem<T>& p, view<T, 2> y,
                          view<accum_t<T>, 3> final, const selective_snapshots<T>& snapshots) {
  using R = accum_t<T>;
  detail::check_selective_step(p, y, final, snapshots);
  if (p.sequences == 0 || p.channels() == 0 || p.states() == 0) return;
  detail::selective_step_arguments<T> o{};
  o.p = p;
  o.y = y;
  o.a = detail::channel_states<const R>(view<const R, 3>{
      p.a.data, {1, p.a.extent(0), p.a.extent(1)}, {0, p.a.stride(0), p.a.stride(1)}});
  if (p.initial) o.initial = detail::channel_states<const R>(p.initial);
  if (final) o.final = detail::channel_states<R>(final);
  if (snapshots.ring) o.ring = detail::channel_states<R>(snapshots.ring);
  o.slots = snapshots.slots;
  o.first_position = snapshots.first_position;
  o.channels = p.channels();
  o.states = static_cast<int>(p.states());
  const int own = o.states <= 128 ? 4 : 32;
  o.lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>((o.states + own - 1) / own)));
  const index_t a_warp = 32 / o.lanes, a_block = detail::selective_step_threads / 32;
  const index_t warps = p.sequences * ((o.channels + a_warp - 1) / a_warp);
  const index_t blocks = (warps + a_block - 1) / a_block;
  if (blocks > std::numeric_limits<int>::max()) {
    throw shape_error("ssm: selective_recurrence: " + std::to_string(p.sequences) +
                      " sequences of " + std::to_string(o.channels) +
                      " channels are more than a grid takes; cut the batch");
  }
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(blocks), detail::selective_step_threads, 0, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  if (own == 4) return launch(detail::selective_step_kernel<T, 4>);
  launch(detail::selective_step_kernel<T, 32>);
}

#define SSMLIB_DETAIL_LIST(T)                                                             \
  SSMLIB_INSTANTIATE(                                                                     \
      cuda_selective_step,                                                                \
      void selective_recurrence<T>(cudaStream_t, const selective_problem<T>&, view<T, 2>, \
                                   view<accum_t<T>, 3>, const selective_snapshots<T>&))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
