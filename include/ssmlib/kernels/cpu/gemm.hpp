#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cpu/gemm_kernel.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>

#if defined(SSMLIB_BLAS)
#include <cblas.h>
#endif

namespace ssm {

/// The same elements with the axes exchanged.
template <class T>
[[nodiscard]] view<T, 2> transposed(view<T, 2> a) {
  return {a.data, {a.extents[1], a.extents[0]}, {a.strides[1], a.strides[0]}};
}

}  // namespace ssm

namespace ssm::kernels {

namespace detail {

/// Which part of a product is wanted or not zero.
enum class gemm_part { all, lower_output, lower_left };

/// Working memory that starts on the stack: products of single chunks never leave it.
template <Real T, index_t OnStack>
class workspace {
 public:
  T* reserve(index_t n) {
    if (n <= OnStack) return stack_;
    if (!heap_ || capacity_ < n) {
      heap_.emplace(n);
      capacity_ = n;
    }
    return heap_->data();
  }

 private:
  alignas(64) T stack_[static_cast<std::size_t>(OnStack)];
  std::optional<scratch<T>> heap_;
  index_t capacity_ = 0;
};

/// One pass over a range of k of c = alpha a b + beta c.
template <Real T>
struct gemm_pass {
  view<const T, 2> a, b;
  view<T, 2> c;
  T alpha, beta;
  gemm_part part;
  index_t k_begin, k_end;
  bool pack_a, pack_b;

  using tile = gemm_tile<T>;
  static constexpr index_t left_block = 120 / tile::rows * tile::rows;

  [[nodiscard]] index_t depth() const { return k_end - k_begin; }
  [[nodiscard]] const T* b_at(index_t j) const {
    return b.data + k_begin * b.strides[0] + j * b.strides[1];
  }

  /// Columns [j_begin, j_end), multiples of the tile, to `to` + depth * (j - j_begin).
  void pack_right(index_t j_begin, index_t j_end, T* to) const {
    index_t j = j_begin;
    for (; b.strides[1] == 1 && j + 4 * tile::cols <= j_end; j += 4 * tile::cols) {
      pack_right_strips(b_at(j), b.strides[0], depth(), to + (j - j_begin) * depth());
    }
    for (; j < j_end; j += tile::cols) {
      pack_right_strip(b_at(j), b.strides[0], b.strides[1], depth(),
                       std::min<index_t>(tile::cols, j_end - j), to + (j - j_begin) * depth());
    }
  }

  /// Rows [i_begin, i_end) by columns [j_begin, j_end); `right` holds those columns if packed.
  void multiply(index_t i_begin, index_t i_end, index_t j_begin, index_t j_end,
                const T* right) const;

 private:
  void multiply_strip(index_t i_begin, index_t i_end, index_t j, index_t j_end, const T* left,
                      const T* right, index_t right_step) const;
  void multiply_panel(index_t i, index_t rows, index_t j, index_t j_end, left_panel<T> left,
                      const T* right, index_t right_step) const;
};

template <Real T>
void gemm_pass<T>::multiply(index_t i_begin, index_t i_end, index_t j_begin, index_t j_end,
                            const T* right) const {
  workspace<T, tile::cols * tile::depth> tail_space;
  std::optional<scratch<T>> left_space;
  if (pack_a) left_space.emplace(left_block * depth() + simd::pack<T>::width);
  for (index_t i0 = i_begin; i0 < i_end; i0 += left_block) {
    const index_t i1 = std::min(i_end, i0 + left_block);
    T* left = pack_a ? left_space->data() : nullptr;
    for (index_t i = i0; pack_a && i < i1; i += tile::rows) {
      // All the rows that follow, since the copy may read ahead; it keeps those of the tile.
      pack_left_panel(a.data + i * a.strides[0] + k_begin * a.strides[1], a.strides[0],
                      a.strides[1], depth(), a.extents[0] - i, left + (i - i0) * depth());
    }
    for (index_t j = j_begin; j < j_end; j += tile::cols) {
      if (pack_b) {
        multiply_strip(i0, i1, j, j_end, left, right + (j - j_begin) * depth(), tile::cols);
      } else if (j + tile::cols <= b.extents[1]) {
        multiply_strip(i0, i1, j, j_end, left, b_at(j), b.strides[0]);
      } else {  // a kernel reads whole tiles
        T* tail = tail_space.reserve(tile::cols * depth());
        pack_right(j, j_end, tail);
        multiply_strip(i0, i1, j, j_end, left, tail, tile::cols);
      }
    }
  }
}

template <Real T>
void gemm_pass<T>::multiply_strip(index_t i_begin, index_t i_end, index_t j, index_t j_end,
                                  const T* left, const T* right, index_t right_step) const {
  for (index_t i = i_begin; i < i_end; i += tile::rows) {
    const index_t rows = std::min<index_t>(tile::rows, i_end - i);
    if (part == gemm_part::lower_output && j > i + rows - 1) continue;
    left_panel<T> panel{a.data + i * a.strides[0] + k_begin * a.strides[1], a.strides[0],
                        a.strides[1], depth()};
    if (left != nullptr) panel = {left + (i - i_begin) * depth(), 1, tile::rows, depth()};
    multiply_panel(i, rows, j, j_end, panel, right, right_step);
  }
}

template <Real T>
void gemm_pass<T>::multiply_panel(index_t i, index_t rows, index_t j, index_t j_end,
                                  left_panel<T> left, const T* right, index_t right_step) const {
  left_panel<T> diagonal;
  T masked[tile::rows * tile::rows];
  if (part == gemm_part::lower_left) {
    const index_t end = std::min(k_end, i + rows);
    if (end <= k_begin) return;
    const index_t begin = std::clamp(i, k_begin, end);
    for (index_t k = begin; k < end; ++k) {
      for (index_t r = 0; r < rows; ++r) {
        masked[(k - begin) * tile::rows + r] =
            k <= i + r ? a.data[(i + r) * a.strides[0] + k * a.strides[1]] : T(0);
      }
    }
    left.k = begin - k_begin;
    diagonal = {masked, 1, tile::rows, end - begin};
  }
  const auto function = tile_function_for<T>(static_cast<int>(rows), left.row_step == 1);
  const index_t cols = std::min<index_t>(tile::cols, j_end - j);
  T* out = c.data + i * c.strides[0] + j * c.strides[1];
  if (cols == tile::cols && c.strides[1] == 1) {
    function(left, diagonal, right, right_step, {out, c.strides[0], alpha, beta});
    return;
  }
  // Through a whole tile on the stack, so that every element sees the same instructions.
  T whole[tile::rows * tile::cols] = {};
  if (beta != T(0)) {
    for (index_t r = 0; r < rows; ++r) {
      for (index_t q = 0; q < cols; ++q) {
        whole[r * tile::cols + q] = out[r * c.strides[0] + q * c.strides[1]];
      }
    }
  }
  function(left, diagonal, right, right_step, {whole, tile::cols, alpha, beta});
  for (index_t r = 0; r < rows; ++r) {
    for (index_t q = 0; q < cols; ++q) {
      out[r * c.strides[0] + q * c.strides[1]] = whole[r * tile::cols + q];
    }
  }
}

/// c = beta c, for products without terms.
template <Real T>
void scale_output(T beta, view<T, 2> c) {
  for (index_t i = 0; i < c.extents[0]; ++i) {
    for (index_t j = 0; j < c.extents[1]; ++j) {
      T& x = c(i, j);
      x = beta == T(0) ? T(0) : beta * x;
    }
  }
}

template <class T>
void check_gemm(const char* operation, view<const T, 2> a, view<const T, 2> b, view<T, 2> c) {
  if (a.extents[1] == b.extents[0] && a.extents[0] == c.extents[0] &&
      b.extents[1] == c.extents[1]) {
    return;
  }
  throw shape_error("ssm: " + std::string(operation) + ": a is " + to_string<2>(a.extents) +
                    ", b is " + to_string<2>(b.extents) + ", c is " + to_string<2>(c.extents) +
                    "; wanted (m x k), (k x n), (m x n)");
}

/// The driver: `ctx` may be null. Columns are taken in blocks that the last-level cache holds.
template <Real T>
void run_gemm(const cpu::context* ctx, gemm_part part, T alpha, view<const T, 2> a,
              view<const T, 2> b, T beta, view<T, 2> c) {
  using tile = gemm_tile<T>;
  const index_t m = c.extents[0], n = c.extents[1], k = a.extents[1];
  if (m == 0 || n == 0) return;
  if (k == 0) return scale_output(beta, c);
  if (part == gemm_part::all && c.strides[1] != 1 && c.strides[0] == 1) {
    return run_gemm(ctx, part, alpha, transposed(b), transposed(a), beta, transposed(c));
  }
  // With few rows, packed columns are used at once, while the second-level cache holds them.
  const bool few_rows = m <= gemm_pass<T>::left_block;
  const index_t right_block = (few_rows ? 256 : 3072) / tile::cols * tile::cols;
  constexpr index_t small = 16384 / static_cast<index_t>(sizeof(T));
  gemm_pass<T> pass{a, b, c, alpha, beta, part, 0, 0, false, false};
  pass.pack_a = n > 8 * tile::cols && m * k > small;
  pass.pack_b = b.strides[1] != 1 || m > 4 * tile::rows;
  const bool parallel = ctx != nullptr && ctx->threads() > 1 && m * n * k > 64 * 64 * 64;
  if (parallel && few_rows && part == gemm_part::all && n >= 8 * tile::cols) {
    ctx->parallel_ranges(n, 4 * ctx->threads(), tile::cols, [&](index_t p, index_t q) {
      auto b_part = b;
      auto c_part = c;
      b_part.data += p * b.strides[1];
      c_part.data += p * c.strides[1];
      b_part.extents[1] = c_part.extents[1] = q - p;
      run_gemm<T>(nullptr, part, alpha, a, b_part, beta, c_part);
    });
    return;
  }
  workspace<T, 128 * 64> right_space;
  for (pass.k_begin = 0; pass.k_begin < k; pass.k_begin = pass.k_end) {
    pass.k_end = std::min(k, pass.k_begin + tile::depth);
    for (index_t j0 = 0; j0 < n; j0 += right_block) {
      const index_t j1 = std::min(n, j0 + right_block), cols = j1 - j0;
      const index_t strips = (cols + tile::cols - 1) / tile::cols;
      T* right = pass.pack_b ? right_space.reserve(strips * tile::cols * pass.depth()) : nullptr;
      if (!parallel) {
        if (pass.pack_b) pass.pack_right(j0, j1, right);
        pass.multiply(0, m, j0, j1, right);
        continue;
      }
      if (pass.pack_b) {
        ctx->parallel_ranges(cols, 4 * ctx->threads(), tile::cols, [&](index_t p, index_t q) {
          pass.pack_right(j0 + p, j0 + q, right + p * pass.depth());
        });
      }
      const index_t panels = (m + tile::rows - 1) / tile::rows;
      const index_t wanted = 4 * ctx->threads();
      const index_t row_pieces = std::clamp<index_t>(panels / 8, 1, std::max(wanted, m / 480));
      const index_t col_pieces =
          std::clamp<index_t>((wanted + row_pieces - 1) / row_pieces, 1, (strips + 3) / 4);
      ctx->parallel_for(row_pieces * col_pieces, [&](index_t piece) {
        const index_t r = piece / col_pieces, s = piece % col_pieces;
        const index_t i0 = panels * r / row_pieces * tile::rows;
        const index_t i1 = std::min(m, panels * (r + 1) / row_pieces * tile::rows);
        const index_t p = strips * s / col_pieces * tile::cols;
        const index_t q = std::min(cols, strips * (s + 1) / col_pieces * tile::cols);
        const T* part_of_right = right == nullptr ? nullptr : right + p * pass.depth();
        pass.multiply(i0, i1, j0 + p, j0 + q, part_of_right);
      });
    }
    pass.beta = T(1);
  }
}

#if defined(SSMLIB_BLAS)
/// Whether CBLAS can take the product: each operand has an axis of unit stride.
template <Real T>
bool blas_layout(view<const T, 2> a, bool& transpose, index_t& ld) {
  transpose = a.strides[1] != 1;
  ld = transpose ? a.strides[1] : a.strides[0];
  return a.strides[transpose ? 0 : 1] == 1 && ld >= a.extents[transpose ? 0 : 1];
}
template <Real T>
bool try_blas(T alpha, view<const T, 2> a, view<const T, 2> b, T beta, view<T, 2> c) {
  bool ta = false, tb = false, tc = false;
  index_t lda = 0, ldb = 0, ldc = 0;
  const index_t m = c.extents[0], n = c.extents[1], k = a.extents[1];
  if (m * n * k < 256 * 256 * 256 || !blas_layout(a, ta, lda) || !blas_layout(b, tb, ldb) ||
      !blas_layout<T>(c, tc, ldc) || tc) {
    return false;
  }
  const auto op_a = ta ? CblasTrans : CblasNoTrans, op_b = tb ? CblasTrans : CblasNoTrans;
  const auto i = [](index_t x) { return static_cast<int>(x); };
  if constexpr (std::is_same_v<T, float>) {
    cblas_sgemm(CblasRowMajor, op_a, op_b, i(m), i(n), i(k), alpha, a.data, i(lda), b.data, i(ldb),
                beta, c.data, i(ldc));
  } else {
    cblas_dgemm(CblasRowMajor, op_a, op_b, i(m), i(n), i(k), alpha, a.data, i(lda), b.data, i(ldb),
                beta, c.data, i(ldc));
  }
  return true;
}
#endif

}  // namespace detail

/// c = alpha a b + beta c, by any strides: a transposed operand is `transposed(view)`.
///
/// Every element of c is summed over k in one order, which depends on k alone: the same bits with
/// any number of threads, and for a row whatever other rows are in the product. (With SSMLIB_BLAS,
/// products of 256^3 and more go to CBLAS, which promises less.)
/// @param a  (m x k)
/// @param b  (k x n)
/// @param c  (m x n), overlaps neither operand; not read when beta is 0
/// @throws shape_error  the sizes do not fit.
/// @cost   2 m n k flops.
template <Real T>
void gemm(const cpu::context& ctx, std::type_identity_t<T> alpha,
          std::type_identity_t<view<const T, 2>> a, std::type_identity_t<view<const T, 2>> b,
          std::type_identity_t<T> beta, view<T, 2> c) {
  detail::check_gemm<T>("gemm", a, b, c);
#if defined(SSMLIB_BLAS)
  if (detail::try_blas<T>(alpha, a, b, beta, c)) return;
#endif
  detail::run_gemm<T>(&ctx, detail::gemm_part::all, alpha, a, b, beta, c);
}
/// The same in the calling thread, for use inside tasks.
template <Real T>
void gemm(std::type_identity_t<T> alpha, std::type_identity_t<view<const T, 2>> a,
          std::type_identity_t<view<const T, 2>> b, std::type_identity_t<T> beta, view<T, 2> c) {
  detail::check_gemm<T>("gemm", a, b, c);
  detail::run_gemm<T>(nullptr, detail::gemm_part::all, alpha, a, b, beta, c);
}

/// `gemm` for the lower triangle of c, i >= j. Elements above it are either those of `gemm` or
/// left as they were: they are computed where a register tile touches the triangle.
/// @cost   half of gemm's flops for a square c.
template <Real T>
void gemm_lower(std::type_identity_t<T> alpha, std::type_identity_t<view<const T, 2>> a,
                std::type_identity_t<view<const T, 2>> b, std::type_identity_t<T> beta,
                view<T, 2> c) {
  detail::check_gemm<T>("gemm_lower", a, b, c);
  detail::run_gemm<T>(nullptr, detail::gemm_part::lower_output, alpha, a, b, beta, c);
}
template <Real T>
void gemm_lower(const cpu::context& ctx, std::type_identity_t<T> alpha,
                std::type_identity_t<view<const T, 2>> a, std::type_identity_t<view<const T, 2>> b,
                std::type_identity_t<T> beta, view<T, 2> c) {
  detail::check_gemm<T>("gemm_lower", a, b, c);
  detail::run_gemm<T>(&ctx, detail::gemm_part::lower_output, alpha, a, b, beta, c);
}

/// `gemm` with a lower triangular a: row i uses a[i, 0..i]. What a holds above its diagonal is not
/// used, whatever it is.
/// @cost   half of gemm's flops for a square a.
template <Real T>
void gemm_lower_left(std::type_identity_t<T> alpha, std::type_identity_t<view<const T, 2>> a,
                     std::type_identity_t<view<const T, 2>> b, std::type_identity_t<T> beta,
                     view<T, 2> c) {
  detail::check_gemm<T>("gemm_lower_left", a, b, c);
  detail::run_gemm<T>(nullptr, detail::gemm_part::lower_left, alpha, a, b, beta, c);
}

/// `gemm` with an upper triangular square a: row i uses a[i, i..m-1], by descending k. Such is the
/// transpose of a lower triangle, in backward passes.
template <Real T>
void gemm_upper_left(std::type_identity_t<T> alpha, std::type_identity_t<view<const T, 2>> a,
                     std::type_identity_t<view<const T, 2>> b, std::type_identity_t<T> beta,
                     view<T, 2> c) {
  detail::check_gemm<T>("gemm_upper_left", a, b, c);
  if (a.extents[0] != a.extents[1]) {
    throw shape_error("ssm: gemm_upper_left: a is " + to_string<2>(a.extents) +
                      "; wanted a square matrix");
  }
  if (a.extents[0] == 0) return;
  // Counted from the last row and column, an upper triangle is a lower one.
  const index_t last = a.extents[0] - 1;
  const view<const T, 2> a_back{
      a.data + last * (a.strides[0] + a.strides[1]), a.extents, {-a.strides[0], -a.strides[1]}};
  const view<const T, 2> b_back{
      b.data + last * b.strides[0], b.extents, {-b.strides[0], b.strides[1]}};
  const view<T, 2> c_back{c.data + last * c.strides[0], c.extents, {-c.strides[0], c.strides[1]}};
  detail::run_gemm<T>(nullptr, detail::gemm_part::lower_left, alpha, a_back, b_back, beta, c_back);
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(gemm, void gemm<T>(const cpu::context&, std::type_identity_t<T>,             \
                                        std::type_identity_t<view<const T, 2>>,                   \
                                        std::type_identity_t<view<const T, 2>>,                   \
                                        std::type_identity_t<T>, view<T, 2>));                    \
  SSMLIB_INSTANTIATE(                                                                             \
      gemm,                                                                                       \
      void gemm<T>(std::type_identity_t<T>, std::type_identity_t<view<const T, 2>>,               \
                   std::type_identity_t<view<const T, 2>>, std::type_identity_t<T>, view<T, 2>)); \
  SSMLIB_INSTANTIATE(                                                                             \
      gemm, void gemm_lower<T>(std::type_identity_t<T>, std::type_identity_t<view<const T, 2>>,   \
                               std::type_identity_t<view<const T, 2>>, std::type_identity_t<T>,   \
                               view<T, 2>));                                                      \
  SSMLIB_INSTANTIATE(gemm, void gemm_lower<T>(const cpu::context&, std::type_identity_t<T>,       \
                                              std::type_identity_t<view<const T, 2>>,             \
                                              std::type_identity_t<view<const T, 2>>,             \
                                              std::type_identity_t<T>, view<T, 2>));              \
  SSMLIB_INSTANTIATE(gemm, void gemm_lower_left<T>(std::type_identity_t<T>,                       \
                                                   std::type_identity_t<view<const T, 2>>,        \
                                                   std::type_identity_t<view<const T, 2>>,        \
                                                   std::type_identity_t<T>, view<T, 2>));         \
  SSMLIB_INSTANTIATE(gemm, void gemm_upper_left<T>(std::type_identity_t<T>,                       \
                                                   std::type_identity_t<view<const T, 2>>,        \
                                                   std::type_identity_t<view<const T, 2>>,        \
                                                   std::type_identity_t<T>, view<T, 2>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
