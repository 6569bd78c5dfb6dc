#pragma once

#include <ssmlib/kernels/cuda/gated_linear.cuh>

/// @file
/// The gradient of gated linear attention. With the names of gated_linear.cuh, and S and E the
/// state before a chunk and the gradient of the state after it:
///
///     d q_in = alpha dY S^T,   d k_out = V E^T,   dV = k_out E + scores^T dY,
///     d scores = alpha dY V^T (s <= t),   E <- diag(pre) E + alpha q_in^T dY
///
/// The gradient of a gate adds up the terms that hold it: pairs of tokens on its two sides, reads
/// of S behind it, writes before it, and the decay of S. Between sub-blocks of 16 tokens the sums
/// over pairs are built from the far ones to the near ones, times one sub-block's total at a time,
/// so that every partial sum is at hand and no difference is taken.

namespace ssm::kernels::cuda {

namespace detail::gated {

template <class T>
struct linear_reverse_arguments {
  common of;
  gated_linear_problem<T> p;
  linear_work<T> w;
  view<const T, 3> dy;
  gated_linear_gradients<T> d;
};

template <class T>
struct linear_reverse_memory {
  using R = accum_t<T>;
  static constexpr int pair = std::max(2 * tile_cells<T> * static_cast<int>(sizeof(T)),
                                       2 * side * real_pitch * static_cast<int>(sizeof(R)));
  static constexpr int tiles = tile_cells<T> * static_cast<int>(sizeof(T));
  static constexpr int reals = (side * gate_pitch + 16 * side) * static_cast<int>(sizeof(R));
  // Operands of the products over the features lie apart where there is room, so that all loads
  // are under way at once.
  static constexpr bool apart = sizeof(T) == 2;
  static constexpr int size = reals + (apart ? 5 : 3) * tiles + pair;
};

template <class T>
struct linear_reverse_block {
  using R = accum_t<T>;
  using memory_of = linear_reverse_memory<T>;
  const linear_reverse_arguments<T>& o;
  // totals (4, 64); sums over the reads and the writes of a sub-block (4, 64); pairs across a
  // sub-block (3, 64); the state's own (64).
  R *gates, *totals, *reads, *writes, *across, *state;
  T *scores, *q, *k, *q_hat, *k_hat, *dy, *v;
  R *d_q_hat, *d_k_hat;  // over q_hat and k_hat
  index_t slot_head, head;
  int tile;
  chunk_rows chunk;
  share_sums<R> d_q, d_k;

  SSMLIB_DEVICE linear_reverse_block(const linear_reverse_arguments<T>& of, unsigned char* memory)
      : o(of),
        gates(reinterpret_cast<R*>(memory)),
        totals(gates + side * gate_pitch),
        reads(totals + 4 * side),
        writes(reads + 4 * side),
        across(writes + 4 * side),
        state(across + 3 * side),
        scores(reinterpret_cast<T*>(memory + memory_of::reals)),
        q(scores + tile_cells<T>),
        k(q + tile_cells<T>),
        q_hat(k + (memory_of::apart ? 3 : 1) * tile_cells<T>),
        k_hat(q_hat + tile_cells<T>),
        dy(memory_of::apart ? k + tile_cells<T> : q),
        v(dy + tile_cells<T>),
        d_q_hat(reinterpret_cast<R*>(q_hat)),
        d_k_hat(d_q_hat + side * real_pitch),
        slot_head(blockIdx.x / of.of.key_tiles),
        head(slot_head % of.of.heads),
        tile(blockIdx.x % of.of.key_tiles),
        chunk(of.of.rows, slot_head / of.of.heads) {}

  template <class U>
  SSMLIB_DEVICE head_rows<U> rows(const view<U, 3>& x, int part) const {
    return {x, head, o.of.heads, chunk.first, chunk.n, index_t{part} * side};
  }

  // Products over the features: d q_in / alpha, d k_out, d scores, and S . E of every key.
  SSMLIB_DEVICE void reverse_features() {
    share_sums<R> d_scores;
    R dot(0);
    T *const before = q_hat, *const after = k_hat;
    for (int part = 0; part < o.of.feature_tiles; ++part) {
      const index_t at = ((slot_head * o.of.key_tiles + tile) * o.of.feature_tiles + part) * cells;
      load_rows(dy, rows(o.dy, part));
      load_rows(v, rows(o.p.v, part));
      load_tile(before, o.w.states + at);
      load_tile(after, o.w.after + at);
      if (part == 0) load_gates(gates, rows(o.p.log_gate, tile));
      wait_and_meet();
      multiply_tiles<false, true>(d_q, dy, before);
      multiply_tiles<false, true>(d_k, v, after);
      multiply_tiles<false, true>(d_scores, dy, v);
      const int from = threadIdx.x / 4 * pitch<T> + threadIdx.x % 4;
      for (int p = 0; p < side; p += 4)
        dot += widen(before[from + p]) * widen(after[from + p]);
      __syncthreads();
    }
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    if (threadIdx.x % 4 == 0) state[threadIdx.x / 4] = dot;
    d_scores.each([&](int t, int s, R& x) {
      scores[t * pitch<T> + s] = narrow<T>(s <= t ? o.p.alpha * x : R(0));
    });
  }

  template <class F>
  SSMLIB_DEVICE static void each_column(F f) {  // f(j, e, column): of share_sums
    const warp_share w;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        f(j, e, w.column + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + e);
  }
  /// The sum over a warp's 16 rows; lanes 0 to 3 have it.
  SSMLIB_DEVICE static R sum_rows(R x) {
    x += __shfl_xor_sync(0xffffffffu, x, 4);
    x += __shfl_xor_sync(0xffffffffu, x, 8);
    return x + __shfl_xor_sync(0xffffffffu, x, 16);
  }

  // From d q_in and d k_out to the gradients of q_hat and k_hat, with the pairs between sub-blocks.
  SSMLIB_DEVICE void reverse_blocks() {
    const warp_share w;
    const int lane = threadIdx.x % 32, r = w.row + lane / 4;
    share_sums<R> far_q, far_k;
    for (int j = 0; j < w.band; ++j) {
      if (j > 0) {
        each_column([&](int b, int e, int n) {
          far_q.c[b][e] *= totals[j * side + n];
          far_q.c[b][e + 2] *= totals[j * side + n];
        });
      }
      multiply<false, false, pitch<T>, pitch<T>>(far_q.c, scores + w.row * pitch<T> + j * block,
                                                 k_hat + j * block * pitch<T> + w.column, 1);
    }
    for (int i = 3; i > w.band; --i) {
      multiply<true, false, pitch<T>, pitch<T>>(far_k.c, scores + i * block * pitch<T> + w.row,
                                                q_hat + i * block * pitch<T> + w.column, 1);
      if (i - 1 == w.band) break;
      each_column([&](int b, int e, int n) {  // across sub-block i - 1
        const R total = totals[(i - 1) * side + n];
        far_k.c[b][e] *= total;
        far_k.c[b][e + 2] *= total;
        const R near = w.band == 0 && i == 3 ? totals[side + n] : R(1);
        const T* key = k_hat + r * pitch<T> + n;
        const R x = sum_rows(
            near * (far_k.c[b][e] * widen(key[0]) + far_k.c[b][e + 2] * widen(key[8 * pitch<T>])));
        // (band, across): (0, 1), (0, 2), (1, 2)
        if (lane < 4) across[(w.band + i - 2) * side + n] = x;
      });
    }
    each_column([&](int b, int e, int n) {
      R before = o.p.alpha, behind(1);
      for (int m = 0; m < w.band; ++m)
        before *= totals[m * side + n];
      for (int m = w.band + 1; m < 4; ++m)
        behind *= totals[m * side + n];
      const T *query = q_hat + r * pitch<T> + n, *key = k_hat + r * pitch<T> + n;
      R &q0 = d_q.c[b][e], &q1 = d_q.c[b][e + 2], &k0 = d_k.c[b][e], &k1 = d_k.c[b][e + 2];
      q0 *= before, q1 *= before, k0 *= behind, k1 *= behind;
      const R x = sum_rows(q0 * widen(query[0]) + q1 * widen(query[8 * pitch<T>]));
      const R y = sum_rows(k0 * widen(key[0]) + k1 * widen(key[8 * pitch<T>]));
      if (lane < 4) {
        reads[w.band * side + n] = x;
        writes[w.band * side + n] = y;
      }
      q0 += far_q.c[b][e], q1 += far_q.c[b][e + 2];
      k0 += far_k.c[b][e], k1 += far_k.c[b][e + 2];
    });
    __syncthreads();
    d_q.each([&](int t, int n, R& x) { d_q_hat[t * real_pitch + n] = x; });
    d_k.each([&](int t, int n, R& x) { d_k_hat[t * real_pitch + n] = x; });
    __syncthreads();
  }

  // The rest of a sub-block, a thread a channel.
  SSMLIB_DEVICE void reverse_channel() {
    const gate_column<R> c;
    const int n = c.channel;
    R a[block], query[block], to_q[block], to_gate[block], w[block];
    R shared(0), all(1);
    for (int m = 0; m < 4; ++m) {
      all *= totals[m * side + n];
      if (m > c.band) shared += reads[m * side + n];
      if (m < c.band) shared += writes[m * side + n];
    }
    if (c.band == 1) shared += across[n];
    if (c.band == 2) shared += across[side + n] + across[2 * side + n];
    shared += all * state[n];
    R pre(1), suf(1);
#pragma unroll
    for (int t = 0; t < block; ++t) {
      a[t] = c.gate(gates, t);
      pre *= a[t];
      query[t] = widen(q[(c.row + t) * pitch<T> + n]);
      to_q[t] = pre * d_q_hat[(c.row + t) * real_pitch + n];
    }
    R sum = shared;
#pragma unroll
    for (int t = block; t-- > 0;)
      to_gate[t] = sum += query[t] * to_q[t];
    const head_rows<T> d_q_rows = rows(o.d.q, tile), d_k_rows = rows(o.d.k, tile);
    const head_rows<R> d_gate_rows = rows(o.d.log_gate, tile);
    const T* keys = k + c.row * pitch<T> + n;
#pragma unroll
    for (int s = block; s-- > 0;) {  // through k_hat; its gradient takes the place of d k_hat
      R& x = d_k_hat[(c.row + s) * real_pitch + n];
      x *= suf;
      suf *= a[s];
    }
    sum = R(0);
#pragma unroll
    for (int s = 0; s < block; ++s) {
      const R key = widen(keys[s * pitch<T>]), d_key = d_k_hat[(c.row + s) * real_pitch + n];
      to_gate[s] += sum;
      sum += key * d_key;
      const T* column = scores + c.row * pitch<T> + c.row + s;
      w[s] = key;
#pragma unroll
      for (int t = s + 1; t < block; ++t)
        w[t] = w[t - 1] * a[t];
      R d_w(0);
#pragma unroll
      for (int t = block - 1; t >= s; --t) {
        const R d_score = widen(column[t * pitch<T>]);
        d_w += d_score * query[t];
        to_q[t] += d_score * w[t];
        if (t > s) {
          to_gate[t] += w[t] * d_w;
          d_w *= a[t];
        }
      }
      d_k_rows.put(c.row + s, n, d_key + d_w, o.d.add);
    }
#pragma unroll
    for (int t = 0; t < block; ++t) {
      d_q_rows.put(c.row + t, n, to_q[t], o.d.add);
      d_gate_rows.put(c.row + t, n, to_gate[t], o.d.add);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(threads)
    linear_reverse_kernel(const __grid_constant__ linear_reverse_arguments<T> o) {
  extern __shared__ __align__(16) unsigned char memory[];
  linear_reverse_block<T> b(o, memory);
  if (b.chunk.n == 0) return;
  const auto load_keys = [&] {
    load_rows(b.q, b.rows(o.p.q, b.tile));
    load_rows(b.k, b.rows(o.p.k, b.tile));
  };
  if (linear_reverse_memory<T>::apart) load_keys();
  b.reverse_features();
  if (!linear_reverse_memory<T>::apart) load_keys();
  wait_and_meet();
  gate_column<accum_t<T>> c;
  c.scale(b.gates, b.q, b.k, b.q_hat, b.k_hat, b.totals);
  __syncthreads();
  b.reverse_blocks();
  b.reverse_channel();
}

}  // namespace detail::gated

template <class T>
std::size_t gated_linear_vjp_workspace_bytes(const gated_linear_problem<T>& p) {
  return detail::gated::linear_work<T>(detail::gated::common_of(p), true, nullptr).bytes;
}

template <class T>
void gated_linear_vjp(cudaStream_t stream, const gated_linear_problem<T>& p, view<const T, 3> dy,
                      view<const accum_t<T>, 4> initial, view<const accum_t<T>, 4> d_final,
                      const gated_linear_gradients<T>& d, void* workspace) {
  using namespace detail::gated;
  check(p);
  check_results(p, "dy", dy, initial, d.initial);
  check_state("d_final", d_final, p.sequences, p.heads, p.q.extent(2), p.v.extent(2));
  const common of = common_of(p);
  const linear_work<T> w(of, true, workspace);
  linear_states(stream, p, w, {initial, {}});
  scan_arguments<T> scan{};
  scan.of = of;
  scan.outer = w.q_in;
  scan.z = dy;
  scan.decay = w.decay;
  scan.initial = d_final;
  scan.final = d.initial;
  scan.states = w.after;
  scan.reverse = true;
  scan.add = d.add;
  launch_scan<T, false, true>(stream, scan);
  if (d.v) {
    launch_product<true>(stream, product_arguments<T>{of, w.k_out, w.after, w.scores, nullptr, dy,
                                                      d.v, nullptr, d.add});
  }
  if (d.q || d.k || d.log_gate) {
    launch(stream, linear_reverse_kernel<T>, of.slots * of.heads * of.key_tiles,
           linear_reverse_memory<T>::size, linear_reverse_arguments<T>{of, p, w, dy, d});
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                  \
  SSMLIB_INSTANTIATE(cuda_gated_linear, std::size_t gated_linear_vjp_workspace_bytes<T>(       \
                                            const gated_linear_problem<T>&));                  \
  SSMLIB_INSTANTIATE(                                                                          \
      cuda_gated_linear,                                                                       \
      void gated_linear_vjp<T>(cudaStream_t, const gated_linear_problem<T>&, view<const T, 3>, \
                               view<const accum_t<T>, 4>, view<const accum_t<T>, 4>,           \
                               const gated_linear_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
