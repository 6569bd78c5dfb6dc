#pragma once

#include <ssmlib/kernels/cuda/mma_tile.cuh>
#include <ssmlib/kernels/cuda/ssd_tile.cuh>

/// @file
/// What the kernels of the sm_80 rung share for scalar-gated recurrences: copies into the panels of
/// ssd_tile.cuh, and products of single warps with operands out of them.

namespace ssm::kernels::cuda::detail {

/// Starts copies of 64 rows into panels by Threads threads: row r of the operand is row `place(r)`
/// of the panels; zeros stand for rows from `rows` on and columns from `columns` on.
template <int Panels, int Threads, class Place>
SSMLIB_DEVICE void ssd_fetch_panels(unsigned char* to, const bf16* from, index_t step, int rows,
                                    int columns, Place place) {
  constexpr int at_once = Threads / 8;
  const int first = static_cast<int>(threadIdx.x) / 8, c = static_cast<int>(threadIdx.x) % 8;
  const bf16* at = from + first * step + 8 * c;
#pragma unroll
  for (int r = 0; r < 64; r += at_once, at += at_once * step) {
#pragma unroll
    for (int panel = 0; panel < Panels; ++panel) {
      const bool valid = first + r < rows && 64 * panel + 8 * c < columns;
      copy_async_16(to + panel * 8192 + swizzled(place(first + r), c),
                    valid ? at + 64 * panel : from, valid);
    }
  }
}
template <int Panels, int Threads>
SSMLIB_DEVICE void ssd_fetch_panels(unsigned char* to, const bf16* from, index_t step, int rows,
                                    int columns) {
  ssd_fetch_panels<Panels, Threads>(to, from, step, rows, columns, [](int r) { return r; });
}

/// Rows [row, row + 16) and columns 16 step.. of panels as a left operand.
SSMLIB_DEVICE void ssd_panel_left(std::uint32_t (&r)[4], std::uint32_t panel, int row, int step,
                                  int lane) {
  load_matrix_x4(r, panel + step / 4 * 8192 + swizzled(row + lane % 16, step % 4 * 2 + lane / 16));
}
/// The transpose of rows [row, row + 16) and columns 16 step.. as right operands: r[0..1] the first
/// eight rows, r[2..3] the others.
SSMLIB_DEVICE void ssd_panel_rows(std::uint32_t (&r)[4], std::uint32_t panel, int row, int step,
                                  int lane) {
  load_matrix_x4(r, panel + step / 4 * 8192 +
                        swizzled(row + lane % 8 + lane / 16 * 8, step % 4 * 2 + lane / 8 % 2));
}
/// Rows [row, row + 16) and columns 16 step.. as right operands: r[0..1] the first eight columns.
SSMLIB_DEVICE void ssd_panel_columns(std::uint32_t (&r)[4], std::uint32_t panel, int row, int step,
                                     int lane) {
  load_matrix_x4_transposed(
      r, panel + step / 4 * 8192 + swizzled(row + lane % 16, step % 4 * 2 + lane / 16));
}

/// d (16 x 64) += left (16 x 16 Steps) b^T for 64 rows of b in panels, of which blocks of 16 from
/// `first` to `last` are wanted. left(i, a) gives a, the i-th 16 columns.
template <int Steps, class Left>
SSMLIB_DEVICE void ssd_add_rows(float (&d)[32], Left left, std::uint32_t b, int lane, int first = 0,
                                int last = 3) {
#pragma unroll
  for (int i = 0; i < Steps; ++i) {
    std::uint32_t a[4], r[4];
    left(i, a);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < first || j > last) continue;  // the same for the warp
      ssd_panel_rows(r, b, 16 * j, i, lane);
      multiply_add_16x8x16(quad(d, 8 * j), a, r[0], r[1]);
      multiply_add_16x8x16(quad(d, 8 * j + 4), a, r[2], r[3]);
    }
  }
}

/// d (16 x N) += left (16 x 64) b for 64 rows of b in panels of N columns; blocks of 16 rows before
/// `first` and behind `last` count as zero.
template <int N>
SSMLIB_DEVICE void ssd_add_columns(float (&d)[N / 2], const std::uint32_t (&left)[4][4],
                                   std::uint32_t b, int lane, int first = 0, int last = 3) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < first || i > last) continue;
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      std::uint32_t r[4];
      ssd_panel_columns(r, b, 16 * i, j, lane);
      multiply_add_16x8x16(quad(d, 8 * j), left[i], r[0], r[1]);
      multiply_add_16x8x16(quad(d, 8 * j + 4), left[i], r[2], r[3]);
    }
  }
}

}  // namespace ssm::kernels::cuda::detail
