#pragma once

#include <ssmlib/expr/concepts.hpp>
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/tokens.hpp>

#include <algorithm>
#include <string>

namespace ssm {

/// A T x T matrix of any mixer, read and differentiated in tiles, so that two mixers can be
/// compared entry by entry in O(T) memory. The type behind it is erased: whatever models
/// MatrixMixer can meet whatever else does (MOHAWK's matrix orientation). Backends cut and compare
/// tiles in their own ways, so this is a class of its own for each: that of CUDA is in
/// mixer/cuda/matrix_panels.hpp. Common to them are layout(), heads(), is_causal(), tile() and
/// panel().
template <Floating T, Backend B = cpu>
class matrix_panels;

template <Floating T>
class matrix_panels<T, cpu> {
 public:
  virtual ~matrix_panels() = default;

  [[nodiscard]] virtual const sequence_layout& layout() const = 0;
  [[nodiscard]] virtual index_t heads() const = 0;
  /// True where entries above the diagonal are zero, so that rows before the panel need no look.
  [[nodiscard]] virtual bool is_causal() const = 0;

  /// Fills `out`, (rows, heads, columns) with unit stride along the columns: the rows from `row`
  /// and the columns from s0, all of sequence i; tokens count over the batch.
  virtual void tile_into(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                         const tensor<T, 3>& out) const = 0;
  /// Whether a few rows cost little more than their part of all rows.
  [[nodiscard]] virtual bool has_cheap_rows() const = 0;

  /// Rows [row, row_end), columns [s0, s1). @return (row_end - row, heads, s1 - s0)
  [[nodiscard]] tensor<T, 3> tile(const cpu::context& ctx, index_t i, index_t row, index_t row_end,
                                  index_t s0, index_t s1) const {
    tensor<T, 3> out(row_end - row, heads(), s1 - s0);
    tile_into(ctx, i, row, s0, out);
    return out;
  }
  /// A tile of the rows from `row` to the end of the sequence.
  [[nodiscard]] tensor<T, 3> panel(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                                   index_t s1) const {
    return tile(ctx, i, row, layout().end(i), s0, s1);
  }

  /// Whether a tile is known to depend on no operand (it decayed to 0): its gradient matters not.
  [[nodiscard]] virtual bool is_constant(index_t /*i*/, index_t /*row*/, index_t /*row_end*/,
                                         index_t /*s0*/, index_t /*s1*/) const {
    return false;
  }
  /// Whether the gradient needs sums over whole rows. If so, observe() is shown every tile of a
  /// sequence with its gradient before the first add_vjp() of that sequence.
  [[nodiscard]] virtual bool needs_row_sums() const { return false; }
  virtual void observe(const cpu::context&, index_t /*i*/, index_t /*row*/, index_t /*s0*/,
                       const tensor<T, 3>& /*values*/, const tensor<T, 3>& /*d*/) {}
  /// Adds the vector-Jacobian product of one tile to the gradients of the mixer's operands.
  /// @param values  what tile() returned
  /// @param d       the gradient of the tile, of the same shape
  virtual void add_vjp(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                       const tensor<T, 3>& values, const tensor<T, 3>& d) = 0;
};

namespace detail {

/// The gradient of an operand that lies (batch, time, ...), for adding to by token; absent if it
/// is not wanted.
template <Floating T, Floating U, Backend B, int R>
[[nodiscard]] tensor<U, R - 1, B> gradient_tokens(tape<T, B>* t,
                                                  const tensor<U, R, B>& operand_tensor) {
  if (t == nullptr) return {};
  const tensor<U, R, B> gradient = t->gradient(operand_tensor);
  if (gradient && !is_token_major(gradient)) {
    throw shape_error(
        "ssm: panels: the operand " + to_string<R>(gradient.extents()) +
        ", whose gradient is wanted, is a slice along time; wanted batch and time that "
        "merge, take all of time");
  }
  return input_tokens(gradient);
}

/// f(head, r0, r1) for blocks of rows of every head, in parallel; the blocks depend on the sizes
/// only.
template <class F>
void for_row_blocks(const cpu::context& ctx, index_t rows, index_t heads, F f) {
  constexpr index_t block = 256;  // by 64 columns: what the second-level cache holds
  const index_t blocks = (rows + block - 1) / block;
  ctx.parallel_for(blocks * heads, [&](index_t task) {
    const index_t r0 = task % blocks * block;
    f(task / blocks, r0, std::min(rows, r0 + block));
  });
}

/// All rows of one head of a panel.
template <Floating T, Backend B>
[[nodiscard]] view<T, 2> rows_of_head(const tensor<T, 3, B>& t, index_t h, index_t begin,
                                      index_t end) {
  return {t.data() + begin * t.strides()[0] + h * t.strides()[1],
          {end - begin, t.extent(2)},
          {t.strides()[0], t.strides()[2]}};
}

}  // namespace detail
}  // namespace ssm
