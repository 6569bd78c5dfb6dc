#pragma once

#include <ssmlib/kernels/cuda/attention_statistics.cuh>
#include <ssmlib/kernels/cuda/attention_tile.cuh>
#include <ssmlib/kernels/cuda/mma_tile.cuh>

/// @file
/// Softmax attention, backward, on the sm_80 rung, in the two passes of the sm_90a rung: dq, where
/// four warps keep 16 queries each and keys stream past, and dk with dv, where they keep keys and
/// the queries of all heads that share the key head stream past.

namespace ssm::kernels::cuda::detail {

struct mma_backward_parameters {
  attention_operand<const bf16> q, k, v, dy;
  attention_operand<bf16> dq, dk, dv;  // of keys, either may be absent
  attention_layout layout;
  attention_schedule schedule;  // dq: over result heads; dk, dv: over key heads
  backward_statistics statistics;
  float scale;
};

/// The weight of a masked logit, from the statistics of its row.
SSMLIB_DEVICE float softmax_weight(float logit, float unit, float log_sum) {
  return power_of_2(fmaf(logit, unit, -log_sum));
}

// ------------------------------------------------------------------------------------------ dq

template <int D>
struct mma_queries_tile {
  static constexpr int size = D, rows = 64, queries = rows, keys = 64, threads = 128;
  static constexpr int pitch = tile_pitch<D>, tile = 64 * pitch;
  static constexpr int dy_at = tile, k_at = 2 * tile, v_at = 3 * tile, shared_bytes = 8 * tile;
};

template <class Tile>
SSMLIB_DEVICE void mma_queries_work(const mma_backward_parameters& p, bf16* shared,
                                    const attention_tile& work) {
  constexpr int D = Tile::size, N = Tile::keys;
  const attention_layout& layout = p.layout;
  const query_range<Tile> range(layout, work);
  const attention_span& span = range.span;
  if (range.row0 >= span.queries) return;
  bf16 *q = shared, *dy = shared + Tile::dy_at, *k = shared + Tile::k_at, *v = shared + Tile::v_at;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = range.row0 + 16 * warp, row = row0 + lane / 4, position = row0 + span.shift();
  const float unit = p.scale * 1.4426950408889634f;
  const bf16* keys = p.k.row(span.key_begin, head_of(work.head, layout.heads, p.k.heads));
  const bf16* values = p.v.row(span.key_begin, head_of(work.head, layout.heads, p.v.heads));
  const auto load_keys = [&](int i) {
    if (i >= range.first) {
      load_tile_async<N, D, Tile::threads>(k, keys + i * N * p.k.token, p.k.token,
                                           span.keys - i * N, p.k.size);
    }
    commit_copies();
  };
  const auto load_values = [&](int i) {
    if (i >= range.first) {
      load_tile_async<N, D, Tile::threads>(v, values + i * N * p.v.token, p.v.token,
                                           span.keys - i * N, p.v.size);
    }
    commit_copies();
  };
  float dq[D / 2], log_sum[2], delta[2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i)
    dq[i] = 0.0f;
  const index_t place = p.statistics.place(work.sequence, span.query_begin, work.head) + row;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    log_sum[r] = p.statistics.log_sum[place + 8 * r];
    delta[r] = p.statistics.delta[place + 8 * r];
  }
  __syncthreads();  // the tiles before have been read
  const int count = span.queries - range.row0;
  const index_t token = span.query_begin + range.row0;
  load_tile_async<Tile::rows, D, Tile::threads>(dy, p.dy.row(token, work.head), p.dy.token, count,
                                                p.dy.size);
  load_values(range.end - 1);
  load_tile_async<Tile::rows, D, Tile::threads>(q, p.q.row(token, work.head), p.q.token, count,
                                                p.q.size);
  load_keys(range.end - 1);
  for (int i = range.end - 1; i >= range.first; --i) {
    const int key0 = i * N;
    float s[N / 2], ds[N / 2];
    std::uint32_t w[N / 4];
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      s[j] = ds[j] = 0.0f;
    wait_copies<1>();
    __syncthreads();
    multiply_tile_rows<N, D>(ds, dy + 16 * warp * Tile::pitch, v);
    wait_copies<0>();
    __syncthreads();
    load_values(i - 1);
    multiply_tile_rows<N, D>(s, q + 16 * warp * Tile::pitch, k);
    if (key0 + N > span.keys ||
        (layout.causal && (key0 + N - 1 > position || key0 <= position + 15 - layout.window))) {
      const kept_columns kept[2] = {kept_keys(layout, span, row + span.shift(), key0),
                                    kept_keys(layout, span, row + 8 + span.shift(), key0)};
      mask_rows<N>(s, kept, -INFINITY);
    }
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      ds[j] = softmax_weight(s[j], unit, log_sum[j / 2 % 2]) * (ds[j] - delta[j / 2 % 2]);
    to_operand(ds, w);
    accumulate_tile_rows<N, D>(dq, w, k);
    __syncthreads();
    load_keys(i - 1);
  }
  wait_copies<0>();
  const float scales[2] = {p.scale, p.scale};
  bf16* to[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r;
    to[r] = at < span.queries ? p.dq.row(span.query_begin + at, work.head) : nullptr;
  }
  store_product<D>(dq, scales, to, p.dq.size);
}

template <class Tile>
__global__ __launch_bounds__(Tile::threads, 2) void attention_mma_queries_kernel(
    const __grid_constant__ mma_backward_parameters p) {
  extern __shared__ __align__(16) unsigned char memory[];
  for (index_t n = blockIdx.x; n < p.schedule.size(); n += gridDim.x)
    mma_queries_work<Tile>(p, reinterpret_cast<bf16*>(memory), p.schedule[n]);
}

// ---------------------------------------------------------------------------------- dk and dv

template <int D>
struct mma_keys_tile {
  static constexpr int size = D, keys = 64, queries = D <= 64 ? 64 : 32, threads = 128;
  static constexpr int pitch = tile_pitch<D>, stages = 2;
  static constexpr int v_at = keys * pitch, stages_at = 2 * keys * pitch;
  static constexpr int dy_at = queries * pitch, statistics_at = 2 * queries * pitch;
  static constexpr int stage = statistics_at + 4 * queries;  // two floats a query
  static constexpr int shared_bytes = 2 * (stages_at + stages * stage);
};

/// Adds what the queries of one stage contribute to dk and dv.
template <class Tile>
SSMLIB_DEVICE void mma_keys_add(const mma_backward_parameters& p, const key_range<Tile>& range,
                                const bf16* shared, const bf16* stage, int query0,
                                float (&dk)[Tile::size / 2], float (&dv)[Tile::size / 2]) {
  constexpr int D = Tile::size, N = Tile::queries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4 * 2;
  const bf16 *q = stage, *dy = stage + Tile::dy_at;
  const float* log_sum = reinterpret_cast<const float*>(stage + Tile::statistics_at);
  const attention_layout& layout = p.layout;
  const float unit = p.scale * 1.4426950408889634f;
  float s[N / 2], ds[N / 2];
  std::uint32_t w[N / 4];
#pragma unroll
  for (int j = 0; j < N / 2; ++j)
    s[j] = ds[j] = 0.0f;
  multiply_tile_rows<N, D>(s, shared + 16 * warp * Tile::pitch, q);
  const int key0 = range.key0 + 16 * warp, first = query0 + range.span.shift();
  if (layout.causal && (first < key0 + 15 || first + N - 1 - layout.window >= key0)) {
    const int key = key0 + lane / 4;
    const kept_columns kept[2] = {kept_queries(layout, range.span, key, query0),
                                  kept_queries(layout, range.span, key + 8, query0)};
    mask_rows<N>(s, kept, -INFINITY);
  }
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 l = *reinterpret_cast<const float2*>(log_sum + 8 * j + t);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[4 * j + e] = softmax_weight(s[4 * j + e], unit, e % 2 == 0 ? l.x : l.y);
  }
  multiply_tile_rows<N, D>(ds, shared + Tile::v_at + 16 * warp * Tile::pitch, dy);
  to_operand(s, w);
  accumulate_tile_rows<N, D>(dv, w, dy);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 d = *reinterpret_cast<const float2*>(log_sum + N + 8 * j + t);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      ds[4 * j + e] = s[4 * j + e] * (ds[4 * j + e] - (e % 2 == 0 ? d.x : d.y));
  }
  to_operand(ds, w);
  accumulate_tile_rows<N, D>(dk, w, q);
}

template <class Tile>
SSMLIB_DEVICE void mma_keys_work(const mma_backward_parameters& p, bf16* shared,
                                 const attention_tile& work) {
  constexpr int D = Tile::size, N = Tile::queries;
  const key_range<Tile> range(p.layout, work);
  const attention_span& span = range.span;
  if (range.key0 >= span.keys) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int shared_by = p.layout.heads / p.k.heads, tiles = range.end - range.first;
  const auto stage_of = [&](int n) { return shared + Tile::stages_at + n % 2 * Tile::stage; };
  // Step n: tile n % tiles of head n / tiles of those that share the keys.
  const auto load = [&](int n) {
    if (n < tiles * shared_by) {
      const int head = work.head * shared_by + n / tiles, row = (range.first + n % tiles) * N;
      const index_t token = span.query_begin + row;
      bf16* to = stage_of(n);
      load_tile_async<N, D, Tile::threads>(to, p.q.row(token, head), p.q.token, span.queries - row,
                                           p.q.size);
      load_tile_async<N, D, Tile::threads>(to + Tile::dy_at, p.dy.row(token, head), p.dy.token,
                                           span.queries - row, p.dy.size);
      if (threadIdx.x < N / 2) {
        const int i = static_cast<int>(threadIdx.x) % (N / 4) * 4;
        const bool sums = threadIdx.x < N / 4;
        const float* from = sums ? p.statistics.log_sum : p.statistics.delta;
        float* at = reinterpret_cast<float*>(to + Tile::statistics_at) + (sums ? 0 : N) + i;
        copy_async_16(at,
                      from + p.statistics.place(work.sequence, span.query_begin, head) + row + i);
      }
    }
    commit_copies();
  };
  float dk[D / 2], dv[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i)
    dk[i] = dv[i] = 0.0f;
  __syncthreads();  // the tiles before have been read
  const index_t token = span.key_begin + range.key0;
  load_tile_async<Tile::keys, D, Tile::threads>(shared, p.k.row(token, work.head), p.k.token,
                                                span.keys - range.key0, p.k.size);
  load_tile_async<Tile::keys, D, Tile::threads>(shared + Tile::v_at, p.v.row(token, work.head),
                                                p.v.token, span.keys - range.key0, p.v.size);
  load(0);
  for (int n = 0; n < tiles * shared_by; ++n) {
    wait_copies<0>();
    __syncthreads();
    load(n + 1);
    mma_keys_add<Tile>(p, range, shared, stage_of(n), (range.first + n % tiles) * N, dk, dv);
  }
  wait_copies<0>();
  const float scales[2] = {p.scale, p.scale}, ones[2] = {1.0f, 1.0f};
  bf16 *to_k[2], *to_v[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = range.key0 + 16 * warp + lane / 4 + 8 * r;
    const bool there = row < span.keys;
    to_k[r] = there && p.dk.data ? p.dk.row(span.key_begin + row, work.head) : nullptr;
    to_v[r] = there && p.dv.data ? p.dv.row(span.key_begin + row, work.head) : nullptr;
  }
  store_product<D>(dk, scales, to_k, p.dk.size);
  store_product<D>(dv, ones, to_v, p.dv.size);
}

template <class Tile>
__global__ __launch_bounds__(Tile::threads, 2) void attention_mma_keys_kernel(
    const __grid_constant__ mma_backward_parameters p) {
  extern __shared__ __align__(16) unsigned char memory[];
  for (index_t n = blockIdx.x; n < p.schedule.size(); n += gridDim.x)
    mma_keys_work<Tile>(p, reinterpret_cast<bf16*>(memory), p.schedule[n]);
}

// -------------------------------------------------------------------------------------- launch

template <class Tile>
void launch_mma_backward(cudaStream_t stream, void (*kernel)(mma_backward_parameters),
                         const mma_backward_parameters& p) {
  const index_t tiles = p.schedule.pairs * p.schedule.tiles;
  if (tiles == 0) return;
  allow_shared_bytes(kernel, Tile::shared_bytes);
  const auto blocks = static_cast<unsigned>(std::min<index_t>(tiles, index_t{1} << 30));
  kernel<<<blocks, Tile::threads, Tile::shared_bytes, stream>>>(p);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <int D>
void mma_backward_of(cudaStream_t stream, const attention_problem<bf16>& problem,
                     mma_backward_parameters p) {
  const attention_layout& layout = p.layout;
  const index_t shared_by = problem.heads / p.k.heads;
  if (p.dq.data != nullptr) {
    using tile = mma_queries_tile<D>;
    p.schedule = make_schedule(problem.sequences, layout.heads, layout.max_length, tile::rows, true,
                               index_t{layout.max_key_length} * 4 * D, shared_by);
    launch_mma_backward<tile>(stream, attention_mma_queries_kernel<tile>, p);
  }
  if (p.dk.data != nullptr || p.dv.data != nullptr) {
    using tile = mma_keys_tile<D>;
    p.schedule = make_schedule(problem.sequences, p.k.heads, layout.max_key_length, tile::keys,
                               false, index_t{layout.max_length} * 4 * D * shared_by, 1);
    launch_mma_backward<tile>(stream, attention_mma_keys_kernel<tile>, p);
  }
}

inline void mma_backward(cudaStream_t stream, const attention_problem<bf16>& problem,
                         view<const bf16, 3> dy, view<bf16, 3> dq, view<bf16, 3> dk,
                         view<bf16, 3> dv, const backward_statistics& statistics) {
  const mma_backward_parameters p{attention_operand<const bf16>(problem.q),
                                  attention_operand<const bf16>(problem.k),
                                  attention_operand<const bf16>(problem.v),
                                  attention_operand<const bf16>(dy),
                                  attention_operand<bf16>(dq),
                                  attention_operand<bf16>(dk),
                                  attention_operand<bf16>(dv),
                                  attention_layout(problem),
                                  {},
                                  statistics,
                                  static_cast<float>(problem.scale)};
  const index_t size = std::max(problem.q.extents[2], problem.v.extents[2]);
  if (size <= 64) return mma_backward_of<64>(stream, problem, p);
  if (size <= 96) return mma_backward_of<96>(stream, problem, p);
  mma_backward_of<128>(stream, problem, p);
}

}  // namespace ssm::kernels::cuda::detail
