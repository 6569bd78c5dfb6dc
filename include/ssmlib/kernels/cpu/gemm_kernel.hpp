#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/kernels/cpu/pack.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

/// @file
/// The register tile of a matrix product and the copies that feed it. After Goto and van de Geijn
/// 2008, ACM TOMS 34(3), and Van Zee and van de Geijn 2015 (BLIS), ACM TOMS 41(3).

namespace ssm::kernels::detail {

/// Rows and columns of c that one kernel call holds in registers, and the depth of one pass.
template <Real T>
struct gemm_tile {
#if defined(__AVX512F__)
  static constexpr int rows = 14;  // 28 accumulators, 2 vectors of b, 2 to spare
#else
  static constexpr int rows = 6;  // 12 accumulators, 2 vectors of b, 2 to spare
#endif
  static constexpr int vectors = 2;
  static constexpr int cols = vectors * simd::pack<T>::width;
  /// A constant: the order of every sum over k follows from it, never from m, n or the threads.
  static constexpr index_t depth = 256;
};

/// Up to `rows` rows of the left operand over a range of k: element (i, k) is
/// a[i * row_step + k * k_step].
template <Real T>
struct left_panel {
  const T* a = nullptr;
  index_t row_step = 0, k_step = 0, k = 0;
};

/// acc[i][v] += sum over k of a(i, k) b[k][v], by ascending k.
template <Real T, int Rows, bool UnitRows>
SSMLIB_ALWAYS_INLINE void accumulate(simd::pack<T> (&acc)[Rows][2], left_panel<T> left,
                                     const T* SSMLIB_RESTRICT b, index_t b_step) {
  using P = simd::pack<T>;
  const T* SSMLIB_RESTRICT a = left.a;
  const index_t row_step = UnitRows ? 1 : left.row_step;
  for (index_t k = 0; k < left.k; ++k) {
    const P b0 = P::load(b), b1 = P::load(b + P::width);
    simd::unroll<Rows>([&](auto i) SSMLIB_LAMBDA_INLINE {
      const P x(a[i * row_step]);
      acc[i][0] = simd::fma(x, b0, acc[i][0]);
      acc[i][1] = simd::fma(x, b1, acc[i][1]);
    });
    a += left.k_step;
    b += b_step;
  }
}

/// What the kernel does with its sums.
template <Real T>
struct tile_output {
  T* c = nullptr;
  index_t row_step = 0;
  T alpha = 1, beta = 0;
};

/// c = alpha (left | diagonal) b + beta c for Rows rows and all columns of a tile. `diagonal`
/// continues `left` along k: triangular operands keep their masked part apart. c is not read when
/// beta is 0.
template <Real T, int Rows, bool UnitRows>
SSMLIB_NOINLINE void multiply_tile(const left_panel<T>& left, const left_panel<T>& diagonal,
                                   const T* b, index_t b_step, const tile_output<T>& out) {
  using P = simd::pack<T>;
  P acc[Rows][2];
  simd::unroll<Rows>([&](auto i) SSMLIB_LAMBDA_INLINE {
    __builtin_prefetch(out.c + i * out.row_step, 1);
    acc[i][0] = acc[i][1] = P(T(0));
  });
  accumulate<T, Rows, UnitRows>(acc, left, b, b_step);
  if (diagonal.k > 0) accumulate<T, Rows, true>(acc, diagonal, b + left.k * b_step, b_step);
  const P alpha(out.alpha), beta(out.beta);
  if (out.beta == T(0)) {
    simd::unroll<Rows>([&](auto i) SSMLIB_LAMBDA_INLINE {
      T* c = out.c + i * out.row_step;
      (alpha * acc[i][0]).store(c);
      (alpha * acc[i][1]).store(c + P::width);
    });
  } else {
    simd::unroll<Rows>([&](auto i) SSMLIB_LAMBDA_INLINE {
      T* c = out.c + i * out.row_step;
      simd::fma(alpha, acc[i][0], beta * P::load(c)).store(c);
      simd::fma(alpha, acc[i][1], beta * P::load(c + P::width)).store(c + P::width);
    });
  }
}

template <Real T>
using tile_function = void (*)(const left_panel<T>&, const left_panel<T>&, const T*, index_t,
                               const tile_output<T>&);

template <Real T, bool UnitRows, int... I>
constexpr auto tile_functions(std::integer_sequence<int, I...>) {
  return std::array<tile_function<T>, sizeof...(I)>{&multiply_tile<T, I + 1, UnitRows>...};
}

/// The kernel for 1 <= rows <= gemm_tile<T>::rows.
template <Real T>
[[nodiscard]] inline tile_function<T> tile_function_for(int rows, bool unit_rows) {
  using all = std::make_integer_sequence<int, gemm_tile<T>::rows>;
  static constexpr auto general = tile_functions<T, false>(all{});
  static constexpr auto unit = tile_functions<T, true>(all{});
  const auto i = static_cast<std::size_t>(rows - 1);
  return unit_rows ? unit[i] : general[i];
}

// Indices of the two-operand shuffles below; a lane is 16 bytes, `of` the lanes' element count.
enum class interleave { low, high, low_pairs, high_pairs };
constexpr int shuffle_index(interleave how, int i, int width, int of) {
  const int base = i / of * of, j = i % of;
  switch (how) {
    case interleave::low:
      return base + j / 2 + (j % 2) * width;
    case interleave::high:
      return base + of / 2 + j / 2 + (j % 2) * width;
    case interleave::low_pairs:
      return base + j % 2 + (j / 2) * width;
    default:
      return base + of / 2 + j % 2 + (j / 2) * width;
  }
}
template <interleave How, Real T, int... I>
SSMLIB_ALWAYS_INLINE simd::pack<T> shuffle(simd::pack<T> a, simd::pack<T> b,
                                           std::integer_sequence<int, I...>) {
  constexpr int width = simd::pack<T>::width, of = 16 / static_cast<int>(sizeof(T));
  return __builtin_shufflevector(a.v, b.v, shuffle_index(How, I, width, of)...);
}
template <interleave How, Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> shuffle(simd::pack<T> a, simd::pack<T> b) {
  return shuffle<How>(a, b, std::make_integer_sequence<int, simd::pack<T>::width>{});
}

/// The 16-byte pieces at p, p + step, p + 2 step, ... side by side in one register.
template <Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> gather_lanes(const T* p, index_t step) {
  using P = simd::pack<T>;
#if defined(__AVX__) && !defined(__AVX512F__)  // through memory, the store would be too narrow
  typedef double piece __attribute__((vector_size(16)));
  piece low, high;
  std::memcpy(&low, p, 16);
  std::memcpy(&high, p + step, 16);
  return (typename P::vec)__builtin_shufflevector(low, high, 0, 1, 2, 3);
#else
  constexpr int of = 16 / static_cast<int>(sizeof(T));
  alignas(simd::native_bytes) T lanes[P::width];
  for (int q = 0; q < P::width / of; ++q)
    std::memcpy(lanes + q * of, p + q * step, 16);
  return P::load(lanes);
#endif
}

/// out[j] = (src[0][j], src[1][j], ...): a square block of `width` rows, `ld` apart.
template <Real T>
SSMLIB_ALWAYS_INLINE void transpose_block(const T* src, index_t ld,
                                          simd::pack<T> (&out)[simd::pack<T>::width]) {
  using P = simd::pack<T>;
  constexpr int of = 16 / static_cast<int>(sizeof(T));
  simd::unroll<P::width / of>([&](auto q) SSMLIB_LAMBDA_INLINE {
    constexpr int j = decltype(q)::value * of;
    P t[of];
    simd::unroll<of>([&](auto i)
                         SSMLIB_LAMBDA_INLINE { t[i] = gather_lanes(src + i * ld + j, of * ld); });
    if constexpr (of == 2) {
      out[j] = shuffle<interleave::low>(t[0], t[1]);
      out[j + 1] = shuffle<interleave::high>(t[0], t[1]);
    } else {
      const P a = shuffle<interleave::low>(t[0], t[1]), b = shuffle<interleave::low>(t[2], t[3]);
      const P c = shuffle<interleave::high>(t[0], t[1]), d = shuffle<interleave::high>(t[2], t[3]);
      out[j] = shuffle<interleave::low_pairs>(a, b);
      out[j + 1] = shuffle<interleave::high_pairs>(a, b);
      out[j + 2] = shuffle<interleave::low_pairs>(c, d);
      out[j + 3] = shuffle<interleave::high_pairs>(c, d);
    }
  });
}

/// to[k * tile_cols + j] = b[k * k_step + j * col_step] for j < cols; zeros up to the tile.
template <Real T>
void pack_right_strip(const T* b, index_t k_step, index_t col_step, index_t k, index_t cols,
                      T* SSMLIB_RESTRICT to) {
  using P = simd::pack<T>;
  constexpr index_t tile = gemm_tile<T>::cols, w = P::width;
  if (cols == tile && col_step == 1) {
    for (index_t p = 0; p < k; ++p) {
      P::load(b + p * k_step).store(to + p * tile);
      P::load(b + p * k_step + w).store(to + p * tile + w);
    }
    return;
  }
  index_t done = 0;
  if (cols == tile && k_step == 1) {
    for (; done + w <= k; done += w) {
      for (index_t j = 0; j < tile; j += w) {
        P block[P::width];
        transpose_block(b + j * col_step + done, col_step, block);
        simd::unroll<P::width>(
            [&](auto p) SSMLIB_LAMBDA_INLINE { block[p].store(to + (done + p) * tile + j); });
      }
    }
  }
  for (index_t p = done; p < k; ++p) {
    T* row = to + p * tile;
    for (index_t j = 0; j < cols; ++j)
      row[j] = b[p * k_step + j * col_step];
    for (index_t j = cols; j < tile; ++j)
      row[j] = T(0);
  }
}

/// Four whole strips of a right operand with unit column stride at once: whole cache lines in
/// sequence, and a page is entered once for all four.
template <Real T>
void pack_right_strips(const T* b, index_t k_step, index_t k, T* SSMLIB_RESTRICT to) {
  using P = simd::pack<T>;
  constexpr index_t tile = gemm_tile<T>::cols, w = P::width;
  constexpr index_t line = 64 / static_cast<index_t>(sizeof(T));
  for (index_t p = 0; p < k; ++p) {
    const T* row = b + p * k_step;
    for (index_t j = 0; j < 4 * tile; j += line)
      __builtin_prefetch(row + 8 * k_step + j);
    simd::unroll<4>([&](auto s) SSMLIB_LAMBDA_INLINE {
      T* strip = to + (s * k + p) * tile;
      P::load(row + s * tile).store(strip);
      P::load(row + s * tile + w).store(strip + w);
    });
  }
}

/// to[k * tile_rows + i] = a[i * row_step + k * k_step] for i < rows; the rest of `to`, which has
/// a register of room to spare, is left as it is or overwritten.
template <Real T>
void pack_left_panel(const T* a, index_t row_step, index_t k_step, index_t k, index_t rows,
                     T* SSMLIB_RESTRICT to) {
  using P = simd::pack<T>;
  constexpr index_t tile = gemm_tile<T>::rows, w = P::width;
  index_t done = 0;
  if constexpr (tile <= w) {
    // Whole registers are stored; what they write beyond the tile, the next store overwrites.
    // A block reads w rows, so the last rows of a matrix take the plain way.
    if (rows >= w && k_step == 1) {
      for (; done + w <= k; done += w) {
        P block[P::width];
        transpose_block(a + done, row_step, block);
        simd::unroll<P::width>(
            [&](auto p) SSMLIB_LAMBDA_INLINE { block[p].store(to + (done + p) * tile); });
      }
    } else if (rows >= w && row_step == 1) {
      for (; done < k; ++done)
        P::load(a + done * k_step).store(to + done * tile);
    }
  }
  rows = std::min(rows, tile);
  for (index_t p = done; p < k; ++p) {
    for (index_t i = 0; i < rows; ++i)
      to[p * tile + i] = a[i * row_step + p * k_step];
  }
}

}  // namespace ssm::kernels::detail
