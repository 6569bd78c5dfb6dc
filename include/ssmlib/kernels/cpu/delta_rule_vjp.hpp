#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/delta_rule.hpp>

#include <algorithm>

/// @file
/// The gradient of the gated delta rule, by chunks from the last to the first. With the names of
/// delta_rule.hpp, error = V - diag(pre) K S, and E the gradient of the state after the chunk:
///
///     dU = scores^T dY + diag(suf) K E            R = (I + L)^-T dU,   dL = -R U^T (s < t)
///     dV = diag(beta) R                           d beta_t = R_t . error_t + sum_s dL overlap
///     d(K S) = -diag(beta pre) R =: G             d scores = dY U^T (s <= t)
///     dQ = alpha diag(pre) dY S^T + alpha (d scores o decay) K
///     dK = alpha (d scores o decay)^T Q + (M + M^T) K + G S^T + diag(suf) U E^T,
///                                                 M[t, s] = dL beta_t decay
///     E <- pre_{n-1} E + alpha (diag(pre) Q)^T dY + K^T G
///
/// The gradient of g_r adds up the terms whose decay holds g_r: pairs t >= r > s of the scores and
/// of L, reads of S at t >= r, writes at s < r, and the decay of S. Sums only, nothing cancels.

namespace ssm::kernels {

/// Gradients, each head's own; everything is added to, absent views are not wanted.
template <Real T>
struct delta_rule_gradients {
  view<T, 3> q, k;             ///< (tokens, H, N), unit inner stride
  view<T, 3> v;                ///< (tokens, H, P), unit inner stride
  view<T, 2> log_decay, beta;  ///< (tokens, H)
  view<T, 4> initial;          ///< (sequences, H, N, P)
};

namespace detail {

template <Real T>
class delta_backward {
 public:
  delta_backward(const delta_rule_operands<T>& o, index_t i, index_t h, index_t size,
                 view<const T, 3> dy, const delta_rule_gradients<T>& to)
      : o_(o),
        to_(to),
        dy_(dy),
        i_(i),
        h_(h),
        keys_(o.keys()),
        features_(o.features()),
        size_(std::clamp<index_t>(size, 1, std::max<index_t>(1, o.length(i)))),
        chunk_(size_, keys_, features_),
        after_(keys_ * features_),
        rhs_(size_ * features_),
        scaled_(size_ * features_),
        d_lower_(size_ * size_),
        d_scores_(size_ * size_),
        d_rows_(size_ * keys_),
        reads_(size_),
        writes_(size_),
        d_gate_(size_) {}

  void run(view<const T, 4> initial, view<const T, 4> d_final) {
    const index_t cells = keys_ * features_, length = o_.length(i_);
    const index_t chunks = (length + size_ - 1) / size_;
    scratch<T> states(std::max<index_t>(1, chunks) * cells);
    load_state(d_final, i_, h_, keys_, features_, after_.data());
    load_state(initial, i_, h_, keys_, features_, states.data());
    for (index_t c = 0; c + 1 < chunks; ++c) {
      T* state = states.data() + (c + 1) * cells;
      std::copy_n(state - cells, cells, state);
      load(c, false);
      chunk_.solve(rows(o_.k, c), rows(o_.v, c), state);
      chunk_.advance(rows(o_.k, c), state, scaled_.data());
    }
    for (index_t c = chunks; c-- > 0;)
      reverse(c, states.data() + c * cells);
    add_state(after_.data(), to_.initial, i_, h_);
  }

 private:
  template <class U>
  [[nodiscard]] view<U, 2> rows(view<U, 3> from, index_t c) const {
    const index_t t = c * size_, n = std::min(size_, o_.length(i_) - t);
    return head_rows(from, h_, o_.heads, o_.offsets[i_] + t, n);
  }
  template <class U>
  [[nodiscard]] view<U, 1> column(view<U, 2> from, index_t c) const {
    const index_t t = c * size_, n = std::min(size_, o_.length(i_) - t);
    return head_column(from, h_, o_.heads, o_.offsets[i_] + t, n);
  }
  void load(index_t c, bool with_scores) {
    chunk_.load(rows(o_.q, c), rows(o_.k, c), column(o_.log_decay, c), column(o_.beta, c), o_.alpha,
                with_scores);
  }
  [[nodiscard]] view<T, 2> key_rows() const {
    return {d_rows_.data(), {chunk_.n, keys_}, {keys_, 1}};
  }
  void add_keys(view<T, 2> to) const {
    for (index_t t = 0; t < chunk_.n; ++t) {
      axpy(keys_, T(1), d_rows_.data() + t * keys_, to.data + t * to.strides[0]);
    }
  }

  void reverse(index_t c, const T* state) {
    load(c, true);
    const view<const T, 2> q = rows(o_.q, c), k = rows(o_.k, c), dy = rows(dy_, c);
    chunk_.solve(k, rows(o_.v, c), state);
    const index_t n = chunk_.n;
    const view<const T, 2> after{after_.data(), {keys_, features_}, {features_, 1}};
    const view<T, 2> rhs{rhs_.data(), {n, features_}, {features_, 1}};
    // R in rhs_
    gemm<T>(T(1), k, after, T(0), rhs);
    for (index_t t = 0; t < n; ++t) {  // what writing token t into the state is worth
      T* row = rhs_.data() + t * features_;
      writes_[t] = chunk_.suf[t] * dot(features_, row, chunk_.written + t * features_);
      scale(features_, chunk_.suf[t], row);
    }
    gemm<T>(T(1), transposed(chunk_.square(chunk_.scores)), dy, T(1), rhs);
    solve_unit_lower_transposed(n, features_, chunk_.lower, rhs_.data());
    gemm_lower<T>(T(-1), rhs, transposed(chunk_.rows(chunk_.written)), T(0),
                  view<T, 2>{d_lower_.data(), {n, n}, {n, 1}});
    gemm_lower<T>(T(1), dy, transposed(chunk_.rows(chunk_.written)), T(0),
                  view<T, 2>{d_scores_.data(), {n, n}, {n, 1}});
    reverse_rates(c);
    reverse_gates(c, state, q, k, dy);
    reverse_keys(c, state, q, k, dy);
    reverse_state(q, k, dy);
  }

  // d beta and d V.
  void reverse_rates(index_t c) {
    const index_t n = chunk_.n;
    if (to_.beta) {
      const view<T, 1> to = column(to_.beta, c);
      for (index_t t = 0; t < n; ++t) {
        T sum = dot(features_, rhs_.data() + t * features_, chunk_.error + t * features_);
        to(t) += sum + dot(t, d_lower_.data() + t * n, chunk_.overlap + t * n);
      }
    }
    if (to_.v) {
      const view<T, 2> to = rows(to_.v, c);
      for (index_t t = 0; t < n; ++t) {
        axpy(features_, chunk_.beta[t], rhs_.data() + t * features_, to.data + t * to.strides[0]);
      }
    }
  }

  // d g; needs R, d_lower and d_scores.
  void reverse_gates(index_t c, const T* state, view<const T, 2> q, view<const T, 2> k,
                     view<const T, 2> dy) {
    if (!to_.log_decay) return;
    const index_t n = chunk_.n;
    const view<const T, 2> before{state, {keys_, features_}, {features_, 1}};
    const view<T, 2> read{scaled_.data(), {n, features_}, {features_, 1}};
    gemm<T>(o_.alpha, q, before, T(0), read);
    for (index_t t = 0; t < n; ++t) {
      reads_[t] = dot(features_, dy.data + t * dy.strides[0], scaled_.data() + t * features_);
    }
    gemm<T>(T(1), k, before, T(0), read);
    for (index_t t = 0; t < n; ++t) {
      reads_[t] -= chunk_.beta[t] *
                   dot(features_, rhs_.data() + t * features_, scaled_.data() + t * features_);
      reads_[t] *= chunk_.pre[t];
    }
    std::fill_n(d_gate_.data(), n,
                chunk_.pre[n - 1] * dot(keys_ * features_, state, after_.data()));
    for (index_t s = 0; s < n; ++s) {
      T pairs(0);
      for (index_t t = n; t-- > s + 1;) {
        const index_t at = t * n + s;
        pairs += d_lower_[at] * chunk_.lower[at] + d_scores_[at] * chunk_.scores[at];
        d_gate_[t] += pairs;
      }
    }
    T reads(0), writes(0);
    for (index_t t = n; t-- > 0;)
      d_gate_[t] += reads += reads_[t];
    const view<T, 1> to = column(to_.log_decay, c);
    for (index_t t = 0; t < n; ++t) {
      to(t) += d_gate_[t] + writes;
      writes += writes_[t];
    }
  }

  // d Q and d K; leaves G = d(K S) in rhs_.
  void reverse_keys(index_t c, const T* state, view<const T, 2> q, view<const T, 2> k,
                    view<const T, 2> dy) {
    const index_t n = chunk_.n;
    const view<const T, 2> before{state, {keys_, features_}, {features_, 1}};
    const view<const T, 2> after{after_.data(), {keys_, features_}, {features_, 1}};
    for (index_t t = 0; t < n; ++t) {
      for (index_t s = 0; s < n; ++s) {
        const index_t at = t * n + s;
        d_scores_[at] = s <= t ? o_.alpha * chunk_.decay[at] * d_scores_[at] : T(0);
        d_lower_[at] = s < t ? chunk_.beta[t] * chunk_.decay[at] * d_lower_[at] : T(0);
      }
      scale(features_, -chunk_.beta[t] * chunk_.pre[t], rhs_.data() + t * features_);
    }
    const view<const T, 2> scores = chunk_.square(d_scores_.data()),
                           lower = chunk_.square(d_lower_.data());
    if (to_.q) {
      gemm<T>(o_.alpha, dy, transposed(before), T(0), key_rows());
      scale_rows(n, keys_, chunk_.pre, d_rows_.data(), keys_);
      gemm_lower_left<T>(T(1), scores, k, T(1), key_rows());
      add_keys(rows(to_.q, c));
    }
    if (to_.k) {
      gemm<T>(T(1), chunk_.rows(chunk_.written), transposed(after), T(0), key_rows());
      scale_rows(n, keys_, chunk_.suf, d_rows_.data(), keys_);
      gemm<T>(T(1), chunk_.rows(rhs_.data()), transposed(before), T(1), key_rows());
      gemm<T>(T(1), transposed(scores), q, T(1), key_rows());
      gemm<T>(T(1), transposed(lower), k, T(1), key_rows());
      gemm_lower_left<T>(T(1), lower, k, T(1), key_rows());
      add_keys(rows(to_.k, c));
    }
  }

  void reverse_state(view<const T, 2> q, view<const T, 2> k, view<const T, 2> dy) {
    using P = simd::pack<T>;
    const index_t n = chunk_.n;
    const view<T, 2> after{after_.data(), {keys_, features_}, {features_, 1}};
    for (index_t t = 0; t < n; ++t) {
      const P weight(o_.alpha * chunk_.pre[t]);
      simd::map(features_, dy.data + t * dy.strides[0], scaled_.data() + t * features_,
                [=](P x) { return weight * x; });
    }
    gemm<T>(T(1), transposed(q), chunk_.rows(scaled_.data()), chunk_.pre[n - 1], after);
    gemm<T>(T(1), transposed(k), chunk_.rows(rhs_.data()), T(1), after);
  }

  const delta_rule_operands<T>& o_;
  const delta_rule_gradients<T>& to_;
  view<const T, 3> dy_;
  index_t i_, h_, keys_, features_, size_;
  delta_chunk<T> chunk_;
  scratch<T> after_, rhs_, scaled_, d_lower_, d_scores_, d_rows_, reads_, writes_, d_gate_;
};

}  // namespace detail

/// Adds the gradient of sum(dy y) + sum(d_final final) of the gated delta rule.
///
/// @param size     tokens a chunk; 0: 64
/// @param initial  (sequences, H, N, P) or absent: what the forward pass began with
/// @param d_final  (sequences, H, N, P) or absent
/// @cost  about 2.5 times the forward pass and its repetition; memory a state a chunk, of as many
///        heads as threads.
template <Real T>
void delta_rule_vjp(const cpu::context& ctx, const delta_rule_operands<T>& o, index_t size,
                    view<const T, 4> initial, view<const T, 3> dy, view<const T, 4> d_final,
                    const delta_rule_gradients<T>& gradients) {
  ctx.parallel_for(o.sequences * o.heads, [&](index_t task) {
    detail::delta_backward<T>(o, task / o.heads, task % o.heads, size == 0 ? 64 : size, dy,
                              gradients)
        .run(initial, d_final);
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(                                                                            \
      gated, void delta_rule_vjp<T>(const cpu::context&, const delta_rule_operands<T>&, index_t, \
                                    view<const T, 4>, view<const T, 3>, view<const T, 4>,        \
                                    const delta_rule_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
