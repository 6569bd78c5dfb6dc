#pragma once

#include <ssmlib/kernels/cuda/gemm.hpp>
#include <ssmlib/kernels/cuda/matrix_distance.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/mixer/matrix_panels.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

#include <algorithm>
#include <utility>

namespace ssm {

/// The entries of a place of some matrices, with the memory that their products lie in.
template <Floating T>
struct cuda_matrix_tile {
  kernels::cuda::matrix_tile<accum_t<T>> tile;
  tensor<accum_t<T>, 1, cuda> products;
};

/// Matrices in tiles on CUDA. A tile is the products of queries and keys, and the numbers that make
/// entries of them; those are made where two tiles are compared. Tiles are of many sequences at
/// once where these are equally long. Everything stays on the device.
template <Floating T>
class matrix_panels<T, cuda> {
 public:
  using real = accum_t<T>;
  using place = kernels::cuda::matrix_place;

  virtual ~matrix_panels() = default;

  [[nodiscard]] virtual const sequence_layout& layout() const = 0;
  [[nodiscard]] virtual index_t heads() const = 0;
  /// True where entries above the diagonal are zero.
  [[nodiscard]] virtual bool is_causal() const = 0;
  /// Whether a tile may be of any rows and of several sequences; else it is of one, and has all
  /// rows from the first that is not zero.
  [[nodiscard]] virtual bool has_cheap_rows() const = 0;
  /// Heads of the products.
  [[nodiscard]] virtual index_t product_heads() const { return heads(); }
  [[nodiscard]] virtual cuda_matrix_tile<T> tile_at(const cuda::context& ctx,
                                                    const place& at) const = 0;

  /// Rows [row, row_end), columns [s0, s1) of sequence i; tokens count over the batch.
  /// @return (row_end - row, heads, s1 - s0)
  [[nodiscard]] tensor<real, 3, cuda> tile(const cuda::context& ctx, index_t i, index_t row,
                                           index_t row_end, index_t s0, index_t s1) const {
    const cuda::scope scope(ctx);
    const index_t begin = layout().begin(i), length = layout().length(i);
    place at{begin, 1, length, row - begin, row_end - row, s0 - begin, s1 - s0};
    if (!has_cheap_rows()) at.row = is_causal() ? at.column : 0, at.rows = length - at.row;
    const cuda_matrix_tile<T> m = tile_at(ctx, at);
    const tensor<real, 3, cuda> all(at.rows, heads(), at.columns);
    kernels::cuda::matrix_entries<real>(ctx.stream(), at, m.tile, all.data());
    if (has_cheap_rows()) return all;
    const tensor<real, 3, cuda> out = tensor<real, 3, cuda>::zeros(row_end - row, heads(), s1 - s0);
    const index_t first = std::max(row - begin, at.row), last = row_end - begin;
    if (first < last) {
      out.slice(0, first - (row - begin), row_end - row)
          .copy_from(all.slice(0, first - at.row, last - at.row));
    }
    return out;
  }
  /// A tile of the rows from `row` to the end of the sequence.
  [[nodiscard]] tensor<real, 3, cuda> panel(const cuda::context& ctx, index_t i, index_t row,
                                            index_t s0, index_t s1) const {
    return tile(ctx, i, row, layout().end(i), s0, s1);
  }

  /// Whether any gradient is wanted.
  [[nodiscard]] virtual bool wants_gradients() const { return false; }
  /// Whether the gradient needs sums over whole rows, so that there are two sweeps.
  [[nodiscard]] virtual bool needs_row_sums() const { return false; }
  /// Before the first and after the last place of one gradient; what is in between collects.
  virtual void begin_gradients(const cuda::context&) {}
  /// Where sums beside the products go, zero at the beginning.
  [[nodiscard]] virtual kernels::cuda::matrix_sums sums() const { return {}; }
  /// @param d  the gradient of the products of tile_at(at), as those lie
  virtual void add_products_vjp(const cuda::context&, const place& /*at*/,
                                const tensor<T, 1, cuda>& /*d*/) {}
  virtual void finish_gradients(const cuda::context&) {}
};

namespace detail {

/// A layout as the kernels of kernels/cuda/matrix_distance.hpp take it.
[[nodiscard]] inline kernels::cuda::matrix_sequences matrix_sequences_of(const device_layout& l) {
  return {l.offsets, l.sequences, l.max_length};
}

/// The products of queries (tokens, Hq, N) and keys (tokens, Hk, N) at a place: (sequences,
/// max(Hq, Hk), rows, columns), and what their gradient adds to those of both, by cuBLASLt.
template <Floating T>
class query_key_products {
 public:
  using real = accum_t<T>;
  using place = kernels::cuda::matrix_place;

  query_key_products(tensor<T, 3, cuda> q, tensor<T, 3, cuda> k)
      : q_(std::move(q)), k_(std::move(k)) {}

  [[nodiscard]] index_t heads() const { return std::max(q_.extent(1), k_.extent(1)); }
  [[nodiscard]] const tensor<T, 3, cuda>& queries() const { return q_; }
  [[nodiscard]] const tensor<T, 3, cuda>& keys() const { return k_; }

  [[nodiscard]] cuda_matrix_tile<T> compute(const cuda::context& ctx, const place& at) const {
    cuda_matrix_tile<T> t{{}, tensor<real, 1, cuda>(at.entries() * heads())};
    for_each_batch(at, [&](const batch& b) {
      kernels::cuda::gemm<T, real>(
          ctx, {operand<const T>(q_, b.q, b, at.row, at.rows),
                kernels::cuda::exchanged(operand<const T>(k_, b.k, b, at.column, at.columns)),
                tile<real>(t.products.data(), b, at)});
    });
    t.tile.products = t.products.data();
    t.tile.strides = {heads() * at.rows * at.columns, at.rows * at.columns, at.columns};
    t.tile.product_heads = static_cast<int>(heads());
    return t;
  }
  /// dq += d k, dk += d^T q; absent ones are skipped. @param dq, dk  dense, as q and k
  void add_vjp(const cuda::context& ctx, const place& at, const tensor<T, 1, cuda>& d,
               const tensor<real, 3, cuda>& dq, const tensor<real, 3, cuda>& dk) const {
    using problem = kernels::cuda::gemm_problem<T, real>;
    for_each_batch(at, [&](const batch& b) {
      const view<const T, 3> part = tile<const T>(d.data(), b, at);
      if (dq) {
        kernels::cuda::gemm<T, real>(
            ctx, problem{part, operand<const T>(k_, b.k, b, at.column, at.columns),
                         operand<real>(dq, b.q, b, at.row, at.rows), nullptr, 1.0, 1.0});
      }
      if (dk) {
        kernels::cuda::gemm<T, real>(
            ctx,
            problem{kernels::cuda::exchanged(part), operand<const T>(q_, b.q, b, at.row, at.rows),
                    operand<real>(dk, b.k, b, at.column, at.columns), nullptr, 1.0, 1.0});
      }
    });
  }

 private:
  // One batch of products: of one head and all sequences, or of one sequence and some heads.
  struct heads_of {
    index_t first, step;
  };
  struct batch {
    index_t count, token, token_step, sequence, sequence_step;
    heads_of q, k, product;
  };

  template <class F>
  void for_each_batch(const place& at, F f) const {
    const index_t all = heads(), fewer = std::min(q_.extent(1), k_.extent(1)), share = all / fewer;
    const auto first_of = [&](const tensor<T, 3, cuda>& t, index_t h) {
      return group_of(h, all, t.extent(1));
    };
    if (at.sequences > fewer) {
      for (index_t h = 0; h < all; ++h) {
        f(batch{at.sequences,
                at.token,
                at.length,
                0,
                1,
                {first_of(q_, h), 0},
                {first_of(k_, h), 0},
                {h, 0}});
      }
      return;
    }
    const auto step_of = [&](const tensor<T, 3, cuda>& t) {
      return t.extent(1) == all ? share : index_t{1};
    };
    // Heads that share one of an operand are in different batches, which add to its gradient in
    // order.
    for (index_t i = 0; i < at.sequences; ++i) {
      for (index_t j = 0; j < share; ++j) {
        f(batch{fewer,
                at.token + i * at.length,
                0,
                i,
                0,
                {first_of(q_, j), step_of(q_)},
                {first_of(k_, j), step_of(k_)},
                {j, share}});
      }
    }
  }
  // Rows of an operand: (batch, n, N).
  template <class U, class Tensor>
  [[nodiscard]] static view<U, 3> operand(const Tensor& t, const heads_of& h, const batch& b,
                                          index_t row, index_t n) {
    const index_t of_token = t.strides()[0], of_head = t.strides()[1];
    return {t.data() + (b.token + row) * of_token + h.first * of_head,
            {b.count, n, t.extent(2)},
            {b.token_step * of_token + h.step * of_head, of_token, 1}};
  }
  template <class U>
  [[nodiscard]] view<U, 3> tile(U* data, const batch& b, const place& at) const {
    const index_t matrix = at.rows * at.columns;
    return {data + (b.sequence * heads() + b.product.first) * matrix,
            {b.count, at.rows, at.columns},
            {(b.sequence_step * heads() + b.product.step) * matrix, at.columns, 1}};
  }

  tensor<T, 3, cuda> q_, k_;
};

}  // namespace detail
}  // namespace ssm
