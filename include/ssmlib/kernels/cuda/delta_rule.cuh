#pragma once

#include <ssmlib/kernels/cuda/delta_rule.hpp>
#include <ssmlib/kernels/cuda/gated_scan.cuh>
#include <ssmlib/kernels/cuda/gated_step.cuh>

/// @file
/// The gated delta rule, forward. A chunk of 64 tokens with the state S before it:
///
///     (I + L) U = diag(beta) (V - diag(pre) K S),   L[t, s] = beta_t decay[t, s] k_t . k_s, s < t
///     U = (I + L)^-1 diag(beta) V - W S,            W = (I + L)^-1 diag(beta pre) K
///
/// One kernel per chunk forms the inverse by sub-blocks of 16 tokens in the accumulator's type and
/// leaves W, the first term of U, the scores and the operands of the state; scan and product of
/// gated_scan.cuh do the rest. Decays are products of exp(log_decay), never quotients.

namespace ssm::kernels::cuda {

namespace detail::gated {

template <class T>
struct delta_work {
  using R = accum_t<T>;
  T *q_in, *k_out, *scores, *states, *w, *u;
  T *after = nullptr, *d_u = nullptr, *inverse = nullptr, *overlap = nullptr;
  R* decay;
  std::size_t bytes;

  delta_work(const common& of, bool backward, void* memory) {
    carver from(memory);
    const index_t chunks = of.slots * of.heads, rows = chunks * of.key_tiles * cells;
    q_in = from.take<T>(rows);
    k_out = from.take<T>(rows);
    w = from.take<T>(rows);
    scores = from.take<T>(chunks * cells);
    u = from.take<T>(chunks * of.feature_tiles * cells);
    states = from.take<T>(rows * of.feature_tiles);
    if (backward) {
      after = from.take<T>(rows * of.feature_tiles);
      d_u = from.take<T>(chunks * of.feature_tiles * cells);
      inverse = from.take<T>(chunks * cells);
      overlap = from.take<T>(chunks * cells);
    }
    decay = from.take<R>(chunks * of.key_tiles * side);
    bytes = from.used();
  }
};

/// The gates and rates of a chunk, and the products of gates from token to token.
template <class R>
struct delta_gates {
  R *decay, *gate, *beta;  // (64, real_pitch), (64), (64)

  static constexpr int size = side * real_pitch + 2 * side;

  SSMLIB_DEVICE explicit delta_gates(R* memory)
      : decay(memory), gate(memory + side * real_pitch), beta(gate + side) {}

  SSMLIB_DEVICE void load(const view<const R, 2>& log_decay, const view<const R, 2>& rate,
                          index_t head, index_t heads, const chunk_rows& chunk) {
    if (threadIdx.x < side) {
      const int t = threadIdx.x;
      const bool valid = t < chunk.n;
      const auto at = [&](const view<const R, 2>& x) {
        return x
            .data[(chunk.first + t) * x.strides[0] + head * x.extents[1] / heads * x.strides[1]];
      };
      gate[t] = valid ? ::exp(at(log_decay)) : R(1);
      beta[t] = valid ? at(rate) : R(0);
    }
    __syncthreads();
    // Four threads a column; each forms the product down to its own rows.
    const int s = threadIdx.x % side, band = threadIdx.x / side;
    R product(1);
    for (int t = s + 1; t < band * block; ++t)
      product *= gate[t];
    for (int t = band * block; t < (band + 1) * block; ++t) {
      if (t > s) product *= gate[t];
      decay[t * real_pitch + s] = t >= s ? product : R(0);
    }
    __syncthreads();
  }
  SSMLIB_DEVICE R pre(int t) const { return decay[t * real_pitch] * gate[0]; }
  SSMLIB_DEVICE R suf(int s) const { return decay[(side - 1) * real_pitch + s]; }
};

/// (I + L)^-1 of a strictly lower 64 x 64 matrix, whose upper part is overwritten.
template <class R>
SSMLIB_DEVICE void invert_unit_lower(R* lower, R* inverse) {
  constexpr int p = real_pitch;
  if (threadIdx.x < side) {  // the four sub-blocks on the diagonal, a thread a column
    const int mine = threadIdx.x % block, start = threadIdx.x - mine;
    R x[block];
#pragma unroll
    for (int t = 0; t < block; ++t) {
      R sum(0);
#pragma unroll
      for (int m = 0; m < t; ++m)
        sum += lower[(start + t) * p + start + m] * x[m];
      x[t] = t == mine ? R(1) : t < mine ? R(0) : -sum;
      inverse[(start + t) * p + start + mine] = x[t];
    }
  }
  __syncthreads();
  const int r = threadIdx.x / block, c = threadIdx.x % block;
  for (int d = 1; d < 4; ++d) {
    for (int i = d; i < 4; ++i) {
      const int j = i - d;
      R sum(0);
      for (int m = j * block; m < i * block; ++m)
        sum += lower[(i * block + r) * p + m] * inverse[m * p + j * block + c];
      lower[(j * block + r) * p + i * block + c] = sum;
    }
    __syncthreads();
    for (int i = d; i < 4; ++i) {
      const int j = i - d;
      R sum(0);
#pragma unroll
      for (int m = 0; m < block; ++m) {
        sum += inverse[(i * block + r) * p + i * block + m] *
               lower[(j * block + m) * p + i * block + c];
      }
      inverse[(i * block + r) * p + j * block + c] = -sum;
      inverse[(j * block + r) * p + i * block + c] = R(0);
    }
    __syncthreads();
  }
}

template <class T>
struct delta_prepare_arguments {
  common of;
  delta_rule_problem<T> p;
  delta_work<T> w;
};

template <class T>
std::size_t delta_prepare_shared() {
  using R = accum_t<T>;
  return (delta_gates<R>::size + side * real_pitch) * sizeof(R) + 3 * tile_cells<T> * sizeof(T);
}

template <class T>
__global__ void __launch_bounds__(threads)
    delta_prepare_kernel(const __grid_constant__ delta_prepare_arguments<T> o) {
  using R = accum_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  R* const reals = reinterpret_cast<R*>(memory);
  R* const lower = reals + delta_gates<R>::size;
  T* const q = reinterpret_cast<T*>(lower + side * real_pitch);
  T *const k = q + tile_cells<T>, *const inverse = k + tile_cells<T>;
  delta_gates<R> gates(reals);
  const index_t slot_head = blockIdx.x, head = slot_head % o.of.heads, heads = o.of.heads;
  const chunk_rows chunk(o.of.rows, slot_head / heads);
  if (chunk.n == 0) return;
  const auto rows = [&](const auto& x, int tile) {
    return head_rows(x, head, heads, chunk.first, chunk.n, index_t{tile} * side);
  };
  gates.load(o.p.log_decay, o.p.beta, head, heads, chunk);
  share_sums<R> overlap, scores;
  for (int tile = 0; tile < o.of.key_tiles; ++tile) {
    load_rows(q, rows(o.p.q, tile));
    load_rows(k, rows(o.p.k, tile));
    wait_and_meet();
    multiply_tiles<false, true>(overlap, k, k);
    multiply_tiles<false, true>(scores, q, k);
    const index_t to = (slot_head * o.of.key_tiles + tile) * cells;
    for (int i = 2 * threadIdx.x; i < cells; i += 2 * threads) {
      const int t = i / side, at = t * pitch<T> + i % side;
      const R a = o.p.alpha * gates.pre(t), b = gates.suf(t);
      store_pair(o.w.q_in + to + i, a * widen(q[at]), a * widen(q[at + 1]));
      store_pair(o.w.k_out + to + i, b * widen(k[at]), b * widen(k[at + 1]));
    }
    __syncthreads();
  }
  scores.pairs([&](int t, int s, R& x, R& y) {
    const R* decay = gates.decay + t * real_pitch + s;
    store_pair(o.w.scores + slot_head * cells + t * side + s, o.p.alpha * decay[0] * x,
               o.p.alpha * decay[1] * y);
  });
  overlap.pairs([&](int t, int s, R& x, R& y) {
    const R* decay = gates.decay + t * real_pitch + s;
    x = s < t ? x * decay[0] : R(0);
    y = s + 1 < t ? y * decay[1] : R(0);
    if (o.w.overlap != nullptr) store_pair(o.w.overlap + slot_head * cells + t * side + s, x, y);
    lower[t * real_pitch + s] = gates.beta[t] * x;
    lower[t * real_pitch + s + 1] = gates.beta[t] * y;
  });
  if (threadIdx.x < o.of.key_tiles * side) {
    o.w.decay[slot_head * o.of.key_tiles * side + threadIdx.x] = gates.pre(side - 1);
  }
  __syncthreads();
  R read = R(0);  // beta pre of this thread's row, while `decay` still is what it says
  if (threadIdx.x < side) read = gates.beta[threadIdx.x] * gates.pre(threadIdx.x);
  __syncthreads();
  invert_unit_lower(lower, gates.decay);
  if (threadIdx.x < side) gates.gate[threadIdx.x] = read;
  for (int i = threadIdx.x; i < cells; i += threads) {
    const int t = i / side, s = i % side;
    const T x = narrow<T>(gates.decay[t * real_pitch + s]);
    inverse[t * pitch<T> + s] = x;
    if (o.w.inverse != nullptr) o.w.inverse[slot_head * cells + i] = x;
  }
  const auto solve = [&](const auto& from, const R* scale, T* to) {
    load_rows(k, from);
    wait_and_meet();
    for (int i = threadIdx.x; i < cells; i += threads) {
      T& x = k[i / side * pitch<T> + i % side];
      x = narrow<T>(scale[i / side] * widen(x));
    }
    __syncthreads();
    share_sums<R> sums;
    multiply_tiles<false, false>(sums, inverse, k);
    sums.pairs([&](int t, int c, R& x, R& y) { store_pair(to + t * side + c, x, y); });
    __syncthreads();
  };
  for (int tile = 0; tile < o.of.key_tiles; ++tile) {
    solve(rows(o.p.k, tile), gates.gate, o.w.w + (slot_head * o.of.key_tiles + tile) * cells);
  }
  for (int tile = 0; tile < o.of.feature_tiles; ++tile) {
    solve(rows(o.p.v, tile), gates.beta, o.w.u + (slot_head * o.of.feature_tiles + tile) * cells);
  }
}

/// Everything a chunk brings, and the states before every chunk.
template <class T>
void delta_states(cudaStream_t stream, const delta_rule_problem<T>& p, const delta_work<T>& w,
                  const gated_states<T>& states) {
  const common of = common_of(p);
  launch(stream, delta_prepare_kernel<T>, of.slots * of.heads, delta_prepare_shared<T>(),
         delta_prepare_arguments<T>{of, p, w});
  scan_arguments<T> scan{};
  scan.of = of;
  scan.reads = w.w;
  scan.read_sign = -1;
  scan.x = w.u;
  scan.writes = w.k_out;
  scan.write_sign = 1;
  scan.decay = w.decay;
  scan.initial = states.initial;
  scan.final = states.final;
  scan.states = w.states;
  launch_scan<T, true, false>(stream, scan);
}

template <class T>
void check(const delta_rule_problem<T>& p) {
  check_common(p);
  check_column("log_decay", p.log_decay, p.q.extent(0), p.heads);
  check_column("beta", p.beta, p.q.extent(0), p.heads);
}

}  // namespace detail::gated

template <class T>
std::size_t delta_rule_workspace_bytes(const delta_rule_problem<T>& p) {
  return detail::gated::delta_work<T>(detail::gated::common_of(p), false, nullptr).bytes;
}

template <class T>
void delta_rule_chunked(cudaStream_t stream, const delta_rule_problem<T>& p, view<T, 3> y,
                        const gated_states<T>& states, void* workspace) {
  using namespace detail::gated;
  check(p);
  check_results(p, "y", y, states.initial, states.final);
  const common of = common_of(p);
  const delta_work<T> w(of, false, workspace);
  delta_states(stream, p, w, states);
  launch_product<false>(
      stream, product_arguments<T>{of, w.q_in, w.states, w.scores, w.u, {}, y, nullptr, false});
}

template <class T>
void delta_rule_recurrent(cudaStream_t stream, const delta_rule_problem<T>& p, view<T, 3> y,
                          const gated_states<T>& states, const state_ring<T>& ring) {
  using namespace detail::gated;
  check(p);
  check_results(p, "y", y, states.initial, states.final);
  check_state("snapshots", ring.rows, ring.slots * p.sequences, p.heads, p.q.extent(2),
              p.v.extent(2));
  step_arguments<T> o{};
  o.rows = {p.offsets, p.sequences, p.max_length};
  o.heads = p.heads;
  o.q = p.q, o.k = p.k, o.v = p.v, o.log_decay = p.log_decay, o.beta = p.beta;
  o.alpha = p.alpha;
  o.y = y, o.states = states, o.ring = ring;
  launch_step<true>(stream, o);
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(cuda_delta_rule,                                                             \
                     std::size_t delta_rule_workspace_bytes<T>(const delta_rule_problem<T>&));    \
  SSMLIB_INSTANTIATE(cuda_delta_rule,                                                             \
                     void delta_rule_chunked<T>(cudaStream_t, const delta_rule_problem<T>&,       \
                                                view<T, 3>, const gated_states<T>&, void*));      \
  SSMLIB_INSTANTIATE(cuda_delta_rule, void delta_rule_recurrent<T>(                               \
                                          cudaStream_t, const delta_rule_problem<T>&, view<T, 3>, \
                                          const gated_states<T>&, const state_ring<T>&))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
