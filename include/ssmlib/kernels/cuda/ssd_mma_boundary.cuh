#pragma once

#include <ssmlib/kernels/cuda/ssd_backward_tile.cuh>
#include <ssmlib/kernels/cuda/ssd_mma.cuh>

/// @file
/// The first launch of the backward pass on the sm_80 rung: the walks of ssd_backward_tile.cuh by
/// products of single warps.

namespace ssm::kernels::cuda::detail {

template <int N>
struct ssd_mma_boundary_tile {
  static constexpr int threads = 128, key_bytes = N / 64 * 8192;
  static constexpr int x_at = key_bytes, stage_bytes = key_bytes + 8192;
  static constexpr int image_at = 2 * stage_bytes, decays_at = image_at + key_bytes;
  static constexpr int bytes = decays_at + 2 * static_cast<int>(sizeof(ssd_backward_decays));
};

template <int N>
__global__ __launch_bounds__(128, 3) void ssd_mma_boundary_kernel(
    const __grid_constant__ ssd_arguments<bf16> p, const ssd_operand<const bf16> dy,
    const ssd_backward_cut cut, const ssd_state_operand<const float> initial,
    const ssd_state_operand<const float> d_final, const ssd_state_operand<float> d_initial) {
  using tile = ssd_mma_boundary_tile<N>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int block = static_cast<int>(blockIdx.x), v = block % cut.lanes;
  const bool reverse = block / cut.lanes % 2 == 1;
  const int s = block / cut.lanes / 2, h = v / cut.parts, from = v % cut.parts * 64;
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const index_t begin = p.begin(s);
  const int tokens = static_cast<int>(p.end(s) - begin), chunks = (tokens + 63) / 64;
  const index_t key_step = reverse ? p.q.token : p.k.token;
  const index_t row_step = reverse ? dy.token : p.x.token;
  const bf16* keys = (reverse ? p.q.head(h) : p.k.head(h)) + begin * key_step;
  const bf16* rows = (reverse ? dy.head(h) : p.x.head(h)) + begin * row_step + from;
  const ssd_steps<bf16> steps(p, h);
  auto* decays = reinterpret_cast<ssd_backward_decays*>(shared + tile::decays_at);
  ssd_raw_step<bf16> loaded[2] = {};
  const auto chunk_of = [&](int i) { return reverse ? chunks - 1 - i : i; };
  const auto load_steps = [&](int i) {
    const int t = 64 * chunk_of(i);
    ssd_load_steps(loaded, steps, begin + t, tokens - t, lane);
  };
  const auto set_decays = [&](int i) {
    decays[i % 2].set(steps, loaded, tokens - 64 * chunk_of(i), p.alpha, lane);
  };
  const auto fetch = [&](int i) {
    if (i < chunks) {
      const int t = 64 * chunk_of(i);
      unsigned char* to = shared + i % 2 * tile::stage_bytes;
      ssd_fetch_panels<N / 64, 128>(to, keys + t * key_step, key_step, tokens - t, p.key_size);
      ssd_fetch_panels<1, 128>(to + tile::x_at, rows + t * row_step, row_step, tokens - t,
                               p.features - from);
    }
    commit_copies();
  };
  float state[N / 2];
  ssd_cut whole{};
  whole.parts = cut.parts, whole.supers = 1;
  ssd_state_operand<const float> state_at = initial;
  if (reverse) state_at = d_final;
  ssd_start_state<N>(state, p, whole, state_at, s, 0, v, tid, false, true);
  fetch(0);
  if (warp == 0 && chunks > 0) load_steps(0), set_decays(0);
  for (int i = 0; i < chunks; ++i) {
    const bool next = i + 1 < chunks && warp == (i + 1) % 4;
    const unsigned char* here = shared + i % 2 * tile::stage_bytes;
    wait_copies<0>();
    __syncthreads();
    fetch(i + 1);
    if (next) load_steps(i + 1);
    const ssd_backward_decays& now = decays[i % 2];
    std::uint32_t x[4][4];
    ssd_load_transposed(x, shared_address(here + tile::x_at), warp, lane);
    ssd_stage_image<N>(state, shared + tile::image_at, warp, lane);
    ssd_weigh_boundary(x, now, reverse, lane);
#pragma unroll
    for (int e = 0; e < N / 2; ++e)
      state[e] *= now.total;
    ssd_add_columns<N>(state, x, shared_address(here), lane);
    ssd_write_image<N>(cut.image<N>(begin, s, chunk_of(i), v) + (reverse ? 64 * N : 0),
                       shared + tile::image_at, warp, lane);
    if (next) set_decays(i + 1);
  }
  if (reverse && d_initial.data != nullptr) {
    ssd_store_state<N>(state, d_initial.at(s, h), d_initial.row, from, p, warp, lane);
  }
}

}  // namespace ssm::kernels::cuda::detail
