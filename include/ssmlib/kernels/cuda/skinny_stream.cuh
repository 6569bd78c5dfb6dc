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

/// Eight columns of a row of 64: chunks are permuted so that the rows of a matrix load meet
/// different banks.
[[nodiscard]] SSMLIB_DEVICE int chunk_place(int row, int chunk) {
  return row * 128 + (chunk ^ (row & 7)) * 16;
}

/// Warp w works for chain w on the tiles (up to 16 rows of w) of its block. Blocks have equal
/// shares of the rows, and cut them into equal tiles.
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
  const int begin = static_cast<int>(index_t{a.n} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(index_t{a.n} * (blockIdx.x + 1) / gridDim.x);
  const int tiles = (end - begin + 15) / 16, height = (end - begin + tiles - 1) / max(tiles, 1);
  const int first_unit = chain_begin(a.k, chain);
  const int units = chain_begin(a.k, chain + 1) - first_unit;

  // The next unit to copy, and this lane's place in it: four rows, 16 bytes each.
  const int copy_row = lane / 8, copy_chunk = lane % 8;
  int copy_tile = begin, copy_unit = 0, copy_slot = 0;
  const auto copy_next = [&]() {
    if (copy_tile < end && units > 0) {
      const int column = (first_unit + copy_unit) * skinny_unit + copy_chunk * 8;
      const int rows = min(height, end - copy_tile);
      const bool valid = column < a.k;
      const bf16* const from =
          valid ? a.w + index_t{copy_tile + copy_row} * a.w_step + column : a.w;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = copy_row + 4 * i;
        if (row < rows) {
          copy_async_16(ring + copy_slot * 2048 + chunk_place(row, copy_chunk),
                        valid ? from + 4 * i * a.w_step : from, valid);
        }
      }
      if (++copy_unit == units) copy_unit = 0, copy_tile += height;
      if (++copy_slot == Depth) copy_slot = 0;
    }
    commit_copies();
  };
  if (!a.early) wait_for_kernel_ahead();
  for (int s = 0; s < Depth - 1; ++s)
    copy_next();
  // While the memory rests before x is there, it may bring more weights nearer.
  if (a.early && threadIdx.x < 16 * skinny_chains) {
    const int its_chain = threadIdx.x / 16, row = threadIdx.x % 16;
    const int from = chain_begin(a.k, its_chain), to = chain_begin(a.k, its_chain + 1);
    int left = 128 * 1024 / (skinny_chains * 128), in_ring = Depth - 1;
    for (int tile = begin; tile < end && left > 0; tile += height, in_ring = 0) {
      const int rows = min(height, end - tile), first = from + in_ring;
      const int column = first * skinny_unit, count = min(to - first, left / rows) * skinny_unit;
      const int whole = min(count, a.k - column);
      if (row < rows && whole >= 8)
        bring_to_cache(a.w + (tile + row) * a.w_step + column, whole * 2);
      left -= rows * max(skinny_units(a.k) / skinny_chains - in_ring, 1);
    }
    for (int c = 64 * threadIdx.x; a.norm_weight != nullptr && c + 64 <= a.k;
         c += 64 * 16 * skinny_chains)
      bring_to_cache(a.norm_weight + c, 256);
  }

  wait_for_kernel_ahead();
  // Early, so that the next product is in place when this one ends.
  let_next_kernel_start();
  const auto place = [&](int row, int column) {
    return reinterpret_cast<uint4*>(xs + column / skinny_unit * a.m * 128 +
                                    chunk_place(row, column % skinny_unit / 8));
  };
  make_rows<Rows>(a, 0, a.m, squares,
                  [&](int row, int column, uint4 bits) { *place(row, column) = bits; });
  for (int i = threadIdx.x; i < a.m * (skinny_units(a.k) * skinny_unit - a.k) / 8;
       i += skinny_threads) {
    *place(i % a.m, a.k + i / a.m * 8) = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  // This lane's rows of the matrices of a load: of w, and of x where two instructions' come at
  // once.
  const int g = lane / 4, t = lane % 4;
  const int w_row = lane % 16, w_chunk = lane / 16, x_row = min(lane % 8, a.m - 1);
  const int out_row = threadIdx.x % 16, out_column = threadIdx.x / 16;
  const float scale = a.scaled_last() && out_column < a.m
                          ? row_scale(squares + out_column * 8, a.k, a.epsilon)
                          : 1.0f;
  int slot = 0;
  for (int tile = begin; tile < end; tile += height) {
    const int j = tile + out_row;
    const bool mine = out_column < a.m && out_row < height && j < end;
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
      const std::uint32_t weights = shared_address(ring + slot * 2048);
      const std::uint32_t rows = shared_address(xs + (first_unit + u) * a.m * 128);
      std::uint32_t w[4][4], x[2][4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        load_matrix_x4(w[k], weights + chunk_place(w_row, 2 * k + w_chunk));
#pragma unroll
      for (int k = 0; k < 2; ++k)
        load_matrix_x4(x[k], rows + chunk_place(x_row, 4 * k + lane / 8));
#pragma unroll
      for (int k = 0; k < 4; ++k)
        multiply_add_16x8x16(dot, w[k], x[k / 2][k % 2 * 2], x[k / 2][k % 2 * 2 + 1]);
      if (++slot == Depth) slot = 0;
    }
    float* const to = sums + chain * 128 + g * 8 + 2 * t;
    *reinterpret_cast<float2*>(to) = make_float2(dot[0], dot[1]);
    *reinterpret_cast<float2*>(to + 64) = make_float2(dot[2], dot[3]);
    __syncthreads();
    if (mine) {
      const float* const from = sums + out_row * 8 + out_column;
      float halves[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        halves[h] = from[h * (skinny_chains / 2) * 128];
#pragma unroll
        for (int c = 1; c < skinny_chains / 2; ++c)
          halves[h] += from[(h * (skinny_chains / 2) + c) * 128];
      }
      const float value = halves[0] + halves[1];
      a.y[out_column * a.y_step + j] = narrow<Y>(a.finished(value, scale, bias, residual));
    }
    __syncthreads();
  }
}

}  // namespace ssm::kernels::cuda::detail
