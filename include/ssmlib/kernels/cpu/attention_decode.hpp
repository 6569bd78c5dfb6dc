#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/attention.hpp>

#include <algorithm>
#include <limits>

/// @file
/// Softmax attention over cached keys and values. New tokens are stored first, in the tiles that
/// attention_forward works on, and then take part like all others: every token has the bits that
/// one pass over everything gives it.

namespace ssm::kernels {

/// The sizes of a cache. Slot by slot: keys (k_heads, key_size, tile), values (v_heads, tile,
/// value_width).
struct attention_cache_shape {
  index_t k_heads = 0, v_heads = 0, key_size = 0, features = 0;

  static constexpr index_t tile = detail::attention_tile;
  template <Real T>
  [[nodiscard]] index_t value_width() const {
    return round_up(features, detail::attention_cols<T>);
  }
  template <Real T>
  [[nodiscard]] index_t keys_a_slot() const {
    return k_heads * key_size * tile;
  }
  template <Real T>
  [[nodiscard]] index_t values_a_slot() const {
    return v_heads * tile * value_width<T>();
  }
};

/// The memory of one sequence: the token at position p is in slot (p / tile) mod slots. Values that
/// no token has been stored to are zero.
template <Real T>
struct attention_cache {
  T* keys = nullptr;
  T* values = nullptr;
  index_t slots = 0;
};

namespace detail {

/// New tokens of a batch: those of sequence i start at offsets[i] and stand at position[i] on.
template <Real T>
struct attention_step {
  attention_options options;
  attention_cache_shape shape;
  const attention_cache<T>* caches;
  const index_t* position;
  view<const T, 3> q, k, v;
  view<T, 3> y;
  const index_t* offsets;
  index_t sequences;
  // The part of each sequence's new tokens that is worked on: [begin, begin + step).
  index_t begin, step;

  [[nodiscard]] index_t tokens(index_t i) const {
    return std::clamp<index_t>(offsets[i + 1] - offsets[i] - begin, 0, step);
  }
  [[nodiscard]] attention_heads heads() const {
    return {y.extents[1], q.extents[1], k.extents[1], v.extents[1]};
  }
  [[nodiscard]] key_value_tiles<T> tiles(index_t i, index_t k_head, index_t v_head) const {
    const index_t tile = attention_tile, width = shape.value_width<T>();
    return {caches[i].keys + k_head * shape.key_size * tile,
            caches[i].values + v_head * tile * width,
            shape.keys_a_slot<T>(),
            shape.values_a_slot<T>(),
            caches[i].slots,
            shape.key_size,
            width,
            std::numeric_limits<index_t>::max()};
  }
  void store_keys(index_t i, index_t head) const;
  void store_values(index_t i, index_t head) const;
  void gather(const attention_task& task, attention_workspace<T>& work, index_t& rows) const;
  void attend_whole(const attention_task& task) const;
  void attend_segments(const cpu::context& ctx, const attention_task* tasks, index_t count) const;
};

template <Real T>
void attention_step<T>::store_keys(index_t i, index_t head) const {
  const index_t count = tokens(i), size = shape.key_size;
  const T* from = k.data + (offsets[i] + begin) * k.strides[0] + head * k.strides[1];
  for (index_t t = 0; t < count;) {
    const index_t p = position[i] + begin + t, column = p % attention_tile;
    const index_t slot = p / attention_tile % caches[i].slots;
    T* to = caches[i].keys + slot * shape.keys_a_slot<T>() + head * size * attention_tile;
    const index_t n = std::min(attention_tile - column, count - t);
    for (index_t d = 0; d < size; ++d) {
      for (index_t s = 0; s < n; ++s)
        to[d * attention_tile + column + s] = from[(t + s) * k.strides[0] + d];
    }
    t += n;
  }
}

template <Real T>
void attention_step<T>::store_values(index_t i, index_t head) const {
  const index_t count = tokens(i), width = shape.value_width<T>();
  const T* from = v.data + (offsets[i] + begin) * v.strides[0] + head * v.strides[1];
  for (index_t t = 0; t < count; ++t) {
    const index_t p = position[i] + begin + t;
    const index_t slot = p / attention_tile % caches[i].slots;
    T* to = caches[i].values + slot * shape.values_a_slot<T>() +
            (head * attention_tile + p % attention_tile) * width;
    std::copy_n(from + t * v.strides[0], shape.features, to);
  }
}

template <Real T>
void attention_step<T>::gather(const attention_task& task, attention_workspace<T>& work,
                               index_t& rows) const {
  const attention_heads h = heads();
  const index_t i = task.sequence;
  rows = std::min(attention_tile, tokens(i) * h.run - task.row_begin);
  gather_queries(q, h, task.run * h.run, offsets[i] + begin, task.row_begin, rows, options.scale,
                 work.q, shape.key_size);
  for (index_t u = 0; u < rows; ++u)
    work.range[u] = keys_of(options, position[i] + begin + (task.row_begin + u) / h.run, 0);
}

template <Real T>
void attention_step<T>::attend_whole(const attention_task& task) const {
  const attention_heads h = heads();
  const index_t first = task.run * h.run, i = task.sequence;
  const auto kv = tiles(i, h.k_head(first), h.v_head(first));
  attention_workspace<T> work(kv.key_size, kv.value_width);
  index_t rows = 0;
  gather(task, work, rows);
  attend({work.q, work.range, rows}, kv, work.s, work.total, work.part);
  write_rows(work.total, kv.value_width, h, first, offsets[i] + begin, task.row_begin, rows, y);
}

/// The segments of each row tile at once, then their merge in order: the bits of attend_whole.
template <Real T>
void attention_step<T>::attend_segments(const cpu::context& ctx, const attention_task* tasks,
                                        index_t count) const {
  const attention_heads h = heads();
  const index_t width = shape.value_width<T>();
  index_t segments = 0, most_rows = 0;
  for (index_t n = 0; n < count; ++n) {
    const index_t i = tasks[n].sequence, end = position[i] + begin + tokens(i);
    segments = std::max(segments, end / (attention_tile * attention_segment) + 1);
    most_rows = std::max(most_rows, std::min(attention_tile, tokens(i) * h.run));
  }
  const index_t size = round_up(attention_sums<T>::size(most_rows, width), 16);
  const scratch<T> memory(count * segments * size);
  const auto part = [&](index_t n, index_t segment) {
    return attention_sums<T>(memory.data() + (n * segments + segment) * size, most_rows);
  };
  ctx.parallel_for(count * segments, [&](index_t n) {
    const index_t segment = n % segments, first = tasks[n / segments].run * h.run;
    const index_t i = tasks[n / segments].sequence;
    const auto kv = tiles(i, h.k_head(first), h.v_head(first));
    attention_workspace<T> work(kv.key_size, kv.value_width);
    index_t rows = 0;
    gather(tasks[n / segments], work, rows);
    const query_rows<T> queries{work.q, work.range, rows};
    const attention_sums<T> sums = part(n / segments, segment);
    sums.clear(rows, width);
    attend_tiles(queries, kv, std::max(queries.first_tile(), segment * attention_segment),
                 std::min(queries.tile_end(), (segment + 1) * attention_segment), work.s, sums);
  });
  ctx.parallel_for(count, [&](index_t n) {
    const index_t i = tasks[n].sequence;
    const index_t rows = std::min(attention_tile, tokens(i) * h.run - tasks[n].row_begin);
    const attention_sums<T> total = part(n, 0);
    for (index_t segment = 1; segment < segments; ++segment)
      total.merge(part(n, segment), rows, width);
    write_rows(total, width, h, tasks[n].run * h.run, offsets[i] + begin, tasks[n].row_begin, rows,
               y);
  });
}

/// One part of the new tokens: stores, then attends.
template <Real T>
void run_step(const cpu::context& ctx, const attention_step<T>& step) {
  const attention_heads heads = step.heads();
  const index_t stored = step.shape.k_heads + step.shape.v_heads;
  ctx.parallel_for(step.sequences * stored, [&](index_t n) {
    const index_t i = n / stored, h = n % stored;
    if (h < step.shape.k_heads) {
      step.store_keys(i, h);
    } else {
      step.store_values(i, h - step.shape.k_heads);
    }
  });
  index_t count = 0, longest = 0;
  const auto row_tiles = [&](index_t i) {
    return (step.tokens(i) * heads.run + attention_tile - 1) / attention_tile;
  };
  for (index_t i = 0; i < step.sequences; ++i) {
    count += heads.runs() * row_tiles(i);
    const index_t end = step.position[i] + step.begin + step.tokens(i);
    if (step.tokens(i) > 0) longest = std::max(longest, end);
  }
  const scratch<attention_task> tasks(count);
  index_t next = 0;
  for (index_t i = 0; i < step.sequences; ++i) {
    for (index_t r = 0; r < heads.runs(); ++r) {
      for (index_t tile = row_tiles(i) - 1; tile >= 0; --tile)
        tasks[next++] = {i, r, tile * attention_tile};
    }
  }
  const bool few = count < 4 * ctx.threads() && ctx.threads() > 1 && step.options.window == 0;
  if (few && longest > attention_tile * attention_segment) {
    return step.attend_segments(ctx, tasks.data(), count);
  }
  ctx.parallel_for(count, [&](index_t n) { step.attend_whole(tasks[n]); });
}

}  // namespace detail

/// Stores the keys and values of new tokens and computes the new tokens' rows of attention_forward
/// over everything stored. Causal attention only.
///
/// @param caches    one a sequence, with a slot for each of its tokens; with a window, slots for
///                  window - 1 + `step` tokens
/// @param position  the number of tokens that each sequence has had
/// @param q         (tokens, Hq, D), k (tokens, Hk, D), v (tokens, Hv, P), y (tokens, H, P): the
///                  new tokens of all sequences
/// @param step      the most new tokens of a sequence that are stored before they are attended to
/// @cost  reads each kept key and value once a row tile; working memory does not depend on them
template <Real T>
void attention_advance(const cpu::context& ctx, const attention_options& options,
                       const attention_cache_shape& shape, const attention_cache<T>* caches,
                       const index_t* position, view<const T, 3> q, view<const T, 3> k,
                       view<const T, 3> v, view<T, 3> y, const index_t* offsets, index_t sequences,
                       index_t step) {
  index_t longest = 0;
  for (index_t i = 0; i < sequences; ++i)
    longest = std::max(longest, offsets[i + 1] - offsets[i]);
  for (index_t begin = 0; begin < longest; begin += step) {
    detail::run_step<T>(ctx, {options, shape, caches, position, q, k, v, y, offsets, sequences,
                              begin, std::min(step, longest)});
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                            \
  SSMLIB_INSTANTIATE(                                                                    \
      attention,                                                                         \
      void attention_advance<T>(const cpu::context&, const attention_options&,           \
                                const attention_cache_shape&, const attention_cache<T>*, \
                                const index_t*, view<const T, 3>, view<const T, 3>,      \
                                view<const T, 3>, view<T, 3>, const index_t*, index_t, index_t))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
