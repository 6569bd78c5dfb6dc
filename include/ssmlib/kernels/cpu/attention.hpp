#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/attention_tile.hpp>

#include <algorithm>
#include <limits>
#include <numeric>

/// @file
/// Softmax attention, forward: tiles with an online softmax.
/// @source Dao et al. 2022, arXiv:2205.14135; the merge of partial sums as in Milakov and
///         Gimelshein 2018, arXiv:1805.02867.

namespace ssm::kernels {

namespace detail {

/// Heads of the operands and of the result. Consecutive result heads with one key head and one
/// value head form a run; a run's queries are rows of one matrix, token by token.
struct attention_heads {
  index_t heads, q_heads, k_heads, v_heads;
  index_t run = 1;

  attention_heads(index_t h, index_t hq, index_t hk, index_t hv)
      : heads(h), q_heads(hq), k_heads(hk), v_heads(hv), run(std::gcd(h / hk, h / hv)) {}
  [[nodiscard]] index_t runs() const { return heads / run; }
  [[nodiscard]] index_t q_head(index_t h) const { return h * q_heads / heads; }
  [[nodiscard]] index_t k_head(index_t h) const { return h * k_heads / heads; }
  [[nodiscard]] index_t v_head(index_t h) const { return h * v_heads / heads; }
};

/// The running result of some query rows: the largest logit, the sum of the exponentials lane by
/// lane, and the weighted values, both relative to the largest logit.
template <Real T>
struct attention_sums {
  static constexpr index_t lanes = simd::pack<T>::width;
  T* largest;  // (rows)
  T* sum;      // (rows x lanes)
  T* value;    // (rows x width)

  [[nodiscard]] static index_t size(index_t rows, index_t width) {
    return round_up(rows, lanes) + rows * (lanes + width);
  }
  attention_sums(T* memory, index_t rows)
      : largest(memory),
        sum(memory + round_up(rows, lanes)),
        value(memory + round_up(rows, lanes) + rows * lanes) {}

  void clear(index_t rows, index_t width) const {
    std::fill_n(largest, rows, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, rows * lanes, T(0));
    std::fill_n(value, rows * width, T(0));
  }
  /// Multiplies row i's sums by `factor`.
  void scale(index_t i, index_t width, T factor) const {
    using P = simd::pack<T>;
    (P::load(sum + i * lanes) * P(factor)).store(sum + i * lanes);
    T* row = value + i * width;
    for (index_t p = 0; p < width; p += lanes)
      (P::load(row + p) * P(factor)).store(row + p);
  }
  /// Adds the sums over later keys. A total without keys becomes `other`, to the bit.
  void merge(const attention_sums& other, index_t rows, index_t width) const {
    using P = simd::pack<T>;
    for (index_t i = 0; i < rows; ++i) {
      const T high = std::max(largest[i], other.largest[i]);
      if (high == -std::numeric_limits<T>::infinity()) continue;
      const P mine = weight_of(P(largest[i] - high)),
              theirs = weight_of(P(other.largest[i] - high));
      largest[i] = high;
      const auto add = [&](T* to, const T* from) SSMLIB_LAMBDA_INLINE {
        simd::fma(mine, P::load(to), theirs * P::load(from)).store(to);
      };
      add(sum + i * lanes, other.sum + i * lanes);
      for (index_t p = 0; p < width; p += lanes)
        add(value + i * width + p, other.value + i * width + p);
    }
  }
};

/// Sets the lanes of row[0, ...) outside [begin, end) to `value`, in the packs that the range
/// touches.
template <Real T>
SSMLIB_ALWAYS_INLINE void fill_outside(T* row, index_t begin, index_t end, T value) {
  constexpr index_t w = simd::pack<T>::width;
  for (index_t i = begin / w * w; i < begin; ++i)
    row[i] = value;
  for (index_t i = end; i < round_up(end, w); ++i)
    row[i] = value;
}

template <Real T>
SSMLIB_ALWAYS_INLINE T largest_of(const T* row, index_t begin, index_t end) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  P a = P::load(row + begin), b = a;
  index_t i = begin + w;
  for (; i + w < end; i += 2 * w) {
    a = simd::max(a, P::load(row + i));
    b = simd::max(b, P::load(row + i + w));
  }
  if (i < end) a = simd::max(a, P::load(row + i));
  return simd::horizontal_max(simd::max(a, b));
}

/// Turns the logits of one tile into weights relative to each row's largest logit so far, and
/// brings the sums up to it.
template <Real T>
void online_softmax(const tile_bounds& bounds, const key_range* range, index_t origin,
                    index_t columns, T* s, const attention_sums<T>& sums, index_t width) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  for (index_t i = 0; i < bounds.rows; ++i) {
    const index_t block = i / bounds.rows_a_block;
    const index_t low = bounds.begin[block] / w * w, high = round_up(bounds.end[block], w);
    const index_t begin = std::max<index_t>(0, range[i].begin - origin);
    const index_t end = std::min(columns, range[i].end - origin);
    T* row = s + i * attention_tile;
    if (begin >= end) {
      if (low < high) std::fill(row + low, row + high, T(0));
      continue;
    }
    const index_t first = begin / w * w, last = round_up(end, w);
    fill_outside(row, begin, end, -std::numeric_limits<T>::infinity());
    const T high_so_far = std::max(sums.largest[i], largest_of(row, first, last));
    if (high_so_far > sums.largest[i]) {
      sums.scale(i, width, weight_of(P(sums.largest[i] - high_so_far))[0]);
      sums.largest[i] = high_so_far;
    }
    const P shift(high_so_far);
    P sum = P::load(sums.sum + i * w);
    for (index_t j = first; j < last; j += w) {
      const P e = weight_of(P::load(row + j) - shift);
      e.store(row + j);
      sum += e;
    }
    sum.store(sums.sum + i * w);
    std::fill(row + low, row + std::max(low, first), T(0));
    if (last < high) std::fill(row + last, row + high, T(0));
  }
}

/// Some query rows of one run, scaled and gathered, and what each keeps.
template <Real T>
struct query_rows {
  const T* q;              // (rows x key size)
  const key_range* range;  // (rows)
  index_t rows;

  [[nodiscard]] index_t first_tile() const {
    index_t low = std::numeric_limits<index_t>::max();
    for (index_t i = 0; i < rows; ++i)
      low = std::min(low, range[i].begin);
    return low / attention_tile;
  }
  [[nodiscard]] index_t tile_end() const {
    index_t high = 0;
    for (index_t i = 0; i < rows; ++i)
      high = std::max(high, range[i].end);
    return (high + attention_tile - 1) / attention_tile;
  }
};

/// Adds the tiles [begin, end) to `sums`, which are clear. `s` is (rows x tile) of working memory.
template <Real T>
void attend_tiles(const query_rows<T>& queries, const key_value_tiles<T>& kv, index_t begin,
                  index_t end, T* s, const attention_sums<T>& sums) {
  for (index_t j = begin; j < end; ++j) {
    const index_t origin = j * attention_tile, ld = kv.leading(j);
    const tile_bounds bounds(queries.range, queries.rows, gemm_tile<T>::rows, origin, ld);
    if (bounds.empty) continue;
    tile_scores(bounds, queries.q, kv.key_size, kv.key_size, kv.key_tile(j), ld, s);
    online_softmax(bounds, queries.range, origin, ld, s, sums, kv.value_width);
    add_tile_product(bounds, s, kv.value_tile(j), kv.value_width, sums.value);
  }
}

/// The whole result of some query rows in `total`; `part` and `s` are working memory.
template <Real T>
void attend(const query_rows<T>& queries, const key_value_tiles<T>& kv, T* s,
            const attention_sums<T>& total, const attention_sums<T>& part) {
  const index_t begin = queries.first_tile(), end = queries.tile_end();
  total.clear(queries.rows, kv.value_width);
  for (index_t segment = begin / attention_segment; segment * attention_segment < end; ++segment) {
    const index_t j0 = std::max(begin, segment * attention_segment);
    const index_t j1 = std::min(end, (segment + 1) * attention_segment);
    const bool only = j0 == begin && j1 == end;
    const attention_sums<T>& sums = only ? total : part;
    if (!only) part.clear(queries.rows, kv.value_width);
    attend_tiles(queries, kv, j0, j1, s, sums);
    if (!only) total.merge(part, queries.rows, kv.value_width);
  }
}

/// Rows [row_begin, row_begin + rows) of a run: row u is token u / run, head first_head + u % run.
template <Real T>
void gather_queries(view<const T, 3> q, const attention_heads& heads, index_t first_head,
                    index_t token_begin, index_t row_begin, index_t rows, double scale, T* to,
                    index_t width) {
  const index_t size = q.extents[2];
  const T factor = static_cast<T>(scale * logit_unit<T>);
  for (index_t i = 0; i < rows; ++i) {
    const index_t u = row_begin + i, h = heads.q_head(first_head + u % heads.run);
    const T* from = q.data + (token_begin + u / heads.run) * q.strides[0] + h * q.strides[1];
    for (index_t d = 0; d < size; ++d)
      to[i * width + d] = factor * from[d];
    std::fill(to + i * width + size, to + (i + 1) * width, T(0));
  }
}

template <Real T>
void write_rows(const attention_sums<T>& sums, index_t width, const attention_heads& heads,
                index_t first_head, index_t token_begin, index_t row_begin, index_t rows,
                view<T, 3> y) {
  using P = simd::pack<T>;
  for (index_t i = 0; i < rows; ++i) {
    const index_t u = row_begin + i, h = first_head + u % heads.run;
    T* to = y.data + (token_begin + u / heads.run) * y.strides[0] + h * y.strides[1];
    const T inverse = T(1) / simd::horizontal_sum(P::load(sums.sum + i * P::width));
    for (index_t p = 0; p < y.extents[2]; ++p)
      to[p] = sums.value[i * width + p] * inverse;
  }
}

/// Working memory of one task with up to a tile of query rows.
template <Real T>
class attention_workspace {
 public:
  attention_workspace(index_t key_size, index_t width)
      : sums_size_(round_up(attention_sums<T>::size(attention_tile, width), 16)),
        memory_(attention_tile * (round_up(key_size, 16) + attention_tile) + 2 * sums_size_),
        s(memory_.data()),
        total(s + attention_tile * attention_tile, attention_tile),
        part(s + attention_tile * attention_tile + sums_size_, attention_tile),
        q(s + attention_tile * attention_tile + 2 * sums_size_) {}

 private:
  index_t sums_size_;
  scratch<T> memory_;

 public:
  T* s;
  attention_sums<T> total, part;
  T* q;
  key_range range[attention_tile];
};

/// One operand of packed sequences, copied into tiles, one block a (sequence, head): transposed,
/// (features x tokens of the tile), or as rows, (tokens x width).
template <Real T>
class packed_operand {
 public:
  packed_operand(const cpu::context& ctx, view<const T, 3> x, const index_t* offsets,
                 index_t sequences, bool transposed)
      : x_(x),
        offsets_(offsets),
        width_(transposed ? x.extents[2] : round_up(x.extents[2], attention_cols<T>)),
        memory_(begin(sequences) * x.extents[1] * width_) {
    ctx.parallel_for(sequences * x.extents[1], [&](index_t task) {
      const index_t i = task / x_.extents[1], h = task % x_.extents[1];
      const index_t length = offsets_[i + 1] - offsets_[i], room = padded(i), step = x_.strides[0];
      const T* from = x_.data + offsets_[i] * step + h * x_.strides[1];
      T* to = memory_.data() + place(i, h);
      if (!transposed) return copy_rows(from, step, length, x_.extents[2], to, width_, room);
      for (index_t s = 0; s < length; s += attention_tile) {
        transpose_rows(from + s * step, step, std::min(attention_tile, length - s), width_,
                       to + s * width_, std::min(attention_tile, room - s));
      }
    });
  }
  [[nodiscard]] const T* get(index_t i, index_t h) const { return memory_.data() + place(i, h); }
  [[nodiscard]] index_t width() const { return width_; }
  [[nodiscard]] index_t padded(index_t i) const {
    return round_up(offsets_[i + 1] - offsets_[i], attention_cols<T>);
  }

 private:
  // Where sequence i starts: the sequences before it need at most one register tile more each
  // than they have tokens.
  [[nodiscard]] index_t begin(index_t i) const {
    return ((offsets_[i] - offsets_[0]) / attention_cols<T> + i) * attention_cols<T>;
  }
  [[nodiscard]] index_t place(index_t i, index_t h) const {
    return (begin(i) * x_.extents[1] + h * padded(i)) * width_;
  }

  view<const T, 3> x_;
  const index_t* offsets_;
  index_t width_;
  scratch<T> memory_;
};

/// Tiles of one (sequence, head): `keys` transposed, `values` as rows.
template <Real T>
[[nodiscard]] key_value_tiles<T> tiles_of(const packed_operand<T>& keys, index_t k_head,
                                          const packed_operand<T>& values, index_t v_head,
                                          index_t i) {
  return {keys.get(i, k_head),
          values.get(i, v_head),
          attention_tile * keys.width(),
          attention_tile * values.width(),
          std::numeric_limits<index_t>::max(),
          keys.width(),
          values.width(),
          keys.padded(i)};
}

/// A piece of work: some rows of one run of one sequence.
struct attention_task {
  index_t sequence, run, row_begin;
};

}  // namespace detail

/// y = softmax(scale q k^T + mask) v for packed sequences.
///
/// @param q  (tokens, Hq, D)
/// @param k  (tokens, Hk, D)
/// @param v  (tokens, Hv, P)
/// @param y  (tokens, H, P); head h uses head h * G / H of an operand with G heads. The innermost
///           strides are 1.
/// @param offsets  sequences + 1 of them: where each sequence starts
/// @cost  4 H D flops a kept (query, key) pair; working memory O(tokens): a copy of k and v
template <Real T>
void attention_forward(const cpu::context& ctx, const attention_options& options,
                       view<const T, 3> q, view<const T, 3> k, view<const T, 3> v, view<T, 3> y,
                       const index_t* offsets, index_t sequences) {
  using namespace detail;
  const attention_heads heads(y.extents[1], q.extents[1], k.extents[1], v.extents[1]);
  const packed_operand<T> keys(ctx, k, offsets, sequences, true);
  const packed_operand<T> values(ctx, v, offsets, sequences, false);
  index_t count = 0;
  for (index_t i = 0; i < sequences; ++i) {
    const index_t rows = (offsets[i + 1] - offsets[i]) * heads.run;
    count += heads.runs() * ((rows + attention_tile - 1) / attention_tile);
  }
  const scratch<attention_task> tasks(count);
  index_t next = 0;
  for (index_t i = 0; i < sequences; ++i) {
    const index_t rows = (offsets[i + 1] - offsets[i]) * heads.run;
    // The longest rows first, so that the threads end together.
    for (index_t u = (rows - 1) / attention_tile * attention_tile; u >= 0 && rows > 0;
         u -= attention_tile) {
      for (index_t r = 0; r < heads.runs(); ++r)
        tasks[next++] = {i, r, u};
    }
  }
  ctx.parallel_for(count, [&](index_t n) {
    const auto [i, r, row_begin] = tasks[n];
    const index_t length = offsets[i + 1] - offsets[i], h = r * heads.run;
    const index_t rows = std::min(attention_tile, length * heads.run - row_begin);
    const auto kv = tiles_of(keys, heads.k_head(h), values, heads.v_head(h), i);
    attention_workspace<T> work(kv.key_size, kv.value_width);
    gather_queries(q, heads, h, offsets[i], row_begin, rows, options.scale, work.q, kv.key_size);
    for (index_t u = 0; u < rows; ++u)
      work.range[u] = keys_of(options, (row_begin + u) / heads.run, length);
    attend({work.q, work.range, rows}, kv, work.s, work.total, work.part);
    write_rows(work.total, kv.value_width, heads, h, offsets[i], row_begin, rows, y);
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(                                                                            \
      attention, void attention_forward<T>(const cpu::context&, const attention_options&,        \
                                           view<const T, 3>, view<const T, 3>, view<const T, 3>, \
                                           view<T, 3>, const index_t*, index_t))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
