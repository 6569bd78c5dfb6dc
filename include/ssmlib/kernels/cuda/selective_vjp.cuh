#pragma once

#include <ssmlib/kernels/cuda/selective_scan.cuh>

/// @file
/// The gradient of the selective scan. With g_t the gradient of h_t and G_t = exp(delta_t a) g_t,
///
///     g_t = c_t dy_t + G_{t+1}
///     d u_t = delta_t sum_n g_t b_t + skip dy_t
///     d delta_t = u_t sum_n g_t b_t + sum_n a G_t h_{t-1},   d a = sum_t delta_t G_t h_{t-1}
///     d b_t = sum_channels g_t delta_t u_t,   d c_t = sum_channels dy_t h_t
///
/// A block owns the channels that its warps cover in `passes` passes, and walks its cut from the
/// last 16 tokens to the first. In each such chunk a warp scans forward from the kept state,
/// leaving every `step`-th state in shared memory, then goes back step by step with the decays and
/// states of that step in registers. Sums over channels and over states go through shared memory in
/// a fixed order; each block writes its own share of d b and d c, added up by another kernel.

namespace ssm::kernels::cuda::detail {

template <class T>
struct vjp_targets {
  using real = accum_t<T>;
  view<const T, 2> dy;
  view<const real, 3> d_final;
  const real* checkpoints;  // (chunks, D, N)
  const real* ends;         // (units, D, N): G after each cut; null: d_final, or zeros
  selective_gradients<T> d;
  real* state_parts;    // (tiles, tokens, 2, padded N): shares of d b, d c
  real* a_parts;        // (parts, D, N), and
  real* channel_parts;  // (parts, 2, D), d skip, d dt_bias: both zero before several passes
  real* carries;        // (parts, D, N): G between passes
  index_t parts, passes;
};

template <int Own, int Lanes, int Step, class R>
struct vjp_warp_memory {
  using layout = lane_layout<Own, Lanes>;
  static constexpr int quads = 2 * Own / 4;            // of a lane, in both channels
  static constexpr int part_row = 32 + layout::pairs;  // padded against bank conflicts
  numbers<R, 4> steps[scan_tokens * layout::pairs];  // delta, delta, then inputs, later sums of gb
  numbers<R, 2> dy[scan_tokens * layout::pairs];     // dy, later sums of a G h
  numbers<R, 2> y[scan_tokens * layout::pairs];
  numbers<R, 4> kept[(scan_tokens / Step - 1) * quads * 32];
  numbers<R, 4> parts[Step * part_row];
  numbers<R, 2> y_parts[Step * part_row];
  numbers<R, 4> state_parts[Step * quads * 32];
  numbers<R, 4> state_sums[scan_tokens * quads * Lanes];
};

template <int Own, int Lanes, int Warps, int Step, class R>
struct vjp_memory {
  R b[scan_tokens * Own * Lanes], c[scan_tokens * Own * Lanes];
  vjp_warp_memory<Own, Lanes, Step, R> warp[Warps];
};

/// What a warp carries from chunk to chunk.
template <int Own, class R>
struct vjp_carry {
  R a[2][Own], g[2][Own], d_a[2][Own];
  R d_skip[2], d_bias[2];
};

/// One warp's channels, one chunk of tokens.
template <class T, int Own, int Lanes, int Step, bool Gated>
class vjp_chunk {
 public:
  using R = accum_t<T>;
  using layout = lane_layout<Own, Lanes>;
  using memory = vjp_warp_memory<Own, Lanes, Step, R>;
  static constexpr int items = layout::items, states = layout::states, quads = memory::quads;

  const selective_arguments<T>& o;
  const vjp_targets<T>& to;
  const token_range& r;
  channel_range range;
  memory& m;
  const R *b, *c;  // rows in shared memory
  layout at;

  SSMLIB_DEVICE index_t channel() const { return range.begin + 2 * at.pair; }
  SSMLIB_DEVICE int channels() const { return static_cast<int>(range.count) - 2 * at.pair; }
  SSMLIB_DEVICE index_t item_channel() const { return range.begin + 2 * at.item_pair; }
  SSMLIB_DEVICE int item_channels() const {
    return min(2, max(0, static_cast<int>(range.count) - 2 * at.item_pair));
  }
  SSMLIB_DEVICE void load_items(const view<const T, 2>& from, index_t t0, int count,
                                packed_t<T, 2> (&raw)[items]) const {
    load_pairs<items, layout::item_step>(
        from.data + (t0 + at.item_token) * from.strides[0] + item_channel(),
        layout::item_step * from.strides[0], at.item_token, count, item_channels(), o.paired, raw);
  }
  SSMLIB_DEVICE void store_item(const view<T, 2>& rows, index_t t, const R (&x)[2]) const {
    T* p = rows.data + t * rows.strides[0] + item_channel();
    if (to.d.add) {
      packed_t<T, 2> old[1];
      load_pairs<1, 1>(static_cast<const T*>(p), 0, 0, 1, item_channels(), o.paired, old);
      const auto before = widen(old[0]);
      const R sum[2] = {x[0] + before.v[0], x[1] + before.v[1]};
      detail::store_pair(p, narrow_pair<T>(sum), item_channels(), o.paired);
    } else {
      detail::store_pair(p, narrow_pair<T>(x), item_channels(), o.paired);
    }
  }
  SSMLIB_DEVICE int tokens_from(index_t t0) const {
    return static_cast<int>(min(index_t{scan_tokens}, r.end - t0));
  }

  SSMLIB_DEVICE void run(index_t t0, bool accumulate, vjp_carry<Own, R>& s) {
    R h[2][Own];
    const R* kept = to.checkpoints + (r.checkpoint(t0) * o.channels + channel()) * o.states;
    load_rows(kept, o.states, at.state, channels(), h);
    make_steps(t0);
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k + 1 < scan_tokens / Step; ++k) {
#pragma unroll
      for (int t = 0; t < Step; ++t)
        advance(k * Step + t, s.a, h);
      numbers<R, 4> packed[quads];
      pack(h, packed);
#pragma unroll
      for (int q = 0; q < quads; ++q)
        m.kept[(k * quads + q) * 32 + at.lane] = packed[q];
    }
#pragma unroll 1
    for (int k = scan_tokens / Step - 1; k >= 0; --k) {
      if (k > 0) {
        numbers<R, 4> packed[quads];
#pragma unroll
        for (int q = 0; q < quads; ++q)
          packed[q] = m.kept[((k - 1) * quads + q) * 32 + at.lane];
        unpack(packed, h);
      } else {
        load_rows(kept, o.states, at.state, channels(), h);  // once more: registers are dearer
      }
      reverse_step(k * Step, s, h);
      __syncwarp();
      add_up(k * Step, accumulate);
      __syncwarp();
    }
    finish(t0, s);
  }

 private:
  SSMLIB_DEVICE void pack(const R (&h)[2][Own], numbers<R, 4> (&to_quads)[quads]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Own; ++j)
        to_quads[(i * Own + j) / 4].v[(i * Own + j) % 4] = h[i][j];
  }
  SSMLIB_DEVICE void unpack(const numbers<R, 4> (&from)[quads], R (&h)[2][Own]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Own; ++j)
        h[i][j] = from[(i * Own + j) / 4].v[(i * Own + j) % 4];
  }

  SSMLIB_DEVICE void make_steps(index_t t0) {
    const int count = tokens_from(t0);
    packed_t<T, 2> raw_dt[items], raw_u[items], raw_dy[items], raw_gate[items];
    load_items(o.p.dt, t0, count, raw_dt);
    load_items(o.p.u, t0, count, raw_u);
    load_items(to.dy, t0, count, raw_dy);
    if constexpr (Gated) load_items(o.p.gate, t0, count, raw_gate);
    const R shift[2] = {bias(0), bias(1)};
#pragma unroll
    for (int k = 0; k < items; ++k) {
      const int t = at.item_token + k * layout::item_step;
      if (scan_tokens % layout::item_step != 0 && t >= scan_tokens) continue;
      const auto dt = widen(raw_dt[k]), u = widen(raw_u[k]);
      auto dy = widen(raw_dy[k]);
      if constexpr (Gated) {
        const auto z = widen(raw_gate[k]);
        dy.v[0] *= silu(z.v[0]);
        dy.v[1] *= silu(z.v[1]);
      }
      numbers<R, 4> step;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const R raw = dt.v[e] + shift[e], soft = softplus(raw);
        const R delta = t < count ? (o.p.softplus ? soft : raw) : R(0);
        step.v[e] = delta;
        step.v[2 + e] = delta * u.v[e];
      }
      m.steps[t * layout::pairs + at.item_pair] = step;
      m.dy[t * layout::pairs + at.item_pair] = {dy.v[0], dy.v[1]};
    }
  }
  SSMLIB_DEVICE R bias(int e) const {
    return o.p.dt_bias && e < item_channels() ? o.p.dt_bias[item_channel() + e] : R(0);
  }

  SSMLIB_DEVICE void advance(int t, const R (&a)[2][Own], R (&h)[2][Own]) const {
    const numbers<R, 4> step = m.steps[t * layout::pairs + at.pair];
    const auto row = *reinterpret_cast<const numbers<R, Own>*>(b + t * states + at.state);
#pragma unroll
    for (int j = 0; j < Own; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        h[i][j] = fma(power_of_two(step.v[i] * a[i][j]), h[i][j], step.v[2 + i] * row.v[j]);
  }

  /// Tokens [t0, t0 + Step) from the last to the first; h is the state before them.
  SSMLIB_DEVICE void reverse_step(int t0, vjp_carry<Own, R>& s, const R (&h)[2][Own]) {
    R decay[Step][2][Own], after[Step][2][Own];
    // Read before anything is written: the compiler cannot know that they are apart.
    numbers<R, 4> steps[Step];
    numbers<R, 2> dys[Step];
    numbers<R, Own> b_rows[Step], c_rows[Step];
#pragma unroll
    for (int t = 0; t < Step; ++t) {
      steps[t] = m.steps[(t0 + t) * layout::pairs + at.pair];
      dys[t] = m.dy[(t0 + t) * layout::pairs + at.pair];
      b_rows[t] = *reinterpret_cast<const numbers<R, Own>*>(b + (t0 + t) * states + at.state);
      c_rows[t] = *reinterpret_cast<const numbers<R, Own>*>(c + (t0 + t) * states + at.state);
    }
#pragma unroll
    for (int t = 0; t < Step; ++t) {
#pragma unroll
      for (int j = 0; j < Own; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          decay[t][i][j] = power_of_two(steps[t].v[i] * s.a[i][j]);
          after[t][i][j] = fma(decay[t][i][j], t == 0 ? h[i][j] : after[t > 0 ? t - 1 : 0][i][j],
                               steps[t].v[2 + i] * b_rows[t].v[j]);
        }
    }
#pragma unroll
    for (int t = Step - 1; t >= 0; --t) {
      const numbers<R, 4>& step = steps[t];
      const numbers<R, 2>& dy = dys[t];
      const numbers<R, Own>&bs = b_rows[t], &cs = c_rows[t];
      R gb[2] = {}, agh[2] = {}, y[2] = {}, d_b[Own] = {}, d_c[Own] = {};
#pragma unroll
      for (int j = 0; j < Own; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const R g = fma(cs.v[j], dy.v[i], s.g[i][j]);
          gb[i] = fma(g, bs.v[j], gb[i]);
          d_b[j] = fma(g, step.v[2 + i], d_b[j]);
          d_c[j] = fma(dy.v[i], after[t][i][j], d_c[j]);
          if constexpr (Gated) y[i] = fma(cs.v[j], after[t][i][j], y[i]);
          s.g[i][j] = decay[t][i][j] * g;
          const R gh = s.g[i][j] * (t == 0 ? h[i][j] : after[t > 0 ? t - 1 : 0][i][j]);
          agh[i] = fma(gh, s.a[i][j], agh[i]);
          s.d_a[i][j] = fma(step.v[i], gh, s.d_a[i][j]);
        }
      const int row = t * memory::part_row + at.lane + at.lane / Lanes;
      m.parts[row] = {gb[0], gb[1], agh[0], agh[1]};
      if constexpr (Gated) m.y_parts[row] = {y[0], y[1]};
#pragma unroll
      for (int q = 0; q < Own / 4; ++q) {
        m.state_parts[(t * quads + q) * 32 + at.lane] = {d_b[4 * q], d_b[4 * q + 1], d_b[4 * q + 2],
                                                         d_b[4 * q + 3]};
        m.state_parts[(t * quads + Own / 4 + q) * 32 + at.lane] = {d_c[4 * q], d_c[4 * q + 1],
                                                                   d_c[4 * q + 2], d_c[4 * q + 3]};
      }
    }
  }

  /// The sums over states, in place of what they were computed from, and those over channels.
  SSMLIB_DEVICE void add_up(int t0, bool accumulate) {
#pragma unroll
    for (int base = 0; base < Step * layout::pairs; base += 32) {
      const int i = base + at.lane, t = i / layout::pairs, pair = i % layout::pairs;
      if (Step * layout::pairs % 32 != 0 && i >= Step * layout::pairs) break;
      const int row = t * memory::part_row + pair * (Lanes + 1);
      numbers<R, 4> sum = m.parts[row];
      numbers<R, 2> y{};
      if constexpr (Gated) y = m.y_parts[row];
#pragma unroll
      for (int l = 1; l < Lanes; ++l) {
        const numbers<R, 4> x = m.parts[row + l];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum.v[e] += x.v[e];
        if constexpr (Gated) {
          const numbers<R, 2> z = m.y_parts[row + l];
          y.v[0] += z.v[0];
          y.v[1] += z.v[1];
        }
      }
      const int to_item = (t0 + t) * layout::pairs + pair;
      reinterpret_cast<numbers<R, 2>*>(m.steps)[2 * to_item + 1] = {sum.v[0], sum.v[1]};
      m.dy[to_item] = {sum.v[2], sum.v[3]};
      if constexpr (Gated) m.y[to_item] = y;
    }
    constexpr int outputs = Step * quads * Lanes;
#pragma unroll
    for (int base = 0; base < outputs; base += 32) {
      const int i = base + at.lane, lane = i % Lanes, row = i / Lanes;
      if (outputs % 32 != 0 && i >= outputs) break;
      // Odd rows begin with another pair, so that they meet other banks.
      numbers<R, 4> sum = m.state_parts[row * 32 + row % layout::pairs * Lanes + lane];
#pragma unroll
      for (int p = 1; p < layout::pairs; ++p) {
        const numbers<R, 4> x = m.state_parts[row * 32 + (row + p) % layout::pairs * Lanes + lane];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum.v[e] += x.v[e];
      }
      numbers<R, 4>& total = m.state_sums[(t0 * quads + row) * Lanes + lane];
      if (accumulate) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum.v[e] += total.v[e];
      }
      total = sum;
    }
  }

  SSMLIB_DEVICE void finish(index_t t0, vjp_carry<Own, R>& s) {
    const selective_gradients<T>& d = to.d;
    const int count = tokens_from(t0);
    // Once more from the cache: registers are dearer.
    packed_t<T, 2> raw_dt[items], raw_u[items], raw_dy[items], raw_gate[items];
    load_items(o.p.dt, t0, count, raw_dt);
    load_items(o.p.u, t0, count, raw_u);
    load_items(to.dy, t0, count, raw_dy);
    if constexpr (Gated) load_items(o.p.gate, t0, count, raw_gate);
    const R shift[2] = {bias(0), bias(1)}, skip[2] = {skip_weight(0), skip_weight(1)};
#pragma unroll
    for (int k = 0; k < items; ++k) {
      const int t = at.item_token + k * layout::item_step;
      if (t >= count) continue;
      const auto dt = widen(raw_dt[k]), u = widen(raw_u[k]);
      auto dy = widen(raw_dy[k]);
      const int i = t * layout::pairs + at.item_pair;
      const numbers<R, 4> step = m.steps[i];  // delta, delta, sums of g b
      const numbers<R, 2> agh = m.dy[i];
      R d_dt[2], d_u[2], d_gate[2];
      if constexpr (Gated) {
        const auto gate = widen(raw_gate[k]);
        const numbers<R, 2> y = m.y[i];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto z = silu_and_slope(gate.v[e]);
          d_gate[e] = dy.v[e] * fma(skip[e], u.v[e], y.v[e]) * z.slope;
          dy.v[e] *= z.value;
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        d_u[e] = fma(step.v[e], step.v[2 + e], skip[e] * dy.v[e]);
        const R x = dt.v[e] + shift[e];
        const R slope = sizeof(R) == 8 && x > R(20) ? R(1) : sigmoid(x);
        d_dt[e] = fma(u.v[e], step.v[2 + e], agh.v[e] * R(1.0 / log2_of_e)) *
                  (o.p.softplus ? slope : R(1));
        s.d_skip[e] = fma(dy.v[e], u.v[e], s.d_skip[e]);
        s.d_bias[e] += d_dt[e];
      }
      if (d.u.data) store_item(d.u, t0 + t, d_u);
      if (d.dt.data) store_item(d.dt, t0 + t, d_dt);
      if constexpr (Gated) {
        if (d.gate.data) store_item(d.gate, t0 + t, d_gate);
      }
    }
  }
  SSMLIB_DEVICE R skip_weight(int e) const {
    return o.p.skip && e < item_channels() ? o.p.skip[item_channel() + e] : R(0);
  }
};

/// Sums over the lanes that share a pair of channels, into the part's row.
template <class L, class R>
SSMLIB_DEVICE void add_channels(const L& at, R (&x)[2], int channels, bool add, R* to) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int step = L::pairs; step < 32; step *= 2)
      x[e] += __shfl_xor_sync(0xffffffffu, x[e], step);
    if (at.lane < L::pairs && e < channels) to[e] = add ? to[e] + x[e] : x[e];
    x[e] = R(0);
  }
}

template <class T, int Own, int Lanes, int Warps, int Step, bool Gated>
__global__ void __launch_bounds__(Warps * 32, Lanes == 4 && sizeof(accum_t<T>) == 4 ? 3 : 1)
    selective_vjp_kernel(const __grid_constant__ selective_arguments<T> o,
                         const __grid_constant__ vjp_targets<T> to) {
  using R = accum_t<T>;
  using chunk_type = vjp_chunk<T, Own, Lanes, Step, Gated>;
  using layout = typename chunk_type::layout;
  constexpr int threads = Warps * 32, states = layout::states, quads = chunk_type::quads;
  extern __shared__ __align__(16) unsigned char shared[];
  auto& m = *reinterpret_cast<vjp_memory<Own, Lanes, Warps, Step, R>*>(shared);
  const int warp = threadIdx.x / 32;
  const index_t N = o.states, D = o.channels, tokens = o.p.dt.extents[0];
  const index_t pass_channels = index_t{Warps} * layout::channels;
  const index_t tile_channels = pass_channels * to.passes;
  const index_t tiles = o.groups * ((o.group_channels + tile_channels - 1) / tile_channels);
  const index_t part = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const channel_range whole = channels_of(o, tile, tile_channels);
  const layout at;
  // The channels of a pass; few or none of them exist in the last ones.
  const auto range_of_pass = [&](index_t pass) {
    channel_range range = whole;
    const index_t offset = pass * pass_channels + warp * layout::channels;
    range.count = min(index_t{layout::channels}, max(index_t{0}, whole.count - offset));
    range.begin = range.count > 0 ? whole.begin + offset : whole.begin;
    return range;
  };

  vjp_carry<Own, R> s{};
  for (index_t unit = part; unit < o.units(); unit += to.parts) {
    const token_range r = range_of(o, unit);
    const index_t chunks = (r.end - r.begin + scan_tokens - 1) / scan_tokens;
    for (index_t k = chunks; k-- > 0 || (chunks == 0 && k == -1 && r.last);) {
      const bool newest = k + 1 >= chunks, oldest = k <= 0;
      const index_t t0 = r.begin + max(k, index_t{0}) * scan_tokens;
      if (k >= 0) {
        using rows = state_rows<states, scan_tokens, threads, T>;
        const auto source = [&](const view<const T, 3>& v, index_t group) -> typename rows::source {
          return {v.data + t0 * v.strides[0] + group * v.strides[1],
                  0,
                  v.strides[0],
                  static_cast<int>(min(index_t{scan_tokens}, r.end - t0)),
                  static_cast<int>(N),
                  o.quads};
        };
        const auto bs = source(o.p.b, whole.b_group), cs = source(o.p.c, whole.c_group);
        rows b_rows, c_rows;
        b_rows.load(bs, threadIdx.x);
        c_rows.load(cs, threadIdx.x);
        b_rows.store(bs, m.b, threadIdx.x);
        c_rows.store(cs, m.c, threadIdx.x);
      }
      __syncthreads();
      for (index_t pass = 0; pass < to.passes; ++pass) {
        const channel_range range = range_of_pass(pass);
        chunk_type chunk{o, to, r, range, m.warp[warp], m.b, m.c, at};
        const index_t channel = chunk.channel();
        const int channels = chunk.channels();
        const index_t row = (part * D + channel) * N;
        if (to.passes > 1 || newest) {
          load_strided(o.p.a.data + channel * o.p.a.strides[0], o.p.a.strides[0], o.p.a.strides[1],
                       N, at.state, channels, s.a);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < Own; ++j) {
              s.a[i][j] *= R(log2_of_e);
              if (newest) s.g[i][j] = R(0);
            }
          if (newest && to.ends) {
            load_rows(to.ends + (unit * D + channel) * N, N, at.state, channels, s.g);
          } else if (newest && to.d_final.data) {
            const auto& f = to.d_final;
            load_strided(f.data + r.sequence * f.strides[0] + channel * f.strides[1], f.strides[1],
                         f.strides[2], N, at.state, channels, s.g);
          } else if (!newest) {
            load_rows(to.carries + row, N, at.state, channels, s.g);
          }
          if (to.passes > 1) load_rows(to.a_parts + row, N, at.state, channels, s.d_a);
        }
        if (k >= 0) chunk.run(t0, pass > 0, s);
        if (oldest && r.segment == 0 && to.d.initial.data) {
          const auto& f = to.d.initial;
          store_strided(s.g, f.strides[1], f.strides[2], N, at.state, channels, to.d.add,
                        f.data + r.sequence * f.strides[0] + channel * f.strides[1]);
        }
        if (to.passes > 1) {
          if (!oldest) store_rows(s.g, N, at.state, channels, to.carries + row);
          store_rows(s.d_a, N, at.state, channels, to.a_parts + row);
          R* sums = to.channel_parts + part * 2 * D + chunk.item_channel();
          add_channels(at, s.d_skip, chunk.item_channels(), true, sums);
          add_channels(at, s.d_bias, chunk.item_channels(), true, sums + D);
        }
      }
      __syncthreads();
      if (k >= 0) {
        for (int i = threadIdx.x; i < scan_tokens * quads * Lanes; i += threads) {
          numbers<R, 4> sum = m.warp[0].state_sums[i];
#pragma unroll
          for (int w = 1; w < Warps; ++w)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              sum.v[e] += m.warp[w].state_sums[i].v[e];
          const int lane = i % Lanes, quad = i / Lanes % quads, t = i / (Lanes * quads);
          const int n = lane * Own + quad % (Own / 4) * 4 + quad / (Own / 4) * states;
          if (t0 + t >= r.end) continue;
          R* row = to.state_parts + ((tile * tokens + t0 + t) * 2) * states;
          *reinterpret_cast<numbers<R, 4>*>(row + n) = sum;
        }
      }
    }
  }
  if (to.passes > 1) return;
  const channel_range range = range_of_pass(0);
  chunk_type chunk{o, to, token_range{}, range, m.warp[warp], m.b, m.c, at};
  store_rows(s.d_a, N, at.state, chunk.channels(), to.a_parts + (part * D + chunk.channel()) * N);
  R* sums = to.channel_parts + part * 2 * D + chunk.item_channel();
  add_channels(at, s.d_skip, chunk.item_channels(), false, sums);
  add_channels(at, s.d_bias, chunk.item_channels(), false, sums + D);
}

/// to[i] (+)= the sum of `parts` rows: d a, d skip, d dt_bias.
template <class R>
__global__ void add_parts_kernel(const R* parts, index_t count, index_t rows, index_t row_stride,
                                 R* to, index_t inner, index_t outer_stride, index_t inner_stride,
                                 bool add) {
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  R sum = R(0);
#pragma unroll 8
  for (index_t k = 0; k < rows; ++k)
    sum += parts[k * row_stride + i];
  R& x = to[i / inner * outer_stride + i % inner * inner_stride];
  x = add ? x + sum : sum;
}

/// d b (kind 0) or d c (kind 1): the sums of the shares of a group's tiles.
template <class T>
__global__ void add_state_parts_kernel(const accum_t<T>* parts, index_t tiles, index_t tokens,
                                       index_t padded, index_t kind, view<T, 3> to, bool add) {
  using R = accum_t<T>;
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const index_t N = to.extents[2], groups = to.extents[1];
  if (i >= tokens * groups * padded) return;
  const index_t n = i % padded, t = i / padded % tokens, group = i / (padded * tokens);
  if (n >= N) return;
  const index_t begin = group * tiles / groups, end = (group + 1) * tiles / groups;
  R sum = R(0);
#pragma unroll 8
  for (index_t k = begin; k < end; ++k)
    sum += parts[((k * tokens + t) * 2 + kind) * padded + n];
  T& x = to.data[t * to.strides[0] + group * to.strides[1] + n];
  x = narrow<T>(add ? widen(x) + sum : sum);
}

}  // namespace ssm::kernels::cuda::detail
