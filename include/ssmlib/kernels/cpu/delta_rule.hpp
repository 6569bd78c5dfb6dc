#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/gated_linear.hpp>

#include <algorithm>

/// @file
/// The gated delta rule, forward, by the UT transform. A chunk of n tokens with the state S before
/// it, decay[t, s] = exp(g_{s+1} + .. + g_t) and pre_t = exp(g_0 + .. + g_t):
///
///     (I + L) U = diag(beta) (V - diag(pre) K S),   L[t, s] = beta_t decay[t, s] k_t . k_s, s < t
///     Y = alpha diag(pre) Q S + scores U,           scores[t, s] = alpha decay[t, s] q_t . k_s
///     S <- pre_{n-1} S + K^T diag(suf) U,           suf_s = decay[n-1, s]
///
/// U holds what each token writes. Decays are products of exp(g), never quotients: resets are
/// exact. The unit lower triangular system is solved by forward substitution.
/// @source Yang et al. 2024, arXiv:2406.06484, section 3.2; with decays: arXiv:2412.06464.

namespace ssm::kernels {

template <Real T>
struct delta_rule_operands {
  view<const T, 3> q, k;             ///< (tokens, groups, N), unit inner stride
  view<const T, 3> v;                ///< (tokens, groups, P), unit inner stride
  view<const T, 2> log_decay, beta;  ///< (tokens, groups)
  T alpha;
  index_t heads;           ///< H; head h reads group h * groups / H
  const index_t* offsets;  ///< sequences + 1 token offsets
  index_t sequences;

  [[nodiscard]] index_t keys() const { return q.extents[2]; }
  [[nodiscard]] index_t features() const { return v.extents[2]; }
  [[nodiscard]] index_t length(index_t i) const { return offsets[i + 1] - offsets[i]; }
};

namespace detail {

template <class T>
[[nodiscard]] view<T, 1> head_column(view<T, 2> from, index_t head, index_t heads, index_t begin,
                                     index_t count) {
  const index_t group = head * from.extents[1] / heads;
  return {
      from.data + begin * from.strides[0] + group * from.strides[1], {count}, {from.strides[0]}};
}

/// Solves (I + L) X = X in place: L (n x n) strictly lower, n apart, X (n x columns), `columns`
/// apart. Blocks of rows take what earlier blocks contribute as a product.
template <Real T>
void solve_unit_lower(index_t n, index_t columns, const T* lower, T* x) {
  constexpr index_t block = 16;
  for (index_t t0 = 0; t0 < n; t0 += block) {
    const index_t rows = std::min(block, n - t0);
    if (t0 > 0) {
      gemm<T>(T(-1), {lower + t0 * n, {rows, t0}, {n, 1}}, {x, {t0, columns}, {columns, 1}}, T(1),
              view<T, 2>{x + t0 * columns, {rows, columns}, {columns, 1}});
    }
    for (index_t t = t0 + 1; t < t0 + rows; ++t) {
      for (index_t s = t0; s < t; ++s) {
        axpy(columns, -lower[t * n + s], x + s * columns, x + t * columns);
      }
    }
  }
}
/// Solves (I + L)^T X = X in place.
template <Real T>
void solve_unit_lower_transposed(index_t n, index_t columns, const T* lower, T* x) {
  constexpr index_t block = 16;
  for (index_t t1 = n; t1 > 0;) {
    const index_t rows = t1 % block == 0 ? block : t1 % block, t0 = t1 - rows;
    if (t1 < n) {
      gemm<T>(T(-1), {lower + t1 * n + t0, {rows, n - t1}, {1, n}},
              {x + t1 * columns, {n - t1, columns}, {columns, 1}}, T(1),
              view<T, 2>{x + t0 * columns, {rows, columns}, {columns, 1}});
    }
    for (index_t s = t1 - 1; s-- > t0;) {
      for (index_t t = s + 1; t < t1; ++t) {
        axpy(columns, -lower[t * n + s], x + t * columns, x + s * columns);
      }
    }
    t1 = t0;
  }
}

/// The matrices of one chunk of one head; see the formulas above.
template <Real T>
struct delta_chunk {
  delta_chunk(index_t size, index_t keys, index_t features)
      : size(size), keys(keys), features(features), memory(size * (4 * size + 2 * features + 4)) {
    T* at = memory.data();
    for (T** part : {&decay, &overlap, &lower, &scores}) {
      *part = at;
      at += size * size;
    }
    for (T** part : {&error, &written}) {
      *part = at;
      at += size * features;
    }
    for (T** part : {&pre, &suf, &beta, &gate}) {
      *part = at;
      at += size;
    }
  }

  /// Decays, overlap[t, s] = decay[t, s] k_t . k_s (s < t), `lower` and, if wanted, the scores;
  /// zeros where s > t.
  void load(view<const T, 2> q, view<const T, 2> k, view<const T, 1> log_decay,
            view<const T, 1> rate, T alpha, bool with_scores) {
    using P = simd::pack<T>;
    n = k.extents[0];
    for (index_t t = 0; t < n; ++t) {
      gate[t] = log_decay(t);
      beta[t] = rate(t);
    }
    simd::map(n, gate, gate, [](P x) { return simd::exp(x); });
    for (index_t t = 0; t < n; ++t) {
      pre[t] = t == 0 ? gate[0] : pre[t - 1] * gate[t];
      T* row = decay + t * n;
      for (index_t s = 0; s < t; ++s)
        row[s] = row[s - n] * gate[t];
      row[t] = T(1);
      std::fill(row + t + 1, row + n, T(0));
    }
    std::copy_n(decay + (n - 1) * n, n, suf);
    gemm_lower<T>(T(1), k, transposed(k), T(0), view<T, 2>{overlap, {n, n}, {n, 1}});
    if (with_scores) {
      gemm_lower<T>(alpha, q, transposed(k), T(0), view<T, 2>{scores, {n, n}, {n, 1}});
    }
    for (index_t t = 0; t < n; ++t) {
      for (index_t s = 0; s < n; ++s) {
        const index_t at = t * n + s;
        overlap[at] = s < t ? decay[at] * overlap[at] : T(0);
        lower[at] = beta[t] * overlap[at];
        if (with_scores) scores[at] = s <= t ? decay[at] * scores[at] : T(0);
      }
    }
  }
  /// error = V - diag(pre) K S and what is written, U.
  void solve(view<const T, 2> k, view<const T, 2> v, const T* state) {
    using P = simd::pack<T>;
    gemm<T>(T(1), k, {state, {keys, features}, {features, 1}}, T(0),
            view<T, 2>{error, {n, features}, {features, 1}});
    for (index_t t = 0; t < n; ++t) {
      T* row = error + t * features;
      const P kept(-pre[t]), rate(beta[t]);
      simd::map(features, row, v.data + t * v.strides[0], row,
                [=](P held, P value) { return simd::fma(kept, held, value); });
      simd::map(features, row, written + t * features, [=](P x) { return rate * x; });
    }
    solve_unit_lower(n, features, lower, written);
  }
  /// S <- pre_{n-1} S + K^T diag(suf) U; `scaled` is working memory (n x P).
  void advance(view<const T, 2> k, T* state, T* scaled) const {
    std::copy_n(written, n * features, scaled);
    scale_rows(n, features, suf, scaled, features);
    gemm<T>(T(1), transposed(k), {scaled, {n, features}, {features, 1}}, pre[n - 1],
            view<T, 2>{state, {keys, features}, {features, 1}});
  }
  [[nodiscard]] view<const T, 2> square(const T* part) const { return {part, {n, n}, {n, 1}}; }
  [[nodiscard]] view<const T, 2> rows(const T* part) const {
    return {part, {n, features}, {features, 1}};
  }

  index_t size, keys, features, n = 0;
  scratch<T> memory;
  T *decay, *overlap, *lower, *scores, *error, *written, *pre, *suf, *beta, *gate;
};

/// One head of one sequence by chunks.
template <Real T>
void delta_chunks(const delta_rule_operands<T>& o, index_t i, index_t h, index_t size,
                  view<const T, 4> initial, view<T, 4> final, view<T, 3> y) {
  const index_t keys = o.keys(), features = o.features(), length = o.length(i);
  size = std::clamp<index_t>(size, 1, std::max<index_t>(1, length));
  scratch<T> state(keys * features), scaled(size * features);
  delta_chunk<T> chunk(size, keys, features);
  load_state(initial, i, h, keys, features, state.data());
  for (index_t t = 0; t < length; t += size) {
    const index_t begin = o.offsets[i] + t, n = std::min(size, length - t);
    const view<const T, 2> q = head_rows(o.q, h, o.heads, begin, n),
                           k = head_rows(o.k, h, o.heads, begin, n);
    const view<T, 2> out = head_rows(y, h, o.heads, begin, n);
    chunk.load(q, k, head_column(o.log_decay, h, o.heads, begin, n),
               head_column(o.beta, h, o.heads, begin, n), o.alpha, true);
    chunk.solve(k, head_rows(o.v, h, o.heads, begin, n), state.data());
    gemm<T>(o.alpha, q, {state.data(), {keys, features}, {features, 1}}, T(0), out);
    scale_rows(n, features, chunk.pre, out.data, out.strides[0]);
    gemm_lower_left<T>(T(1), chunk.square(chunk.scores), chunk.rows(chunk.written), T(1), out);
    chunk.advance(k, state.data(), scaled.data());
  }
  store_state(state.data(), final, i, h);
}

/// One head of one sequence, token by token.
template <Real T>
void delta_tokens(const delta_rule_operands<T>& o, index_t i, index_t h, view<const T, 4> initial,
                  view<T, 4> final, const state_ring<T>& ring, view<T, 3> y) {
  using P = simd::pack<T>;
  const index_t keys = o.keys(), features = o.features(), length = o.length(i);
  scratch<T> state(keys * features), query(keys), update(features);
  load_state(initial, i, h, keys, features, state.data());
  const index_t begin = o.offsets[i];
  const view<const T, 2> q = head_rows(o.q, h, o.heads, begin, length),
                         k = head_rows(o.k, h, o.heads, begin, length),
                         v = head_rows(o.v, h, o.heads, begin, length);
  const view<const T, 1> g = head_column(o.log_decay, h, o.heads, begin, length),
                         beta = head_column(o.beta, h, o.heads, begin, length);
  const view<T, 2> out = head_rows(y, h, o.heads, begin, length);
  for (index_t t = 0; t < length; ++t) {
    ring.keep(state.data(), i, o.sequences, h, t, length);
    const T* key = k.data + t * k.strides[0];
    const T log_decay = g(t);
    const P decay = simd::exp(P(log_decay)), rate(beta(t));
    transposed_matrix_vector(keys, features, state.data(), features, key, update.data());
    simd::map(features, v.data + t * v.strides[0], update.data(), update.data(),
              [=](P value, P held) { return rate * simd::fma(-decay, held, value); });
    for (index_t n = 0; n < keys; ++n) {
      T* row = state.data() + n * features;
      const P weight(key[n]);
      simd::map(features, update.data(), row, row,
                [=](P u, P s) { return simd::fma(weight, u, decay * s); });
    }
    simd::map(keys, q.data + t * q.strides[0], query.data(), [&](P x) { return P(o.alpha) * x; });
    transposed_matrix_vector(keys, features, state.data(), features, query.data(),
                             out.data + t * out.strides[0]);
  }
  store_state(state.data(), final, i, h);
}

}  // namespace detail

/// The gated delta rule by chunks: y and the final state.
///
/// @param size     tokens a chunk; 0: 64
/// @param initial  (sequences, H, N, P) or absent: zero
/// @param final    (sequences, H, N, P) or absent; may be `initial`
/// @param y        (tokens, H, P), unit inner stride; overwritten
/// @cost  T H (6 N P + 2 size (N + P)) flops.
template <Real T>
void delta_rule_chunked(const cpu::context& ctx, const delta_rule_operands<T>& o, index_t size,
                        view<const T, 4> initial, view<T, 4> final, view<T, 3> y) {
  ctx.parallel_for(o.sequences * o.heads, [&](index_t task) {
    detail::delta_chunks<T>(o, task / o.heads, task % o.heads, size == 0 ? 64 : size, initial,
                            final, y);
  });
}

/// The same token by token: a token's bits depend on the token and the state only.
/// @param ring  where the states before the last tokens go, or default
template <Real T>
void delta_rule_recurrent(const cpu::context& ctx, const delta_rule_operands<T>& o,
                          view<const T, 4> initial, view<T, 4> final, const state_ring<T>& ring,
                          view<T, 3> y) {
  ctx.parallel_for(o.sequences * o.heads, [&](index_t task) {
    detail::delta_tokens<T>(o, task / o.heads, task % o.heads, initial, final, ring, y);
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                \
  SSMLIB_INSTANTIATE(                                                                        \
      gated, void delta_rule_chunked<T>(const cpu::context&, const delta_rule_operands<T>&,  \
                                        index_t, view<const T, 4>, view<T, 4>, view<T, 3>)); \
  SSMLIB_INSTANTIATE(gated, void delta_rule_recurrent<T>(                                    \
                                const cpu::context&, const delta_rule_operands<T>&,          \
                                view<const T, 4>, view<T, 4>, const state_ring<T>&, view<T, 3>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
