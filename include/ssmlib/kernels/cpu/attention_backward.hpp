#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/attention.hpp>

#include <algorithm>
#include <limits>
#include <numeric>

/// @file
/// Softmax attention, backward. A task takes a tile of query rows and keeps its logits and their
/// gradients for all their keys, two strips of O(length) memory: nothing is saved by the forward
/// pass, and nothing is computed twice.

namespace ssm::kernels {

namespace detail {

/// What the backward pass of one run of one sequence reads, besides its query rows.
template <Real T>
struct backward_tiles {
  key_value_tiles<T> keys;    // transposed and as rows
  key_value_tiles<T> values;  // transposed only
};

/// Sums over queries for the keys of one sequence, row by row.
template <Real T>
struct key_gradients {
  T* dk;  // (padded tokens x key_width)
  T* dv;  // (padded tokens x value_width)
};

/// The query rows of one task.
template <Real T>
struct backward_rows {
  T* q;   // (rows x key_width): scale * q
  T* dy;  // (rows x value_width)
  T* dq;  // (rows x key_width), zero at the start
  const key_range* range;
  index_t rows, key_width, value_width;
};

/// Weights relative to the row's largest logit, and dS up to the row's normaliser:
///
///   p = exp(s - largest),   d = dy . v,   sum p,   sum p d
template <Real T>
void weigh(const key_range* range, index_t rows, index_t origin, index_t columns, const T* largest,
           T* s, const T* d, T* sum, T* mean) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  for (index_t i = 0; i < rows; ++i) {
    const index_t begin = std::max<index_t>(0, range[i].begin - origin);
    const index_t end = std::min(columns, range[i].end - origin);
    T* row = s + i * attention_tile;
    if (begin >= end) {
      std::fill_n(row, columns, T(0));
      continue;
    }
    const index_t first = begin / w * w, last = round_up(end, w);
    const P shift(largest[i]);
    P total = P::load(sum + i * w), product = P::load(mean + i * w);
    for (index_t j = first; j < last; j += w) {
      const P e = weight_of(P::load(row + j) - shift);
      e.store(row + j);
      total += e;
      product = simd::fma(e, P::load(d + i * attention_tile + j), product);
    }
    total.store(sum + i * w);
    product.store(mean + i * w);
    std::fill(row, row + first, T(0));
    std::fill(row + last, row + columns, T(0));
  }
}

/// d = p (d - mean) where p is not masked, else 0.
template <Real T>
void weigh_gradients(const key_range* range, index_t rows, index_t origin, index_t columns,
                     const T* mean, const T* p, T* d) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  for (index_t i = 0; i < rows; ++i) {
    const index_t begin = std::max<index_t>(0, range[i].begin - origin);
    const index_t end = std::min(columns, range[i].end - origin);
    T* row = d + i * attention_tile;
    if (begin >= end) {
      std::fill_n(row, columns, T(0));
      continue;
    }
    const index_t first = begin / w * w, last = round_up(end, w);
    const P shift(mean[i]);
    for (index_t j = first; j < last; j += w)
      (P::load(p + i * attention_tile + j) * (P::load(row + j) - shift)).store(row + j);
    std::fill(row, row + first, T(0));
    std::fill(row + last, row + columns, T(0));
  }
}

/// largest[i] = the largest logit of row i, masking each tile of the strip on the way.
template <Real T>
void mask_and_find_largest(const key_range* range, index_t rows, index_t origin, index_t columns,
                           T* s, T* largest) {
  constexpr index_t w = simd::pack<T>::width;
  for (index_t i = 0; i < rows; ++i) {
    const index_t begin = std::max<index_t>(0, range[i].begin - origin);
    const index_t end = std::min(columns, range[i].end - origin);
    if (begin >= end) continue;
    T* row = s + i * attention_tile;
    fill_outside(row, begin, end, -std::numeric_limits<T>::infinity());
    largest[i] = std::max(largest[i], largest_of(row, begin / w * w, round_up(end, w)));
  }
}

/// One task: adds to dq of its rows, and to the gradients of the keys. `strips` holds two
/// (tiles x rows x tile) arrays.
template <Real T>
void backward_task(const backward_rows<T>& in, const backward_tiles<T>& tiles,
                   const key_gradients<T>& out, T* strips) {
  constexpr index_t w = simd::pack<T>::width;
  constexpr index_t area = attention_tile * attention_tile;
  const query_rows<T> queries{in.q, in.range, in.rows};
  const index_t begin = queries.first_tile(), end = queries.tile_end();
  T* strip_s = strips;
  T* strip_d = strips + (end - begin) * area;
  T largest[attention_tile], mean[attention_tile];
  alignas(64) T sums[attention_tile * w], products[attention_tile * w];
  std::fill_n(largest, in.rows, -std::numeric_limits<T>::infinity());
  std::fill_n(sums, in.rows * w, T(0));
  std::fill_n(products, in.rows * w, T(0));
  const auto for_tiles = [&](auto f) {
    for (index_t j = begin; j < end; ++j) {
      const index_t origin = j * attention_tile, columns = tiles.keys.leading(j);
      const tile_bounds bounds(in.range, in.rows, gemm_tile<T>::rows, origin, columns);
      f(j, origin, columns, bounds, strip_s + (j - begin) * area, strip_d + (j - begin) * area);
    }
  };
  for_tiles([&](index_t j, index_t origin, index_t columns, const tile_bounds& bounds, T* s, T*) {
    tile_scores(bounds, in.q, in.key_width, tiles.keys.key_size, tiles.keys.key_tile(j), columns,
                s);
    mask_and_find_largest(in.range, in.rows, origin, columns, s, largest);
  });
  for_tiles([&](index_t j, index_t origin, index_t columns, const tile_bounds& bounds, T* s, T* d) {
    tile_scores(bounds, in.dy, in.value_width, tiles.values.key_size, tiles.values.key_tile(j),
                columns, d);
    weigh(in.range, in.rows, origin, columns, largest, s, d, sums, products);
  });
  // With unnormalised weights p: dv = p^T (dy / sum), dS = p (d - mean), dk = dS^T (q / sum), q in
  // the unit of the scale again.
  T inverse[attention_tile];
  for (index_t i = 0; i < in.rows; ++i) {
    using P = simd::pack<T>;
    inverse[i] = T(1) / simd::horizontal_sum(P::load(sums + i * w));
    mean[i] = simd::horizontal_sum(P::load(products + i * w)) * inverse[i];
    for (index_t p = 0; p < in.value_width; ++p)
      in.dy[i * in.value_width + p] *= inverse[i];
    for (index_t p = 0; p < in.key_width; ++p)
      in.q[i * in.key_width + p] *= inverse[i] * static_cast<T>(1.0 / logit_unit<T>);
  }
  for_tiles([&](index_t j, index_t origin, index_t columns, const tile_bounds& bounds, T* s, T* d) {
    weigh_gradients(in.range, in.rows, origin, columns, mean, s, d);
    add_transposed_product(bounds, s, in.dy, in.value_width, columns,
                           out.dv + origin * in.value_width);
    add_transposed_product(bounds, d, in.q, in.key_width, columns, out.dk + origin * in.key_width);
    add_tile_product(bounds, d, tiles.keys.value_tile(j), in.key_width, in.dq);
  });
  for (index_t i = 0; i < in.rows; ++i) {
    for (index_t p = 0; p < in.key_width; ++p)
      in.dq[i * in.key_width + p] *= inverse[i];
  }
}

/// The backward pass over packed sequences: its operands, and how it is cut into tasks.
template <Real T>
class attention_backward_pass {
 public:
  attention_backward_pass(const cpu::context& ctx, const attention_options& options,
                          view<const T, 3> q, view<const T, 3> k, view<const T, 3> v,
                          view<const T, 3> dy, const index_t* offsets, index_t sequences)
      : options_(options),
        q_(q),
        dy_(dy),
        offsets_(offsets),
        heads_(dy.extents[1], q.extents[1], k.extents[1], v.extents[1]),
        keys_(ctx, k, offsets, sequences, true),
        key_rows_(ctx, k, offsets, sequences, false),
        values_(ctx, v, offsets, sequences, true) {}

  /// Heads of one unit share operands with each other only.
  [[nodiscard]] index_t units() const {
    return std::gcd(std::gcd(heads_.q_heads, heads_.k_heads), heads_.v_heads);
  }
  /// With few units, query tiles are dealt out to this many tasks, each with its own sums for the
  /// keys: a number that depends on the shape only, so that the sums have one order.
  [[nodiscard]] index_t pieces() const {
    return heads_.q_heads == heads_.heads ? (3 + units()) / units() : 1;
  }
  /// Every pieces()-th query tile of a unit of sequence i.
  void run(index_t i, index_t unit, index_t piece, view<T, 3> dq, view<T, 3> dk,
           view<T, 3> dv) const;

 private:
  [[nodiscard]] index_t length(index_t i) const { return offsets_[i + 1] - offsets_[i]; }
  void run_rows(index_t i, index_t first_head, index_t row_begin, const backward_tiles<T>& tiles,
                const key_gradients<T>& sums, T* strips, view<T, 3> dq) const;
  void gather_cotangents(index_t first_head, index_t token_begin, index_t row_begin, index_t rows,
                         T* to, index_t width) const;

  attention_options options_;
  view<const T, 3> q_, dy_;
  const index_t* offsets_;
  attention_heads heads_;
  packed_operand<T> keys_, key_rows_, values_;
};

/// to[s, head, :] += sums[s, :]
template <Real T>
void add_head_rows(const T* sums, index_t width, index_t tokens, index_t token_begin, index_t head,
                   view<T, 3> to) {
  for (index_t s = 0; s < tokens; ++s) {
    T* row = to.data + (token_begin + s) * to.strides[0] + head * to.strides[1];
    for (index_t p = 0; p < to.extents[2]; ++p)
      row[p] += sums[s * width + p];
  }
}

template <Real T>
void attention_backward_pass<T>::run(index_t i, index_t unit, index_t piece, view<T, 3> dq,
                                     view<T, 3> dk, view<T, 3> dv) const {
  const index_t rows = length(i) * heads_.run;
  const index_t row_tiles = (rows + attention_tile - 1) / attention_tile;
  if (piece >= row_tiles) return;
  const index_t stride = std::min(pieces(), row_tiles);
  const index_t padded = keys_.padded(i), tiles = (padded + attention_tile - 1) / attention_tile;
  const index_t band = options_.window + attention_tile / heads_.run;
  const index_t strip_tiles =
      options_.window == 0 ? tiles : std::min(tiles, band / attention_tile + 2);
  const scratch<T> strips(2 * strip_tiles * attention_tile * attention_tile);
  const index_t key_width = key_rows_.width();
  const index_t value_width = round_up(dy_.extents[2], attention_cols<T>);
  const scratch<T> memory(padded * (key_width + value_width));
  const key_gradients<T> sums{memory.data(), memory.data() + padded * key_width};
  const index_t heads_a_unit = heads_.heads / units();
  for (index_t h = unit * heads_a_unit; h < (unit + 1) * heads_a_unit; h += heads_.run) {
    const index_t hk = heads_.k_head(h), hv = heads_.v_head(h);
    const backward_tiles<T> operands{tiles_of(keys_, hk, key_rows_, hk, i),
                                     tiles_of(values_, hv, values_, hv, i)};
    std::fill_n(memory.data(), padded * (key_width + value_width), T(0));
    for (index_t tile = piece; tile < row_tiles; tile += stride)
      run_rows(i, h, tile * attention_tile, operands, sums, strips.data(), dq);
    if (dk) add_head_rows(sums.dk, key_width, length(i), offsets_[i], hk, dk);
    if (dv) add_head_rows(sums.dv, value_width, length(i), offsets_[i], hv, dv);
  }
}

template <Real T>
void attention_backward_pass<T>::run_rows(index_t i, index_t first_head, index_t row_begin,
                                          const backward_tiles<T>& tiles,
                                          const key_gradients<T>& sums, T* strips,
                                          view<T, 3> dq) const {
  const index_t key_width = tiles.keys.value_width, size = q_.extents[2];
  const index_t value_width = round_up(dy_.extents[2], attention_cols<T>);
  const index_t rows = std::min(attention_tile, length(i) * heads_.run - row_begin);
  const scratch<T> memory(attention_tile * (2 * key_width + value_width));
  T* q = memory.data();
  T* dq_rows = q + attention_tile * key_width;
  T* dy = dq_rows + attention_tile * key_width;
  key_range range[attention_tile];
  for (index_t u = 0; u < rows; ++u)
    range[u] = keys_of(options_, (row_begin + u) / heads_.run, length(i));
  gather_queries(q_, heads_, first_head, offsets_[i], row_begin, rows, options_.scale, q,
                 key_width);
  gather_cotangents(first_head, offsets_[i], row_begin, rows, dy, value_width);
  std::fill_n(dq_rows, rows * key_width, T(0));
  backward_task<T>({q, dy, dq_rows, range, rows, key_width, value_width}, tiles, sums, strips);
  if (!dq) return;
  for (index_t u = 0; u < rows; ++u) {
    const index_t row = row_begin + u, h = heads_.q_head(first_head + row % heads_.run);
    T* to = dq.data + (offsets_[i] + row / heads_.run) * dq.strides[0] + h * dq.strides[1];
    for (index_t d = 0; d < size; ++d)
      to[d] += static_cast<T>(options_.scale) * dq_rows[u * key_width + d];
  }
}

template <Real T>
void attention_backward_pass<T>::gather_cotangents(index_t first_head, index_t token_begin,
                                                   index_t row_begin, index_t rows, T* to,
                                                   index_t width) const {
  for (index_t i = 0; i < rows; ++i) {
    const index_t u = row_begin + i, h = first_head + u % heads_.run;
    const T* from = dy_.data + (token_begin + u / heads_.run) * dy_.strides[0] + h * dy_.strides[1];
    std::copy_n(from, dy_.extents[2], to + i * width);
    std::fill(to + i * width + dy_.extents[2], to + (i + 1) * width, T(0));
  }
}

/// Sums of the pieces, (pieces, tokens, heads, features), for one operand.
template <Real T>
class piece_sums {
 public:
  piece_sums(const cpu::context& ctx, index_t pieces, view<T, 3> like)
      : pieces_(pieces), target_(like), memory_(like ? pieces * like.size() : 0) {
    if (!like) return;
    ctx.parallel_ranges(pieces * like.size(), 64, 1024, [&](index_t begin, index_t end) {
      std::fill(memory_.data() + begin, memory_.data() + end, T(0));
    });
  }
  [[nodiscard]] view<T, 3> get(index_t piece) const {
    if (!target_) return {};
    return {memory_.data() + piece * target_.size(), target_.extents,
            dense_strides(target_.extents)};
  }
  /// Adds them to the target, piece by piece for every element.
  void finish(const cpu::context& ctx) const {
    if (!target_) return;
    ctx.parallel_ranges(target_.extents[0], 64, 1, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        for (index_t h = 0; h < target_.extents[1]; ++h) {
          for (index_t d = 0; d < target_.extents[2]; ++d) {
            T sum = 0;
            for (index_t p = 0; p < pieces_; ++p)
              sum += get(p)(t, h, d);
            target_(t, h, d) += sum;
          }
        }
      }
    });
  }

 private:
  index_t pieces_;
  view<T, 3> target_;
  scratch<T> memory_;
};

}  // namespace detail

/// Adds the gradients of sum(dy * y), y the result of attention_forward, to dq, dk, dv; absent
/// ones are skipped. Sums over queries and heads have one order, whatever the number of threads.
/// @cost  10 H D flops a kept (query, key) pair; working memory O(tokens), and O(length) a thread
template <Real T>
void attention_backward(const cpu::context& ctx, const attention_options& options,
                        view<const T, 3> q, view<const T, 3> k, view<const T, 3> v,
                        view<const T, 3> dy, view<T, 3> dq, view<T, 3> dk, view<T, 3> dv,
                        const index_t* offsets, index_t sequences) {
  using namespace detail;
  const attention_backward_pass<T> pass(ctx, options, q, k, v, dy, offsets, sequences);
  const index_t units = pass.units(), pieces = pass.pieces();
  if (pieces == 1) {
    ctx.parallel_for(sequences * units,
                     [&](index_t task) { pass.run(task / units, task % units, 0, dq, dk, dv); });
    return;
  }
  const piece_sums<T> dk_sums(ctx, pieces, dk), dv_sums(ctx, pieces, dv);
  ctx.parallel_for(sequences * units * pieces, [&](index_t task) {
    const index_t piece = task % pieces, unit = task / pieces % units;
    pass.run(task / pieces / units, unit, piece, dq, dk_sums.get(piece), dv_sums.get(piece));
  });
  dk_sums.finish(ctx);
  dv_sums.finish(ctx);
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      attention,                                                                                   \
      void attention_backward<T>(const cpu::context&, const attention_options&, view<const T, 3>,  \
                                 view<const T, 3>, view<const T, 3>, view<const T, 3>, view<T, 3>, \
                                 view<T, 3>, view<T, 3>, const index_t*, index_t))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
