#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/mma.cuh>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

/// @file
/// The instructions of the sm_90a rung: barriers that count bytes, tiles through the tensor copy
/// engine, and products of a warpgroup (4 warps) with operands in shared memory.
///
/// Tiles lie in shared memory as panels of 64 columns of bf16: a panel is (rows x 128 bytes), its
/// 16-byte chunks permuted by the engine's 128-byte swizzle, and starts at a multiple of 1024
/// bytes.

namespace ssm::kernels::cuda {

// ------------------------------------------------------------------------------------ barriers

SSMLIB_DEVICE void barrier_init(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
/// Makes initialised barriers visible to the copy engine; a __syncthreads() must follow.
SSMLIB_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SSMLIB_DEVICE void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Racecheck follows a barrier only by the threads that arrive at it themselves: a build to be run
/// under it defines SSMLIB_RACECHECK, and every lane arrives where otherwise one does for its warp.
#ifdef SSMLIB_RACECHECK
inline constexpr int arrivals_a_warp = 32;
#else
inline constexpr int arrivals_a_warp = 1;
#endif
/// A whole warp: says that what its lanes have done is done. It counts as `arrivals_a_warp`.
/// __syncwarp() orders the lanes' accesses before the arrival of the one, which releases them: that
/// is cumulative.
SSMLIB_DEVICE void barrier_arrive_warp(std::uint64_t* barrier) {
  __syncwarp();
  if (arrivals_a_warp == 32 || threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
SSMLIB_DEVICE void barrier_arrive_expect(std::uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Waits until the phase of this parity has ended; a fresh barrier is past parity 1.
SSMLIB_DEVICE void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
/// Barrier `id` (1 to 15) of the block among `threads` threads, all of the same warps.
SSMLIB_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SSMLIB_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Orders this thread's ordinary writes to shared memory before later reads by the tensor cores
/// and the copy engine; a barrier among the threads must follow.
SSMLIB_DEVICE void fence_shared_for_engines() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int Registers>
SSMLIB_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
SSMLIB_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ------------------------------------------------------------------------- tensor copy engine

/// Starts the copy of one box at (c0, c1, c2, c3), innermost first; elements outside the tensor
/// arrive as zeros and count as bytes.
SSMLIB_DEVICE void load_box(void* shared, const CUtensorMap* map, std::uint64_t* barrier, int c0,
                            int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
/// Starts a copy of `bytes` contiguous bytes; both addresses and the size are multiples of 16.
SSMLIB_DEVICE void load_bulk(void* shared, const void* global, int bytes, std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
SSMLIB_DEVICE void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// The map of a bf16 tensor (d3, d2, d1, d0), innermost stride 1, in boxes of 64 columns by
/// `rows` along dimension 2, with the 128-byte swizzle. Strides are in elements.
inline CUtensorMap box_map(const void* data, const index_t (&extents)[4],
                           const index_t (&strides)[3], int rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    SSMLIB_CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                       cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
      throw backend_error(
          "ssm: the driver has no cuTensorMapEncodeTiled; install a driver for CUDA 12 or later");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  cuuint64_t sizes[4], bytes[3];
  for (int i = 0; i < 4; ++i)
    sizes[i] = static_cast<cuuint64_t>(extents[i]);
  for (int i = 0; i < 3; ++i)
    bytes[i] = static_cast<cuuint64_t>(strides[i]) * sizeof(bf16);
  const cuuint32_t box[4] = {64, 1, static_cast<cuuint32_t>(rows), 1}, steps[4] = {1, 1, 1, 1};
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), sizes, bytes, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw backend_error("ssm: cuTensorMapEncodeTiled failed with status " +
                        std::to_string(static_cast<int>(status)) + " for a tensor of " +
                        to_string(extents));
  }
  return map;
}

// --------------------------------------------------------------------------- warpgroup products

/// The part that all descriptors of 128-byte swizzled panels share: 1024 bytes from one group of
/// 8 rows to the next, `panel_bytes` from panel to panel (for operands read along their rows).
SSMLIB_DEVICE std::uint64_t panel_descriptor(std::uint32_t address, int panel_bytes = 16) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{1024 >> 4} << 32) |
         (static_cast<std::uint64_t>(panel_bytes >> 4) << 16) | ((address & 0x3ffff) >> 4);
}
/// `bytes` further on, a multiple of 16.
SSMLIB_DEVICE std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

/// Before the first product and wherever registers of a product were written by other means.
SSMLIB_DEVICE void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SSMLIB_DEVICE void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most `Pending` committed groups of products are under way.
template <int Pending>
SSMLIB_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// Keeps uses of the registers on their side of a wait or of a product.
template <int N>
SSMLIB_DEVICE void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    asm volatile("" : "+f"(r[i])::"memory");
}
template <int N>
SSMLIB_DEVICE void pin(std::uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    asm volatile("" : "+r"(r[i])::"memory");
}

/// d (64 x N) (+)= a (64 x 16) b (16 x N), bf16 with float sums, in the background. With
/// g = lane / 4, t = lane % 4 and the warp's 16 rows, d[4 j + 0..1] is row g, columns 8 j + 2 t..;
/// d[4 j + 2..3] row g + 8. `a` in registers is laid out as in multiply_add_16x8x16. TransposeB: b
/// lies as (16 rows x N), else as (N rows x 16). `add`: whether d's old content counts.
template <int N>
struct warpgroup_product;

#define SSMLIB_DETAIL_D8(i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SSMLIB_DETAIL_WARPGROUP_PRODUCT(N, NUMBERS, X0, X1, X2, X3, X4, X5, X6, ...)              \
  template <>                                                                                     \
  struct warpgroup_product<N> {                                                                   \
    template <bool TransposeB>                                                                    \
    SSMLIB_DEVICE static void run(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, int add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " X2                                         \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NUMBERS "}, " X0  \
                   ", " X1 ", p, 1, 1, 0, " X3 ";\n}"                                             \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b), "r"(add), "n"(TransposeB));                                  \
    }                                                                                             \
    template <bool TransposeB>                                                                    \
    SSMLIB_DEVICE static void run(float (&d)[N / 2], const std::uint32_t* a, std::uint64_t b,     \
                                  int add) {                                                      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " X5                                         \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NUMBERS "}, {" X0 \
                   ", " X1 ", " X2 ", " X3 "}, " X4 ", p, 1, 1, " X6 ";\n}"                       \
                   : __VA_ARGS__                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add),                \
                     "n"(TransposeB));                                                            \
    }                                                                                             \
  }

#define SSMLIB_DETAIL_N0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SSMLIB_DETAIL_N8 "%8,%9,%10,%11,%12,%13,%14,%15"
#define SSMLIB_DETAIL_N16 "%16,%17,%18,%19,%20,%21,%22,%23"
#define SSMLIB_DETAIL_N24 "%24,%25,%26,%27,%28,%29,%30,%31"
#define SSMLIB_DETAIL_N32 "%32,%33,%34,%35,%36,%37,%38,%39"
#define SSMLIB_DETAIL_N40 "%40,%41,%42,%43,%44,%45,%46,%47"
#define SSMLIB_DETAIL_N48 "%48,%49,%50,%51,%52,%53,%54,%55"
#define SSMLIB_DETAIL_N56 "%56,%57,%58,%59,%60,%61,%62,%63"
#define SSMLIB_DETAIL_N64 "%64,%65,%66,%67,%68,%69,%70,%71"
#define SSMLIB_DETAIL_N72 "%72,%73,%74,%75,%76,%77,%78,%79"
#define SSMLIB_DETAIL_N80 "%80,%81,%82,%83,%84,%85,%86,%87"
#define SSMLIB_DETAIL_N88 "%88,%89,%90,%91,%92,%93,%94,%95"
#define SSMLIB_DETAIL_N96 "%96,%97,%98,%99,%100,%101,%102,%103"
#define SSMLIB_DETAIL_N104 "%104,%105,%106,%107,%108,%109,%110,%111"
#define SSMLIB_DETAIL_N112 "%112,%113,%114,%115,%116,%117,%118,%119"
#define SSMLIB_DETAIL_N120 "%120,%121,%122,%123,%124,%125,%126,%127"

SSMLIB_DETAIL_WARPGROUP_PRODUCT(32, SSMLIB_DETAIL_N0 "," SSMLIB_DETAIL_N8, "%16", "%17", "%18",
                                "%19", "%20", "%21", "%22", SSMLIB_DETAIL_D8(0),
                                SSMLIB_DETAIL_D8(8));
SSMLIB_DETAIL_WARPGROUP_PRODUCT(64,
                                SSMLIB_DETAIL_N0 "," SSMLIB_DETAIL_N8 "," SSMLIB_DETAIL_N16
                                                 "," SSMLIB_DETAIL_N24,
                                "%32", "%33", "%34", "%35", "%36", "%37", "%38",
                                SSMLIB_DETAIL_D8(0), SSMLIB_DETAIL_D8(8), SSMLIB_DETAIL_D8(16),
                                SSMLIB_DETAIL_D8(24));
SSMLIB_DETAIL_WARPGROUP_PRODUCT(96,
                                SSMLIB_DETAIL_N0 "," SSMLIB_DETAIL_N8 "," SSMLIB_DETAIL_N16
                                                 "," SSMLIB_DETAIL_N24 "," SSMLIB_DETAIL_N32
                                                 "," SSMLIB_DETAIL_N40,
                                "%48", "%49", "%50", "%51", "%52", "%53", "%54",
                                SSMLIB_DETAIL_D8(0), SSMLIB_DETAIL_D8(8), SSMLIB_DETAIL_D8(16),
                                SSMLIB_DETAIL_D8(24), SSMLIB_DETAIL_D8(32), SSMLIB_DETAIL_D8(40));
SSMLIB_DETAIL_WARPGROUP_PRODUCT(128,
                                SSMLIB_DETAIL_N0 "," SSMLIB_DETAIL_N8 "," SSMLIB_DETAIL_N16
                                                 "," SSMLIB_DETAIL_N24 "," SSMLIB_DETAIL_N32
                                                 "," SSMLIB_DETAIL_N40 "," SSMLIB_DETAIL_N48
                                                 "," SSMLIB_DETAIL_N56,
                                "%64", "%65", "%66", "%67", "%68", "%69", "%70",
                                SSMLIB_DETAIL_D8(0), SSMLIB_DETAIL_D8(8), SSMLIB_DETAIL_D8(16),
                                SSMLIB_DETAIL_D8(24), SSMLIB_DETAIL_D8(32), SSMLIB_DETAIL_D8(40),
                                SSMLIB_DETAIL_D8(48), SSMLIB_DETAIL_D8(56));
SSMLIB_DETAIL_WARPGROUP_PRODUCT(192,
                                SSMLIB_DETAIL_N0
                                "," SSMLIB_DETAIL_N8 "," SSMLIB_DETAIL_N16 "," SSMLIB_DETAIL_N24
                                "," SSMLIB_DETAIL_N32 "," SSMLIB_DETAIL_N40 "," SSMLIB_DETAIL_N48
                                "," SSMLIB_DETAIL_N56 "," SSMLIB_DETAIL_N64 "," SSMLIB_DETAIL_N72
                                "," SSMLIB_DETAIL_N80 "," SSMLIB_DETAIL_N88,
                                "%96", "%97", "%98", "%99", "%100", "%101", "%102",
                                SSMLIB_DETAIL_D8(0), SSMLIB_DETAIL_D8(8), SSMLIB_DETAIL_D8(16),
                                SSMLIB_DETAIL_D8(24), SSMLIB_DETAIL_D8(32), SSMLIB_DETAIL_D8(40),
                                SSMLIB_DETAIL_D8(48), SSMLIB_DETAIL_D8(56), SSMLIB_DETAIL_D8(64),
                                SSMLIB_DETAIL_D8(72), SSMLIB_DETAIL_D8(80), SSMLIB_DETAIL_D8(88));
SSMLIB_DETAIL_WARPGROUP_PRODUCT(
    256,
    SSMLIB_DETAIL_N0 "," SSMLIB_DETAIL_N8 "," SSMLIB_DETAIL_N16 "," SSMLIB_DETAIL_N24
                     "," SSMLIB_DETAIL_N32 "," SSMLIB_DETAIL_N40 "," SSMLIB_DETAIL_N48
                     "," SSMLIB_DETAIL_N56 "," SSMLIB_DETAIL_N64 "," SSMLIB_DETAIL_N72
                     "," SSMLIB_DETAIL_N80 "," SSMLIB_DETAIL_N88 "," SSMLIB_DETAIL_N96
                     "," SSMLIB_DETAIL_N104 "," SSMLIB_DETAIL_N112 "," SSMLIB_DETAIL_N120,
    "%128", "%129", "%130", "%131", "%132", "%133", "%134", SSMLIB_DETAIL_D8(0),
    SSMLIB_DETAIL_D8(8), SSMLIB_DETAIL_D8(16), SSMLIB_DETAIL_D8(24), SSMLIB_DETAIL_D8(32),
    SSMLIB_DETAIL_D8(40), SSMLIB_DETAIL_D8(48), SSMLIB_DETAIL_D8(56), SSMLIB_DETAIL_D8(64),
    SSMLIB_DETAIL_D8(72), SSMLIB_DETAIL_D8(80), SSMLIB_DETAIL_D8(88), SSMLIB_DETAIL_D8(96),
    SSMLIB_DETAIL_D8(104), SSMLIB_DETAIL_D8(112), SSMLIB_DETAIL_D8(120));

#undef SSMLIB_DETAIL_N0
#undef SSMLIB_DETAIL_N8
#undef SSMLIB_DETAIL_N16
#undef SSMLIB_DETAIL_N24
#undef SSMLIB_DETAIL_N32
#undef SSMLIB_DETAIL_N40
#undef SSMLIB_DETAIL_N48
#undef SSMLIB_DETAIL_N56
#undef SSMLIB_DETAIL_N64
#undef SSMLIB_DETAIL_N72
#undef SSMLIB_DETAIL_N80
#undef SSMLIB_DETAIL_N88
#undef SSMLIB_DETAIL_N96
#undef SSMLIB_DETAIL_N104
#undef SSMLIB_DETAIL_N112
#undef SSMLIB_DETAIL_N120
#undef SSMLIB_DETAIL_WARPGROUP_PRODUCT
#undef SSMLIB_DETAIL_D8

}  // namespace ssm::kernels::cuda
