#pragma once

#include <ssmlib/kernels/cuda/device.cuh>

#include <cstdint>

/// @file
/// The instructions of the sm_80 rung: cp.async into shared memory, ldmatrix out of it and its
/// counterpart, and the 16 x 8 x 16 bf16 product with float sums.

namespace ssm::kernels::cuda {

SSMLIB_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Copies 16 bytes to shared memory in the background; zeros where `valid` is false.
SSMLIB_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
/// The same, and asks for the 256 bytes around them: later copies will want those.
SSMLIB_DEVICE void copy_async_16_line(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes)
      : "memory");
}
SSMLIB_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `Pending` groups of this thread's copies are under way.
template <int Pending>
SSMLIB_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
SSMLIB_DEVICE void load_matrix_x4(std::uint32_t (&r)[4], std::uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}
SSMLIB_DEVICE void load_matrix_x4_transposed(std::uint32_t (&r)[4], std::uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

/// What stmatrix does with one matrix, where there is none: a lane has two neighbours of a row, and
/// the lanes know where rows begin.
template <int Matrix>
SSMLIB_DEVICE void store_matrix_row(std::uint32_t row_address, std::uint32_t pair) {
  const int lane = threadIdx.x % 32;
  const std::uint32_t at =
      __shfl_sync(0xffffffffu, row_address, 8 * Matrix + lane / 4) + 4 * (lane % 4);
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(pair) : "memory");
}
template <int Matrix>
SSMLIB_DEVICE void store_matrix_column(std::uint32_t row_address, std::uint32_t pair) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const std::uint32_t at =
        __shfl_sync(0xffffffffu, row_address, 8 * Matrix + lane % 4 * 2 + e) + 2 * (lane / 4);
    const auto number = static_cast<std::uint16_t>(pair >> (16 * e));
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(number) : "memory");
  }
}

/// Four 8 x 8 matrices of 16-bit numbers out of registers; lane l names row l % 8 of matrix l / 8.
SSMLIB_DEVICE void store_matrix_x4(std::uint32_t row_address, std::uint32_t r0, std::uint32_t r1,
                                   std::uint32_t r2, std::uint32_t r3) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
#else
  store_matrix_row<0>(row_address, r0), store_matrix_row<1>(row_address, r1);
  store_matrix_row<2>(row_address, r2), store_matrix_row<3>(row_address, r3);
#endif
}
SSMLIB_DEVICE void store_matrix_x2(std::uint32_t row_address, std::uint32_t r0, std::uint32_t r1) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(row_address),
               "r"(r0), "r"(r1)
               : "memory");
#else
  store_matrix_row<0>(row_address, r0), store_matrix_row<1>(row_address, r1);
#endif
}
SSMLIB_DEVICE void store_matrix_x4_transposed(std::uint32_t row_address, std::uint32_t r0,
                                              std::uint32_t r1, std::uint32_t r2,
                                              std::uint32_t r3) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
#else
  store_matrix_column<0>(row_address, r0), store_matrix_column<1>(row_address, r1);
  store_matrix_column<2>(row_address, r2), store_matrix_column<3>(row_address, r3);
#endif
}

/// c += a b for a 16 x 16, b 16 x 8 of bf16. With g = lane / 4, t = lane % 4: c[0..1] is row g,
/// columns 2t, 2t+1; c[2..3] row g + 8. a[0], a[1] are rows g, g + 8 at columns 2t..; a[2], a[3]
/// the same at columns 2t + 8... b[0], b[1] are rows 2t.., 2t + 8.. of column g.
SSMLIB_DEVICE void multiply_add_16x8x16(float (&c)[4], const std::uint32_t (&a)[4],
                                        std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ssm::kernels::cuda
