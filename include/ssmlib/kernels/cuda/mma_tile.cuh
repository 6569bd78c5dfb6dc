#pragma once

#include <ssmlib/kernels/cuda/mma.cuh>
#include <ssmlib/tensor/view.hpp>

#include <cstdint>

/// @file
/// Products of single warps on the sm_80 rung, with operands in tiles of shared memory whose rows
/// are padded by 16 bytes, so that eight rows lie in different banks.

namespace ssm::kernels::cuda {

/// Elements from row to row of a tile.
template <int Columns>
inline constexpr int tile_pitch = Columns + 8;

/// Four neighbours of a warp's product: what one instruction adds to.
template <int N>
SSMLIB_DEVICE float (&quad(float (&d)[N], int at))[4] {
  return reinterpret_cast<float(&)[4]>(d[at]);
}

/// Starts copies of Rows rows into a tile by Threads threads; zeros stand for rows from `rows` on
/// and for columns from `columns` on. All is in whole pieces of 16 bytes.
template <int Rows, int Columns, int Threads>
SSMLIB_DEVICE void load_tile_async(bf16* tile, const bf16* from, index_t step, int rows,
                                   int columns) {
  constexpr int pieces = Columns / 8;
#pragma unroll
  for (int i = 0; i < Rows * pieces; i += Threads) {
    const int n = i + static_cast<int>(threadIdx.x), row = n / pieces, column = n % pieces * 8;
    if (Rows * pieces % Threads != 0 && row >= Rows) break;
    const bool valid = row < rows && column < columns;
    copy_async_16(tile + row * tile_pitch<Columns> + column,
                  from + (valid ? row * step + column : 0), valid);
  }
}

/// s (16 x N) += a b^T for 16 rows of a, N rows of b, Columns columns of both. Layouts as
/// multiply_add_16x8x16's, column blocks of 8 one after the other.
template <int N, int Columns>
SSMLIB_DEVICE void multiply_tile_rows(float (&s)[N / 2], const bf16* a, const bf16* b) {
  constexpr int pitch = tile_pitch<Columns>;
  const int lane = threadIdx.x % 32;
  const std::uint32_t left = shared_address(a + lane % 16 * pitch + lane / 16 * 8);
  const std::uint32_t right =
      shared_address(b + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
#pragma unroll
  for (int i = 0; i < Columns / 16; ++i) {
    std::uint32_t x[4];
    load_matrix_x4(x, left + 32 * i);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      std::uint32_t y[4];
      load_matrix_x4(y, right + 32 * j * pitch + 32 * i);
      multiply_add_16x8x16(quad(s, 8 * j), x, y[0], y[1]);
      multiply_add_16x8x16(quad(s, 8 * j + 4), x, y[2], y[3]);
    }
  }
}

/// o (16 x Columns) += w b for w (16 x N) in registers and N rows of b.
template <int N, int Columns>
SSMLIB_DEVICE void accumulate_tile_rows(float (&o)[Columns / 2], const std::uint32_t (&w)[N / 4],
                                        const bf16* b) {
  constexpr int pitch = tile_pitch<Columns>;
  const int lane = threadIdx.x % 32;
  const std::uint32_t right = shared_address(b + lane % 16 * pitch + lane / 16 * 8);
#pragma unroll
  for (int i = 0; i < N / 16; ++i) {
    const auto& x = reinterpret_cast<const std::uint32_t(&)[4]>(w[4 * i]);
#pragma unroll
    for (int j = 0; j < Columns / 16; ++j) {
      std::uint32_t y[4];
      load_matrix_x4_transposed(y, right + 32 * i * pitch + 32 * j);
      multiply_add_16x8x16(quad(o, 8 * j), x, y[0], y[1]);
      multiply_add_16x8x16(quad(o, 8 * j + 4), x, y[2], y[3]);
    }
  }
}

}  // namespace ssm::kernels::cuda
