#pragma once

#include <ssmlib/kernels/cuda/selective_parts.cuh>

/// @file
/// The scan itself, for the forward pass and for the states between cuts of time. A warp owns
/// 2 * 32 / Lanes neighbouring channels of one cut, and a lane Own states of two of them, in
/// registers. Warps share nothing and never wait for each other. Every 16 tokens a warp turns its
/// rows of dt, u, b, c into steps and inputs in shared memory, where the lanes read them; the
/// partial sums over states go back there, and the same lanes that made the steps finish y.
///
/// What bounds it: 16 exponentials a token and channel at 16 a clock and multiprocessor.

namespace ssm::kernels::cuda::detail {

enum class scan_mode {
  outputs,  ///< y
  states,   ///< states only: h = exp(delta a) h + delta b u
  reversed  ///< from the last token to the first: g = exp(delta a) (g + c dy silu(gate))
};

/// What a scan starts from and leaves; everything but y may be null.
template <class T>
struct scan_targets {
  using real = accum_t<T>;
  view<T, 2> y{};
  view<real, 3> final{};
  real* checkpoints = nullptr;   // (chunks, D, N): states before every 16th token
  const real* starts = nullptr;  // (units, D, N); null: the initial states, then zeros
  real* ends = nullptr;          // (units, D, N)
  real* sums = nullptr;          // (units, D): sums of delta
  view<const T, 2> dy{};         // reversed
};

/// Tokens of a tile: where warps have few channels, more of them, for less to do a tile.
template <int Own>
inline constexpr int tile_tokens = Own < 4 ? 2 * scan_tokens : scan_tokens;

template <int Own, int Lanes, scan_mode Mode, class R>
struct scan_memory {
  using layout = lane_layout<Own, Lanes, tile_tokens<Own>>;
  static constexpr int y_row = 2 * Lanes + 2;  // padded: reads of rows meet every bank once
  static constexpr bool outputs = Mode == scan_mode::outputs;

  numbers<R, 4> steps[layout::tokens * layout::pairs];  // delta, delta, input, input
  R first[layout::tokens * layout::states];             // b, or c where time runs back
  R second[outputs ? layout::tokens * layout::states : 4];
  R y[outputs ? layout::tokens * layout::pairs * y_row : 4];
};

inline constexpr int scan_warps(int states) {
  return states > 64 ? 2 : 4;
}
/// Blocks a multiprocessor, for the registers.
template <int Own, int Lanes, class T>
inline constexpr int scan_blocks = Own* Lanes > 16 || sizeof(T) == 8 ? 1 : 3;

template <class T, int Own, int Lanes, scan_mode Mode>
__global__ void __launch_bounds__(scan_warps(Own* Lanes) * 32, scan_blocks<Own, Lanes, T>)
    selective_scan_kernel(const __grid_constant__ selective_arguments<T> o,
                          const __grid_constant__ scan_targets<T> to) {
  using R = accum_t<T>;
  using layout = lane_layout<Own, Lanes, tile_tokens<Own>>;
  using memory = scan_memory<Own, Lanes, Mode, R>;
  constexpr bool outputs = Mode == scan_mode::outputs, reversed = Mode == scan_mode::reversed;
  constexpr int items = layout::items, states = layout::states;
  extern __shared__ __align__(16) unsigned char shared[];
  memory& m = reinterpret_cast<memory*>(shared)[threadIdx.x / 32];
  const layout at;

  const index_t group_tiles = (o.group_channels + layout::channels - 1) / layout::channels;
  const index_t tiles = o.groups * group_tiles;
  const index_t id = index_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (id >= o.units() * tiles) return;
  const token_range r = range_of(o, id / tiles);
  if (r.begin == r.end && !r.last && to.ends == nullptr) return;
  if (to.ends && r.segment == (reversed ? 0 : o.segments - 1)) return;  // nothing starts from it
  const channel_range range = channels_of(o, id % tiles, layout::channels);
  const index_t N = o.states, D = o.channels;
  const index_t channel = range.begin + 2 * at.pair;
  const int channels = static_cast<int>(range.count) - 2 * at.pair;  // of this lane, if 0 < it < 2
  const index_t item_channel = range.begin + 2 * at.item_pair;
  const int item_channels = min(2, max(0, static_cast<int>(range.count) - 2 * at.item_pair));

  R a[2][Own], h[2][Own];
  load_strided(o.p.a.data + channel * o.p.a.strides[0], o.p.a.strides[0], o.p.a.strides[1], N,
               at.state, channels, a);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < Own; ++j) {
      a[i][j] *= R(log2_of_e);
      h[i][j] = R(0);
    }
  if (to.starts) {
    load_rows(to.starts + ((id / tiles) * D + channel) * N, N, at.state, channels, h);
  } else if (!reversed && r.segment == 0 && o.p.initial.data) {
    const auto& s = o.p.initial;
    load_strided(s.data + r.sequence * s.strides[0] + channel * s.strides[1], s.strides[1],
                 s.strides[2], N, at.state, channels, h);
  }
  R bias[2] = {}, skip[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (o.p.dt_bias && i < item_channels) bias[i] = o.p.dt_bias[item_channel + i];
    if (outputs && o.p.skip && i < item_channels) skip[i] = o.p.skip[item_channel + i];
  }
  R sums[2] = {};

  constexpr int tile = layout::tokens;
  const int tokens = static_cast<int>(r.end - r.begin), chunks = (tokens + tile - 1) / tile;
  // Pointers to a lane's first item of the first tile, then of each next one.
  const index_t t0 = r.begin + (reversed ? max(chunks - 1, 0) * tile : 0);
  const auto first_item = [&](const view<const T, 2>& rows) {
    return rows.data + (t0 + at.item_token) * rows.strides[0] + item_channel;
  };
  const view<const T, 2>& inputs = reversed ? to.dy : o.p.u;
  const view<const T, 3>& weights = reversed ? o.p.c : o.p.b;
  constexpr index_t tile_step = reversed ? -tile : tile;
  const index_t dt_stride = o.p.dt.strides[0], in_stride = inputs.strides[0];
  const index_t gate_stride = o.p.gate.strides[0], y_stride = to.y.strides[0];
  const T *dt_item = first_item(o.p.dt), *in_item = first_item(inputs);
  const T* gate_item = o.p.gate.data ? first_item(o.p.gate) : nullptr;
  T* y_item = outputs ? to.y.data + (t0 + at.item_token) * y_stride + item_channel : nullptr;
  using rows = state_rows<states, tile, 32, T>;
  // To where a lane begins; lanes that take no part of the rows in registers begin at the first.
  const int lane_row = rows::held ? at.lane / (states / 4) : 0;
  const T* first_row = weights.data + (t0 + lane_row) * weights.strides[0] +
                       (reversed ? range.c_group : range.b_group) * weights.strides[1];
  const T* second_row =
      o.p.c.data + (t0 + lane_row) * o.p.c.strides[0] + range.c_group * o.p.c.strides[1];
  R* checkpoint = to.checkpoints ? to.checkpoints + (r.checkpoint(t0) * D + channel) * N : nullptr;
  rows first, second;
  packed_t<T, 2> raw_dt[items], raw_in[items], raw_gate[items];
  const auto load_items = [&](const T* p, index_t stride, int count, packed_t<T, 2>(&raw)[items]) {
    load_pairs<items, layout::item_step>(p, layout::item_step * stride, at.item_token, count,
                                         item_channels, o.paired, raw);
  };
  const auto rows_at = [&](const T* p, index_t stride, int count) ->
      typename rows::source { return {p, lane_row, stride, count, static_cast<int>(N), o.quads}; };
  // Tokens of tile k.
  const auto count_of = [&](int k) {
    return min(tile, tokens - (reversed ? chunks - 1 - k : k) * tile);
  };
  // All but gates of y, which are wanted late.
  const auto fetch = [&](int count) {
    load_items(dt_item, dt_stride, count, raw_dt);
    load_items(in_item, in_stride, count, raw_in);
    if (reversed && gate_item) load_items(gate_item, gate_stride, count, raw_gate);
    first.load(rows_at(first_row, weights.strides[0], count), at.lane);
    if constexpr (outputs) second.load(rows_at(second_row, o.p.c.strides[0], count), at.lane);
  };

  if (chunks > 0) fetch(count_of(0));
  for (int k = 0; k < chunks; ++k) {
    const int count = count_of(k);
    packed_t<T, 2> u[items];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int t = at.item_token + i * layout::item_step;
      if (tile % layout::item_step != 0 && t >= tile) continue;
      const auto dt = widen(raw_dt[i]), in = widen(raw_in[i]);
      numbers<R, 4> step;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const R raw = dt.v[e] + bias[e], soft = softplus(raw);
        // a step of zero leaves the state as it is
        const R delta = t < count ? (o.p.softplus ? soft : raw) : R(0);
        step.v[e] = delta;
        step.v[2 + e] = reversed ? in.v[e] : delta * in.v[e];
      }
      if (reversed && gate_item) {
        const auto z = widen(raw_gate[i]);
        step.v[2] *= silu(z.v[0]);
        step.v[3] *= silu(z.v[1]);
      }
      m.steps[t * layout::pairs + at.item_pair] = step;
      u[i] = raw_in[i];
    }
    first.store(rows_at(first_row, weights.strides[0], count), m.first, at.lane);
    if constexpr (outputs) {
      second.store(rows_at(second_row, o.p.c.strides[0], count), m.second, at.lane);
    }
    __syncwarp();
    if (outputs && gate_item) load_items(gate_item, gate_stride, count, raw_gate);
    dt_item += tile_step * dt_stride;
    in_item += tile_step * in_stride;
    if (gate_item) gate_item += tile_step * gate_stride;
    first_row += tile_step * weights.strides[0];
    second_row += tile_step * o.p.c.strides[0];
    if (k + 1 < chunks) fetch(count_of(k + 1));

    // The decays of a token are computed during the sums of the token before, and the operands
    // are read one token ahead of that: then one warp alone keeps the exponentials busy.
    const auto token = [](int s) { return reversed ? tile - 1 - s : s; };
    const auto step_at = [&](int s) { return m.steps[token(s) * layout::pairs + at.pair]; };
    const auto row_at = [&](const R* rows_of, int s) {
      return *reinterpret_cast<const numbers<R, Own>*>(rows_of + token(s) * states + at.state);
    };
    const auto decays = [&](const numbers<R, 4>& step, R(&to_decay)[2][Own]) {
#pragma unroll
      for (int j = 0; j < Own; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          to_decay[i][j] = power_of_two(step.v[i] * a[i][j]);
    };
    numbers<R, 4> step = step_at(0), next_step = step_at(1);
    numbers<R, Own> b = row_at(m.first, 0), c{};
    if constexpr (outputs) c = row_at(m.second, 0);
    R decay[2][Own];
    decays(step, decay);
#pragma unroll
    for (int s = 0; s < tile; ++s) {
      if (!reversed && s % scan_tokens == 0 && checkpoint && s < count) {
        store_rows(h, N, at.state, channels, checkpoint);
        checkpoint += D * N;
      }
      numbers<R, 4> later{};
      numbers<R, Own> next_b{}, next_c{};
      R next_decay[2][Own];
      if (s + 2 < tile) later = step_at(s + 2);
      if (s + 1 < tile) {
        next_b = row_at(m.first, s + 1);
        if constexpr (outputs) next_c = row_at(m.second, s + 1);
        decays(next_step, next_decay);
      }
      if constexpr (!outputs) {
        sums[0] += step.v[0];
        sums[1] += step.v[1];
      }
      numbers<R, 2> y{};
#pragma unroll
      for (int j = 0; j < Own; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (reversed) {
            h[i][j] = decay[i][j] * fma(step.v[2 + i], b.v[j], h[i][j]);
          } else {
            h[i][j] = fma(decay[i][j], h[i][j], step.v[2 + i] * b.v[j]);
          }
          if constexpr (outputs) y.v[i] = fma(c.v[j], h[i][j], y.v[i]);
        }
      if constexpr (outputs) {
        *reinterpret_cast<numbers<R, 2>*>(
            m.y + (token(s) * layout::pairs + at.pair) * memory::y_row + 2 * (at.lane % Lanes)) = y;
      }
      step = next_step, next_step = later, b = next_b, c = next_c;
#pragma unroll
      for (int j = 0; j < Own; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          decay[i][j] = next_decay[i][j];
    }
    __syncwarp();

    if constexpr (outputs) {
      R factor[items][2];
#pragma unroll
      for (int i = 0; i < items; ++i)
        factor[i][0] = factor[i][1] = R(1);
      if (gate_item) {
#pragma unroll
        for (int i = 0; i < items; ++i) {
          const auto z = widen(raw_gate[i]);
          factor[i][0] = silu(z.v[0]);
          factor[i][1] = silu(z.v[1]);
        }
      }
#pragma unroll
      for (int i = 0; i < items; ++i) {
        const int t = at.item_token + i * layout::item_step;
        if (t >= count) continue;
        const auto* parts = reinterpret_cast<const numbers<R, 2>*>(
            m.y + (t * layout::pairs + at.item_pair) * memory::y_row);
        R y[2] = {parts[0].v[0], parts[0].v[1]};
#pragma unroll
        for (int l = 1; l < Lanes; ++l) {
          const numbers<R, 2> part = parts[l];
          y[0] += part.v[0];
          y[1] += part.v[1];
        }
        const auto in = widen(u[i]);
#pragma unroll
        for (int e = 0; e < 2; ++e)
          y[e] = fma(skip[e], in.v[e], y[e]) * factor[i][e];
        store_pair(y_item + i * layout::item_step * y_stride, narrow_pair<T>(y), item_channels,
                   o.paired);
      }
      y_item += tile_step * y_stride;
    }
  }

  if (!reversed && to.final.data && r.last) {
    const auto& s = to.final;
    store_strided(h, s.strides[1], s.strides[2], N, at.state, channels, false,
                  s.data + r.sequence * s.strides[0] + channel * s.strides[1]);
  }
  if constexpr (!outputs) {
    if (to.ends == nullptr) return;
    store_rows(h, N, at.state, channels, to.ends + ((id / tiles) * D + channel) * N);
    if (at.lane % Lanes == 0) {
      for (int i = 0; i < min(2, channels); ++i)
        to.sums[(id / tiles) * D + channel + i] = sums[i];
    }
  }
}

/// From what every cut makes of the state zero to the state that it starts from, in place;
/// `reversed` from the last cut to the first. `left` takes what remains after the last one.
template <class T>
__global__ void join_segments_kernel(const __grid_constant__ selective_arguments<T> o,
                                     accum_t<T>* ends, const accum_t<T>* sums,
                                     view<const accum_t<T>, 3> initial, bool reversed) {
  using R = accum_t<T>;
  const index_t N = o.states, D = o.channels;
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= o.p.sequences * D * N) return;
  const index_t n = i % N, c = i / N % D, sequence = i / (N * D);
  const R a = o.p.a.data[c * o.p.a.strides[0] + n * o.p.a.strides[1]] * R(log2_of_e);
  R state = R(0);
  if (initial.data) {
    state =
        initial
            .data[sequence * initial.strides[0] + c * initial.strides[1] + n * initial.strides[2]];
  }
  for (index_t k = 0; k < o.segments; ++k) {
    const index_t unit = sequence * o.segments + (reversed ? o.segments - 1 - k : k);
    const R own = ends[(unit * D + c) * N + n];
    ends[(unit * D + c) * N + n] = state;
    state = fma(power_of_two(a * sums[unit * D + c]), state, own);
  }
}

}  // namespace ssm::kernels::cuda::detail
