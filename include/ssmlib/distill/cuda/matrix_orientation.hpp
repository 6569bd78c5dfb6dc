#pragma once

#include <ssmlib/distill/matrix_orientation.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/mixer/cuda/matrix_panels.hpp>

#include <algorithm>
#include <cmath>

/// @file
/// Matrix orientation on CUDA. Products of a tile, by cuBLASLt, wait in memory of at most 32 MiB a
/// matrix (in float, so that both stay in the second-level cache); one kernel makes entries of both
/// and adds the squared differences, or makes the gradient of the products. Nothing waits for the
/// device, and the same call gives the same bits.

namespace ssm {

namespace detail {

/// How two matrices are cut: f(place, its first sequence) for tiles that together have every entry
/// that is not zero in both.
template <Floating T>
class cuda_matrix_tiling {
 public:
  using panels = matrix_panels<T, cuda>;
  using place = kernels::cuda::matrix_place;

  cuda_matrix_tiling(const panels& a, const panels& b)
      : layout_(a.layout()),
        heads_(std::max({a.product_heads(), b.product_heads(), index_t{1}})),
        causal_(a.is_causal() && b.is_causal()),
        cheap_rows_(a.has_cheap_rows() && b.has_cheap_rows()) {}

  template <class F>
  void for_each(F f) const {
    index_t n = 1;
    for (index_t i = 0; i < layout_.sequences(); i += n) {
      const index_t length = layout_.length(i);
      n = length > 0 ? std::min(group(length), like(i)) : 1;
      place at{layout_.begin(i), n, length, 0, 0, 0, 0};
      const index_t columns = cheap_rows_ ? edge(length) : narrow(length);
      const index_t rows = cheap_rows_ ? columns : length;
      for (at.column = 0; at.column < length; at.column += columns) {
        at.columns = std::min(columns, length - at.column);
        for (at.row = causal_ ? at.column : 0; at.row < length; at.row += rows) {
          at.rows = std::min(rows, length - at.row);
          f(at, i);
        }
      }
    }
  }

 private:
  static constexpr index_t most_entries = index_t{1} << 23;

  // Tiles are squares, so that causal matrices waste little.
  [[nodiscard]] index_t edge(index_t length) const {
    const auto side = static_cast<index_t>(std::sqrt(static_cast<double>(most_entries / heads_)));
    return std::min(round_up(length, 64), std::clamp<index_t>(side / 64 * 64, 64, 1024));
  }
  [[nodiscard]] index_t narrow(index_t length) const {
    return std::clamp<index_t>(most_entries / (heads_ * std::max<index_t>(length, 1)), 8, 64);
  }
  // Sequences in a tile.
  [[nodiscard]] index_t group(index_t length) const {
    if (!cheap_rows_) return 1;
    const index_t side = edge(length);
    return std::max<index_t>(1, most_entries / (heads_ * side * side));
  }
  // Sequences from i on that are as long as i, and lie one after the other.
  [[nodiscard]] index_t like(index_t i) const {
    index_t n = 1;
    while (i + n < layout_.sequences() && layout_.length(i + n) == layout_.length(i))
      ++n;
    return n;
  }

  sequence_layout layout_;
  index_t heads_;
  bool causal_, cheap_rows_;
};

/// Both matrices at a place, with the memory of their products.
template <Floating T>
struct cuda_matrix_pair {
  cuda_matrix_tile<T> student, teacher;
  kernels::cuda::matrix_pair<accum_t<T>> pair;

  cuda_matrix_pair(const cuda::context& ctx, const matrix_panels<T, cuda>& s,
                   const matrix_panels<T, cuda>& t, index_t heads,
                   const kernels::cuda::matrix_place& at)
      : student(s.tile_at(ctx, at)),
        teacher(t.tile_at(ctx, at)),
        pair{at, student.tile, teacher.tile, static_cast<int>(heads)} {}
};

}  // namespace detail

template <Floating T>
void apply_matrix_distances(const cuda::context& ctx, const matrix_panels<T, cuda>& student,
                            const matrix_panels<T, cuda>& teacher, index_t heads,
                            const tensor<double, 1, cuda>& norms) {
  const sequence_layout& layout = student.layout();
  const auto squares = tensor<double, 2, cuda>::zeros(layout.tokens(), heads);
  detail::cuda_matrix_tiling<T>(student, teacher).for_each([&](const auto& place, index_t) {
    const detail::cuda_matrix_pair<T> m(ctx, student, teacher, heads, place);
    kernels::cuda::add_matrix_distances<accum_t<T>>(ctx.stream(), m.pair, squares.data());
  });
  const detail::device_layout on_device(ctx, layout);
  kernels::cuda::matrix_norms<double>(ctx.stream(), detail::matrix_sequences_of(on_device),
                                      static_cast<int>(heads), squares.data(), norms.data());
}

template <Floating T>
void apply_matrix_distances_vjp(const cuda::context& ctx, matrix_panels<T, cuda>& student,
                                const matrix_panels<T, cuda>& teacher, index_t heads,
                                const tensor<double, 1, cuda>& norms,
                                const tensor<accum_t<T>, 1, cuda>& d_loss) {
  using real = accum_t<T>;
  if (!student.wants_gradients() || norms.size() == 0) return;
  const tensor<real, 1, cuda> factors(norms.size());
  kernels::cuda::matrix_factors<real>(ctx.stream(), norms.size(), norms.data(), d_loss.data(),
                                      static_cast<double>(norms.size()), factors.data());
  student.begin_gradients(ctx);
  const detail::cuda_matrix_tiling<T> tiling(student, teacher);
  const auto for_each_place = [&](auto f) {
    tiling.for_each([&](const auto& place, index_t first) {
      const detail::cuda_matrix_pair<T> m(ctx, student, teacher, heads, place);
      f(place, kernels::cuda::matrix_gradient<T>{m.pair, factors.data() + first * heads,
                                                 student.sums(), nullptr});
    });
  };
  if (student.needs_row_sums()) {
    for_each_place([&](const auto&, const kernels::cuda::matrix_gradient<T>& g) {
      kernels::cuda::add_matrix_row_sums<T>(ctx.stream(), g);
    });
  }
  for_each_place([&](const auto& place, kernels::cuda::matrix_gradient<T> g) {
    const tensor<T, 1, cuda> d(place.entries() * student.product_heads());
    g.d_products = d.data();
    const detail::cuda_workspace workspace(ctx,
                                           kernels::cuda::matrix_gradient_workspace_bytes<T>(g));
    kernels::cuda::add_matrix_gradient<T>(ctx.stream(), g, workspace.data());
    student.add_products_vjp(ctx, place, d);
  });
  student.finish_gradients(ctx);
}

}  // namespace ssm
