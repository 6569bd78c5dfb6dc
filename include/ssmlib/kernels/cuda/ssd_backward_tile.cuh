#pragma once

#include <ssmlib/kernels/cuda/ssd_backward_general.cuh>
#include <ssmlib/kernels/cuda/ssd_tile.cuh>

#include <algorithm>

/// @file
/// The backward pass of the scalar-gated recurrence on the tensor cores, in two launches.
///
/// ssd_boundary_kernel walks every lane's chunks forward for the states at their starts, and
/// backward for the gradients of the states at their ends. ssd_gradient_kernel takes one chunk of
/// one group of keys and goes through the group's lanes: what they share, the gradients of q and k,
/// stays in registers.

namespace ssm::kernels::cuda::detail {

/// Two barriers a stage: full when what it holds has arrived, free when nobody reads it any more.
template <int Stages>
struct ssd_stages {
  std::uint64_t* at;

  /// A stage is full when the engine's bytes are there and `filling` warps have arrived.
  SSMLIB_DEVICE void start(int filling, int reading) const {
    for (int i = 0; i < Stages; ++i) {
      barrier_init(at + i, 1 + filling * arrivals_a_warp);
      barrier_init(at + Stages + i, reading * arrivals_a_warp);
    }
  }
  SSMLIB_DEVICE std::uint64_t* full(int c) const { return at + c % Stages; }
  SSMLIB_DEVICE std::uint64_t* free(int c) const { return at + Stages + c % Stages; }
  SSMLIB_DEVICE void wait_full(int c) const { barrier_wait(full(c), (c / Stages) & 1); }
  SSMLIB_DEVICE void wait_free(int c) const {
    if (c >= Stages) barrier_wait(free(c), (c / Stages - 1) & 1);
  }
};

/// The decays of a chunk of one lane, as the backward pass takes them.
struct __align__(16) ssd_backward_decays {
  float2 sum_and_weight[64];  // Lambda, weight; weight 0 past the end
  float start[64];            // alpha * 2^Lambda
  float end[64];              // 2^(total - Lambda)
  float total;                // 2^total
  float padding[3];

  /// A warp; lane l has loaded tokens 2 l and 2 l + 1, of which `n` are left in the sequence.
  SSMLIB_DEVICE void set(const ssd_steps<bf16>& steps, const ssd_raw_step<bf16>(&loaded)[2], int n,
                         float alpha, int lane) {
    float log_a[2] = {0.0f, 0.0f}, w[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * lane + i < n) {
        const ssd_step<float> s = steps.compute(loaded[i]);
        const float l = s.log_a * 1.4426950408889634f;
        log_a[i] = l < -256.0f ? -256.0f : l;
        w[i] = s.weight;
      }
    }
    float sum = log_a[0] + log_a[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += below;
    }
    const float all = __shfl_sync(0xffffffffu, sum, 31);
    float before = __shfl_up_sync(0xffffffffu, sum, 1);
    if (lane == 0) before = 0.0f;
    const float first = before + log_a[0];
    reinterpret_cast<float4*>(sum_and_weight)[lane] = {first, w[0], sum, w[1]};
    reinterpret_cast<float2*>(start)[lane] = {alpha * power_of_two(first),
                                              alpha * power_of_two(sum)};
    reinterpret_cast<float2*>(end)[lane] = {power_of_two(all - first), power_of_two(all - sum)};
    if (lane == 0) total = power_of_two(all);
  }
};

SSMLIB_DEVICE void ssd_load_steps(ssd_raw_step<bf16> (&to)[2], const ssd_steps<bf16>& steps,
                                  index_t t, int n, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (2 * lane + i < n) to[i] = steps.load(t + 2 * lane + i);
  }
}

/// The maps by which the copy engine reads operands, all in boxes of 64 tokens.
struct ssd_backward_maps {
  CUtensorMap q, k, x, dy;

  ssd_backward_maps(const ssd_problem<bf16>& p, const view<const bf16, 3>& dy_)
      : q(ssd_maps::map(p.q, 64)),
        k(ssd_maps::map(p.k, 64)),
        x(ssd_maps::map(p.x, 64)),
        dy(ssd_maps::map(dy_, 64)) {}
};

/// How the backward pass is cut, and where its intermediates lie.
struct ssd_backward_cut {
  int lanes, parts;    // lanes in all, lanes of a head
  int groups, splits;  // of q and k; blocks that share a group's lanes
  int chunks;          // of the longest sequence
  index_t tokens;      // rows of the operands
  bf16* images;        // (chunks of all sequences, lanes, 2, 64 * keys): state, gradient
  float *q, *k;        // (splits, tokens, groups, keys), with more than one split
  ssd_token_sums<float> sums;

  /// The state's image of chunk c of sequence s, which begins with token `begin`; the gradient's
  /// follows it.
  template <int N>
  SSMLIB_DEVICE bf16* image(index_t begin, int s, int c, int v) const {
    return images + ((begin / 64 + s + c) * lanes + v) * index_t{2 * 64 * N};
  }
};

/// A block of ssd_boundary_kernel: a warpgroup that computes and one that fetches.
template <int N>
struct ssd_boundary_tile {
  static constexpr int threads = 256, stages = 3, panel_bytes = 64 * 128;
  static constexpr int key_bytes = N / 64 * panel_bytes, x_at = key_bytes;
  static constexpr int stage_bytes = key_bytes + panel_bytes;
  static constexpr int image_at = stages * stage_bytes, decays_at = image_at + key_bytes;
  static constexpr int barriers_at =
      decays_at + stages * static_cast<int>(sizeof(ssd_backward_decays));
  static constexpr int bytes = barriers_at + 2 * stages * 8;
};

/// Writes the transposed state (64 x N) as the image of a swizzled tile: a warp its 16 rows.
template <int N>
SSMLIB_DEVICE void ssd_stage_image(const float (&state)[N / 2], unsigned char* image, int warp,
                                   int lane) {
  __syncwarp();
#pragma unroll
  for (int j = 0; j < N / 8; j += 2) {
    const std::uint32_t at =
        shared_address(image + j / 8 * 8192) + swizzled(16 * warp + lane % 16, j % 8 + lane / 16);
    store_matrix_x4(at, pack_bf16(state[4 * j], state[4 * j + 1]),
                    pack_bf16(state[4 * j + 2], state[4 * j + 3]),
                    pack_bf16(state[4 * j + 4], state[4 * j + 5]),
                    pack_bf16(state[4 * j + 6], state[4 * j + 7]));
  }
  __syncwarp();
}

/// A warp's rows of the image, 2048 bytes of each panel, to global memory.
template <int N>
SSMLIB_DEVICE void ssd_write_image(bf16* to, const unsigned char* image, int warp, int lane) {
  auto* at = reinterpret_cast<unsigned char*>(to);
#pragma unroll
  for (int e = 0; e < N / 16; ++e) {
    const int place = warp * 2048 + lane * 16 + e / 4 * 8192 + e % 4 * 512;
    *reinterpret_cast<uint4*>(at + place) = *reinterpret_cast<const uint4*>(image + place);
  }
}

/// x^T or dy^T with its tokens scaled for the state at the chunk's other end.
SSMLIB_DEVICE void ssd_weigh_boundary(std::uint32_t (&x)[4][4], const ssd_backward_decays& now,
                                      bool reverse, int lane) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const int t = 8 * b + 2 * (lane % 4);
    float2 w = *reinterpret_cast<const float2*>((reverse ? now.start : now.end) + t);
    if (!reverse) {
      const float4 weights = reinterpret_cast<const float4*>(now.sum_and_weight)[t / 2];
      w = {w.x * weights.y, w.y * weights.w};
    }
    const std::uint32_t pair = pack_bf16(w.x, w.y);
    x[b / 2][b % 2 * 2] = multiply_pairs(x[b / 2][b % 2 * 2], pair);
    x[b / 2][b % 2 * 2 + 1] = multiply_pairs(x[b / 2][b % 2 * 2 + 1], pair);
  }
}

template <int N>
SSMLIB_DEVICE void ssd_walk(const ssd_arguments<bf16>& p, const ssd_backward_cut& cut,
                            const ssd_stages<ssd_boundary_tile<N>::stages>& stages,
                            unsigned char* shared, const ssd_state_operand<const float>& from,
                            const ssd_state_operand<float>& to, int s, int v, bool reverse,
                            int tokens) {
  using tile = ssd_boundary_tile<N>;
  const int tid = threadIdx.x % 128, lane = tid % 32;
  const int warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int h = v / cut.parts, chunks = (tokens + 63) / 64;
  const index_t begin = p.begin(s);
  float state[N / 2];
  ssd_cut whole{};
  whole.parts = cut.parts, whole.supers = 1;
  ssd_start_state<N>(state, p, whole, from, s, 0, v, tid, false, true);
  for (int i = 0; i < chunks; ++i) {
    const int c = reverse ? chunks - 1 - i : i, n = min(64, tokens - 64 * c);
    unsigned char* here = shared + i % tile::stages * tile::stage_bytes;
    stages.wait_full(i);
    if (n < 64) {
      ssd_clear_rows(here, N / 64 + 1, n, tid);
      fence_shared_for_engines();
      named_barrier_sync(1, 128);
    }
    const auto& now = *reinterpret_cast<const ssd_backward_decays*>(
        shared + tile::decays_at + i % tile::stages * sizeof(ssd_backward_decays));
    std::uint32_t x[4][4];
    ssd_load_transposed(x, shared_address(here + tile::x_at), warp, lane);
    ssd_stage_image<N>(state, shared + tile::image_at, warp, lane);
    ssd_weigh_boundary(x, now, reverse, lane);
    const float total = now.total;
#pragma unroll
    for (int e = 0; e < N / 2; ++e)
      state[e] *= total;
    const std::uint64_t columns = panel_descriptor(shared_address(here), tile::panel_bytes);
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      warpgroup_product<N>::template run<true>(state, x[j], advance(columns, 2048 * j), 1);
    products_commit();
    ssd_write_image<N>(cut.image<N>(begin, s, c, v) + (reverse ? 64 * N : 0),
                       shared + tile::image_at, warp, lane);
    products_wait<0>();
    pin(state);
    barrier_arrive_warp(stages.free(i));
  }
  if (to.data != nullptr) {
    ssd_store_state<N>(state, to.at(s, h), to.row, v % cut.parts * 64, p, warp, lane);
  }
}

template <int N>
__global__ __launch_bounds__(256, 2) void ssd_boundary_kernel(
    const ssd_arguments<bf16> p, const __grid_constant__ ssd_backward_maps maps,
    const ssd_backward_cut cut, const ssd_state_operand<const float> initial,
    const ssd_state_operand<const float> d_final, const ssd_state_operand<float> d_initial) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using tile = ssd_boundary_tile<N>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int block = static_cast<int>(blockIdx.x), v = block % cut.lanes;
  const bool reverse = block / cut.lanes % 2 == 1;
  const int s = block / cut.lanes / 2, h = v / cut.parts;
  const index_t begin = p.begin(s);
  const int tokens = static_cast<int>(p.end(s) - begin), chunks = (tokens + 63) / 64;
  const ssd_stages<tile::stages> stages{
      reinterpret_cast<std::uint64_t*>(shared + tile::barriers_at)};
  if (threadIdx.x == 0) {
    stages.start(1, 4);
    barrier_init_done();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;
  if (warp < 4) {
    ssd_state_operand<const float> from = initial;
    if (reverse) from = d_final;
    ssd_state_operand<float> to = d_initial;
    if (!reverse) to.data = nullptr;
    ssd_walk<N>(p, cut, stages, shared, from, to, s, v, reverse, tokens);
  } else if (warp == 4) {
    const ssd_steps<bf16> steps(p, h);
    for (int i = 0; i < chunks; ++i) {
      const int c = reverse ? chunks - 1 - i : i;
      ssd_raw_step<bf16> loaded[2] = {};
      ssd_load_steps(loaded, steps, begin + 64 * c, tokens - 64 * c, lane);
      stages.wait_free(i);
      reinterpret_cast<ssd_backward_decays*>(shared + tile::decays_at)[i % tile::stages].set(
          steps, loaded, tokens - 64 * c, p.alpha, lane);
      barrier_arrive_warp(stages.full(i));
    }
  } else if (warp == 5 && lane == 0) {
    const CUtensorMap *keys = reverse ? &maps.q : &maps.k, *rows = reverse ? &maps.dy : &maps.x;
    const int group = h / p.q.heads_a_group;
    for (int i = 0; i < chunks; ++i) {
      const int c = reverse ? chunks - 1 - i : i, t = static_cast<int>(begin) + 64 * c;
      unsigned char* to = shared + i % tile::stages * tile::stage_bytes;
      stages.wait_free(i);
      barrier_arrive_expect(stages.full(i), tile::stage_bytes);
#pragma unroll
      for (int j = 0; j < N / 64; ++j)
        load_box(to + j * tile::panel_bytes, keys, stages.full(i), 64 * j, group, t, 0);
      load_box(to + tile::x_at, rows, stages.full(i), v % cut.parts * 64, h, t, 0);
    }
  }
#else
  __trap();
#endif
}

}  // namespace ssm::kernels::cuda::detail
