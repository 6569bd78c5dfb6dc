#pragma once

#include <ssmlib/kernels/cuda/ssd_mma.cuh>

/// @file
/// The scalar-gated recurrence on the sm_80 rung: the work of ssd_forward.cuh by products of single
/// warps. Four warps carry the transposed state of a lane; there are no warps that only fetch: all
/// start the copies of the next chunk, and one in turn computes its decays.

namespace ssm::kernels::cuda::detail {

template <int N, int Groups, bool States>
struct ssd_mma_tile {
  using rows = ssd_tile<N, Groups, States>;
  static constexpr int keys = N, groups = Groups, threads = 128 * Groups, chunk = 64;
  static constexpr bool states = States;
  static constexpr int blocks = 2 / Groups;  // of a multiprocessor, by registers
  static constexpr int panel_bytes = 64 * 128, key_bytes = N / 64 * panel_bytes;
  static constexpr int k_at = 0, x_at = key_bytes, q_at = x_at + Groups * panel_bytes;
  static constexpr int stage_bytes = States ? q_at : q_at + key_bytes, stages = 2;
  static constexpr int mixed_at = stages * stage_bytes;
  static constexpr int out_at = mixed_at + (States ? 0 : Groups * panel_bytes);
  static constexpr int decays_at = out_at + (States ? 0 : Groups * panel_bytes);
  static constexpr int bytes =
      decays_at + Groups * stages * static_cast<int>(sizeof(ssd_chunk_decays));

  SSMLIB_DEVICE static constexpr int tokens_of(int i) { return rows::tokens_of(i); }
  SSMLIB_DEVICE static constexpr int rows_of(int i) { return rows::rows_of(i); }
};

/// Starts the copies of the chunk of n tokens from t on, for the lanes v, v + 1...
template <class Tile>
SSMLIB_DEVICE void ssd_mma_fetch(unsigned char* to, const ssd_arguments<bf16>& p,
                                 const ssd_cut& cut, index_t t, int n, int v) {
  constexpr int panels = Tile::keys / 64;
  const int h = v / cut.parts;
  ssd_fetch_panels<panels, Tile::threads>(to + Tile::k_at, p.k.head(h) + t * p.k.token, p.k.token,
                                          n, p.key_size);
  if constexpr (!Tile::states) {
    ssd_fetch_panels<panels, Tile::threads>(
        to + Tile::q_at, p.q.head(h) + t * p.q.token, p.q.token, n, p.key_size, [](int r) {
          const int block = r / 8;  // the inverse of tokens_of
          return 8 * (block < 4 ? 2 * block : 15 - 2 * block) + r % 8;
        });
  }
#pragma unroll
  for (int i = 0; i < Tile::groups; ++i) {
    const int from = (v + i) % cut.parts * 64;
    ssd_fetch_panels<1, Tile::threads>(to + Tile::x_at + i * Tile::panel_bytes,
                                       p.x.head((v + i) / cut.parts) + t * p.x.token + from,
                                       p.x.token, n, p.features - from);
  }
}

/// A lane's outputs of one chunk out of a panel.
SSMLIB_DEVICE void ssd_write_outputs(const unsigned char* staged, bf16* to, index_t step, int n,
                                     bool column_valid, int tid) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 row = *reinterpret_cast<const uint4*>(staged + swizzled(tid / 8 + 16 * i, tid % 8));
    if (tid / 8 + 16 * i < n && column_valid) *reinterpret_cast<uint4*>(to + 16 * i * step) = row;
  }
}

/// One chunk of a lane: adds to the state, and leaves the outputs in the panel `out`.
template <class Tile>
SSMLIB_DEVICE void ssd_mma_chunk(float (&state)[Tile::keys / 2], const unsigned char* here,
                                 const unsigned char* x_panel, const ssd_chunk_decays& now,
                                 std::uint32_t mixed, std::uint32_t out_panel, float d, int group,
                                 int warp, int lane) {
  constexpr int N = Tile::keys;
  const std::uint32_t k = shared_address(here + Tile::k_at), q = shared_address(here + Tile::q_at);
  std::uint32_t x[4][4], weighted[4][4];
  float out[32];
  if constexpr (!Tile::states) {
    float scores[32];
#pragma unroll
    for (int i = 0; i < 32; ++i)
      scores[i] = out[i] = 0.0f;
    // Rows are tokens 8 warp.. and 8 (7 - warp)..: no key behind the latter counts.
    ssd_add_rows<N / 16>(
        scores, [&](int i, std::uint32_t(&a)[4]) { ssd_panel_left(a, q, 16 * warp, i, lane); }, k,
        lane, 0, (7 - warp) / 2);
    ssd_mix(scores, now, d, warp, lane, mixed);
    ssd_add_rows<N / 16>(
        out,
        [&](int i, std::uint32_t(&a)[4]) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            a[e] = pack_bf16(state[8 * i + 2 * e], state[8 * i + 2 * e + 1]);
        },
        q, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 start =
          *reinterpret_cast<const float2*>(now.start + 8 * Tile::tokens_of(i) + 2 * (lane % 4));
      out[4 * i] *= start.x, out[4 * i + 1] *= start.y;
      out[4 * i + 2] *= start.x, out[4 * i + 3] *= start.y;
    }
  }
  ssd_load_transposed(x, shared_address(x_panel), warp, lane);
  ssd_weigh(weighted, x, now, lane);
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    state[i] *= now.total;
  ssd_add_columns<N>(state, weighted, k, lane);
  if constexpr (!Tile::states) {
    named_barrier_sync(1 + group, 128);
    ssd_multiply_mixed<Tile>(out, x, mixed, lane);
    ssd_stage_transposed(out, out_panel, warp, lane);
    named_barrier_sync(1 + group, 128);
  }
}

template <class Tile>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void ssd_mma_chunk_kernel(
    const __grid_constant__ ssd_arguments<bf16> p, const ssd_cut cut, const ssd_operand<bf16> y,
    const ssd_state_operand<const float> initial, const ssd_state_operand<float> final) {
  constexpr int N = Tile::keys;
  extern __shared__ __align__(1024) unsigned char shared[];
  const ssd_place place(p, cut, static_cast<int>(blockIdx.x), Tile::groups, cut.supers);
  if (Tile::states ? place.last : place.empty) return;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int tid = threadIdx.x % 128, lane = tid % 32;
  const int warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int v = place.lane + group, h = v / cut.parts, from = v % cut.parts * 64;
  const int chunks = (place.tokens + 63) / 64;
  const ssd_steps<bf16> steps(p, h);
  float state[N / 2];
  ssd_start_state<N>(state, p, cut, initial, place.sequence,
                     Tile::states ? place.super : place.super * cut.pieces, v, tid, Tile::states,
                     place.super == 0 && place.last);
  const float d = p.d.data == nullptr ? 0.0f : *p.d.head(h);
  float product = 1.0f;  // of the decays of all chunks
  auto* decays = reinterpret_cast<ssd_chunk_decays*>(shared + Tile::decays_at) + group;
  const unsigned char* staged = shared + Tile::out_at + group * Tile::panel_bytes;
  const std::uint32_t mixed = shared_address(shared + Tile::mixed_at + group * Tile::panel_bytes);
  ssd_raw_step<bf16> loaded[2] = {};
  const auto load_steps = [&](int c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 64 * c + 2 * lane + i;
      if (t < place.tokens) loaded[i] = steps.load(place.first + t);
    }
  };
  const auto set_decays = [&](int c) {
    decays[c % 2 * Tile::groups].set(steps, loaded, place.tokens - 64 * c, p.alpha, lane);
  };
  const auto fetch = [&](int c) {
    if (c < chunks) {
      ssd_mma_fetch<Tile>(shared + c % 2 * Tile::stage_bytes, p, cut, place.first + 64 * c,
                          place.tokens - 64 * c, place.lane);
    }
    commit_copies();
  };
  fetch(0);
  if (warp == 0) load_steps(0), set_decays(0);
  for (int c = 0; c < chunks; ++c) {
    const bool next = c + 1 < chunks && warp == (c + 1) % 4;
    const unsigned char* here = shared + c % 2 * Tile::stage_bytes;
    wait_copies<0>();
    __syncthreads();
    fetch(c + 1);
    if (next) load_steps(c + 1);
    const ssd_chunk_decays& now = decays[c % 2 * Tile::groups];
    product *= now.total;
    ssd_mma_chunk<Tile>(state, here, here + Tile::x_at + group * Tile::panel_bytes, now, mixed,
                        shared_address(staged), d, group, warp, lane);
    if (next) set_decays(c + 1);
    if constexpr (!Tile::states) {
      const int column = from + tid % 8 * 8;
      ssd_write_outputs(staged,
                        y.data + (place.first + 64 * c + tid / 8) * y.token + h * y.group + column,
                        y.token, place.tokens - 64 * c, column < p.features, tid);
    }
  }
  if constexpr (Tile::states) {
    float* sum = cut.state_of<N>(place.sequence, place.super + 1, v) + tid;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      sum[128 * i] = state[i];
    if (tid == 0) *cut.decay_of(place.sequence, place.super, v) = product;
  } else if (place.last && final.data != nullptr) {
    ssd_store_state<N>(state, final.at(place.sequence, h), final.row, from, p, warp, lane);
  }
}

template <class Tile, class... Arguments>
void ssd_mma_launch(cudaStream_t stream, index_t blocks, const Arguments&... arguments) {
  const auto kernel = ssd_mma_chunk_kernel<Tile>;
  SSMLIB_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::bytes));
  kernel<<<ssd_blocks(blocks), Tile::threads, Tile::bytes, stream>>>(arguments...);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <int N, int Groups>
void ssd_mma_forward(cudaStream_t stream, const ssd_problem<bf16>& p, const ssd_plan& plan,
                     const view<bf16, 3>& y, const ssd_states<bf16>& states, void* workspace) {
  const ssd_cut cut = plan.cut(p, workspace);
  const ssd_arguments<bf16> arguments(p);
  const ssd_operand<bf16> to(y, p.heads);
  const ssd_state_operand<const float> initial(states.initial);
  const ssd_state_operand<float> final(states.final);
  const index_t packs = cut.lanes / Groups;  // of lanes, a block each
  if (cut.supers > 1) {
    const ssd_cut pieces = cut.of_pieces();
    ssd_mma_launch<ssd_mma_tile<N, Groups, true>>(stream, p.sequences * pieces.supers * packs,
                                                  arguments, pieces, to, initial, final);
    if (!cut.folded) ssd_scan_states(stream, p, pieces, 64 * N);
  }
  ssd_mma_launch<ssd_mma_tile<N, Groups, false>>(stream, p.sequences * cut.supers * packs,
                                                 arguments, cut, to, initial, final);
}

}  // namespace ssm::kernels::cuda::detail
