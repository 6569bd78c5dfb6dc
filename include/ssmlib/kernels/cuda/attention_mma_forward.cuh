#pragma once

#include <ssmlib/kernels/cuda/attention_tile.cuh>
#include <ssmlib/kernels/cuda/mma_tile.cuh>

/// @file
/// Softmax attention, forward, on the sm_80 rung: four warps of 16 queries each share the tiles of
/// keys and values that stream past. Keys and values have one buffer each; the next tile's keys are
/// copied while this one's values are added, and the other blocks of the multiprocessor fill in.

namespace ssm::kernels::cuda::detail {

/// @tparam D     head size, rounded up
/// @tparam Keys  of a tile
template <int D, int Keys>
struct mma_forward_tile {
  static constexpr int size = D, keys = Keys, warps = 4, rows = 16 * warps, threads = 32 * warps;
  static constexpr int blocks = D <= 96 ? 3 : 2;  // of a multiprocessor, by registers
  static constexpr int pitch = tile_pitch<D>;
  static constexpr int k_at = rows * pitch, v_at = k_at + keys * pitch;
  static constexpr int shared_bytes = (v_at + keys * pitch) * 2;
};

struct mma_forward_parameters {
  attention_operand<const bf16> q, k, v;
  attention_operand<bf16> y;
  float* log_sum;
  index_t log_sum_head;
  attention_layout layout;
  attention_schedule schedule;
  float scale;
};

template <class Tile>
SSMLIB_DEVICE void mma_forward_store(const mma_forward_parameters& p,
                                     const query_range<Tile>& range, int head, int row,
                                     const row_sums& rows, const float (&o)[Tile::size / 2]) {
  float factor[2];
  bf16* to[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int at = row + 8 * r;
    const index_t token = range.span.query_begin + at;
    const bool there = at < range.span.queries;
    factor[r] = sum > 0.0f ? 1.0f / sum : 0.0f;
    to[r] = there ? p.y.row(token, head) : nullptr;
    if (there && p.log_sum != nullptr && threadIdx.x % 4 == 0) {
      p.log_sum[head * p.log_sum_head + token] =
          sum > 0.0f ? fmaf(rows.largest[r], p.scale, logf(sum)) : -INFINITY;
    }
  }
  store_product<Tile::size>(o, factor, to, p.y.size);
}

template <class Tile>
SSMLIB_DEVICE void mma_forward_work(const mma_forward_parameters& p, bf16* shared,
                                    const attention_tile& work) {
  constexpr int D = Tile::size, N = Tile::keys;
  const attention_layout& layout = p.layout;
  const query_range<Tile> range(layout, work);
  const attention_span& span = range.span;
  if (range.row0 >= span.queries) return;
  bf16 *q = shared, *k = shared + Tile::k_at, *v = shared + Tile::v_at;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = range.row0 + 16 * warp, row = row0 + lane / 4, position = row0 + span.shift();
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
  row_sums rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  float o[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i)
    o[i] = 0.0f;
  __syncthreads();  // the tile before has been read
  const int q_head = head_of(work.head, layout.heads, p.q.heads);
  load_tile_async<Tile::rows, D, Tile::threads>(q, p.q.row(span.query_begin + range.row0, q_head),
                                                p.q.token, span.queries - range.row0, p.q.size);
  load_keys(range.end - 1);
  load_values(range.end - 1);
  for (int i = range.end - 1; i >= range.first; --i) {
    float s[N / 2], factor[2];
    std::uint32_t w[N / 4];
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      s[j] = 0.0f;
    wait_copies<1>();
    __syncthreads();
    multiply_tile_rows<N, D>(s, q + 16 * warp * Tile::pitch, k);
    __syncthreads();
    load_keys(i - 1);
    const int key0 = i * N;
    if (key0 + N > span.keys ||
        (layout.causal && (key0 + N - 1 > position || key0 <= position + 15 - layout.window))) {
      const kept_columns kept[2] = {kept_keys(layout, span, row + span.shift(), key0),
                                    kept_keys(layout, span, row + 8 + span.shift(), key0)};
      mask_rows<N>(s, kept, -INFINITY);
    }
    online_softmax<N>(s, rows, p.scale * 1.4426950408889634f, factor);
#pragma unroll
    for (int j = 0; j < D / 2; ++j)
      o[j] *= factor[j / 2 % 2];
    to_operand(s, w);
    wait_copies<1>();
    __syncthreads();
    accumulate_tile_rows<N, D>(o, w, v);
    __syncthreads();
    load_values(i - 1);
  }
  wait_copies<0>();
  mma_forward_store<Tile>(p, range, work.head, row, rows, o);
}

template <class Tile>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void attention_mma_forward_kernel(
    const __grid_constant__ mma_forward_parameters p) {
  extern __shared__ __align__(16) unsigned char memory[];
  for (index_t n = blockIdx.x; n < p.schedule.size(); n += gridDim.x)
    mma_forward_work<Tile>(p, reinterpret_cast<bf16*>(memory), p.schedule[n]);
}

template <class Tile>
void launch_mma_forward(cudaStream_t stream, const attention_problem<bf16>& problem,
                        view<bf16, 3> y, view<float, 2> log_sum) {
  mma_forward_parameters p{attention_operand<const bf16>(problem.q),
                           attention_operand<const bf16>(problem.k),
                           attention_operand<const bf16>(problem.v),
                           attention_operand<bf16>(y),
                           log_sum.data,
                           log_sum.strides[0],
                           attention_layout(problem),
                           {},
                           static_cast<float>(problem.scale)};
  p.schedule = make_schedule(problem.sequences, p.layout.heads, p.layout.max_length, Tile::rows,
                             true, index_t{p.layout.max_key_length} * 4 * Tile::size,
                             problem.heads / std::max(problem.k.extents[1], problem.v.extents[1]));
  const index_t tiles = p.schedule.pairs * p.schedule.tiles;
  if (tiles == 0) return;
  allow_shared_bytes(attention_mma_forward_kernel<Tile>, Tile::shared_bytes);
  const auto blocks = static_cast<unsigned>(std::min<index_t>(tiles, index_t{1} << 30));
  attention_mma_forward_kernel<Tile><<<blocks, Tile::threads, Tile::shared_bytes, stream>>>(p);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

inline void mma_forward(cudaStream_t stream, const attention_problem<bf16>& problem,
                        view<bf16, 3> y, view<float, 2> log_sum) {
  const index_t size = std::max(problem.q.extents[2], problem.v.extents[2]);
  if (size <= 64) return launch_mma_forward<mma_forward_tile<64, 64>>(stream, problem, y, log_sum);
  if (size <= 96) return launch_mma_forward<mma_forward_tile<96, 64>>(stream, problem, y, log_sum);
  if (size <= 128)
    return launch_mma_forward<mma_forward_tile<128, 64>>(stream, problem, y, log_sum);
  launch_mma_forward<mma_forward_tile<256, 32>>(stream, problem, y, log_sum);
}

}  // namespace ssm::kernels::cuda::detail
