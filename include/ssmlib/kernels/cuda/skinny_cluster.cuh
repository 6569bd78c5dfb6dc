#pragma once

#include <ssmlib/kernels/cuda/skinny_parts.cuh>

#include <algorithm>

/// @file
/// The product for 9 to 64 rows: a cluster of eight blocks, each of which sums one chain, so that
/// f(x) is read from the second-level cache by an eighth a block; their sums meet in shared memory.

namespace ssm::kernels::cuda::detail {

/// Tiles (16 rows of w) that a cluster works on at once.
inline constexpr int cluster_tiles = 12, cluster_threads = 512;

/// skinny_arguments with `tiles` tiles of shared memory.
template <class Y>
struct cluster_arguments {
  skinny_arguments<bf16, bf16, Y> a;
  int tiles;
};

/// A stage of the ring is a unit, 64 columns, of the tiles and of f(x): two halves of 32 columns,
/// in the second of which neighbouring rows of a tile are exchanged, against bank conflicts.
template <int RowTiles>
[[nodiscard]] constexpr int cluster_stage_bytes(int tiles) {
  return tiles * 2048 + RowTiles * 1024;
}
template <int RowTiles>
[[nodiscard]] constexpr std::size_t cluster_shared_bytes(int depth, int tiles) {
  return static_cast<std::size_t>(depth * cluster_stage_bytes<RowTiles>(tiles) +
                                  tiles * 16 * RowTiles * 8 * 4);
}

SSMLIB_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
SSMLIB_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Sixteen bytes at this block's shared address, but in the block of `rank`.
SSMLIB_DEVICE float4 load_cluster_16(std::uint32_t address, int rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

/// Place of the eight columns of row tile `group` in the sums of a row of w: permuted, so that the
/// rows of a fragment meet different banks.
template <int RowTiles>
[[nodiscard]] SSMLIB_DEVICE int sums_place(int row, int group) {
  return row * (RowTiles * 8) + (group ^ (row & (RowTiles - 1))) * 8;
}

template <int RowTiles, int Depth, class Y>
class cluster_product {
 public:
  // Warps share the row tiles of x among them, and the tiles of w.
  static constexpr int row_parts = RowTiles < 4 ? RowTiles : 4;
  static constexpr int tile_parts = cluster_threads / 32 / row_parts;
  static constexpr int my_rows = RowTiles / row_parts;
  static constexpr int my_tiles = cluster_tiles / tile_parts + (cluster_tiles % tile_parts != 0);

  SSMLIB_DEVICE cluster_product(const cluster_arguments<Y>& p, unsigned char* shared)
      : a_(p.a),
        ring_(shared),
        stage_bytes_(cluster_stage_bytes<RowTiles>(p.tiles)),
        x_place_(p.tiles * 2048),
        pass_(p.tiles),
        sums_(reinterpret_cast<float*>(shared + Depth * stage_bytes_)),
        chain_(blockIdx.x % skinny_chains) {
    const index_t tiles = (a_.n + 15) / 16, clusters = gridDim.x / skinny_chains;
    const index_t cluster = blockIdx.x / skinny_chains;
    begin_ = static_cast<int>(tiles * cluster / clusters);
    end_ = static_cast<int>(tiles * (cluster + 1) / clusters);
    units_ = units_of_chain(a_.k, chain_);
    copy_tile_ = begin_;
  }

  SSMLIB_DEVICE void run() {
    // Weights may come before the kernel ahead is done, f(x) not: one group holds the first.
    if (!a_.early) wait_for_kernel_ahead();
    for (int s = 0; s < Depth - 1; ++s) {
      copy_weights();
      next_stage();
    }
    wait_for_kernel_ahead();
    let_next_kernel_start();
    copy_tile_ = begin_, copy_unit_ = 0, copy_slot_ = 0;
    for (int s = 0; s < Depth - 1; ++s) {
      copy_rows();
      next_stage();
      commit_copies();
    }
    const int passes = passes_of_all();
    for (int pass = 0, tile = begin_; pass < passes; ++pass, tile += pass_) {
      const int count = max(0, min(pass_, end_ - tile));
      float dot[my_tiles][my_rows][4] = {};
      for (int u = 0; u < (count > 0 ? units_ : 0); ++u) {
        wait_copies<Depth - 2>();
        __syncthreads();
        copy_weights();
        copy_rows();
        next_stage();
        commit_copies();
        multiply(count, dot);
        if (++slot_ == Depth) slot_ = 0;
      }
      if (pass > 0) cluster_wait();  // the sums of the pass before have been read
      keep(count, dot);
      cluster_arrive();
      cluster_wait();
      add_chains(tile, count);
      cluster_arrive();
    }
    cluster_wait();  // no block leaves while its sums are read
  }

 private:
  /// The same in every block of a cluster, and at least one.
  SSMLIB_DEVICE int passes_of_all() const { return max(1, (end_ - begin_ + pass_ - 1) / pass_); }

  [[nodiscard]] SSMLIB_DEVICE int unit_of_copy() const {
    return copy_unit_ * skinny_chains + chain_;
  }
  SSMLIB_DEVICE void copy_weights() {
    if (copy_tile_ >= end_ || units_ == 0) return;
    const int rows = min(pass_, end_ - copy_tile_) * 16;
    const int chunk = threadIdx.x % 8, half = chunk / 4;
    const int column = unit_of_copy() * skinny_unit + chunk * 8;
    unsigned char* const to =
        ring_ + copy_slot_ * stage_bytes_ + half * (x_place_ / 2) + chunk % 4 * 16;
    const bf16* const from = a_.w + index_t{copy_tile_} * 16 * a_.w_step + column;
#pragma unroll
    for (int i = 0; i < cluster_tiles * 16 / (cluster_threads / 8); ++i) {
      const int row = static_cast<int>(threadIdx.x) / 8 + i * (cluster_threads / 8);
      if (row < rows) {
        const bool valid = copy_tile_ * 16 + row < a_.n && column < a_.k;
        copy_async_16_line(to + (row ^ half) * 64, valid ? from + row * a_.w_step : a_.w, valid);
      }
    }
  }
  SSMLIB_DEVICE void copy_rows() {
    if (copy_tile_ >= end_ || units_ == 0) return;
    const auto* const from =
        static_cast<const unsigned char*>(a_.packed) + index_t{unit_of_copy()} * (RowTiles * 1024);
    unsigned char* const to = ring_ + copy_slot_ * stage_bytes_ + x_place_;
    for (int i = threadIdx.x * 16; i < RowTiles * 1024; i += cluster_threads * 16)
      copy_async_16(to + i, from + i);
  }
  SSMLIB_DEVICE void next_stage() {
    if (copy_tile_ >= end_ || units_ == 0) return;
    if (++copy_unit_ == units_) copy_unit_ = 0, copy_tile_ += pass_;
    if (++copy_slot_ == Depth) copy_slot_ = 0;
  }

  SSMLIB_DEVICE void multiply(int count, float (&dot)[my_tiles][my_rows][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const unsigned char* const stage = ring_ + slot_ * stage_bytes_ + lane % 4 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* const weights = stage + half * (x_place_ / 2) + (g ^ half) * 64;
      uint4 x[my_rows];
#pragma unroll
      for (int r = 0; r < my_rows; ++r) {
        const int row = (warp % row_parts * my_rows + r) * 8 + g;
        x[r] = shared_16(stage + x_place_ + (half * RowTiles * 8 + row) * 64);
      }
#pragma unroll
      for (int i = 0; i < my_tiles; ++i) {
        const int tile = warp / row_parts + tile_parts * i;
        if (tile < count) {
          const uint4 low = shared_16(weights + tile * 1024);
          const uint4 high = shared_16(weights + tile * 1024 + 512);
#pragma unroll
          for (int r = 0; r < my_rows; ++r)
            multiply_first_half(dot[i][r], low, high, x[r]);
#pragma unroll
          for (int r = 0; r < my_rows; ++r)
            multiply_second_half(dot[i][r], low, high, x[r]);
        }
      }
    }
  }
  SSMLIB_DEVICE void keep(int count, const float (&dot)[my_tiles][my_rows][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < my_tiles; ++i) {
      const int tile = warp / row_parts + tile_parts * i;
      if (tile < count) {
#pragma unroll
        for (int r = 0; r < my_rows; ++r) {
          const int row = tile * 16 + lane / 4, group = warp % row_parts * my_rows + r;
          float* const to = sums_ + lane % 4 * 2;
          *reinterpret_cast<float2*>(to + sums_place<RowTiles>(row, group)) =
              make_float2(dot[i][r][0], dot[i][r][1]);
          *reinterpret_cast<float2*>(to + sums_place<RowTiles>(row + 8, group)) =
              make_float2(dot[i][r][2], dot[i][r][3]);
        }
      }
    }
  }
  /// Every block adds the chains of an eighth of the elements, four rows of y at a time.
  SSMLIB_DEVICE void add_chains(int first_tile, int count) {
    const std::uint32_t base = shared_address(sums_);
    for (int i = chain_ * cluster_threads + threadIdx.x; i < count * 16 * RowTiles * 2;
         i += skinny_chains * cluster_threads) {
      const int row = i / (16 * RowTiles * 2) * 16 + i % 16, four = i / 16 % (RowTiles * 2);
      const std::uint32_t place = base + 4 * (sums_place<RowTiles>(row, four / 2) + four % 2 * 4);
      float4 sum = load_cluster_16(place, 0);
#pragma unroll
      for (int c = 1; c < skinny_chains; ++c) {
        const float4 more = load_cluster_16(place, c);
        sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
      }
      const int j = first_tile * 16 + row;
      if (j < a_.n) {
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = four * 4 + e;
          if (i < a_.m) {
            const float scale = a_.scaled_last() ? a_.scales[i] : 1.0f;
            const float bias = a_.bias != nullptr ? a_.bias[j] : 0.0f;
            const float residual =
                a_.residual != nullptr ? widen(a_.residual[i * a_.residual_step + j]) : 0.0f;
            a_.y[i * a_.y_step + j] = narrow<Y>(a_.finished(values[e], scale, bias, residual));
          }
        }
      }
    }
  }

  const skinny_arguments<bf16, bf16, Y>& a_;
  unsigned char* ring_;
  int stage_bytes_, x_place_, pass_;
  float* sums_;
  int chain_, begin_, end_, units_;
  int copy_tile_, copy_unit_ = 0, copy_slot_ = 0, slot_ = 0;
};

template <int RowTiles, int Depth, class Y>
__global__ void __launch_bounds__(cluster_threads)
    skinny_cluster_kernel(const cluster_arguments<Y> p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  cluster_product<RowTiles, Depth, Y>(p, shared).run();
#endif
}

/// Launches the product of packed rows.
template <int RowTiles, class Y>
void launch_cluster(cudaStream_t stream, const skinny_arguments<bf16, bf16, Y>& a) {
  constexpr int depth = 4;
  const auto kernel = skinny_cluster_kernel<RowTiles, depth, Y>;
  const int all = (a.n + 15) / 16;
  // A cluster lies within one part of the chip, so that some multiprocessors may form none.
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = skinny_chains;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(multiprocessors() / skinny_chains * skinny_chains));
  config.blockDim = dim3(cluster_threads);
  config.dynamicSmemBytes = cluster_shared_bytes<RowTiles>(depth, cluster_tiles);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int fitting = 0;
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(config.dynamicSmemBytes)));
  SSMLIB_CHECK_CUDA(cudaOccupancyMaxActiveClusters(&fitting, kernel, &config));
  const int clusters = std::max(1, std::min({multiprocessors() / skinny_chains, fitting, all}));
  const int share = (all + clusters - 1) / clusters;
  const int passes = (share + cluster_tiles - 1) / cluster_tiles;
  const int tiles = (share + passes - 1) / passes;
  launch_overlapped(stream, kernel, clusters * skinny_chains, cluster_threads,
                    cluster_shared_bytes<RowTiles>(depth, tiles), skinny_chains,
                    cluster_arguments<Y>{a, tiles});
}

}  // namespace ssm::kernels::cuda::detail
