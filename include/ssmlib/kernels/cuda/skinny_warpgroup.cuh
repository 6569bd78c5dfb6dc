#pragma once

#include <ssmlib/kernels/cuda/hopper.cuh>
#include <ssmlib/kernels/cuda/skinny_parts.cuh>

#include <algorithm>

/// @file
/// The product for 9 to 64 rows: rows of x are the 64 rows of warpgroup products, rows of w their
/// columns, both straight from shared memory. A cluster of Split blocks divides the chains of its
/// rows of w, so that f(x) is read by a part a block; the sums meet in shared memory.

namespace ssm::kernels::cuda::detail {

/// Two warpgroups multiply; a thread of them starts the copies, since a further warp would leave no
/// registers to the kernel that packs the rows of the next product.
inline constexpr int warpgroup_threads = 2 * 128;

/// skinny_arguments with the weights as boxes.
template <class Y>
struct warpgroup_arguments {
  skinny_arguments<bf16, bf16, Y> a;
  CUtensorMap weights;
  int depth;         // stages of the ring
  int early_stages;  // of them, whose weights are asked for before f(x) is there
  int packed_rows;   // of f(x) in the workspace
  int pass_rows;     // of w that a cluster works on at once, a multiple of 8
  int box_rows;      // of w in a stage, at least pass_rows
  bool pairs;        // neighbours of y and of the residual can be touched at once
  // Shared memory: stages of f(x) and w, the sums of other blocks, barriers.
  int stage_bytes, sums_at, barriers_at, shared_bytes;
};

SSMLIB_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
SSMLIB_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// The place of this block's shared address in the block of `rank`.
SSMLIB_DEVICE std::uint32_t cluster_address(const void* shared, int rank) {
  std::uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(shared)), "r"(rank));
  return there;
}
SSMLIB_DEVICE float4 load_cluster_16(std::uint32_t there) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}
/// One block of a cluster. Each warpgroup has N rows of w of a pass.
template <int Split, int N, class Y>
class warpgroup_skinny {
 public:
  SSMLIB_DEVICE warpgroup_skinny(const warpgroup_arguments<Y>& p, unsigned char* shared)
      : p_(p), a_(p.a), shared_(shared), rank_(static_cast<int>(blockIdx.x % Split)) {
    const index_t clusters = gridDim.x / Split, cluster = blockIdx.x / Split;
    const index_t pairs = (index_t{a_.n} + 1) / 2;
    begin_ = static_cast<int>(2 * (pairs * cluster / clusters));
    end_ = static_cast<int>(min(2 * (pairs * (cluster + 1) / clusters), index_t{a_.n}));
  }

  SSMLIB_DEVICE void run() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < p_.depth; ++s) {
        barrier_init(full(s), 1);
        barrier_init(empty(s), warpgroup_threads / 32 * arrivals_a_warp);
      }
      barrier_init_done();
      start_copies();
    }
    __syncthreads();
    wait_for_kernel_ahead();
    let_next_kernel_start();
    const int group = threadIdx.x / 128;
    // The second group's rows of w end where the pass ends; those that the first has are idle.
    start_ = group == 0 ? 0 : max(0, p_.pass_rows - N);
    float scale[2];
    load_scales(scale);
    for (int tile = begin_; tile < end_; tile += p_.pass_rows) {
      float half[N / 2], dot[N / 2];
#pragma unroll 1
      for (int c = 0; c < chains; ++c) {
        chain(rank_ * chains + c, dot);
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
          half[i] = c == 0 ? dot[i] : half[i] + dot[i];
      }
      if (tile > begin_) cluster_wait();  // the sums of the pass before have been read
      keep(group, half);
      cluster_arrive();
      cluster_wait();
      finish(tile, scale);
      cluster_arrive();
    }
    cluster_wait();  // no block leaves while its sums are read
  }

 private:
  static constexpr int chains = skinny_chains / Split;  // of a block
  static_assert(chains == 1 || chains == skinny_chains / 2, "a half of the chains, or one");

  [[nodiscard]] SSMLIB_DEVICE std::uint64_t* full(int slot) const {
    return reinterpret_cast<std::uint64_t*>(shared_ + p_.barriers_at) + slot;
  }
  [[nodiscard]] SSMLIB_DEVICE std::uint64_t* empty(int slot) const {
    return full(p_.depth + slot);
  }

  SSMLIB_DEVICE void load_weights(int slot, int tile, int unit) const {
    barrier_arrive_expect(full(slot), p_.stage_bytes);
    load_box(shared_ + slot * p_.stage_bytes + p_.packed_rows * 128, &p_.weights, full(slot),
             unit * skinny_unit, 0, tile, 0);
  }
  SSMLIB_DEVICE void load_rows(int slot, int unit) const {
    const int bytes = p_.packed_rows * 128;
    load_bulk(shared_ + slot * p_.stage_bytes,
              static_cast<const unsigned char*>(a_.packed) + index_t{unit} * bytes, bytes,
              full(slot));
  }
  /// Fills the ring. Weights may come before the kernel ahead is done, f(x) not.
  SSMLIB_DEVICE void start_copies() {
    if (!a_.early) wait_for_kernel_ahead();
    first_ = chain_begin(a_.k, rank_ * chains);
    last_ = chain_begin(a_.k, (rank_ + 1) * chains);
    copy_tile_ = first_ == last_ ? end_ : begin_, copy_unit_ = first_;
    int count = 0;
    for (; count < p_.early_stages && copy_tile_ < end_; ++count) {
      load_weights(count, copy_tile_, copy_unit_);
      next_copy();
    }
    wait_for_kernel_ahead();
    for (int i = 0, unit = first_; i < count; ++i) {
      load_rows(i, unit);
      if (++unit == last_) unit = first_;
    }
    for (; count < p_.depth && copy_tile_ < end_; ++count) {
      load_weights(count, copy_tile_, copy_unit_);
      load_rows(count, copy_unit_);
      next_copy();
    }
  }
  SSMLIB_DEVICE void next_copy() {
    if (++copy_unit_ == last_) copy_unit_ = first_, copy_tile_ += p_.pass_rows;
  }
  /// Fills the place that is the next to be empty.
  SSMLIB_DEVICE void copy() {
    if (copy_tile_ >= end_) return;
    barrier_wait(empty(copy_slot_), copy_parity_);
    load_weights(copy_slot_, copy_tile_, copy_unit_);
    load_rows(copy_slot_, copy_unit_);
    next_copy();
    if (++copy_slot_ == p_.depth) copy_slot_ = 0, copy_parity_ ^= 1;
  }

  SSMLIB_DEVICE void chain(int index, float (&dot)[N / 2]) {
    const int units = chain_begin(a_.k, index + 1) - chain_begin(a_.k, index);
    if (units == 0) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        dot[i] = 0.0f;
    }
    for (int u = 0; u < units; ++u) {
      barrier_wait(full(slot_), parity_);
      const std::uint32_t stage = shared_address(shared_ + slot_ * p_.stage_bytes);
      const std::uint64_t x = panel_descriptor(stage);
      const std::uint64_t w = panel_descriptor(stage + (p_.packed_rows + start_) * 128);
      products_begin();
#pragma unroll
      for (int k = 0; k < skinny_unit / 16; ++k) {
        warpgroup_product<N>::template run<false>(dot, advance(x, 32 * k), advance(w, 32 * k),
                                                  u + k > 0);
      }
      products_commit();
      // One unit is multiplied while the next one's products are asked for.
      if (u > 0) {
        products_wait<1>();
        release(slot_ == 0 ? p_.depth - 1 : slot_ - 1);
      }
      if (u == units - 1) {
        products_wait<0>();
        release(slot_);
      }
      // A unit late, when the other group has most likely left the place too.
      if (threadIdx.x == 0 && used_++ > 1) copy();
      __syncwarp();
      if (++slot_ == p_.depth) slot_ = 0, parity_ ^= 1;
    }
    pin(dot);
  }
  SSMLIB_DEVICE void release(int slot) const {
    barrier_arrive_warp(empty(slot));
  }

  /// The first of a fragment's two rows of x, which are eight apart.
  [[nodiscard]] static SSMLIB_DEVICE int row_of(int fragment) {
    return fragment / 32 * 16 + fragment % 32 / 4;
  }
  SSMLIB_DEVICE void load_scales(float (&scale)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(threadIdx.x % 128) + 8 * r;
      scale[r] = a_.scaled_last() && row < a_.m ? a_.scales[row] : 1.0f;
    }
  }
  /// Where four sums of an eight of rows of w lie: those of a thread's fragment.
  [[nodiscard]] SSMLIB_DEVICE unsigned char* place(int eight, int fragment) const {
    return shared_ + p_.sums_at + eight * 2048 + fragment * 16;
  }
  SSMLIB_DEVICE void keep(int group, const float (&half)[N / 2]) const {
    unsigned char* const to = place(start_ / 8, threadIdx.x % 128);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      if (group == 0 || start_ + 8 * j >= N) {
        *reinterpret_cast<float4*>(to + j * 2048) =
            make_float4(half[4 * j], half[4 * j + 1], half[4 * j + 2], half[4 * j + 3]);
      }
    }
  }
  /// Adds the blocks' sums in the order of skinny_parts and writes this block's eights.
  SSMLIB_DEVICE void finish(int tile, const float (&scale)[2]) const {
    const int share = (p_.pass_rows / 8 + Split - 1) / Split, group = threadIdx.x / 128;
    const int fragment = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int row = row_of(fragment);
    const int last = min((rank_ + 1) * share, p_.pass_rows / 8);
#pragma unroll 3
    for (int eight = rank_ * share + group; eight < last; eight += 2) {
      const float4 sum = added(place(eight, fragment));
      const int column = tile + eight * 8 + lane % 4 * 2;
      if (row < a_.m) put(row, column, scale[0], sum.x, sum.y);
      if (row + 8 < a_.m) put(row + 8, column, scale[1], sum.z, sum.w);
    }
  }
  [[nodiscard]] SSMLIB_DEVICE float4 added(const unsigned char* sums) const {
    float4 part[Split];
#pragma unroll
    for (int s = 0; s < Split; ++s)
      part[s] = load_cluster_16(cluster_address(sums, s));
    constexpr int blocks = Split / 2;  // of a half of the chains
    float4 halves[2] = {part[0], part[blocks]};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int s = 1; s < blocks; ++s) {
        const float4 more = part[h * blocks + s];
        halves[h] = make_float4(halves[h].x + more.x, halves[h].y + more.y, halves[h].z + more.z,
                                halves[h].w + more.w);
      }
    }
    return make_float4(halves[0].x + halves[1].x, halves[0].y + halves[1].y,
                       halves[0].z + halves[1].z, halves[0].w + halves[1].w);
  }
  /// Columns j and j + 1 of row i of y.
  SSMLIB_DEVICE void put(int i, int j, float scale, float first, float second) const {
    if (j >= end_) return;
    Y* const y = a_.y + i * a_.y_step + j;
    const Y* const residual =
        a_.residual != nullptr ? a_.residual + i * a_.residual_step + j : nullptr;
    const bool both = j + 1 < end_;
    float bias[2] = {}, more[2] = {};
    if (a_.bias != nullptr) {
      bias[0] = a_.bias[j];
      if (both) bias[1] = a_.bias[j + 1];
    }
    if (p_.pairs && both) {
      if (residual != nullptr) load_two(residual, more);
      store_two(y, a_.finished(first, scale, bias[0], more[0]),
                a_.finished(second, scale, bias[1], more[1]));
      return;
    }
    if (residual != nullptr) {
      more[0] = widen(residual[0]);
      if (both) more[1] = widen(residual[1]);
    }
    y[0] = narrow<Y>(a_.finished(first, scale, bias[0], more[0]));
    if (both) y[1] = narrow<Y>(a_.finished(second, scale, bias[1], more[1]));
  }
  static SSMLIB_DEVICE void load_two(const float* p, float (&v)[2]) {
    const float2 pair = *reinterpret_cast<const float2*>(p);
    v[0] = pair.x, v[1] = pair.y;
  }
  static SSMLIB_DEVICE void load_two(const bf16* p, float (&v)[2]) {
    const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(p);
    v[0] = __uint_as_float(pair << 16), v[1] = __uint_as_float(pair & 0xffff0000u);
  }
  static SSMLIB_DEVICE void store_two(float* p, float first, float second) {
    *reinterpret_cast<float2*>(p) = make_float2(first, second);
  }
  static SSMLIB_DEVICE void store_two(bf16* p, float first, float second) {
    *reinterpret_cast<std::uint32_t*>(p) = pack_bf16(first, second);
  }

  const warpgroup_arguments<Y>& p_;
  const skinny_arguments<bf16, bf16, Y>& a_;
  unsigned char* shared_;
  int rank_, begin_, end_;
  int start_ = 0, slot_ = 0, parity_ = 0;
  // Of the thread that copies: the block's units, the next copy, and the units multiplied.
  int first_ = 0, last_ = 0, copy_tile_ = 0, copy_unit_ = 0, copy_slot_ = 0, copy_parity_ = 0;
  int used_ = 0;
};

template <int Split, int N, class Y>
__global__ void __launch_bounds__(warpgroup_threads)
    skinny_warpgroup_kernel(const __grid_constant__ warpgroup_arguments<Y> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  warpgroup_skinny<Split, N, Y>(p, shared).run();
#endif
}

template <int Split, int N, class Y>
void launch_warpgroups(cudaStream_t stream, warpgroup_arguments<Y> p, int clusters) {
  p.box_rows = std::max(p.pass_rows, N);
  p.stage_bytes = 128 * (p.packed_rows + p.box_rows);
  // Products read 64 rows of f(x), of the last stage too.
  const int sums = std::max(p.box_rows / 8 * 2048, 64 * 128 - p.stage_bytes);
  // The rest of a multiprocessor's memory is for a small kernel beside this one.
  constexpr int most = 208 * 1024;
  p.depth = std::clamp((most - sums - 256) / p.stage_bytes, 3, 8);
  p.early_stages = p.depth;
  p.sums_at = p.depth * p.stage_bytes;
  p.barriers_at = p.sums_at + sums;
  p.shared_bytes = p.barriers_at + 2 * p.depth * 8;
  const index_t step = p.a.n == 1 ? round_up(p.a.k, 8) : p.a.w_step;
  p.weights = box_map(p.a.w, {p.a.k, 1, p.a.n, 1}, {step, step, step * p.a.n}, p.box_rows);
  launch_overlapped(stream, skinny_warpgroup_kernel<Split, N, Y>, clusters * Split,
                    warpgroup_threads, p.shared_bytes, Split, p);
}

/// Clusters of eight blocks of the product that run at once: a cluster lies within one part of the
/// chip, so that some multiprocessors may form none.
template <class Y>
[[nodiscard]] int clusters_of_eight() {
  static const int count = [] {
    const auto kernel = skinny_warpgroup_kernel<8, 128, Y>;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 8;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(multiprocessors() / 8 * 8));
    config.blockDim = dim3(warpgroup_threads);
    config.dynamicSmemBytes = 200 * 1024;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int fitting = 0;
    SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(config.dynamicSmemBytes)));
    SSMLIB_CHECK_CUDA(cudaOccupancyMaxActiveClusters(&fitting, kernel, &config));
    return std::max(1, fitting);
  }();
  return count;
}

/// Launches the product of packed rows.
template <class Y>
void launch_warpgroup(cudaStream_t stream, const skinny_arguments<bf16, bf16, Y>& a,
                      int packed_rows) {
  warpgroup_arguments<Y> p{};
  p.a = a;
  p.packed_rows = packed_rows;
  const auto even = [](const Y* data, index_t step) {
    return reinterpret_cast<std::uintptr_t>(data) % (2 * sizeof(Y)) == 0 && step % 2 == 0;
  };
  p.pairs = even(a.y, a.y_step) && (a.residual == nullptr || even(a.residual, a.residual_step));
  const int pairs = a.n / 2 + a.n % 2;
  // Two blocks to a cluster read f(x) half a block, which is little beside many rows of w.
  const bool few = a.n < 64 * multiprocessors();
  const int clusters = std::min(few ? clusters_of_eight<Y>() : multiprocessors() / 2, pairs);
  // Sums of a half of the chains and of a chain are in registers at once where a block has four.
  const int rows = 2 * ((pairs + clusters - 1) / clusters), most = few ? 256 : 192;
  const int passes = (rows + most - 1) / most;
  p.pass_rows = ((rows + passes - 1) / passes + 7) / 8 * 8;
  if (!few) {
    launch_warpgroups<2, 96>(stream, p, clusters);
  } else if (p.pass_rows <= 64) {
    launch_warpgroups<8, 32>(stream, p, clusters);
  } else {
    p.pass_rows <= 192 ? launch_warpgroups<8, 96>(stream, p, clusters)
                       : launch_warpgroups<8, 128>(stream, p, clusters);
  }
}

}  // namespace ssm::kernels::cuda::detail
