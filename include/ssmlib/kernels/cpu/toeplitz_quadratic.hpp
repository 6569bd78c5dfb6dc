#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/masked_quadratic.hpp>
#include <ssmlib/kernels/cpu/toeplitz.hpp>

#include <algorithm>

/// @file
/// L X with a causal Toeplitz L by matrix products. The matrix is never stored: entry (t, s) lies
/// at kernel + t - s, so that a block of L is a view of the kernel with strides 1 and -1.

namespace ssm::kernels {

namespace detail {

/// The kernels, dense, each after `quadratic_block` zeros: blocks on the diagonal may be read above
/// it.
template <Real T>
class padded_kernels {
 public:
  padded_kernels(view<const T, 2> kernel, index_t heads)
      : step_(kernel.extent(1) + quadratic_block),
        groups_(kernel.extent(0)),
        heads_(heads),
        memory_(step_ * groups_) {
    for (index_t g = 0; g < groups_; ++g) {
      T* to = memory_.data() + g * step_;
      std::fill_n(to, quadratic_block, T(0));
      for (index_t d = 0; d < kernel.extent(1); ++d)
        to[quadratic_block + d] = kernel(g, d);
    }
  }
  /// Rows by columns of L for head h.
  [[nodiscard]] view<const T, 2> block(index_t h, token_range rows, token_range columns) const {
    const T* kernel = memory_.data() + h * groups_ / heads_ * step_ + quadratic_block;
    return {kernel + rows.begin - columns.begin,
            {rows.end - rows.begin, columns.end - columns.begin},
            {1, -1}};
  }

 private:
  index_t step_, groups_, heads_;
  scratch<T> memory_;
};

}  // namespace detail

/// y = L x; y (tokens, heads, P) is overwritten. @cost T^2 P flops a head, no T x T storage.
template <Real T>
void toeplitz_quadratic(const cpu::context& ctx, const toeplitz_problem<T>& p, view<T, 3> y) {
  using namespace detail;
  const row_blocks blocks(p.offsets, p.sequences);
  const padded_kernels<T> kernels(p.kernel, p.heads);
  ctx.parallel_for(blocks.count() * p.heads, [&](index_t task) {
    const index_t h = task % p.heads;
    // The longest rows first, so that the last task is a short one.
    const row_blocks::place at = blocks.at(blocks.count() - 1 - task / p.heads);
    const index_t base = at.base;
    const token_range rows = at.tokens;
    const view<T, 2> out = head_rows(y, h, p.heads, base, rows);
    const token_range before{0, rows.begin};
    gemm<T>(T(1), kernels.block(h, rows, before), head_rows(p.x, h, p.heads, base, before), T(0),
            out);
    gemm_lower_left<T>(T(1), kernels.block(h, rows, rows), head_rows(p.x, h, p.heads, base, rows),
                       T(1), out);
  });
}

/// dx += L^T dy, dkernel[d] += the sum over t and columns of dy[t] x[t - d].
template <Real T>
void toeplitz_quadratic_vjp(const cpu::context& ctx, const toeplitz_problem<T>& p,
                            view<const T, 3> dy, const toeplitz_gradients<T>& g) {
  using namespace detail;
  const row_blocks blocks(p.offsets, p.sequences);
  if (g.x) {
    const padded_kernels<T> kernels(p.kernel, p.heads);
    ctx.parallel_for(blocks.count() * p.heads, [&](index_t task) {
      const index_t h = task % p.heads;
      const row_blocks::place at = blocks.at(task / p.heads);
      const index_t base = at.base;
      const token_range mine = at.tokens;
      const token_range after{mine.end, at.length};
      const view<T, 2> out = head_rows(g.x, h, p.heads, base, mine);
      gemm_upper_left<T>(T(1), transposed(kernels.block(h, mine, mine)),
                         head_rows(dy, h, p.heads, base, mine), T(1), out);
      gemm<T>(T(1), transposed(kernels.block(h, after, mine)),
              head_rows(dy, h, p.heads, base, after), T(1), out);
    });
  }
  if (g.kernel) {
    const quadratic_problem<T> q{{}, {}, p.x, T(1), p.heads, p.offsets, p.sequences};
    masked_quadratic_mask_vjp<T>(ctx, q, toeplitz_entries<T>{p.kernel, p.heads}, dy, g.kernel);
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(toeplitz, void toeplitz_quadratic<T>(                                        \
                                   const cpu::context&, const toeplitz_problem<T>&, view<T, 3>)); \
  SSMLIB_INSTANTIATE(                                                                             \
      toeplitz, void toeplitz_quadratic_vjp<T>(const cpu::context&, const toeplitz_problem<T>&,   \
                                               view<const T, 3>, const toeplitz_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
