#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/reduce.hpp>

#include <algorithm>

/// @file
/// (L o alpha Q K^T) X in square blocks, for any mask L that can multiply a block of entries:
/// O(T^2) time, no T x T storage. A mask is a value with
///
///   range(begin, end, length)             the columns [first, second) where rows [begin, end) may
///                                         be other than zero; by column, `rows` the other way
///   multiply(h, t, s, block)              block(i, j) *= L[t + i, s + j], exact zeros included
///   add_gradient(h, t, s, block, to)      to += the gradient of the mask's parameters for
///                                         dL = block; optional, with parameters() numbers a head

namespace ssm::kernels {

/// Views are (tokens, heads, features) with unit stride in the features; head h of `heads` uses
/// head h * G / heads of an operand with G heads.
template <Real T>
struct quadratic_problem {
  view<const T, 3> q, k, x;
  T alpha = T(1);
  index_t heads = 0;
  const index_t* offsets = nullptr;
  index_t sequences = 0;
};

/// Tokens counted from the begin of their sequence.
struct token_range {
  index_t begin, end;
};

/// All ones: the gram matrix itself.
template <Real T>
struct no_mask {
  [[nodiscard]] token_range range(index_t, index_t, index_t length) const { return {0, length}; }
  [[nodiscard]] token_range rows(index_t, index_t, index_t length) const { return {0, length}; }
  void multiply(index_t, index_t, index_t, view<T, 2>) const {}
};

/// 1 for t - size < s <= t.
template <Real T>
struct band_mask {
  index_t size;
  [[nodiscard]] token_range range(index_t begin, index_t end, index_t) const {
    return {std::max<index_t>(0, begin - size + 1), end};
  }
  [[nodiscard]] token_range rows(index_t begin, index_t end, index_t length) const {
    return {begin, std::min(length, end - 1 + size)};
  }
  void multiply(index_t, index_t t, index_t s, view<T, 2> block) const {
    for (index_t i = 0; i < block.extent(0); ++i) {
      for (index_t j = 0; j < block.extent(1); ++j) {
        const index_t distance = t + i - s - j;
        if (distance < 0 || distance >= size) block(i, j) = T(0);
      }
    }
  }
};

/// kernel[h, t - s] for s <= t.
template <Real T>
struct toeplitz_entries {
  view<const T, 2> kernel;
  index_t heads;

  [[nodiscard]] const T* of_head(index_t h) const {
    return kernel.data + h * kernel.extent(0) / heads * kernel.stride(0);
  }
  [[nodiscard]] token_range range(index_t, index_t end, index_t) const { return {0, end}; }
  [[nodiscard]] token_range rows(index_t begin, index_t, index_t length) const {
    return {begin, length};
  }
  void multiply(index_t h, index_t t, index_t s, view<T, 2> block) const {
    const T* entries = of_head(h);
    for (index_t i = 0; i < block.extent(0); ++i) {
      for (index_t j = 0; j < block.extent(1); ++j) {
        const index_t d = t + i - s - j;
        block(i, j) = d < 0 ? T(0) : block(i, j) * entries[d * kernel.stride(1)];
      }
    }
  }
  [[nodiscard]] index_t parameters() const { return kernel.extent(1); }
  void add_gradient(index_t, index_t t, index_t s, view<const T, 2> block, T* to) const {
    for (index_t i = 0; i < block.extent(0); ++i) {
      for (index_t j = 0; j < block.extent(1); ++j) {
        const index_t d = t + i - s - j;
        if (d >= 0) to[d] += block(i, j);
      }
    }
  }
};

namespace detail {

inline constexpr index_t quadratic_block = 128;

/// The blocks of rows of all sequences, numbered through.
class row_blocks {
 public:
  row_blocks(const index_t* offsets, index_t sequences, index_t rows = quadratic_block)
      : offsets_(offsets), sequences_(sequences), rows_(rows), first_(sequences + 1) {
    first_[0] = 0;
    for (index_t i = 0; i < sequences; ++i) {
      const index_t length = offsets[i + 1] - offsets[i];
      first_[i + 1] = first_[i] + (length + rows - 1) / rows;
    }
  }
  struct place {
    index_t base, length;  ///< of the sequence
    token_range tokens;    ///< of the block
  };
  [[nodiscard]] index_t count() const { return first_[sequences_]; }
  [[nodiscard]] place at(index_t block) const {
    const index_t i = sequence_of(block), length = offsets_[i + 1] - offsets_[i];
    const index_t begin = (block - first_[i]) * rows_;
    return {offsets_[i], length, {begin, std::min(length, begin + rows_)}};
  }
  /// The number of a sequence's first block, also for i = sequences: the end.
  [[nodiscard]] index_t first(index_t i) const { return first_[i]; }
  [[nodiscard]] index_t sequence_of(index_t block) const {
    return std::upper_bound(first_.data(), first_.data() + sequences_ + 1, block) - first_.data() -
           1;
  }

 private:
  const index_t* offsets_;
  index_t sequences_, rows_;
  scratch<index_t> first_;
};

/// Rows of one head as a matrix.
template <class T>
[[nodiscard]] view<T, 2> head_rows(view<T, 3> t, index_t h, index_t heads, index_t base,
                                   token_range r) {
  return {t.data + (base + r.begin) * t.stride(0) + h * t.extent(1) / heads * t.stride(1),
          {r.end - r.begin, t.extent(2)},
          {t.stride(0), t.stride(2)}};
}

/// f(range) for the blocks of a range.
template <class F>
void for_each_block_of(token_range r, F f) {
  for (index_t s = r.begin; s < r.end; s += quadratic_block) {
    f(token_range{s, std::min(r.end, s + quadratic_block)});
  }
}

/// The products of one block of the matrix: its entries, and what the gradient does to them.
template <Real T, class Mask>
class entry_block {
 public:
  entry_block(const quadratic_problem<T>& p, const Mask& mask, index_t h, index_t base)
      : p_(p), mask_(mask), h_(h), base_(base), memory_(quadratic_block * quadratic_block) {}

  /// alpha Q K^T, without the mask.
  view<T, 2> gram(token_range rows, token_range columns) {
    const view<T, 2> m = shaped(rows, columns);
    gemm<T>(p_.alpha, of(p_.q, rows), transposed(of(p_.k, columns)), T(0), m);
    return m;
  }
  view<T, 2> entries(token_range rows, token_range columns) {
    const view<T, 2> m = gram(rows, columns);
    mask_.multiply(h_, rows.begin, columns.begin, m);
    return m;
  }
  /// dy x^T, the gradient of the entries.
  view<T, 2> gradient(view<const T, 3> dy, token_range rows, token_range columns) {
    const view<T, 2> m = shaped(rows, columns);
    gemm<T>(T(1), of(dy, rows), transposed(of(p_.x, columns)), T(0), m);
    return m;
  }
  /// L o dy x^T, the gradient of alpha Q K^T.
  view<T, 2> gram_gradient(view<const T, 3> dy, token_range rows, token_range columns) {
    const view<T, 2> m = gradient(dy, rows, columns);
    mask_.multiply(h_, rows.begin, columns.begin, m);
    return m;
  }
  template <class U>
  [[nodiscard]] view<U, 2> of(view<U, 3> t, token_range r) const {
    return head_rows(t, h_, p_.heads, base_, r);
  }

 private:
  view<T, 2> shaped(token_range rows, token_range columns) const {
    const index_t m = rows.end - rows.begin, n = columns.end - columns.begin;
    return {memory_.data(), {m, n}, {n, 1}};
  }
  const quadratic_problem<T>& p_;
  const Mask& mask_;
  index_t h_, base_;
  scratch<T> memory_;
};

template <Real T>
[[nodiscard]] view<const T, 2> constant_view(view<T, 2> m) {
  return m;
}

}  // namespace detail

/// y = (L o alpha Q K^T) x; y (tokens, heads, P) is overwritten.
template <Real T, class Mask>
void masked_quadratic(const cpu::context& ctx, const quadratic_problem<T>& p, const Mask& mask,
                      view<T, 3> y) {
  using namespace detail;
  const row_blocks blocks(p.offsets, p.sequences);
  ctx.parallel_for(blocks.count() * p.heads, [&](index_t task) {
    const index_t h = task % p.heads;
    const row_blocks::place at = blocks.at(task / p.heads);
    const token_range rows = at.tokens;
    entry_block<T, Mask> block(p, mask, h, at.base);
    const view<T, 2> out = block.of(y, rows);
    T beta = T(0);
    for_each_block_of(mask.range(rows.begin, rows.end, at.length), [&](token_range columns) {
      gemm<T>(T(1), block.entries(rows, columns), block.of(p.x, columns), beta, out);
      beta = T(1);
    });
  });
}

/// Adds the gradients of masked_quadratic; each head has its own rows of dq, dk and dx, absent
/// ones are skipped.
template <Real T, class Mask>
void masked_quadratic_vjp(const cpu::context& ctx, const quadratic_problem<T>& p, const Mask& mask,
                          view<const T, 3> dy, view<T, 3> dq, view<T, 3> dk, view<T, 3> dx) {
  using namespace detail;
  const row_blocks blocks(p.offsets, p.sequences);
  if (!dq && !dk && !dx) return;
  ctx.parallel_for(blocks.count() * p.heads, [&](index_t task) {
    const index_t h = task % p.heads;
    const row_blocks::place at = blocks.at(task / p.heads);
    const token_range mine = at.tokens;
    entry_block<T, Mask> block(p, mask, h, at.base);
    if (dq) {
      for_each_block_of(mask.range(mine.begin, mine.end, at.length), [&](token_range columns) {
        gemm<T>(p.alpha, block.gram_gradient(dy, mine, columns), block.of(p.k, columns), T(1),
                block.of(dq, mine));
      });
    }
    if (!dk && !dx) return;
    for_each_block_of(mask.rows(mine.begin, mine.end, at.length), [&](token_range rows) {
      if (dk) {
        gemm<T>(p.alpha, transposed(constant_view(block.gram_gradient(dy, rows, mine))),
                block.of(p.q, rows), T(1), block.of(dk, mine));
      }
      if (dx) {
        gemm<T>(T(1), transposed(constant_view(block.entries(rows, mine))), block.of(dy, rows),
                T(1), block.of(dx, mine));
      }
    });
  });
}

/// Adds the gradient of the mask's parameters to `to` (G, parameters).
template <Real T, class Mask>
void masked_quadratic_mask_vjp(const cpu::context& ctx, const quadratic_problem<T>& p,
                               const Mask& mask, view<const T, 3> dy, view<T, 2> to) {
  using namespace detail;
  const row_blocks blocks(p.offsets, p.sequences);
  const index_t n = mask.parameters(), parts = std::min<index_t>(8, blocks.count());
  if (parts == 0 || n == 0) return;
  const scratch<T> sums(p.heads * parts * n);
  std::fill_n(sums.data(), p.heads * parts * n, T(0));
  ctx.parallel_for(p.heads * parts, [&](index_t task) {
    const index_t h = task / parts;
    // Late rows of a causal mask have more columns: taking every eighth block balances them.
    for (index_t b = task % parts; b < blocks.count(); b += parts) {
      const row_blocks::place at = blocks.at(b);
      const token_range mine = at.tokens;
      entry_block<T, Mask> gram(p, mask, h, at.base), gradient(p, mask, h, at.base);
      for_each_block_of(mask.range(mine.begin, mine.end, at.length), [&](token_range columns) {
        const view<T, 2> d = gradient.gradient(dy, mine, columns);
        if (p.q) {
          const view<T, 2> g = gram.gram(mine, columns);
          for (index_t i = 0; i < d.size(); ++i)
            d.data[i] *= g.data[i];
        }
        mask.add_gradient(h, mine.begin, columns.begin, d, sums.data() + task * n);
      });
    }
  });
  const index_t groups = to.extent(0);
  for (index_t h = 0; h < p.heads; ++h) {
    for (index_t part = h * parts; part < (h + 1) * parts; ++part) {
      for (index_t i = 0; i < n; ++i)
        to(h * groups / p.heads, i) += sums[part * n + i];
    }
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      gram, void masked_quadratic<T, no_mask<T>>(const cpu::context&, const quadratic_problem<T>&, \
                                                 const no_mask<T>&, view<T, 3>));                  \
  SSMLIB_INSTANTIATE(gram, void masked_quadratic<T, band_mask<T>>(                                 \
                               const cpu::context&, const quadratic_problem<T>&,                   \
                               const band_mask<T>&, view<T, 3>));                                  \
  SSMLIB_INSTANTIATE(gram, void masked_quadratic<T, toeplitz_entries<T>>(                          \
                               const cpu::context&, const quadratic_problem<T>&,                   \
                               const toeplitz_entries<T>&, view<T, 3>));                           \
  SSMLIB_INSTANTIATE(gram,                                                                         \
                     void masked_quadratic_vjp<T, no_mask<T>>(                                     \
                         const cpu::context&, const quadratic_problem<T>&, const no_mask<T>&,      \
                         view<const T, 3>, view<T, 3>, view<T, 3>, view<T, 3>));                   \
  SSMLIB_INSTANTIATE(gram,                                                                         \
                     void masked_quadratic_vjp<T, band_mask<T>>(                                   \
                         const cpu::context&, const quadratic_problem<T>&, const band_mask<T>&,    \
                         view<const T, 3>, view<T, 3>, view<T, 3>, view<T, 3>));                   \
  SSMLIB_INSTANTIATE(                                                                              \
      gram, void masked_quadratic_vjp<T, toeplitz_entries<T>>(                                     \
                const cpu::context&, const quadratic_problem<T>&, const toeplitz_entries<T>&,      \
                view<const T, 3>, view<T, 3>, view<T, 3>, view<T, 3>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
