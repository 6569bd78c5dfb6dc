#pragma once

#include <ssmlib/kernels/cuda/skinny_parts.cuh>

/// @file
/// The product for up to 8 rows: a block makes f(x) in shared memory, then streams weights past it.

namespace ssm::kernels::cuda::detail {

/// Bytes of shared memory: the rings of eight warps, f(x), the chains' sums, the rows' squares.
[[nodiscard]] inline std::size_t stream_shared_bytes(int depth, int m, int k) {
  return static_cast<std::size_t>(8 * depth * 2048 + m * 2 * 64 * skinny_units(k) +
                                  skinny_chains * 128 * 4 + 64 * 4);
}

/// Sixteen rows of w, 64 columns, as a warp copies and reads them: two halves of 32 columns, in
/// the second neighbouring rows exchanged, so that no two lanes of a phase meet in a bank.
[[nodiscard]] SSMLIB_DEVICE int weight_place(int half, int row) {
  return half * 1024 + (row ^ half) * 64;
}

/// Warp w works for chain w on the tiles (16 rows of w) of its block.
///
/// A warp's ring holds the next Depth - 1 units of its chain, over the borders of tiles; the first
/// of them are on their way before the kernel ahead has finished.
template <int Rows, int Depth, class X, class Y>
__global__ void __launch_bounds__(skinny_threads, 2)
    skinny_stream_kernel(const skinny_arguments<X, bf16, Y> a) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int chain = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* const ring = shared + chain * Depth * 2048;
  unsigned char* const xs = shared + 8 * Depth * 2048;
  float* const sums = reinterpret_cast<float*>(xs + a.m * 2 * 64 * skinny_units(a.k));
  float* const squares = sums + skinny_chains * 128;
  const int tiles = (a.n + 15) / 16, step = gridDim.x;
  const int units = units_of_chain(a.k, chain);

  // The next unit to copy, and this lane's place in it: four rows, 16 bytes each.
  const int copy_row = lane / 8, copy_chunk = lane % 8, copy_half = copy_chunk / 4;
  int copy_tile = blockIdx.x, copy_unit = 0, copy_slot = 0;
  const auto copy_next = [&]() {
    if (copy_tile < tiles && units > 0) {
      const int column = (copy_unit * skinny_chains + chain) * skinny_unit + copy_chunk * 8;
      const bf16* const from = a.w + index_t{copy_tile * 16 + copy_row} * a.w_step + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = copy_row + 4 * i;
        const bool valid = copy_tile * 16 + row < a.n && column < a.k;
        copy_async_16(ring + copy_slot * 2048 + weight_place(copy_half, row) + copy_chunk % 4 * 16,
                      valid ? from + 4 * i * a.w_step : a.w, valid);
      }
      if (++copy_unit == units) copy_unit = 0, copy_tile += step;
      if (++copy_slot == Depth) copy_slot = 0;
    }
    commit_copies();
  };
  if (!a.early) wait_for_kernel_ahead();
  for (int s = 0; s < Depth - 1; ++s)
    copy_next();
  // While the memory rests before x is there, it may bring more weights nearer.
  if (a.early && threadIdx.x < 16) {
    constexpr int budget = 96 * 1024, in_ring = (Depth - 1) * skinny_chains * skinny_unit;
    int column = min(a.k, in_ring);
    int left = budget;
    for (int tile = blockIdx.x; tile < tiles && left > 0; tile += step, column = 0) {
      const int count = min(a.k - column, left / 32);
      const int row = tile * 16 + threadIdx.x;
      if (count >= 8 && row < a.n) bring_to_cache(a.w + row * a.w_step + column, count / 8 * 16);
      left -= max(count, 1) * 32;
    }
    for (int c = 64 * threadIdx.x; a.norm_weight != nullptr && c + 64 <= a.k; c += 64 * 16)
      bring_to_cache(a.norm_weight + c, 256);
  }

  wait_for_kernel_ahead();
  // Early, so that the next product is in place when this one ends.
  let_next_kernel_start();
  const auto place = [&](int row, int column) {
    return reinterpret_cast<uint4*>(xs + (column / 32 * a.m + row) * 64 + column % 32 * 2);
  };
  make_rows<Rows>(a, 0, a.m, squares,
                  [&](int row, int column, uint4 bits) { *place(row, column) = bits; });
  for (int i = threadIdx.x; i < a.m * (skinny_units(a.k) * skinny_unit - a.k) / 8;
       i += skinny_threads) {
    *place(i % a.m, a.k + i / a.m * 8) = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  const int g = lane / 4, t = lane % 4;
  const unsigned char* const x_lane = xs + min(g, a.m - 1) * 64 + t * 16;
  const int out_row = threadIdx.x % 16, out_column = threadIdx.x / 16;
  const float scale = a.scaled_last() && out_column < a.m
                          ? row_scale(squares + out_column * 8, a.k, a.epsilon)
                          : 1.0f;
  int slot = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += step) {
    const int j = tile * 16 + out_row;
    const bool mine = out_column < a.m && j < a.n;
    float bias = 0, residual = 0;
    if (mine && a.bias != nullptr) bias = a.bias[j];
    if (mine && a.residual != nullptr) {
      residual = widen(a.residual[out_column * a.residual_step + j]);
    }
    float dot[4] = {};
    for (int u = 0; u < units; ++u) {
      wait_copies<Depth - 2>();
      __syncwarp();
      copy_next();
      const unsigned char* const weights = ring + slot * 2048 + t * 16;
      uint4 low[2], high[2], x[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int block = (u * skinny_chains + chain) * 2 + half;
        low[half] = shared_16(weights + weight_place(half, g));
        high[half] = shared_16(weights + weight_place(half, g + 8));
        x[half] = shared_16(x_lane + block * a.m * 64);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_first_half(dot, low[half], high[half], x[half]);
        multiply_second_half(dot, low[half], high[half], x[half]);
      }
      if (++slot == Depth) slot = 0;
    }
    float* const to = sums + chain * 128 + g * 8 + 2 * t;
    *reinterpret_cast<float2*>(to) = make_float2(dot[0], dot[1]);
    *reinterpret_cast<float2*>(to + 64) = make_float2(dot[2], dot[3]);
    __syncthreads();
    if (mine) {
      const float* const from = sums + out_row * 8 + out_column;
      float value = from[0];
#pragma unroll
      for (int c = 1; c < skinny_chains; ++c)
        value += from[c * 128];
      a.y[out_column * a.y_step + j] = narrow<Y>(a.finished(value, scale, bias, residual));
    }
    __syncthreads();
  }
}

}  // namespace ssm::kernels::cuda::detail
