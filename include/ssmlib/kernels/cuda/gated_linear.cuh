#pragma once

#include <ssmlib/kernels/cuda/gated_scan.cuh>
#include <ssmlib/kernels/cuda/gated_step.cuh>

/// @file
/// Gated linear attention, forward. With pre_t and suf_s the products of gates from the start of a
/// sub-block of 16 tokens through t, and behind s to its end, and total_m those of sub-block m:
///
///     decay[t, s] = pre_t total_{i-1} .. total_{j+1} suf_s      t in sub-block i, s in j < i
///
/// so that sub-blocks off the diagonal are products of q o pre and k o suf; those on it go channel
/// by channel in the accumulator's type. One kernel per chunk leaves scores and the operands of the
/// state; scan and product of gated_scan.cuh do the rest.

namespace ssm::kernels::cuda {

namespace detail::gated {

template <class T>
struct linear_prepare_arguments {
  using R = accum_t<T>;
  common of;
  view<const T, 3> q, k;
  view<const R, 3> log_gate;
  R alpha;
  T *q_in, *k_out;  // tiles (slot, head, key tile): alpha q o pre, k o suf of the whole chunk
  T* scores;        // tiles (slot, head)
  R* decay;         // (slot, head, 64 key tiles)
};

/// The column of a thread in one sub-block: products of gates and the sub-block's total.
template <class R>
struct gate_column {
  int band, row, channel;  // sub-block, its first row
  R total;

  SSMLIB_DEVICE gate_column()
      : band(threadIdx.x / side), row(band * block), channel(threadIdx.x % side), total(1) {}
  SSMLIB_DEVICE R gate(const R* gates, int t) const {
    return gates[(row + t) * gate_pitch + channel];
  }
  /// q o pre and k o suf of a chunk's tiles; leaves the totals, (4, 64).
  template <class T>
  SSMLIB_DEVICE void scale(const R* gates, const T* q, const T* k, T* q_hat, T* k_hat, R* totals) {
    R pre(1), suf(1);
#pragma unroll
    for (int t = 0; t < block; ++t) {
      const int at = (row + t) * pitch<T> + channel;
      pre *= gate(gates, t);
      q_hat[at] = narrow<T>(widen(q[at]) * pre);
    }
#pragma unroll
    for (int s = block; s-- > 0;) {
      const int at = (row + s) * pitch<T> + channel;
      k_hat[at] = narrow<T>(widen(k[at]) * suf);
      suf *= gate(gates, s);
    }
    total = pre;
    totals[threadIdx.x] = pre;
  }
  SSMLIB_DEVICE R before(const R* totals) const {
    R x(1);
    for (int m = 0; m < band; ++m)
      x *= totals[m * side + channel];
    return x;
  }
  SSMLIB_DEVICE R behind(const R* totals) const {
    R x(1);
    for (int m = band + 1; m < 4; ++m)
      x *= totals[m * side + channel];
    return x;
  }
};

template <class T>
std::size_t linear_prepare_shared() {
  return (side * gate_pitch + 4 * side) * sizeof(accum_t<T>) + 5 * tile_cells<T> * sizeof(T);
}

template <class T>
__global__ void __launch_bounds__(threads)
    linear_prepare_kernel(const __grid_constant__ linear_prepare_arguments<T> o) {
  using R = accum_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  R* const gates = reinterpret_cast<R*>(memory);
  R* const totals = gates + side * gate_pitch;
  T* const q = reinterpret_cast<T*>(totals + 4 * side);
  T *const k = q + tile_cells<T>, *const q_hat = k + tile_cells<T>,
           *const k_hat = q_hat + tile_cells<T>, *const far = k_hat + tile_cells<T>;
  const index_t slot_head = blockIdx.x, head = slot_head % o.of.heads;
  const chunk_rows chunk(o.of.rows, slot_head / o.of.heads);
  if (chunk.n == 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Pairs of sub-blocks (i, j), a warp each; `far` holds q_hat with the totals between them.
  const int low = warp < 3 ? warp : warp == 4 ? 1 : 0;
  const int high = warp < 3 ? warp + 1 : warp == 3 ? 2 : 3;
  const int source = warp < 3 ? high : warp == 3 ? 2 : warp == 4 ? 3 : 1;
  R pair[2][4] = {}, diagonal[block] = {};
  const int s = threadIdx.x / 4, s_band = s / block * block;
  for (int tile = 0; tile < o.of.key_tiles; ++tile) {
    const auto rows = [&](const auto& x) {
      return head_rows(x, head, o.of.heads, chunk.first, chunk.n, index_t{tile} * side);
    };
    load_rows(q, rows(o.q));
    load_rows(k, rows(o.k));
    load_gates(gates, rows(o.log_gate));
    wait_and_meet();
    gate_column<R> c;
    c.scale(gates, q, k, q_hat, k_hat, totals);
    __syncthreads();
    const R before = c.before(totals), behind = c.behind(totals);
    const index_t to = (slot_head * o.of.key_tiles + tile) * cells + c.row * side + c.channel;
    R pre(1), suf(1);
    const R middle = c.band >= 2 ? totals[(c.band - 1) * side + c.channel] : R(0);
    const R both = middle * totals[side + c.channel];
#pragma unroll
    for (int t = 0; t < block; ++t) {
      const int at = (c.row + t) * pitch<T> + c.channel;
      const R x = widen(q[at]);
      pre *= c.gate(gates, t);
      o.q_in[to + t * side] = narrow<T>(o.alpha * x * (pre * before));
      if (c.band >= 2) far[at] = narrow<T>(x * (pre * middle));
      if (c.band == 3) far[at - 2 * block * pitch<T>] = narrow<T>(x * (pre * both));
    }
#pragma unroll
    for (int t = block; t-- > 0;) {
      const R x = widen(k[(c.row + t) * pitch<T> + c.channel]);
      o.k_out[to + t * side] = narrow<T>(x * (suf * behind));
      suf *= c.gate(gates, t);
    }
    if (c.band == 0) {
      o.decay[(slot_head * o.of.key_tiles + tile) * side + c.channel] = c.total * behind;
    }
    __syncthreads();
    if (warp < 6) {
      multiply<false, true, pitch<T>, pitch<T>>(
          pair, (warp < 3 ? q_hat : far) + source * block * pitch<T>,
          k_hat + low * block * pitch<T>, 4);
    }
    for (int n = threadIdx.x % 4 * 4; n < side; n += block) {
      R key[4], w[4] = {};
      load_four(key, k + s * pitch<T> + n);
#pragma unroll
      for (int t = 0; t < block; ++t) {
        if (t < block / 2 && warp % 2 == 1) continue;  // above the diagonal of the whole warp
        R gate[4], query[4];
        load_four(gate, gates + (s_band + t) * gate_pitch + n);
        load_four(query, q + (s_band + t) * pitch<T> + n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          w[e] = s_band + t == s ? key[e] : w[e] * gate[e];
          diagonal[t] += query[e] * w[e];
        }
      }
    }
    __syncthreads();
  }
  T* const scores = q;
  for (int i = threadIdx.x; i < tile_cells<T>; i += threads)
    scores[i] = narrow<T>(R(0));
  __syncthreads();
  if (warp < 6) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        scores[(high * block + lane / 4 + e / 2 * 8) * pitch<T> + low * block + 8 * j +
               lane % 4 * 2 + e % 2] = narrow<T>(o.alpha * pair[j][e]);
  }
#pragma unroll
  for (int t = 0; t < block; ++t) {
    R x = diagonal[t];
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    x += __shfl_xor_sync(0xffffffffu, x, 2);
    if (threadIdx.x % 4 == 0) {
      scores[(s_band + t) * pitch<T> + s] = narrow<T>(s_band + t >= s ? o.alpha * x : R(0));
    }
  }
  __syncthreads();
  store_tile(scores, o.scores + slot_head * cells);
}

template <class T>
struct linear_work {
  using R = accum_t<T>;
  T *q_in, *k_out, *scores, *states, *after = nullptr;
  R* decay;
  std::size_t bytes;

  linear_work(const common& of, bool backward, void* memory) {
    carver from(memory);
    const index_t chunks = of.slots * of.heads;
    q_in = from.take<T>(chunks * of.key_tiles * cells);
    k_out = from.take<T>(chunks * of.key_tiles * cells);
    scores = from.take<T>(chunks * cells);
    states = from.take<T>(chunks * of.key_tiles * of.feature_tiles * cells);
    if (backward) after = from.take<T>(chunks * of.key_tiles * of.feature_tiles * cells);
    decay = from.take<R>(chunks * of.key_tiles * side);
    bytes = from.used();
  }
};

/// Scores, operands of the state, and the states before every chunk.
template <class T>
void linear_states(cudaStream_t stream, const gated_linear_problem<T>& p, const linear_work<T>& w,
                   const gated_states<T>& states) {
  const common of = common_of(p);
  launch(stream, linear_prepare_kernel<T>, of.slots * of.heads, linear_prepare_shared<T>(),
         linear_prepare_arguments<T>{of, p.q, p.k, p.log_gate, p.alpha, w.q_in, w.k_out, w.scores,
                                     w.decay});
  scan_arguments<T> scan{};
  scan.of = of;
  scan.outer = w.k_out;
  scan.z = p.v;
  scan.decay = w.decay;
  scan.initial = states.initial;
  scan.final = states.final;
  scan.states = w.states;
  launch_scan<T, false, true>(stream, scan);
}

template <class T>
void check(const gated_linear_problem<T>& p) {
  check_common(p);
  check_rows("log_gate", p.log_gate, p.q.extent(0), p.heads, p.q.extent(2));
}

}  // namespace detail::gated

template <class T>
std::size_t gated_linear_workspace_bytes(const gated_linear_problem<T>& p) {
  return detail::gated::linear_work<T>(detail::gated::common_of(p), false, nullptr).bytes;
}

template <class T>
void gated_linear_chunked(cudaStream_t stream, const gated_linear_problem<T>& p, view<T, 3> y,
                          const gated_states<T>& states, void* workspace) {
  using namespace detail::gated;
  check(p);
  check_results(p, "y", y, states.initial, states.final);
  const common of = common_of(p);
  const linear_work<T> w(of, false, workspace);
  linear_states(stream, p, w, states);
  launch_product<false>(stream, product_arguments<T>{of, w.q_in, w.states, w.scores, nullptr, p.v,
                                                     y, nullptr, false});
}

template <class T>
void gated_linear_recurrent(cudaStream_t stream, const gated_linear_problem<T>& p, view<T, 3> y,
                            const gated_states<T>& states, const state_ring<T>& ring) {
  using namespace detail::gated;
  check(p);
  check_results(p, "y", y, states.initial, states.final);
  check_state("snapshots", ring.rows, ring.slots * p.sequences, p.heads, p.q.extent(2),
              p.v.extent(2));
  step_arguments<T> o{};
  o.rows = {p.offsets, p.sequences, p.max_length};
  o.heads = p.heads;
  o.q = p.q, o.k = p.k, o.v = p.v, o.log_gate = p.log_gate;
  o.alpha = p.alpha;
  o.y = y, o.states = states, o.ring = ring;
  launch_step<false>(stream, o);
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_gated_linear,                                                            \
                     std::size_t gated_linear_workspace_bytes<T>(const gated_linear_problem<T>&)); \
  SSMLIB_INSTANTIATE(cuda_gated_linear,                                                            \
                     void gated_linear_chunked<T>(cudaStream_t, const gated_linear_problem<T>&,    \
                                                  view<T, 3>, const gated_states<T>&, void*));     \
  SSMLIB_INSTANTIATE(                                                                              \
      cuda_gated_linear,                                                                           \
      void gated_linear_recurrent<T>(cudaStream_t, const gated_linear_problem<T>&, view<T, 3>,     \
                                     const gated_states<T>&, const state_ring<T>&))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
