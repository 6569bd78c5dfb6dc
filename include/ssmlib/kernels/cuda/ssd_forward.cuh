#pragma once

#include <ssmlib/kernels/cuda/hopper.cuh>
#include <ssmlib/kernels/cuda/ssd_general.cuh>
#include <ssmlib/kernels/cuda/ssd_mma_forward.cuh>
#include <ssmlib/kernels/cuda/ssd_tile.cuh>

#include <algorithm>

namespace ssm::kernels::cuda {

namespace detail {

// A warpgroup carries the transposed state (64 features x N keys) of its lane in registers through
// the chunks of its part of the sequence. Everything is transposed, so that the state and x are
// left operands out of registers:
//
//     Y^T = S^T (q^T scaled by the decay from the chunk's start) + X^T mixed^T
//     S^T = total S^T + (X^T scaled by weight and decay to the chunk's end) K
//
// mixed = decay weight (q k^T), masked, goes through shared memory; so does Y^T, to be transposed.
// The product with mixed is one of single warps: those of a warpgroup would read shared memory by
// another way than it is written, and the fence between waits for the stores of y.
template <class Tile>
SSMLIB_DEVICE void ssd_compute(const ssd_pipeline<Tile>& pipeline, const ssd_arguments<bf16>& p,
                               const ssd_cut& cut, const ssd_operand<bf16>& y,
                               const ssd_state_operand<const float>& initial,
                               const ssd_state_operand<float>& final, unsigned char* shared,
                               const ssd_place& place, int group) {
  constexpr int N = Tile::keys, chunk = Tile::chunk, panel = Tile::panel_bytes;
  const int tid = threadIdx.x % 128, lane = tid % 32;
  const int warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int v = place.lane + group, h = v / cut.parts, from = v % cut.parts * 64;
  const int chunks = (place.tokens + chunk - 1) / chunk;
  float state[N / 2];
  // Not only who reads the workspace waits: the kernel must not end before the one that fills it.
  if constexpr (!Tile::states) wait_for_kernel_ahead();
  ssd_start_state<N>(state, p, cut, initial, place.sequence,
                     Tile::states ? place.super : place.super * cut.pieces, v, tid, Tile::states,
                     place.super == 0 && place.last);
  const float d = p.d.data == nullptr ? 0.0f : *p.d.head(h);
  float product = 1.0f;  // of the decays of all chunks
  bf16* to = nullptr;
  if constexpr (!Tile::states) {
    to = y.data + (place.first + tid / 8) * y.token + h * y.group + from + tid % 8 * 8;
  }
  const bool column_valid = from + tid % 8 * 8 < p.features;
  const std::uint32_t mixed = shared_address(shared + Tile::mixed_at + group * panel);
  unsigned char* staged = shared + Tile::out_at + group * panel;

  for (int c = 0; c < chunks; ++c) {
    unsigned char* here = pipeline.wait(c);
    const int n = min(chunk, place.tokens - c * chunk);
    if (n < chunk) {
      ssd_clear_rows(here + Tile::k_at, N / 64, n, tid);
      ssd_clear_rows(here + Tile::x_at + group * panel, 1, n, tid);
      fence_shared_for_engines();
      named_barrier_sync(1 + group, 128);
    }
    const std::uint32_t x_tile = shared_address(here + Tile::x_at + group * panel);
    const std::uint64_t k_rows = panel_descriptor(shared_address(here + Tile::k_at));
    const std::uint64_t k_columns = panel_descriptor(shared_address(here + Tile::k_at), panel);
    const std::uint64_t q_rows = panel_descriptor(shared_address(here + Tile::q_at));
    const ssd_chunk_decays& now = *pipeline.decays(c, group);
    std::uint32_t x[chunk / 16][4], weighted[chunk / 16][4], before[N / 4];
    float out[chunk / 2], scores[chunk / 2];
    if constexpr (!Tile::states) {
      products_begin();
#pragma unroll
      for (int i = 0; i < N / 16; ++i) {
        warpgroup_product<chunk>::template run<false>(scores, advance(q_rows, Tile::key_at(i)),
                                                      advance(k_rows, Tile::key_at(i)), i > 0);
      }
      products_commit();
#pragma unroll
      for (int i = 0; i < N / 4; ++i)
        before[i] = pack_bf16(state[2 * i], state[2 * i + 1]);
    }
    ssd_load_transposed(x, x_tile, warp, lane);
    ssd_weigh(weighted, x, now, lane);
    const float total = now.total;
    product *= total;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      state[i] *= total;
    products_begin();
    if constexpr (!Tile::states) {
#pragma unroll
      for (int i = 0; i < N / 16; ++i) {
        warpgroup_product<chunk>::template run<false>(out, before + 4 * i,
                                                      advance(q_rows, Tile::key_at(i)), i > 0);
      }
      products_commit();
    }
#pragma unroll
    for (int i = 0; i < chunk / 16; ++i)
      warpgroup_product<N>::template run<true>(state, weighted[i], advance(k_columns, 2048 * i), 1);
    products_commit();
    if constexpr (!Tile::states) {
      products_wait<2>();
      pin(scores);
      ssd_mix(scores, now, d, warp, lane, mixed);
      products_wait<1>();
      pin(out);
#pragma unroll
      for (int i = 0; i < chunk / 8; ++i) {
        const float2 start =
            *reinterpret_cast<const float2*>(now.start + 8 * Tile::tokens_of(i) + 2 * (lane % 4));
        out[4 * i] *= start.x, out[4 * i + 1] *= start.y;
        out[4 * i + 2] *= start.x, out[4 * i + 3] *= start.y;
      }
      named_barrier_sync(1 + group, 128);
      ssd_multiply_mixed<Tile>(out, x, mixed, lane);
      ssd_stage_transposed(out, shared_address(staged), warp, lane);
    }
    products_wait<0>();
    pin(state);
    pipeline.release(c);
    if constexpr (!Tile::states) {
      named_barrier_sync(1 + group, 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 rows =
            *reinterpret_cast<const uint4*>(staged + swizzled(tid / 8 + 16 * i, tid % 8));
        if (tid / 8 + 16 * i < n && column_valid) {
          *reinterpret_cast<uint4*>(to + 16 * i * y.token) = rows;
        }
      }
      to += chunk * y.token;
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

template <class Tile>
__global__ __launch_bounds__(Tile::threads, Tile::blocks) void ssd_chunk_kernel(
    const ssd_arguments<bf16> p, const __grid_constant__ ssd_maps maps, const ssd_cut cut,
    const ssd_operand<bf16> y, const ssd_state_operand<const float> initial,
    const ssd_state_operand<float> final) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  if constexpr (Tile::states) let_next_kernel_start();
  const ssd_place place(p, cut, static_cast<int>(blockIdx.x), Tile::groups, cut.supers);
  if (Tile::states ? place.last : place.empty) return;
  const ssd_pipeline<Tile> pipeline(shared);
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == Tile::groups) {
    give_registers<Tile::fetch_registers>();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) % 128 / 32, 0);
    const int lane = threadIdx.x % 32;
    if (warp < Tile::groups) {
      const ssd_steps<bf16> steps(p, (place.lane + warp) / cut.parts);
      pipeline.decay(steps, place.first, place.tokens, warp, p.alpha, lane);
    } else if (warp == Tile::groups && lane == 0) {
      pipeline.copy(maps, p, static_cast<int>(place.first),
                    (place.tokens + Tile::chunk - 1) / Tile::chunk, place.lane, cut.parts);
    }
  } else {
    take_registers<Tile::registers>();
    ssd_compute(pipeline, p, cut, y, initial, final, shared, place, group);
  }
#else
  __trap();
#endif
}

template <int N, int Groups>
void ssd_forward_tiles(cudaStream_t stream, const ssd_problem<bf16>& p, const ssd_plan& plan,
                       const view<bf16, 3>& y, const ssd_states<bf16>& states, void* workspace) {
  const ssd_cut cut = plan.cut(p, workspace);
  const ssd_arguments<bf16> arguments(p);
  const ssd_operand<bf16> to(y, p.heads);
  const ssd_maps maps(p);
  const ssd_state_operand<const float> initial(states.initial);
  const ssd_state_operand<float> final(states.final);
  const index_t packs = cut.lanes / Groups;  // of lanes, a block each
  if (cut.supers > 1) {
    using tile = ssd_tile<N, Groups, true>;
    SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(
        ssd_chunk_kernel<tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, tile::bytes));
    const ssd_cut pieces = cut.of_pieces();
    const unsigned blocks = ssd_blocks(p.sequences * pieces.supers * packs);
    ssd_chunk_kernel<tile><<<blocks, tile::threads, tile::bytes, stream>>>(arguments, maps, pieces,
                                                                           to, initial, final);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
    if (!cut.folded) ssd_scan_states(stream, p, pieces, 64 * N);
  }
  using tile = ssd_tile<N, Groups, false>;
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(ssd_chunk_kernel<tile>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, tile::bytes));
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ssd_blocks(p.sequences * cut.supers * packs));
  config.blockDim = dim3(tile::threads);
  config.dynamicSmemBytes = tile::bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = cut.supers > 1 ? 1 : 0;
  SSMLIB_CHECK_CUDA(cudaLaunchKernelEx(&config, ssd_chunk_kernel<tile>, arguments, maps, cut, to,
                                       initial, final));
}

template <int N>
void ssd_forward_of(cudaStream_t stream, const ssd_problem<bf16>& p, const ssd_plan& plan,
                    const view<bf16, 3>& y, const ssd_states<bf16>& states, void* workspace) {
  const auto run = [&](auto launch) { launch(stream, p, plan, y, states, workspace); };
  if (plan.kernels == rung::sm_90a) {
    plan.groups == 2 ? run(ssd_forward_tiles<N, 2>) : run(ssd_forward_tiles<N, 1>);
  } else {
    plan.groups == 2 ? run(ssd_mma_forward<N, 2>) : run(ssd_mma_forward<N, 1>);
  }
}

}  // namespace detail

template <class T>
std::size_t ssd_forward_workspace_bytes(const ssd_problem<T>& p) {
  if constexpr (std::is_same_v<T, bf16>) return detail::ssd_plan::of(p).workspace_bytes(p);
  return 0;
}

template <class T>
void ssd_forward(cudaStream_t stream, const ssd_problem<T>& p, view<T, 3> y,
                 const ssd_states<T>& states, void* workspace) {
  detail::ssd_check(p);
  detail::ssd_check_tokens("y", y, p.q.extent(0));
  if (y.extent(1) != p.heads || y.extent(2) != p.features()) {
    detail::ssd_fail("y is " + to_string(y.extents) + ", wanted (tokens x " +
                     std::to_string(p.heads) + " x " + std::to_string(p.features()) + ")");
  }
  detail::ssd_check_state(p, "the initial state", states.initial);
  detail::ssd_check_state(p, "the final state", states.final);
  if (p.sequences == 0 || p.heads == 0) return;
  if constexpr (std::is_same_v<T, bf16>) {
    const detail::ssd_plan plan = detail::ssd_plan::of(p);
    if (plan.kernels != rung::general && detail::ssd_aligned(view<const bf16, 3>(y))) {
      return plan.keys == 64 ? detail::ssd_forward_of<64>(stream, p, plan, y, states, workspace)
                             : detail::ssd_forward_of<128>(stream, p, plan, y, states, workspace);
    }
  }
  detail::ssd_forward_general(stream, p, y, states);
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_ssd, std::size_t ssd_forward_workspace_bytes<T>(const ssd_problem<T>&)); \
  SSMLIB_INSTANTIATE(cuda_ssd, void ssd_forward<T>(cudaStream_t, const ssd_problem<T>&,            \
                                                   view<T, 3>, const ssd_states<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
