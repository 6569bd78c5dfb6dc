#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/mixer/panels.hpp>
#include <ssmlib/nn/pass.hpp>
#include <ssmlib/train/token_loss.hpp>

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

namespace ssm {

namespace detail {

/// Adds the squared entries of student - teacher to `sums`, per head; both are tiles (rows, heads,
/// columns), heads broadcast to the larger count.
template <Real T>
void add_squared_differences(const cpu::context& ctx, const tensor<T, 3>& student,
                             const tensor<T, 3>& teacher, std::vector<double>& sums) {
  using P = simd::pack<T>;
  const index_t rows = student.extent(0), columns = student.extent(2);
  const index_t heads = static_cast<index_t>(sums.size());
  // One sum a row, so that the order of the additions is not that of the threads.
  const auto row_sums = tensor<double, 2>(heads, rows);
  for_row_blocks(ctx, rows, heads, [&](index_t h, index_t r0, index_t r1) {
    const index_t hs = group_of(h, heads, student.extent(1));
    const index_t ht = group_of(h, heads, teacher.extent(1));
    for (index_t r = r0; r < r1; ++r) {
      const T* m = &student(r, hs, 0);
      const T* a = &teacher(r, ht, 0);
      P sum(T(0));
      index_t s = 0;
      for (; s + P::width <= columns; s += P::width) {
        const P d = P::load(m + s) - P::load(a + s);
        sum = simd::fma(d, d, sum);
      }
      if (s < columns) {
        const P d = P::load_part(m + s, columns - s) - P::load_part(a + s, columns - s);
        sum = simd::fma(d, d, sum);
      }
      row_sums(h, r) = static_cast<double>(simd::horizontal_sum(sum));
    }
  });
  for (index_t h = 0; h < heads; ++h) {
    for (index_t r = 0; r < rows; ++r)
      sums[static_cast<std::size_t>(h)] += row_sums(h, r);
  }
}

/// to[i] += f (x[i] - y[i])
template <Real T>
void add_scaled_difference(index_t n, T f, const T* x, const T* y, T* to) {
  using P = simd::pack<T>;
  index_t i = 0;
  for (; i + P::width <= n; i += P::width)
    simd::fma(P(f), P::load(x + i) - P::load(y + i), P::load(to + i)).store(to + i);
  for (; i < n; ++i)
    to[i] = simd::fma(f, x[i] - y[i], to[i]);
}

/// out = the gradient of the student's tile: student - teacher with its factor per head, summed
/// over the heads that share one of the student's.
template <Real T>
void fold_difference(const cpu::context& ctx, const tensor<T, 3>& student,
                     const tensor<T, 3>& teacher, const std::vector<T>& factor,
                     const tensor<T, 3>& out) {
  using P = simd::pack<T>;
  const index_t heads = static_cast<index_t>(factor.size()), own = student.extent(1);
  const index_t columns = student.extent(2);
  for_row_blocks(ctx, student.extent(0), own, [&](index_t g, index_t r0, index_t r1) {
    const index_t first = g * heads / own, last = (g + 1) * heads / own;
    for (index_t r = r0; r < r1; ++r) {
      for (index_t h = first; h < last; ++h) {
        const T* m = &student(r, g, 0);
        const T* a = &teacher(r, group_of(h, heads, teacher.extent(1)), 0);
        const T f = factor[static_cast<std::size_t>(h)];
        if (h == first) {
          simd::map<T>(columns, m, a, &out(r, g, 0),
                       [f](P x, P y) SSMLIB_LAMBDA_INLINE { return P(f) * (x - y); });
        } else {
          add_scaled_difference(columns, f, m, a, &out(r, g, 0));
        }
      }
    }
  });
}

/// How sequence i of two matrices is compared: by panels of columns, and those, where the matrices
/// have cheap rows, by tiles that stay in a thread's cache between being computed and being used.
template <Real T>
class matrix_tiling {
 public:
  matrix_tiling(const matrix_panels<T>& a, const matrix_panels<T>& b, index_t i)
      : begin_(a.layout().begin(i)),
        end_(a.layout().end(i)),
        row_size_(columns * std::max(a.heads(), b.heads())),
        causal_(a.is_causal() && b.is_causal()),
        cheap_rows_(a.has_cheap_rows() && b.has_cheap_rows()) {}
  [[nodiscard]] bool cheap_rows() const { return cheap_rows_; }
  [[nodiscard]] index_t panels() const { return (end_ - begin_ + columns - 1) / columns; }
  /// f(row, row_end, s0, s1) for the pieces of a panel: tiles, or many tiles at once.
  template <class F>
  void for_tiles(index_t panel, F f) const {
    for_pieces(panel, rows_of(index_t{1} << 16), f);
  }
  template <class F>
  void for_large_pieces(index_t panel, F f) const {
    for_pieces(panel, rows_of(index_t{1} << 19), f);
  }
  /// f(row, row_end) for the tiles of a large piece, in parallel.
  template <class F>
  void for_tiles_of(const cpu::context& ctx, index_t row, index_t row_end, F f) const {
    const index_t step = rows_of(index_t{1} << 16);
    ctx.parallel_for((row_end - row + step - 1) / step, [&](index_t tile) {
      f(row + tile * step, std::min(row_end, row + (tile + 1) * step));
    });
  }

 private:
  static constexpr index_t columns = 64;

  [[nodiscard]] index_t rows_of(index_t entries) const {
    return cheap_rows_ ? std::max<index_t>(64, entries / row_size_) : end_ - begin_;
  }
  template <class F>
  void for_pieces(index_t panel, index_t rows, F f) const {
    const index_t s0 = begin_ + panel * columns, s1 = std::min(end_, s0 + columns);
    for (index_t row = causal_ ? s0 : begin_; row < end_; row += rows)
      f(row, std::min(end_, row + rows), s0, s1);
  }

  index_t begin_, end_, row_size_;
  bool causal_, cheap_rows_;
};

/// The sums of the squared entries of student - teacher over sequence i, per head.
template <Real T>
[[nodiscard]] std::vector<double> squared_distances(const cpu::context& ctx,
                                                    const matrix_panels<T>& student,
                                                    const matrix_panels<T>& teacher, index_t i,
                                                    index_t heads) {
  const matrix_tiling<T> tiling(student, teacher, i);
  const auto size = static_cast<std::size_t>(heads);
  std::vector<std::vector<double>> sums(static_cast<std::size_t>(tiling.panels()),
                                        std::vector<double>(size, 0.0));
  const auto add_panel = [&](index_t panel) {
    tiling.for_tiles(panel, [&](index_t row, index_t row_end, index_t s0, index_t s1) {
      add_squared_differences(ctx, student.tile(ctx, i, row, row_end, s0, s1),
                              teacher.tile(ctx, i, row, row_end, s0, s1),
                              sums[static_cast<std::size_t>(panel)]);
    });
  };
  // Whole panels are too large to have one per thread: there the threads share each.
  if (tiling.cheap_rows()) {
    ctx.parallel_for(tiling.panels(), add_panel);
  } else {
    for (index_t panel = 0; panel < tiling.panels(); ++panel)
      add_panel(panel);
  }
  std::vector<double> total(size, 0.0);
  for (const auto& panel : sums) {
    for (std::size_t h = 0; h < size; ++h)
      total[h] += panel[h];
  }
  return total;
}

/// Adds the gradient of sum over heads of factor[h] || student - teacher ||_F^2 / 2 over sequence i
/// to the student's operands.
template <Real T>
void add_distance_gradients(const cpu::context& ctx, matrix_panels<T>& student,
                            const matrix_panels<T>& teacher, index_t i,
                            const std::vector<T>& factor) {
  const matrix_tiling<T> tiling(student, teacher, i);
  // Rows first, for mixers whose gradient needs whole-row sums; then the gradient.
  for (const bool second : {false, true}) {
    if (!second && !student.needs_row_sums()) continue;
    const auto visit_piece = [&](index_t row, index_t row_end, index_t s0, index_t s1) {
      if (student.is_constant(i, row, row_end, s0, s1)) return;
      const tensor<T, 3> m(row_end - row, student.heads(), s1 - s0), d(m.extents());
      tiling.for_tiles_of(ctx, row, row_end, [&](index_t r0, index_t r1) {
        const tensor<T, 3> values = m.slice(0, r0 - row, r1 - row);
        student.tile_into(ctx, i, r0, s0, values);
        fold_difference(ctx, values, teacher.tile(ctx, i, r0, r1, s0, s1), factor,
                        d.slice(0, r0 - row, r1 - row));
      });
      if (second) {
        student.add_vjp(ctx, i, row, s0, m, d);
      } else {
        student.observe(ctx, i, row, s0, m, d);
      }
    };
    for (index_t panel = 0; panel < tiling.panels(); ++panel)
      tiling.for_large_pieces(panel, visit_piece);
  }
}

/// @throws shape_error  sequences of other tokens.
void require_same_sequences(const sequence_layout& student, const sequence_layout& teacher);

}  // namespace detail

/// norms[i * heads + h] = the Frobenius norm of student - teacher for head h of sequence i.
template <Real T>
void apply_matrix_distances(const cpu::context& ctx, const matrix_panels<T>& student,
                            const matrix_panels<T>& teacher, index_t heads,
                            const tensor<double, 1>& norms) {
  for (index_t i = 0; i < student.layout().sequences(); ++i) {
    const auto sums = detail::squared_distances(ctx, student, teacher, i, heads);
    for (index_t h = 0; h < heads; ++h)
      norms(i * heads + h) = std::sqrt(sums[static_cast<std::size_t>(h)]);
  }
}
/// Adds the gradient of d_loss times the mean of the norms to the gradients of the student's
/// operands.
template <Real T>
void apply_matrix_distances_vjp(const cpu::context& ctx, matrix_panels<T>& student,
                                const matrix_panels<T>& teacher, index_t heads,
                                const tensor<double, 1>& norms, const tensor<T, 1>& d_loss) {
  const double count = static_cast<double>(std::max<index_t>(norms.size(), 1));
  const double upstream = static_cast<double>(d_loss(0));
  for (index_t i = 0; i < student.layout().sequences(); ++i) {
    std::vector<T> factor;
    for (index_t h = 0; h < heads; ++h) {
      const double norm = norms(i * heads + h);
      factor.push_back(norm > 0 ? static_cast<T>(upstream / (norm * count)) : T(0));
    }
    detail::add_distance_gradients(ctx, student, teacher, i, factor);
  }
}

/// MOHAWK stage 1, matrix orientation: the mean over sequences and heads of the Frobenius norm
///
///     || M_student - M_teacher ||_F        (a norm, not its square)
///
/// computed in tiles. Where head counts differ, a head is compared with the head of the other mixer
/// that owns it (h * G / H).
///
/// @param teacher, student  panels of two mixers over the same tokens
/// @return (1); recorded on p.tape: backward() adds to the gradients of the student's operands
/// @throws shape_error  other sequences, or head counts where neither divides the other.
/// @cost   O(T^2) time, one sweep over the tiles forward and one or two backward; O(T) memory
/// @source Bick et al. 2024 (MOHAWK), arXiv:2408.10189, section 4.1.
template <Floating T, Backend B = cpu>
[[nodiscard]] tensor<accum_t<T>, 1, B> matrix_orientation_loss(
    const pass<T, B>& p, std::type_identity_t<std::shared_ptr<const matrix_panels<T, B>>> teacher,
    std::type_identity_t<std::shared_ptr<matrix_panels<T, B>>> student) {
  detail::require_same_sequences(student->layout(), teacher->layout());
  const index_t heads =
      detail::join_heads("matrix_orientation_loss", student->heads(), teacher->heads());
  const typename B::scope scope(p.ctx);
  const index_t count = student->layout().sequences() * heads;
  const tensor<double, 1, B> norms(count);
  apply_matrix_distances(p.ctx, *student, *teacher, heads, norms);
  const tensor<accum_t<T>, 1, B> loss =
      detail::make_token_loss<T, B>(p.ctx, norms, 1, 1,
                                    static_cast<double>(std::max<index_t>(count, 1)), count)
          .loss;
  if (p.tape == nullptr) return loss;
  p.tape->record(loss, [loss, norms, heads, teacher, student, t = p.tape, &ctx = p.ctx] {
    apply_matrix_distances_vjp(ctx, *student, *teacher, heads, norms, t->gradient(loss));
  });
  return loss;
}

#define SSMLIB_DETAIL_LIST(T)                                                                   \
  SSMLIB_INSTANTIATE(distillation, tensor<T, 1> matrix_orientation_loss<T, cpu>(                \
                                       const pass<T>&, std::shared_ptr<const matrix_panels<T>>, \
                                       std::shared_ptr<matrix_panels<T>>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/distill/matrix_orientation_impl.hpp>
#endif
