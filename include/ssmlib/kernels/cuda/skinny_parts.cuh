#pragma once

#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/mma.cuh>
#include <ssmlib/kernels/cuda/skinny.hpp>

#include <cstdint>

/// @file
/// What the kernels of skinny_forward share: f(x) in bf16 with one order of sums, and the kernels
/// for any type.

namespace ssm::kernels::cuda::detail {

/// skinny_problem as kernels take it.
template <class X, class W, class Y>
struct skinny_arguments {
  using real = std::conditional_t<std::is_same_v<W, double>, double, float>;

  const X *x, *gate;
  const W* w;
  Y* y;
  const Y* residual;
  index_t x_step, gate_step, w_step, y_step, residual_step;
  const real *bias, *norm_weight;
  real epsilon;
  int m, n, k, group;
  bool normalise, early;
  void* packed;   // f(x), where a kernel ahead makes it
  float* scales;  // (m), where that kernel leaves the normalisation to the product's end

  /// Whether a row's 1 / sqrt(...) is one factor of its products: the sums need not wait for it.
  [[nodiscard]] SSMLIB_DEVICE bool scaled_last() const { return normalise && group == k; }

  /// An element of y from its dot product, in every tensor core kernel by the same operations.
  [[nodiscard]] SSMLIB_DEVICE float finished(float value, float scale, float b, float r) const {
    if (scaled_last()) value = __fmul_rn(value, scale);
    if (bias != nullptr) value = __fadd_rn(value, b);
    return residual != nullptr ? __fadd_rn(value, r) : value;
  }
  /// Element (i, j) of y from its dot product, in the general kernel.
  SSMLIB_DEVICE void finish(int i, int j, real value) const {
    if (bias != nullptr) value += bias[j];
    if (residual != nullptr) value += widen(residual[i * residual_step + j]);
    y[i * y_step + j] = narrow<Y>(value);
  }
};

inline constexpr int skinny_threads = 256;

// Units of 64 columns of k are divided among eight chains of sums. A chain adds in order of k,
// sixteen columns at a time; the chains of each half of k are added in order, then the halves. This
// is all that decides the bits of a product.
inline constexpr int skinny_unit = 64, skinny_chains = 8;

[[nodiscard]] __host__ __device__ constexpr int skinny_units(int k) {
  return (k + skinny_unit - 1) / skinny_unit;
}
/// The first unit of a chain; of chain 8: the end of the last.
[[nodiscard]] SSMLIB_DEVICE int chain_begin(int k, int chain) {
  return static_cast<int>(index_t{skinny_units(k)} * chain / skinny_chains);
}

/// Asks for 16 to 2^20 bytes, a multiple of 16, to be brought to the second-level cache.
SSMLIB_DEVICE void bring_to_cache(const void* p, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

/// Eight columns as they came from memory.
template <class X>
struct raw_8;
template <>
struct raw_8<bf16> {
  uint4 words;

  SSMLIB_DEVICE void load(const bf16* p) { words = *reinterpret_cast<const uint4*>(p); }
  SSMLIB_DEVICE void unpack(float (&v)[8]) const {
    const std::uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(pairs[i] << 16);
      v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
};
template <>
struct raw_8<float> {
  float4 words[2];

  SSMLIB_DEVICE void load(const float* p) {
    words[0] = reinterpret_cast<const float4*>(p)[0];
    words[1] = reinterpret_cast<const float4*>(p)[1];
  }
  SSMLIB_DEVICE void unpack(float (&v)[8]) const {
    v[0] = words[0].x, v[1] = words[0].y, v[2] = words[0].z, v[3] = words[0].w;
    v[4] = words[1].x, v[5] = words[1].y, v[6] = words[1].z, v[7] = words[1].w;
  }
};

/// Eight columns of x * silu(gate).
template <class A>
SSMLIB_DEVICE void gated_8(const A& a, int row, int column, float (&v)[8]) {
  using raw = raw_8<std::remove_const_t<std::remove_pointer_t<decltype(a.x)>>>;
  raw x, gate;
  x.load(a.x + row * a.x_step + column);
  if (a.gate != nullptr) gate.load(a.gate + row * a.gate_step + column);
  x.unpack(v);
  if (a.gate == nullptr) return;
  float z[8];
  gate.unpack(z);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] *= z[i] / (1.0f + expf(-z[i]));
}

SSMLIB_DEVICE void add_squares(const float (&v)[8], float& sum) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    sum = fmaf(v[i], v[i], sum);
}

/// The factor of a normalised row from the sums of squares of eight warps.
[[nodiscard]] SSMLIB_DEVICE float row_scale(const float* sums, int count, float epsilon) {
  float sum = sums[0];
#pragma unroll
  for (int i = 1; i < 8; ++i)
    sum += sums[i];
  return 1.0f / sqrtf(sum / static_cast<float>(count) + epsilon);
}

/// Eight columns of f(x) in bf16.
[[nodiscard]] SSMLIB_DEVICE uint4 packed_8(const float (&v)[8], float scale,
                                           const float (&weight)[8]) {
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    y[i] = v[i] * scale * weight[i];
  return make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]),
                    pack_bf16(y[6], y[7]));
}

/// Weights of the normalisation, ones where there are none.
template <class A>
SSMLIB_DEVICE void norm_weights(const A& a, int column, float (&weight)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    weight[i] = 1.0f;
  if (a.norm_weight == nullptr) return;
  raw_8<float> raw;
  raw.load(a.norm_weight + column);
  raw.unpack(weight);
}

/// The sums of squares of a warp's columns of a row, for row_scale().
SSMLIB_DEVICE void keep_squares(float squares, float* sums, int row) {
  const float sum = warp_sum(squares);
  if (threadIdx.x % 32 == 0) sums[row * 8 + threadIdx.x / 32] = sum;
}

/// make_rows() where f(x) needs no factor before it is rounded: the loads of several rows or pieces
/// of a row are under way together.
template <int Rows, class A, class Store>
SSMLIB_DEVICE void make_plain_rows(const A& a, int first, int rows, float* sums, Store store) {
  using raw = raw_8<std::remove_const_t<std::remove_pointer_t<decltype(a.x)>>>;
  constexpr int ahead = Rows == 1 ? 3 : Rows == 2 ? 2 : 1;  // pieces of a row
  float squares[Rows] = {};
#pragma unroll 1
  for (int c = 8 * static_cast<int>(threadIdx.x); c < a.k; c += ahead * 8 * skinny_threads) {
    raw x[ahead][Rows];
    float weight[ahead][8];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int column = min(c + i * 8 * skinny_threads, a.k - 8);
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        x[i][r].load(a.x + (first + min(r, rows - 1)) * a.x_step + column);
      norm_weights(a, column, weight[i]);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int column = c + i * 8 * skinny_threads;
      if (column >= a.k) break;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float v[8];
        x[i][r].unpack(v);
        add_squares(v, squares[r]);
        if (r < rows) store(r, column, packed_8(v, 1.0f, weight[i]));
      }
    }
  }
  if (!a.scaled_last()) return;
#pragma unroll
  for (int r = 0; r < Rows; ++r)
    keep_squares(squares[r], sums, r);
}

/// f(x) of rows [first, first + rows), 1 <= rows <= Rows, in bf16, eight columns at a time, by a
/// block of skinny_threads: store(row - first, column, bits). Where scaled_last(), without the
/// factors: their sums of squares are left in `sums`, eight a row, behind a barrier that the caller
/// must add. Statistics are taken once a row, in an order that does not depend on the other rows.
///
/// Code runs once a launch here, so that its length is its time: loops stay loops.
/// @param sums  shared memory for Rows * 8 floats
template <int Rows, class A, class Store>
SSMLIB_DEVICE void make_rows(const A& a, int first, int rows, float* sums, Store store) {
  const bool last = a.scaled_last();
  if (a.gate == nullptr && (last || !a.normalise)) {
    make_plain_rows<Rows>(a, first, rows, sums, store);
    return;
  }
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
#pragma unroll 1
    for (int begin = 0; begin < a.k; begin += a.group) {
      const int end = begin + a.group;
      float scale = 1.0f, squares = 0.0f, v[8], weight[8];
      if (a.normalise && !last) {
#pragma unroll 1
        for (int c = begin + 8 * static_cast<int>(threadIdx.x); c < end; c += 8 * skinny_threads) {
          gated_8(a, first + r, c, v);
          add_squares(v, squares);
        }
        keep_squares(squares, sums, r);
        __syncthreads();
        scale = row_scale(sums + r * 8, a.group, a.epsilon);
        __syncthreads();
      }
#pragma unroll 1
      for (int c = begin + 8 * static_cast<int>(threadIdx.x); c < end; c += 8 * skinny_threads) {
        gated_8(a, first + r, c, v);
        norm_weights(a, c, weight);
        if (last) add_squares(v, squares);
        store(r, c, packed_8(v, scale, weight));
      }
      if (last) keep_squares(squares, sums, r);
    }
  }
}

/// Place of element of f(x) in the warpgroup kernel's workspace: a unit of all rows lies together,
/// permuted as the products read it from shared memory.
[[nodiscard]] SSMLIB_DEVICE index_t packed_offset(int padded_rows, int row, int column) {
  const int chunk = column % skinny_unit / 8 ^ (row & 7);
  return (index_t{column / skinny_unit} * padded_rows + row) * skinny_unit + chunk * 8 + column % 8;
}

/// f(x) in bf16, zeros in padding rows and columns; a block a row.
template <class A>
struct pack_rows_arguments {
  A a;
  int padded_rows;
};
template <class A>
__global__ void __launch_bounds__(skinny_threads) pack_rows_kernel(const pack_rows_arguments<A> p) {
  __shared__ float sums[8];
  // The product that follows may read its weights from now on: it reads nothing else early.
  let_next_kernel_start();
  if (p.a.norm_weight != nullptr && p.a.early) {
    for (int c = 64 * static_cast<int>(threadIdx.x); c + 64 <= p.a.k; c += 64 * skinny_threads)
      bring_to_cache(p.a.norm_weight + c, 256);
  }
  wait_for_kernel_ahead();
  const int row = blockIdx.x, padded_k = skinny_unit * skinny_units(p.a.k);
  auto* const packed = static_cast<bf16*>(p.a.packed);
  const auto store = [&](int column, uint4 bits) {
    *reinterpret_cast<uint4*>(packed + packed_offset(p.padded_rows, row, column)) = bits;
  };
  const bool real_row = row < p.a.m;
  if (real_row) {
    make_rows<1>(p.a, row, 1, sums, [&](int, int column, uint4 bits) { store(column, bits); });
    if (p.a.scaled_last()) {
      __syncthreads();
      if (threadIdx.x == 0) p.a.scales[row] = row_scale(sums, p.a.k, p.a.epsilon);
    }
  }
  for (int c = (real_row ? p.a.k : 0) + 8 * static_cast<int>(threadIdx.x); c < padded_k;
       c += 8 * skinny_threads) {
    store(c, make_uint4(0, 0, 0, 0));
  }
}

// ------------------------------------------------------------------------------------- any type

/// f(x) in the accumulator's type, (m, k) dense; a block a row.
template <class X, class W, class Y>
__global__ void __launch_bounds__(skinny_threads)
    general_rows_kernel(const skinny_arguments<X, W, Y> a) {
  using real = typename skinny_arguments<X, W, Y>::real;
  __shared__ real sums[8];
  wait_for_kernel_ahead();
  let_next_kernel_start();
  const int row = blockIdx.x;
  real* const out = static_cast<real*>(a.packed) + index_t{row} * a.k;
  const auto value = [&](int c) {
    real v = widen(a.x[row * a.x_step + c]);
    if (a.gate != nullptr) {
      const real z = widen(a.gate[row * a.gate_step + c]);
      v *= z / (real(1) + exp(-z));
    }
    return v;
  };
  for (int begin = 0; begin < a.k; begin += a.group) {
    real scale(1);
    if (a.normalise) {
      real squares(0);
      for (int c = threadIdx.x; c < a.group; c += skinny_threads) {
        const real v = value(begin + c);
        squares += v * v;
      }
      squares = warp_sum(squares);
      __syncthreads();
      if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
      __syncthreads();
      real sum = sums[0];
      for (int i = 1; i < 8; ++i)
        sum += sums[i];
      scale = real(1) / sqrt(sum / static_cast<real>(a.group) + a.epsilon);
    }
    for (int c = threadIdx.x; c < a.group; c += skinny_threads) {
      const real weight = a.norm_weight != nullptr ? a.norm_weight[begin + c] : real(1);
      out[begin + c] = value(begin + c) * scale * weight;
    }
  }
}

/// A warp a row of w, lanes along k, up to eight rows of x at a time.
template <class F, class W, class Y, class X>
struct general_product_arguments {
  skinny_arguments<X, W, Y> a;
  const F* x;
  index_t x_step;
};
template <class F, class W, class Y, class X>
__global__ void __launch_bounds__(skinny_threads)
    general_product_kernel(const general_product_arguments<F, W, Y, X> p) {
  using real = typename skinny_arguments<X, W, Y>::real;
  const auto& a = p.a;
  wait_for_kernel_ahead();
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warps = gridDim.x * (skinny_threads / 32);
  for (int j = blockIdx.x * (skinny_threads / 32) + threadIdx.x / 32; j < a.n; j += warps) {
    const W* const w = a.w + j * a.w_step;
    for (int first = 0; first < a.m; first += 8) {
      const int rows = min(8, a.m - first);
      real sums[8] = {};
#pragma unroll 4
      for (int c = lane; c < a.k; c += 32) {
        const real weight = widen(w[c]);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          if (r < rows)
            sums[r] =
                fma(weight, static_cast<real>(widen(p.x[(first + r) * p.x_step + c])), sums[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        if (r < rows) {
          const real sum = warp_sum(sums[r]);
          if (lane == 0) a.finish(first + r, j, sum);
        }
      }
    }
  }
}

}  // namespace ssm::kernels::cuda::detail
