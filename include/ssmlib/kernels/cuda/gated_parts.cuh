#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/gated_linear.hpp>
#include <ssmlib/kernels/cuda/mma.cuh>
#include <ssmlib/kernels/cuda/rung.cuh>

#include <algorithm>
#include <cstdint>
#include <string>

/// @file
/// What the chunked kernels of gated linear attention and the delta rule share: chunks of 64 tokens
/// and tiles of 64 x 64 numbers, in shared memory with padded rows and in the workspace without.
///
/// A tile of the workspace is always whole: zeros stand for tokens, keys and features that are not
/// there, so products need no bounds. Chunk c of sequence i has the slot offsets[i] / 64 + i + c;
/// slots of different chunks differ and there are tokens / 64 + sequences of them.

namespace ssm::kernels::cuda::detail::gated {

inline constexpr int side = 64;   // tokens of a chunk, rows and columns of a tile
inline constexpr int block = 16;  // tokens of a sub-block
inline constexpr int threads = 256;
inline constexpr int cells = side * side;
inline constexpr int gate_pitch = side + 4;  // rows of gates, read by fours
inline constexpr int real_pitch = side + 1;  // rows and columns without bank conflicts

template <class T>
inline constexpr int pitch = side + 16 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int tile_cells = side* pitch<T>;

/// Where sequences lie.
struct sequence_rows {
  const index_t* offsets;
  index_t sequences, max_length;

  SSMLIB_DEVICE index_t begin(index_t i) const { return offsets ? offsets[i] : i * max_length; }
  SSMLIB_DEVICE index_t length(index_t i) const { return begin(i + 1) - begin(i); }
  SSMLIB_DEVICE index_t first_slot(index_t i) const { return begin(i) / side + i; }
};

/// A chunk: rows first .. first + n - 1, of nobody where n == 0.
struct chunk_rows {
  index_t first = 0;
  int n = 0;

  SSMLIB_DEVICE chunk_rows(const sequence_rows& s, index_t slot) {
    index_t low = 0, high = s.sequences;
    while (high - low > 1) {
      const index_t middle = (low + high) / 2;
      (s.first_slot(middle) <= slot ? low : high) = middle;
    }
    const index_t t = (slot - s.first_slot(low)) * side;
    if (t < 0) return;
    first = s.begin(low) + t;
    n = static_cast<int>(max(index_t{0}, min(index_t{side}, s.length(low) - t)));
  }
};

/// Rows of one head of a caller's operand, up to 64 columns from `column`.
template <class T>
struct head_rows {
  T* p;
  index_t stride;
  int n, columns;

  SSMLIB_DEVICE head_rows(const view<T, 3>& from, index_t head, index_t heads, index_t first,
                          int tokens, index_t column)
      : p(from.data + first * from.strides[0] + head * from.extents[1] / heads * from.strides[1] +
          column),
        stride(from.strides[0]),
        n(from.data != nullptr ? tokens : 0),
        columns(static_cast<int>(max(index_t{0}, min(index_t{side}, from.extents[2] - column)))) {}

  SSMLIB_DEVICE void put(int row, int column, accum_t<T> x, bool add) const {
    if (row >= n || column >= columns) return;
    T& to = p[row * stride + column];
    to = narrow<T>(add ? widen(to) + x : x);
  }
  /// Columns `column`, which is even, and the next.
  SSMLIB_DEVICE void put_pair(int row, int column, accum_t<T> x, accum_t<T> y, bool add) const {
    if constexpr (std::is_same_v<T, bf16>) {
      if (!add && row < n && column + 1 < columns && stride % 2 == 0 &&
          reinterpret_cast<std::uintptr_t>(p) % 4 == 0) {
        *reinterpret_cast<std::uint32_t*>(p + row * stride + column) = pack_bf16(x, y);
        return;
      }
    }
    put(row, column, x, add);
    put(row, column + 1, y, add);
  }
};

/// Columns 0 .. Columns - 1 of a caller's rows into shared memory, zeros around them. Aligned rows
/// are copied in the background.
template <int Columns, int Pitch, class T>
SSMLIB_DEVICE void load_rows(T* to, const head_rows<const T>& from) {
  constexpr int vector = 16 / static_cast<int>(sizeof(T));
  if (from.columns >= Columns && from.stride % vector == 0 &&
      reinterpret_cast<std::uintptr_t>(from.p) % 16 == 0) {
    for (int i = threadIdx.x; i < side * Columns / vector; i += threads) {
      const int row = i / (Columns / vector), column = i % (Columns / vector) * vector;
      const bool valid = row < from.n;
      copy_async_16(to + row * Pitch + column, from.p + (valid ? row * from.stride : 0) + column,
                    valid);
    }
    return;
  }
  for (int i = threadIdx.x; i < side * Columns; i += threads) {
    const int row = i / Columns, column = i % Columns;
    T x = narrow<T>(accum_t<T>(0));
    if (row < from.n && column < from.columns) x = from.p[row * from.stride + column];
    to[row * Pitch + column] = x;
  }
}
template <class T>
SSMLIB_DEVICE void load_rows(T* to, const head_rows<const T>& from) {
  load_rows<side, pitch<T>>(to, from);
}

/// Gates of a chunk, 1 where there are none.
template <class R>
SSMLIB_DEVICE void load_gates(R* to, const head_rows<const R>& from) {
  const int column = threadIdx.x % side;
#pragma unroll
  for (int i = 0; i < cells / threads; ++i) {
    const int row = threadIdx.x / side + i * (threads / side);
    const bool valid = row < from.n && column < from.columns;
    to[row * gate_pitch + column] = valid ? ::exp(from.p[row * from.stride + column]) : R(1);
  }
}

/// Four neighbours, aligned, in the accumulator's type.
template <class T>
SSMLIB_DEVICE void load_four(accum_t<T> (&to)[4], const T* from) {
  struct alignas(sizeof(T) == 2 ? 8 : 16) four {
    T v[4];
  };
  const four x = *reinterpret_cast<const four*>(from);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    to[e] = widen(x.v[e]);
}

/// A tile of the workspace into shared memory, in the background.
template <class T>
SSMLIB_DEVICE void load_tile(T* to, const T* from) {
  constexpr int vector = 16 / static_cast<int>(sizeof(T)), vectors = side / vector;
#pragma unroll 4
  for (int i = threadIdx.x; i < cells / vector; i += threads)
    copy_async_16(to + i / vectors * pitch<T> + i % vectors * vector, from + i * vector);
}
/// And back.
template <class T>
SSMLIB_DEVICE void store_tile(const T* from, T* to) {
  constexpr int vector = 16 / static_cast<int>(sizeof(T)), vectors = side / vector;
  for (int i = threadIdx.x; i < cells / vector; i += threads) {
    *reinterpret_cast<uint4*>(to + i * vector) =
        *reinterpret_cast<const uint4*>(from + i / vectors * pitch<T> + i % vectors * vector);
  }
}

SSMLIB_DEVICE void wait_and_meet() {
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

/// c += a b of 16 x (8 Blocks), over `steps` times 16. a(m, k) lies at a[m * PA + k], or at
/// a[k * PA + m] where TA; b(k, n) at b[k * PB + n], or at b[n * PB + k] where TB. A warp holds c
/// as multiply_add_16x8x16 does, in every type.
template <bool TA, bool TB, int PA, int PB, int Blocks, class T>
SSMLIB_DEVICE void multiply(accum_t<T> (&c)[Blocks][4], const T* a, const T* b, int steps) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, bf16>) {
    static_assert(Blocks % 2 == 0);
    const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
    std::uint32_t pa =
        shared_address(TA ? a + (low + high) * PA + middle : a + (low + middle) * PA + high);
    std::uint32_t pb =
        shared_address(TB ? b + (low + high) * PB + middle : b + (low + middle) * PB + high);
#pragma unroll 4
    for (int s = 0; s < steps; ++s) {
      std::uint32_t x[4];
      if constexpr (TA) {
        load_matrix_x4_transposed(x, pa);
      } else {
        load_matrix_x4(x, pa);
      }
      pa += 32 * (TA ? PA : 1);
#pragma unroll
      for (int j = 0; j < Blocks / 2; ++j) {
        std::uint32_t y[4];
        if constexpr (TB) {
          load_matrix_x4(y, pb + 32 * j * PB);
        } else {
          load_matrix_x4_transposed(y, pb + 32 * j);
        }
        multiply_add_16x8x16(c[2 * j], x, y[0], y[1]);
        multiply_add_16x8x16(c[2 * j + 1], x, y[2], y[3]);
      }
      pb += 32 * (TB ? 1 : PB);
    }
  } else {
    const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll 2
    for (int k = 0; k < 16 * steps; ++k) {
      const T x0 = TA ? a[k * PA + row] : a[row * PA + k];
      const T x1 = TA ? a[k * PA + row + 8] : a[(row + 8) * PA + k];
#pragma unroll
      for (int j = 0; j < Blocks; ++j) {
        const int n = 8 * j + column;
        const T y0 = TB ? b[n * PB + k] : b[k * PB + n];
        const T y1 = TB ? b[(n + 1) * PB + k] : b[k * PB + n + 1];
        c[j][0] += x0 * y0;
        c[j][1] += x0 * y1;
        c[j][2] += x1 * y0;
        c[j][3] += x1 * y1;
      }
    }
  }
}

/// The share of a warp in a product of tiles: rows 16 (warp % 4), columns 32 (warp / 4).
struct warp_share {
  int band, row, column;  // band: which 16 rows
  SSMLIB_DEVICE warp_share()
      : band(threadIdx.x / 32 % 4), row(band * block), column(threadIdx.x / 128 * 32) {}
};
template <class R>
struct share_sums {
  R c[4][4] = {};

  /// f(row of 0 .. 63, column of 0 .. 63, first, second): two neighbours.
  template <class F>
  SSMLIB_DEVICE void pairs(F f) {
    const warp_share w;
    const int lane = threadIdx.x % 32, row = w.row + lane / 4, column = w.column + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      f(row, column + 8 * j, c[j][0], c[j][1]);
      f(row + 8, column + 8 * j, c[j][2], c[j][3]);
    }
  }
  template <class F>
  SSMLIB_DEVICE void each(F f) {
    pairs([&](int row, int column, R& x, R& y) {
      f(row, column, x);
      f(row, column + 1, y);
    });
  }
};
/// c += A B of two tiles in shared memory, or with one transposed.
template <bool TA, bool TB, class T>
SSMLIB_DEVICE void multiply_tiles(share_sums<accum_t<T>>& sums, const T* a, const T* b) {
  const warp_share w;
  multiply<TA, TB, pitch<T>, pitch<T>>(sums.c, TA ? a + w.row : a + w.row * pitch<T>,
                                       TB ? b + w.column * pitch<T> : b + w.column, 4);
}
template <class T>
SSMLIB_DEVICE void store_sums(share_sums<accum_t<T>>& sums, T* tile) {
  sums.each(
      [&](int row, int column, accum_t<T>& x) { tile[row * pitch<T> + column] = narrow<T>(x); });
}
template <class T>
SSMLIB_DEVICE void store_pair(T* to, accum_t<T> x, accum_t<T> y) {
  if constexpr (std::is_same_v<T, bf16>) {
    *reinterpret_cast<std::uint32_t*>(to) = pack_bf16(x, y);
  } else {
    to[0] = x;
    to[1] = y;
  }
}

/// Tiles along the keys: 1, 2 or 4, as the scan has kernels for.
inline int key_tiles(index_t keys) {
  return keys <= 64 ? 1 : keys <= 128 ? 2 : 4;
}

/// What every problem of the two families has.
struct common {
  sequence_rows rows;
  index_t heads, slots;
  int key_tiles, feature_tiles;
};
template <class Problem>
[[nodiscard]] common common_of(const Problem& p) {
  return {{p.offsets, p.sequences, p.max_length},
          p.heads,
          p.q.extent(0) / side + p.sequences,
          key_tiles(p.q.extent(2)),
          static_cast<int>((p.v.extent(2) + side - 1) / side)};
}

/// Hands out parts of a workspace, or counts them where there is none.
class carver {
 public:
  explicit carver(void* from) : from_(static_cast<unsigned char*>(from)) {}
  template <class U>
  [[nodiscard]] U* take(index_t count) {
    unsigned char* at = from_ == nullptr ? nullptr : from_ + used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(U) + 255) / 256 * 256;
    return reinterpret_cast<U*>(at);
  }
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  unsigned char* from_;
  std::size_t used_ = 0;
};

template <class P>
void launch(cudaStream_t stream, void (*kernel)(P), index_t blocks, std::size_t shared,
            const P& arguments) {
  if (blocks <= 0) return;
  if (blocks > 0x7fffffff) {
    throw value_error("ssm: a gated kernel needs " + std::to_string(blocks) +
                      " blocks but a launch has at most 2147483647; split the batch");
  }
  allow_shared_memory_of(kernel, shared);
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void check_rows(const char* what, const view<T, 3>& x, index_t tokens, index_t heads,
                index_t width) {
  if (x.extent(0) == tokens && x.extent(2) == width && x.extent(1) > 0 &&
      heads % x.extent(1) == 0 && (width <= 1 || x.stride(2) == 1))
    return;
  throw shape_error(std::string("ssm: ") + what + " is (" + std::to_string(x.extent(0)) + ", " +
                    std::to_string(x.extent(1)) + ", " + std::to_string(x.extent(2)) +
                    "), but the problem wants (" + std::to_string(tokens) + ", a divisor of " +
                    std::to_string(heads) + ", " + std::to_string(width) +
                    ") with a unit inner stride");
}
template <class T>
void check_column(const char* what, const view<T, 2>& x, index_t tokens, index_t heads) {
  if (x.extent(0) == tokens && x.extent(1) > 0 && heads % x.extent(1) == 0) return;
  throw shape_error(std::string("ssm: ") + what + " is (" + std::to_string(x.extent(0)) + ", " +
                    std::to_string(x.extent(1)) + "), but the problem wants (" +
                    std::to_string(tokens) + ", a divisor of " + std::to_string(heads) + ")");
}
template <class T>
void check_state(const char* what, const view<T, 4>& x, index_t sequences, index_t heads,
                 index_t keys, index_t features) {
  if (!x || (x.extent(0) == sequences && x.extent(1) == heads && x.extent(2) == keys &&
             x.extent(3) == features))
    return;
  throw shape_error(std::string("ssm: ") + what + " is (" + std::to_string(x.extent(0)) + ", " +
                    std::to_string(x.extent(1)) + ", " + std::to_string(x.extent(2)) + ", " +
                    std::to_string(x.extent(3)) + "), but the problem wants (" +
                    std::to_string(sequences) + ", " + std::to_string(heads) + ", " +
                    std::to_string(keys) + ", " + std::to_string(features) + ")");
}
template <class Problem>
void check_common(const Problem& p) {
  const index_t tokens = p.q.extent(0), keys = p.q.extent(2);
  if (keys > 256 || keys < 1) {
    throw shape_error("ssm: a gated mixer on CUDA has " + std::to_string(keys) +
                      " keys, but takes 1 to 256; use the CPU for more");
  }
  if (p.offsets == nullptr && tokens < p.sequences * p.max_length) {
    throw shape_error("ssm: q has " + std::to_string(tokens) + " tokens, but " +
                      std::to_string(p.sequences) + " sequences of " +
                      std::to_string(p.max_length) + " need more");
  }
  check_rows("q", p.q, tokens, p.heads, keys);
  check_rows("k", p.k, tokens, p.heads, keys);
  check_rows("v", p.v, tokens, p.heads, p.v.extent(2));
}
template <class Problem, class T, class R>
void check_results(const Problem& p, const char* what, const view<T, 3>& y,
                   const view<const R, 4>& initial, const view<R, 4>& final) {
  check_rows(what, y, p.q.extent(0), p.heads, p.v.extent(2));
  check_state("initial", initial, p.sequences, p.heads, p.q.extent(2), p.v.extent(2));
  check_state("final", final, p.sequences, p.heads, p.q.extent(2), p.v.extent(2));
}

}  // namespace ssm::kernels::cuda::detail::gated
