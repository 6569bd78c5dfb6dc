#pragma once

#include <ssmlib/kernels/cuda/delta_rule.cuh>

/// @file
/// The gradient of the gated delta rule. With the names of delta_rule.cuh and E the gradient of the
/// state after a chunk:
///
///     dU = scores^T dY + diag(suf) K E,    E <- pre E + alpha (diag(pre) Q)^T dY - W^T dU   (scan)
///     R = (I + L)^-T dU,  dV = diag(beta) R,  dL = -R U^T (s < t),  d scores = dY U^T (s <= t)
///     dQ = alpha diag(pre) dY S^T + D K,               D = alpha d scores o decay
///     dK = D^T Q + (M + M^T) K - diag(beta pre) R S^T + diag(suf) U E^T,  M = beta dL o decay
///
/// d beta_t is R_t . V_t - pre_t k_t . (S R_t) + sum_s dL overlap. The gradient of a gate adds up
/// the terms whose decay holds it: pairs on its two sides, reads of S behind it, writes before it,
/// and the decay of S. Sums only, nothing cancels.

namespace ssm::kernels::cuda {

namespace detail::gated {

template <class T>
struct delta_reverse_arguments {
  common of;
  delta_rule_problem<T> p;
  delta_work<T> w;
  view<const T, 3> dy;
  delta_rule_gradients<T> d;
};

/// Whether the tiles of a step over keys and features lie apart, all loads under way at once.
template <class T>
inline constexpr bool delta_apart = sizeof(T) == 2;

template <class T>
std::size_t delta_reverse_shared() {
  using R = accum_t<T>;
  return (delta_gates<R>::size + 10 * side) * sizeof(R) +
         (delta_apart<T> ? 7 : 5) * tile_cells<T> * sizeof(T);
}

/// Sums over the columns of a row, whose parts lie with the threads of two warps: to (2, 64).
template <class R>
SSMLIB_DEVICE void add_up_rows(const R (&x)[2], R* to) {
  const warp_share w;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    R sum = x[e];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) to[w.column / 32 * side + w.row + lane / 4 + 8 * e] = sum;
  }
}

template <class T>
struct delta_reverse_block {
  using R = accum_t<T>;
  const delta_reverse_arguments<T>& o;
  delta_gates<R> gates;
  R *pre, *suf, *sums;  // (64), (64), (8, 64)
  T *a, *b, *c, *scores, *lower, *after, *written;
  index_t slot_head, head;
  chunk_rows chunk;
  R d_beta[2] = {}, reads[2] = {}, writes[2] = {}, state = R(0);

  SSMLIB_DEVICE delta_reverse_block(const delta_reverse_arguments<T>& of, unsigned char* memory)
      : o(of),
        gates(reinterpret_cast<R*>(memory)),
        pre(reinterpret_cast<R*>(memory) + delta_gates<R>::size),
        suf(pre + side),
        sums(suf + side),
        a(reinterpret_cast<T*>(sums + 8 * side)),
        b(a + tile_cells<T>),
        c(b + tile_cells<T>),
        scores(c + tile_cells<T>),
        lower(scores + tile_cells<T>),
        after(delta_apart<T> ? lower + tile_cells<T> : b),
        written(delta_apart<T> ? after + tile_cells<T> : c),
        slot_head(blockIdx.x),
        head(slot_head % of.of.heads),
        chunk(of.of.rows, slot_head / of.of.heads) {}

  template <class U>
  SSMLIB_DEVICE head_rows<U> rows(const view<U, 3>& x, int tile) const {
    return {x, head, o.of.heads, chunk.first, chunk.n, index_t{tile} * side};
  }
  SSMLIB_DEVICE const T* features(const T* tiles, int part) const {
    return tiles + (slot_head * o.of.feature_tiles + part) * cells;
  }
  SSMLIB_DEVICE const T* states(const T* tiles, int key, int part) const {
    return tiles + ((slot_head * o.of.key_tiles + key) * o.of.feature_tiles + part) * cells;
  }

  // R over dU, dV, and the pairs of tokens; leaves D in `scores` and M in `lower`.
  SSMLIB_DEVICE void reverse_writes() {
    share_sums<R> d_lower, d_scores;
    load_tile(lower, o.w.inverse + slot_head * cells);
    for (int part = 0; part < o.of.feature_tiles; ++part) {
      load_tile(a, features(o.w.d_u, part));
      load_tile(b, features(o.w.u, part));
      load_rows(c, rows(o.dy, part));
      wait_and_meet();
      share_sums<R> r;
      multiply_tiles<true, false>(r, lower, a);
      __syncthreads();
      const head_rows<const T> v = rows(o.p.v, part);
      const head_rows<T> d_v = rows(o.d.v, part);
      r.pairs([&](int t, int p, R& x, R& y) {
        store_pair(a + t * pitch<T> + p, x, y);
        R& sum = d_beta[t / 8 % 2];
        if (t < v.n && p < v.columns) sum += x * widen(v.p[t * v.stride + p]);
        if (t < v.n && p + 1 < v.columns) sum += y * widen(v.p[t * v.stride + p + 1]);
        d_v.put_pair(t, p, gates.beta[t] * x, gates.beta[t] * y, o.d.add);
      });
      __syncthreads();
      store_tile(a, const_cast<T*>(features(o.w.d_u, part)));
      multiply_tiles<false, true>(d_lower, a, b);
      multiply_tiles<false, true>(d_scores, c, b);
      __syncthreads();
    }
    const T *overlap = o.w.overlap + slot_head * cells, *score = o.w.scores + slot_head * cells;
    d_lower.each([&](int t, int s, R& x) {
      const R held = s < t ? widen(overlap[t * side + s]) : R(0);
      d_beta[t / 8 % 2] -= x * held;
      lower[t * pitch<T> + s] =
          narrow<T>(s < t ? -gates.beta[t] * gates.decay[t * real_pitch + s] * x : R(0));
      x *= -gates.beta[t] * held;
    });
    d_scores.each([&](int t, int s, R& x) {
      scores[t * pitch<T> + s] =
          narrow<T>(s <= t ? o.p.alpha * gates.decay[t * real_pitch + s] * x : R(0));
      x *= s < t ? widen(score[t * side + s]) : R(0);
    });
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        d_lower.c[j][e] += d_scores.c[j][e];
    __syncthreads();
    d_lower.each([&](int t, int s, R& x) { gates.decay[t * real_pitch + s] = x; });
    __syncthreads();
  }

  // Pairs t >= r > s of every gate r, into `to`; one warp after another takes 8 columns.
  SSMLIB_DEVICE void reverse_pairs(R* to) {
    R* const pairs = gates.decay;
    const int s = threadIdx.x / 4, part = threadIdx.x % 4;  // 16 rows of a column
    R sum(0);
    for (int t = part * block; t < (part + 1) * block; ++t)
      sum += pairs[t * real_pitch + s];
    R below(0);
#pragma unroll
    for (int other = 3; other > 0; --other) {
      const R x = __shfl_sync(0xffffffffu, sum, threadIdx.x % 32 / 4 * 4 + other);
      if (other > part) below += x;
    }
    for (int t = (part + 1) * block; t-- > part * block;) {
      below += pairs[t * real_pitch + s];
      pairs[t * real_pitch + s] = t > s ? below : R(0);
    }
    __syncthreads();
    sum = R(0);
    for (int i = part * block; i < (part + 1) * block; ++i)
      sum += pairs[s * real_pitch + i];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (part == 0) to[s] = sum;
  }

  // d Q and d K of 64 keys.
  SSMLIB_DEVICE void reverse_keys(int tile) {
    share_sums<R> d_q, held, d_k;
    for (int part = 0; part < o.of.feature_tiles; ++part) {
      load_tile(a, states(o.w.states, tile, part));
      load_rows(b, rows(o.dy, part));
      load_tile(c, features(o.w.d_u, part));
      const auto load_writes = [&] {
        load_tile(after, states(o.w.after, tile, part));
        load_tile(written, features(o.w.u, part));
      };
      if (delta_apart<T>) load_writes();
      wait_and_meet();
      multiply_tiles<false, true>(d_q, b, a);
      multiply_tiles<false, true>(held, c, a);
      if (!delta_apart<T>) {
        __syncthreads();
        load_writes();
        wait_and_meet();
      }
      multiply_tiles<false, true>(d_k, written, after);
#pragma unroll
      for (int i = 4 * threadIdx.x; i < cells; i += 4 * threads) {
        const int at = i / side * pitch<T> + i % side;
        R x[4], y[4];
        load_four(x, a + at);
        load_four(y, after + at);
        state += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
      }
      __syncthreads();
    }
    load_rows(a, rows(o.p.q, tile));
    load_rows(b, rows(o.p.k, tile));
    wait_and_meet();
    d_q.each([&](int t, int n, R& x) {
      x *= o.p.alpha * pre[t];
      reads[t / 8 % 2] += x * widen(a[t * pitch<T> + n]);
    });
    held.each([&](int t, int n, R& x) {
      const R y = -pre[t] * x * widen(b[t * pitch<T> + n]);
      d_beta[t / 8 % 2] += y;
      reads[t / 8 % 2] += gates.beta[t] * y;
      x *= -pre[t] * gates.beta[t];
    });
    d_k.each([&](int t, int n, R& x) {
      x *= suf[t];
      writes[t / 8 % 2] += x * widen(b[t * pitch<T> + n]);
    });
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        d_k.c[j][e] += held.c[j][e];
    multiply_tiles<false, false>(d_q, scores, b);
    multiply_tiles<true, false>(d_k, scores, a);
    multiply_tiles<true, false>(d_k, lower, b);
    multiply_tiles<false, false>(d_k, lower, b);
    const head_rows<T> to_q = rows(o.d.q, tile), to_k = rows(o.d.k, tile);
    d_q.pairs([&](int t, int n, R& x, R& y) { to_q.put_pair(t, n, x, y, o.d.add); });
    d_k.pairs([&](int t, int n, R& x, R& y) { to_k.put_pair(t, n, x, y, o.d.add); });
    __syncthreads();
  }

  // d beta and d log_decay from the sums over rows.
  SSMLIB_DEVICE void finish() {
    R* const of_state = gates.decay;  // the pairs are added up
    state = warp_sum(state);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_state[threadIdx.x / 32] = state;
    add_up_rows(d_beta, sums + side);
    add_up_rows(reads, sums + 3 * side);
    add_up_rows(writes, sums + 5 * side);
    __syncthreads();
    const int t = threadIdx.x;
    if (t >= chunk.n) return;
    const auto put = [&](const view<R, 2>& to, R x) {
      if (to.data == nullptr) return;
      R& at = to.data[(chunk.first + t) * to.strides[0] + head * to.strides[1]];
      at = o.d.add ? at + x : x;
    };
    put(o.d.beta, sums[side + t] + sums[2 * side + t]);
    R sum(0);
    for (int w = 0; w < threads / 32; ++w)
      sum += of_state[w];
    sum = sum * pre[side - 1] + sums[t];
    for (int r = t; r < side; ++r)
      sum += sums[3 * side + r] + sums[4 * side + r];
    for (int s = 0; s < t; ++s)
      sum += sums[5 * side + s] + sums[6 * side + s];
    put(o.d.log_decay, sum);
  }
};

template <class T>
__global__ void __launch_bounds__(threads)
    delta_reverse_kernel(const __grid_constant__ delta_reverse_arguments<T> o) {
  extern __shared__ __align__(16) unsigned char memory[];
  delta_reverse_block<T> block_of(o, memory);
  if (block_of.chunk.n == 0) return;
  block_of.gates.load(o.p.log_decay, o.p.beta, block_of.head, o.of.heads, block_of.chunk);
  if (threadIdx.x < side) {
    block_of.pre[threadIdx.x] = block_of.gates.pre(threadIdx.x);
    block_of.suf[threadIdx.x] = block_of.gates.suf(threadIdx.x);
  }
  block_of.reverse_writes();
  block_of.reverse_pairs(block_of.sums);
  for (int tile = 0; tile < o.of.key_tiles; ++tile)
    block_of.reverse_keys(tile);
  block_of.finish();
}

}  // namespace detail::gated

template <class T>
std::size_t delta_rule_vjp_workspace_bytes(const delta_rule_problem<T>& p) {
  return detail::gated::delta_work<T>(detail::gated::common_of(p), true, nullptr).bytes;
}

template <class T>
void delta_rule_vjp(cudaStream_t stream, const delta_rule_problem<T>& p, view<const T, 3> dy,
                    view<const accum_t<T>, 4> initial, view<const accum_t<T>, 4> d_final,
                    const delta_rule_gradients<T>& d, void* workspace) {
  using namespace detail::gated;
  check(p);
  check_results(p, "dy", dy, initial, d.initial);
  check_state("d_final", d_final, p.sequences, p.heads, p.q.extent(2), p.v.extent(2));
  const common of = common_of(p);
  const delta_work<T> w(of, true, workspace);
  delta_states(stream, p, w, {initial, {}});
  launch_product<true>(
      stream, product_arguments<T>{of, nullptr, nullptr, w.scores, nullptr, dy, {}, w.d_u, false});
  scan_arguments<T> scan{};
  scan.of = of;
  scan.reads = w.k_out;
  scan.read_sign = 1;
  scan.x = w.d_u;
  scan.writes = w.w;
  scan.write_sign = -1;
  scan.outer = w.q_in;
  scan.z = dy;
  scan.decay = w.decay;
  scan.initial = d_final;
  scan.final = d.initial;
  scan.states = w.after;
  scan.reverse = true;
  scan.add = d.add;
  launch_scan<T, true, true>(stream, scan);
  launch(stream, delta_reverse_kernel<T>, of.slots * of.heads, delta_reverse_shared<T>(),
         delta_reverse_arguments<T>{of, p, w, dy, d});
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_delta_rule,                                                              \
                     std::size_t delta_rule_vjp_workspace_bytes<T>(const delta_rule_problem<T>&)); \
  SSMLIB_INSTANTIATE(                                                                              \
      cuda_delta_rule,                                                                             \
      void delta_rule_vjp<T>(cudaStream_t, const delta_rule_problem<T>&, view<const T, 3>,         \
                             view<const accum_t<T>, 4>, view<const accum_t<T>, 4>,                 \
                             const delta_rule_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
