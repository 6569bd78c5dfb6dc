#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/gemm.hpp>

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int general_tile = 32;

/// A block of 32 x 8 threads has a tile of 32 x 32 of C; each thread four rows of a column.
template <class In, class Out>
__global__ void __launch_bounds__(256)
    gemm_general_kernel(const __grid_constant__ gemm_problem<In, Out> p, index_t row_tiles,
                        index_t column_tiles) {
  using real = typename gemm_problem<In, Out>::real;
  constexpr int tile = general_tile;
  __shared__ real a[tile][tile + 1], b[tile][tile + 1];
  const int x = static_cast<int>(threadIdx.x) % tile, y = static_cast<int>(threadIdx.x) / tile;
  const index_t m = p.c.extents[1], n = p.c.extents[2], k = p.a.extents[2];
  const index_t tiles = row_tiles * column_tiles * p.c.extents[0];
  for (index_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const index_t first_column = t % column_tiles * tile;
    const index_t first_row = t / column_tiles % row_tiles * tile;
    const index_t batch = t / column_tiles / row_tiles;
    const In* const from_a = p.a.data + batch * p.a.strides[0];
    const In* const from_b = p.b.data + batch * p.b.strides[0];
    real sums[4] = {};
    for (index_t first = 0; first < k; first += tile) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = y + 8 * r;
        const index_t row = first_row + at, inner = first + x;
        const index_t across = first + at, column = first_column + x;
        a[at][x] = row < m && inner < k
                       ? widen(from_a[row * p.a.strides[1] + inner * p.a.strides[2]])
                       : real(0);
        b[at][x] = across < k && column < n
                       ? widen(from_b[across * p.b.strides[1] + column * p.b.strides[2]])
                       : real(0);
      }
      __syncthreads();
#pragma unroll 8
      for (int i = 0; i < tile; ++i) {
        const real right = b[i][x];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          sums[r] += a[y + 8 * r][i] * right;
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const index_t row = first_row + y + 8 * r, column = first_column + x;
      if (row >= m || column >= n) continue;
      Out& c = p.c.data[batch * p.c.strides[0] + row * p.c.strides[1] + column * p.c.strides[2]];
      real sum = static_cast<real>(p.alpha) * sums[r];
      if (p.beta != 0) sum += static_cast<real>(p.beta) * widen(c);
      if (p.bias != nullptr) sum += widen(p.bias[column]);
      c = narrow<Out>(sum);
    }
  }
}

}  // namespace detail

template <class In, class Out>
void gemm_general(cudaStream_t stream, const gemm_problem<In, Out>& p) {
  detail::check_gemm(p);
  if (p.c.size() == 0) return;
  const index_t rows = (p.c.extent(1) + detail::general_tile - 1) / detail::general_tile;
  const index_t columns = (p.c.extent(2) + detail::general_tile - 1) / detail::general_tile;
  const auto blocks =
      static_cast<unsigned>(std::min<index_t>(rows * columns * p.c.extent(0), index_t{1} << 30));
  detail::gemm_general_kernel<In, Out><<<blocks, 256, 0, stream>>>(p, rows, columns);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

SSMLIB_INSTANTIATE(cuda_gemm,
                   void gemm_general<bf16, bf16>(cudaStream_t, const gemm_problem<bf16, bf16>&));
SSMLIB_INSTANTIATE(cuda_gemm,
                   void gemm_general<bf16, float>(cudaStream_t, const gemm_problem<bf16, float>&));
SSMLIB_INSTANTIATE(cuda_gemm, void gemm_general<float, float>(cudaStream_t,
                                                              const gemm_problem<float, float>&));
SSMLIB_INSTANTIATE(cuda_gemm,
                   void gemm_general<double, double>(cudaStream_t,
                                                     const gemm_problem<double, double>&));

}  // namespace ssm::kernels::cuda
