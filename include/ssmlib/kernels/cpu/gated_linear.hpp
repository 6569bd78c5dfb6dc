#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/reduce.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <optional>

/// @file
/// Gated linear attention, forward: a gate per key channel.
///
/// A chunk of n tokens with the state S before it, a_t = exp(log_gate_t), and the products of gates
/// pre_t = a_0 .. a_t and suf_s = a_{s+1} .. a_{n-1}, channel by channel:
///
///     y_t = alpha (q_t o pre_t)^T S + sum_{s <= t} scores[t, s] v_s
///     scores[t, s] = alpha q_t . (k_s o a_{s+1} o .. o a_t)
///     S <- diag(pre_{n-1}) S + sum_s (k_s o suf_s) v_s^T
///
/// Nothing is divided and no logarithms are added up: every factor is a product of gates, so
/// nothing overflows, resets (log_gate = -infinity) are exact, and no bits cancel. The scores cost
/// n / 2 vector products a token, which is why chunks are short: at 16 tokens they are a small part
/// of the two products with the state.

namespace ssm::kernels {

template <Real T>
struct gated_linear_operands {
  view<const T, 3> q, k, log_gate;  ///< (tokens, groups, N), unit inner stride
  view<const T, 3> v;               ///< (tokens, groups, P), unit inner stride
  T alpha;
  index_t heads;           ///< H; head h reads group h * groups / H
  const index_t* offsets;  ///< sequences + 1 token offsets
  index_t sequences;

  [[nodiscard]] index_t keys() const { return q.extents[2]; }
  [[nodiscard]] index_t features() const { return v.extents[2]; }
  [[nodiscard]] index_t length(index_t i) const { return offsets[i + 1] - offsets[i]; }
};

/// Where the states before each token go: (slots * sequences, H, N, P), see ssm::carry.
template <Real T>
struct state_ring {
  view<T, 4> rows;
  index_t slots = 0;
  const index_t* first_position = nullptr;

  /// Puts the state before token t of `length` new ones; those that the same call would overwrite
  /// are left out.
  void keep(const T* state, index_t sequence, index_t sequences, index_t head, index_t t,
            index_t length) const;
};

namespace detail {

/// A head's rows of an operand, from the first token of a sequence.
template <class T>
[[nodiscard]] view<T, 2> head_rows(view<T, 3> from, index_t head, index_t heads, index_t begin,
                                   index_t count) {
  const index_t group = head * from.extents[1] / heads;
  return {from.data + begin * from.strides[0] + group * from.strides[1],
          {count, from.extents[2]},
          {from.strides[0], from.strides[2]}};
}

/// The state of one head between a tensor and dense working memory (N x P): f(dense, element).
template <class S, class T, class F>
void for_each_cell(S* dense, view<T, 4> states, index_t sequence, index_t head, F f) {
  const index_t keys = states.extents[2], features = states.extents[3];
  for (index_t n = 0; n < keys; ++n) {
    T* row = states.data + sequence * states.strides[0] + head * states.strides[1] +
             n * states.strides[2];
    S* mine = dense + n * features;
    const index_t step = states.strides[3];
    if (step == 1) {  // the usual case, in a loop that becomes a copy
      for (index_t p = 0; p < features; ++p)
        f(mine[p], row[p]);
    } else {
      for (index_t p = 0; p < features; ++p)
        f(mine[p], row[p * step]);
    }
  }
}
template <Real T>
void load_state(view<const T, 4> from, index_t sequence, index_t head, index_t keys,
                index_t features, T* to) {
  if (!from) return std::fill_n(to, keys * features, T(0)), void();
  for_each_cell(to, from, sequence, head, [](T& mine, const T& x) { mine = x; });
}
template <Real T>
void store_state(const T* from, view<T, 4> to, index_t sequence, index_t head) {
  if (to) for_each_cell(from, to, sequence, head, [](const T& mine, T& x) { x = mine; });
}
template <Real T>
void add_state(const T* from, view<T, 4> to, index_t sequence, index_t head) {
  if (to) for_each_cell(from, to, sequence, head, [](const T& mine, T& x) { x += mine; });
}

/// Rows padded to whole registers with zeros, so that loops over keys have no tails.
[[nodiscard]] inline index_t padded(index_t n, index_t width) {
  return (n + width - 1) / width * width;
}
template <Real T>
void load_padded(view<const T, 2> from, T* to, index_t step) {
  for (index_t t = 0; t < from.extents[0]; ++t) {
    const T* row = from.data + t * from.strides[0];
    std::copy_n(row, from.extents[1], to + t * step);
    std::fill(to + t * step + from.extents[1], to + (t + 1) * step, T(0));
  }
}

/// a *= b, then the sum of q a, over padded rows.
template <Real T>
SSMLIB_ALWAYS_INLINE T scale_and_dot(index_t n, const T* b, const T* q, T* a) {
  using P = simd::pack<T>;
  P sum(T(0));
  for (index_t i = 0; i < n; i += P::width) {
    const P x = P::load(a + i) * P::load(b + i);
    x.store(a + i);
    sum = simd::fma(P::load(q + i), x, sum);
  }
  return simd::horizontal_sum(sum);
}

/// What one chunk of one head is made of; see the formulas above. Rows are `step` apart.
template <Real T>
struct gated_chunk {
  gated_chunk(index_t size, index_t keys)
      : size(size),
        keys(keys),
        step(padded(keys, simd::pack<T>::width)),
        memory(size * step * 7 + step),
        scores_memory(size * size) {
    T* at = memory.data();
    for (T** part : {&q, &k, &gate, &pre, &suf, &q_in, &k_out}) {
      *part = at;
      at += size * step;
    }
    running = at;
    scores = scores_memory.data();
  }

  /// Loads n rows and forms the products of gates.
  void load(view<const T, 2> q_rows, view<const T, 2> k_rows, view<const T, 2> gate_rows) {
    using P = simd::pack<T>;
    n = k_rows.extents[0];
    load_padded(q_rows, q, step);
    load_padded(k_rows, k, step);
    load_padded(gate_rows, gate, step);
    simd::map(n * step, gate, gate, [](P x) { return simd::exp(x); });
    for (index_t t = 0; t < n; ++t) {
      const index_t row = t * step;
      for (index_t i = row; i < row + step; i += P::width) {
        const P product = t == 0 ? P::load(gate + i) : P::load(pre + i - step) * P::load(gate + i);
        product.store(pre + i);
        (product * P::load(q + i)).store(q_in + i);
      }
    }
    for (index_t s = n; s-- > 0;) {
      const index_t row = s * step;
      for (index_t i = row; i < row + step; i += P::width) {
        P product(T(1));
        if (s + 1 < n) product = P::load(suf + i + step) * P::load(gate + i + step);
        product.store(suf + i);
        (product * P::load(k + i)).store(k_out + i);
      }
    }
  }
  /// The lower triangle of the scores; zeros above.
  void score(T alpha) {
    for (index_t s = 0; s < n; ++s) {
      std::fill_n(scores + s * n + s + 1, n - s - 1, T(0));
      std::copy_n(k + s * step, step, running);
      scores[s * n + s] = alpha * dot(step, q + s * step, running);
      for (index_t t = s + 1; t < n; ++t) {
        scores[t * n + s] = alpha * scale_and_dot(step, gate + t * step, q + t * step, running);
      }
    }
  }
  /// S <- diag(pre_{n-1}) S + k_out^T V
  void advance(view<const T, 2> v, T* state) const {
    const index_t features = v.extents[1];
    scale_rows(keys, features, last(), state, features);
    gemm<T>(T(1), transposed(rows(k_out)), v, T(1), {state, {keys, features}, {features, 1}});
  }
  [[nodiscard]] const T* last() const { return pre + (n - 1) * step; }
  [[nodiscard]] view<const T, 2> rows(const T* part) const { return {part, {n, keys}, {step, 1}}; }
  [[nodiscard]] view<const T, 2> score_rows() const { return {scores, {n, n}, {n, 1}}; }

  index_t size, keys, step, n = 0;
  scratch<T> memory, scores_memory;
  T *q, *k, *gate, *pre, *suf, *q_in, *k_out, *running, *scores;
};

/// One head of one sequence by chunks.
template <Real T>
void gated_chunks(const gated_linear_operands<T>& o, index_t i, index_t h, index_t size,
                  view<const T, 4> initial, view<T, 4> final, view<T, 3> y) {
  const index_t keys = o.keys(), features = o.features(), length = o.length(i);
  size = std::clamp<index_t>(size, 1, std::max<index_t>(1, length));
  scratch<T> state(keys * features);
  gated_chunk<T> chunk(size, keys);
  load_state(initial, i, h, keys, features, state.data());
  const view<const T, 2> before{state.data(), {keys, features}, {features, 1}};
  for (index_t t = 0; t < length; t += size) {
    const index_t begin = o.offsets[i] + t, n = std::min(size, length - t);
    const view<const T, 2> v = head_rows(o.v, h, o.heads, begin, n);
    const view<T, 2> out = head_rows(y, h, o.heads, begin, n);
    chunk.load(head_rows(o.q, h, o.heads, begin, n), head_rows(o.k, h, o.heads, begin, n),
               head_rows(o.log_gate, h, o.heads, begin, n));
    chunk.score(o.alpha);
    gemm<T>(o.alpha, chunk.rows(chunk.q_in), before, T(0), out);
    gemm<T>(T(1), chunk.score_rows(), v, T(1), out);
    chunk.advance(v, state.data());
  }
  store_state(state.data(), final, i, h);
}

/// One head of one sequence, token by token.
template <Real T>
void gated_tokens(const gated_linear_operands<T>& o, index_t i, index_t h, view<const T, 4> initial,
                  view<T, 4> final, const state_ring<T>& ring, view<T, 3> y) {
  using P = simd::pack<T>;
  const index_t keys = o.keys(), features = o.features(), length = o.length(i);
  scratch<T> state(keys * features), gate(keys), query(keys);
  load_state(initial, i, h, keys, features, state.data());
  const view<const T, 2> q = head_rows(o.q, h, o.heads, o.offsets[i], length),
                         k = head_rows(o.k, h, o.heads, o.offsets[i], length),
                         g = head_rows(o.log_gate, h, o.heads, o.offsets[i], length),
                         v = head_rows(o.v, h, o.heads, o.offsets[i], length);
  const view<T, 2> out = head_rows(y, h, o.heads, o.offsets[i], length);
  for (index_t t = 0; t < length; ++t) {
    ring.keep(state.data(), i, o.sequences, h, t, length);
    simd::map(keys, g.data + t * g.strides[0], gate.data(), [](P x) { return simd::exp(x); });
    simd::map(keys, q.data + t * q.strides[0], query.data(), [&](P x) { return P(o.alpha) * x; });
    for (index_t n = 0; n < keys; ++n) {
      const P kept(gate[n]), key(k.data[t * k.strides[0] + n]);
      T* row = state.data() + n * features;
      simd::map(features, v.data + t * v.strides[0], row, row,
                [=](P value, P s) { return simd::fma(kept, s, key * value); });
    }
    transposed_matrix_vector(keys, features, state.data(), features, query.data(),
                             out.data + t * out.strides[0]);
  }
  store_state(state.data(), final, i, h);
}

}  // namespace detail

template <Real T>
void state_ring<T>::keep(const T* state, index_t sequence, index_t sequences, index_t head,
                         index_t t, index_t length) const {
  if (!rows || t < length - slots) return;
  const index_t row = (first_position[sequence] + t) % slots * sequences + sequence;
  detail::store_state(state, rows, row, head);
}

/// Tokens a chunk where the caller does not say: with wide keys the products with the state gain
/// more from longer chunks than the scores lose.
[[nodiscard]] inline index_t gated_linear_chunk(index_t size, index_t keys) {
  if (size > 0) return size;
  return keys <= 64 ? 16 : 32;
}

/// Gated linear attention by chunks: y and the final state.
///
/// @param size     tokens a chunk; 0: gated_linear_chunk's choice
/// @param initial  (sequences, H, N, P) or absent: zero
/// @param final    (sequences, H, N, P) or absent; may be `initial`
/// @param y        (tokens, H, P), unit inner stride; overwritten
/// @cost  4 T H N P flops and T H N size / 2 fused operations.
template <Real T>
void gated_linear_chunked(const cpu::context& ctx, const gated_linear_operands<T>& o, index_t size,
                          view<const T, 4> initial, view<T, 4> final, view<T, 3> y) {
  ctx.parallel_for(o.sequences * o.heads, [&](index_t task) {
    detail::gated_chunks<T>(o, task / o.heads, task % o.heads, gated_linear_chunk(size, o.keys()),
                            initial, final, y);
  });
}

/// The same token by token: a token's bits depend on the token and the state only.
/// @param ring  where the states before the last tokens go, or default
template <Real T>
void gated_linear_recurrent(const cpu::context& ctx, const gated_linear_operands<T>& o,
                            view<const T, 4> initial, view<T, 4> final, const state_ring<T>& ring,
                            view<T, 3> y) {
  ctx.parallel_for(o.sequences * o.heads, [&](index_t task) {
    detail::gated_tokens<T>(o, task / o.heads, task % o.heads, initial, final, ring, y);
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                   \
  SSMLIB_INSTANTIATE(                                                                           \
      gated, void gated_linear_chunked<T>(const cpu::context&, const gated_linear_operands<T>&, \
                                          index_t, view<const T, 4>, view<T, 4>, view<T, 3>));  \
  SSMLIB_INSTANTIATE(gated, void gated_linear_recurrent<T>(                                     \
                                const cpu::context&, const gated_linear_operands<T>&,           \
                                view<const T, 4>, view<T, 4>, const state_ring<T>&, view<T, 3>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
