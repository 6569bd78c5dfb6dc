#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/masked_quadratic.hpp>

/// @file
/// (alpha Q K^T) X as alpha Q (K^T X): linear in the length, for matrices without a mask.

namespace ssm::kernels {

namespace detail {

/// Tokens a task; the sums over them are added in order.
inline constexpr index_t gram_block = 512;

/// For every sequence and head the (N x P) matrix scale u^T v, u with N and v with P features.
template <Real T>
class key_value_sums {
 public:
  key_value_sums(const cpu::context& ctx, const quadratic_problem<T>& p, const row_blocks& blocks,
                 T scale, view<const T, 3> u, view<const T, 3> v)
      : blocks_(blocks),
        rows_(u.extent(2)),
        columns_(v.extent(2)),
        heads_(p.heads),
        sums_(blocks.count() * p.heads * rows_ * columns_) {
    ctx.parallel_for(blocks.count() * heads_, [&](index_t task) {
      const index_t h = task % heads_;
      const row_blocks::place at = blocks.at(task / heads_);
      gemm<T>(scale, transposed(head_rows(u, h, heads_, at.base, at.tokens)),
              head_rows(v, h, heads_, at.base, at.tokens), T(0), block(task / heads_, h));
    });
    ctx.parallel_for(p.sequences * heads_, [&](index_t task) {
      const index_t first = blocks.first(task / heads_), last = blocks.first(task / heads_ + 1);
      for (index_t b = first + 1; b < last; ++b) {
        axpy(rows_ * columns_, T(1), block(b, task % heads_).data,
             block(first, task % heads_).data);
      }
    });
  }
  /// The sum of the whole sequence that has this block.
  [[nodiscard]] view<const T, 2> of(index_t b, index_t h) const {
    return block(blocks_.first(blocks_.sequence_of(b)), h);
  }

 private:
  [[nodiscard]] view<T, 2> block(index_t b, index_t h) const {
    return {sums_.data() + (b * heads_ + h) * rows_ * columns_, {rows_, columns_}, {columns_, 1}};
  }
  const row_blocks& blocks_;
  index_t rows_, columns_, heads_;
  scratch<T> sums_;
};

}  // namespace detail

/// y = alpha Q (K^T x); y (tokens, heads, P) is overwritten. @cost 4 T N P flops a head.
template <Real T>
void gram_associative(const cpu::context& ctx, const quadratic_problem<T>& p, view<T, 3> y) {
  using namespace detail;
  const row_blocks blocks(p.offsets, p.sequences, gram_block);
  const key_value_sums<T> state(ctx, p, blocks, p.alpha, p.k, p.x);
  ctx.parallel_for(blocks.count() * p.heads, [&](index_t task) {
    const index_t h = task % p.heads, block = task / p.heads;
    const row_blocks::place at = blocks.at(block);
    gemm<T>(T(1), head_rows(p.q, h, p.heads, at.base, at.tokens), state.of(block, h), T(0),
            head_rows(y, h, p.heads, at.base, at.tokens));
  });
}

/// Adds the gradients; each head has its own rows of dq, dk and dx, absent ones are skipped.
template <Real T>
void gram_associative_vjp(const cpu::context& ctx, const quadratic_problem<T>& p,
                          view<const T, 3> dy, view<T, 3> dq, view<T, 3> dk, view<T, 3> dx) {
  using namespace detail;
  const row_blocks blocks(p.offsets, p.sequences, gram_block);
  const auto add_rows = [&](view<T, 3> to, view<const T, 3> from, const key_value_sums<T>& state,
                            bool transpose) {
    ctx.parallel_for(blocks.count() * p.heads, [&](index_t task) {
      const index_t h = task % p.heads, block = task / p.heads;
      const row_blocks::place at = blocks.at(block);
      const view<const T, 2> m = state.of(block, h);
      gemm<T>(T(1), head_rows(from, h, p.heads, at.base, at.tokens), transpose ? transposed(m) : m,
              T(1), head_rows(to, h, p.heads, at.base, at.tokens));
    });
  };
  if (dq) add_rows(dq, dy, key_value_sums<T>(ctx, p, blocks, p.alpha, p.k, p.x), true);
  if (!dk && !dx) return;
  const key_value_sums<T> d_state(ctx, p, blocks, p.alpha, p.q, dy);
  if (dk) add_rows(dk, p.x, d_state, true);
  if (dx) add_rows(dx, p.k, d_state, false);
}

#define SSMLIB_DETAIL_LIST(T)                                                                  \
  SSMLIB_INSTANTIATE(gram, void gram_associative<T>(const cpu::context&,                       \
                                                    const quadratic_problem<T>&, view<T, 3>)); \
  SSMLIB_INSTANTIATE(                                                                          \
      gram, void gram_associative_vjp<T>(const cpu::context&, const quadratic_problem<T>&,     \
                                         view<const T, 3>, view<T, 3>, view<T, 3>, view<T, 3>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
