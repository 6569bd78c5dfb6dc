#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/gated_linear.hpp>

#include <algorithm>

/// @file
/// The gradient of gated linear attention, by chunks from the last to the first. With S and E the
/// state before a chunk and the gradient of the state after it:
///
///     d q_in = alpha dY S^T,  d k_out = V E^T,  d V = k_out E + scores^T dY,  d scores = alpha dY
///     V^T E <- diag(pre_{n-1}) E + alpha q_in^T dY
///
/// The gradient of log_gate_r is a sum over the products of gates that hold a_r: those of q_in at
/// t >= r, of k_out at s < r, of the decay of the state, of the scores (t >= r > s). Sums only: the
/// shorter form with differences of running sums cancels.

namespace ssm::kernels {

/// Gradients, each head's own; everything is added to, absent views are not wanted.
template <Real T>
struct gated_linear_gradients {
  view<T, 3> q, k, log_gate;  ///< (tokens, H, N), unit inner stride
  view<T, 3> v;               ///< (tokens, H, P), unit inner stride
  view<T, 4> initial;         ///< (sequences, H, N, P)
};

namespace detail {

template <Real T>
class gated_backward {
 public:
  gated_backward(const gated_linear_operands<T>& o, index_t i, index_t h, index_t size,
                 view<const T, 3> dy, const gated_linear_gradients<T>& to)
      : o_(o),
        to_(to),
        dy_(dy),
        i_(i),
        h_(h),
        keys_(o.keys()),
        features_(o.features()),
        size_(std::clamp<index_t>(size, 1, std::max<index_t>(1, o.length(i)))),
        chunk_(size_, keys_),
        after_(keys_ * features_),
        memory_(size_ * chunk_.step * 6 + chunk_.step),
        d_scores_(size_ * size_),
        d_v_(size_ * features_) {
    T* at = memory_.data();
    for (T** part : {&d_q_in_, &d_k_out_, &d_q_, &d_k_, &d_gate_, &running_}) {
      *part = at;
      at += size_ * chunk_.step;
    }
    d_running_ = at;
  }

  void run(view<const T, 4> initial, view<const T, 4> d_final) {
    const index_t cells = keys_ * features_, length = o_.length(i_);
    const index_t chunks = (length + size_ - 1) / size_;
    const index_t segments = (chunks + segment - 1) / segment;
    // States before every segment, and before every chunk of one segment.
    scratch<T> starts(std::max<index_t>(1, segments) * cells);
    scratch<T> states(std::min(segment, std::max<index_t>(1, chunks)) * cells);
    load_state(d_final, i_, h_, keys_, features_, after_.data());
    load_state(initial, i_, h_, keys_, features_, starts.data());
    for (index_t g = 0; g + 1 < segments; ++g) {
      T* state = starts.data() + (g + 1) * cells;
      std::copy_n(starts.data() + g * cells, cells, state);
      for (index_t c = g * segment; c < (g + 1) * segment; ++c)
        advance(c, state);
    }
    for (index_t g = segments; g-- > 0;) {
      const index_t first = g * segment, end = std::min(chunks, first + segment);
      std::copy_n(starts.data() + g * cells, cells, states.data());
      for (index_t c = first; c + 1 < end; ++c) {
        T* state = states.data() + (c - first + 1) * cells;
        std::copy_n(state - cells, cells, state);
        advance(c, state);
      }
      for (index_t c = end; c-- > first;)
        reverse(c, states.data() + (c - first) * cells);
    }
    add_state(after_.data(), to_.initial, i_, h_);
  }

 private:
  static constexpr index_t segment = 16;  ///< chunks between kept states

  using P = simd::pack<T>;

  template <class U>
  [[nodiscard]] view<U, 2> rows(view<U, 3> from, index_t c) const {
    const index_t t = c * size_, n = std::min(size_, o_.length(i_) - t);
    return head_rows(from, h_, o_.heads, o_.offsets[i_] + t, n);
  }
  void load(index_t c) { chunk_.load(rows(o_.q, c), rows(o_.k, c), rows(o_.log_gate, c)); }
  void advance(index_t c, T* state) {
    load(c);
    chunk_.advance(rows(o_.v, c), state);
  }

  void reverse(index_t c, const T* state) {
    load(c);
    chunk_.score(o_.alpha);
    const index_t n = chunk_.n, step = chunk_.step;
    const view<const T, 2> v = rows(o_.v, c), dy = rows(dy_, c);
    const view<const T, 2> before{state, {keys_, features_}, {features_, 1}};
    const view<T, 2> after{after_.data(), {keys_, features_}, {features_, 1}};
    std::fill_n(d_q_in_, 2 * size_ * step, T(0));  // with d_k_out: the padding is read below
    gemm<T>(o_.alpha, dy, transposed(before), T(0), view<T, 2>{d_q_in_, {n, keys_}, {step, 1}});
    gemm<T>(T(1), v, transposed<const T>(after), T(0), view<T, 2>{d_k_out_, {n, keys_}, {step, 1}});
    gemm<T>(o_.alpha, dy, transposed(v), T(0), view<T, 2>{d_scores_.data(), {n, n}, {n, 1}});
    if (to_.v) {
      const view<T, 2> d_v{d_v_.data(), {n, features_}, {features_, 1}};
      gemm<T>(T(1), chunk_.rows(chunk_.k_out), after, T(0), d_v);
      gemm<T>(T(1), transposed(chunk_.score_rows()), dy, T(1), d_v);
      const view<T, 2> to = rows(to_.v, c);
      for (index_t t = 0; t < n; ++t) {
        axpy(features_, T(1), d_v_.data() + t * features_, to.data + t * to.strides[0]);
      }
    }
    reverse_scores();
    reverse_products(state);
    scale_rows(keys_, features_, chunk_.last(), after_.data(), features_);
    gemm<T>(o_.alpha, transposed(chunk_.rows(chunk_.q_in)), dy, T(1), after);
    add_rows(d_q_, to_.q, c);
    add_rows(d_k_, to_.k, c);
    add_rows(d_gate_, to_.log_gate, c);
  }

  // Through scores[t, s] = q_t . w_t with w_s = k_s, w_t = gate_t o w_{t-1}: overwrites d_q, d_k
  // and d_gate.
  void reverse_scores() {
    const index_t n = chunk_.n, step = chunk_.step;
    std::fill_n(d_q_, n * step, T(0));
    std::fill_n(d_gate_, n * step, T(0));
    for (index_t s = 0; s < n; ++s) {
      std::copy_n(chunk_.k + s * step, step, running_ + s * step);
      for (index_t t = s + 1; t < n; ++t) {
        simd::map(step, running_ + (t - 1) * step, chunk_.gate + t * step, running_ + t * step,
                  [](P w, P gate) { return w * gate; });
      }
      for (index_t j = 0; j < step; j += P::width) {
        P d_w(T(0));
        for (index_t t = n; t-- > s;) {
          const index_t at = t * step + j;
          const P d_score(d_scores_[t * n + s]), w = P::load(running_ + at);
          d_w = simd::fma(d_score, P::load(chunk_.q + at), d_w);
          simd::fma(d_score, w, P::load(d_q_ + at)).store(d_q_ + at);
          if (t == s) break;
          simd::fma(w, d_w, P::load(d_gate_ + at)).store(d_gate_ + at);
          d_w *= P::load(chunk_.gate + at);
        }
        d_w.store(d_k_ + s * step + j);
      }
    }
  }

  // Through q_in = q o pre, k_out = k o suf and the decay of the state.
  void reverse_products(const T* state) {
    const index_t n = chunk_.n, step = chunk_.step;
    std::fill_n(d_running_, step, T(0));
    for (index_t j = 0; j < keys_; ++j) {
      d_running_[j] =
          chunk_.last()[j] * dot(features_, state + j * features_, after_.data() + j * features_);
    }
    for (index_t j = 0; j < step; j += P::width) {
      P sum = P::load(d_running_ + j);
      for (index_t t = 0; t < n; ++t) {  // k_out at s < t
        const index_t at = t * step + j;
        (P::load(d_gate_ + at) + sum).store(d_gate_ + at);
        const P d_k_out = P::load(d_k_out_ + at);
        sum = simd::fma(d_k_out, P::load(chunk_.k_out + at), sum);
        simd::fma(d_k_out, P::load(chunk_.suf + at), P::load(d_k_ + at)).store(d_k_ + at);
      }
      sum = P(T(0));
      for (index_t t = n; t-- > 0;) {  // q_in at t and later
        const index_t at = t * step + j;
        const P d_q_in = P::load(d_q_in_ + at);
        sum = simd::fma(d_q_in, P::load(chunk_.q_in + at), sum);
        (P::load(d_gate_ + at) + sum).store(d_gate_ + at);
        simd::fma(d_q_in, P::load(chunk_.pre + at), P::load(d_q_ + at)).store(d_q_ + at);
      }
    }
  }

  void add_rows(const T* from, view<T, 3> wanted, index_t c) const {
    if (!wanted) return;
    const view<T, 2> to = rows(wanted, c);
    for (index_t t = 0; t < chunk_.n; ++t) {
      axpy(keys_, T(1), from + t * chunk_.step, to.data + t * to.strides[0]);
    }
  }

  const gated_linear_operands<T>& o_;
  const gated_linear_gradients<T>& to_;
  view<const T, 3> dy_;
  index_t i_, h_, keys_, features_, size_;
  gated_chunk<T> chunk_;
  scratch<T> after_, memory_, d_scores_, d_v_;
  T *d_q_in_, *d_k_out_, *d_q_, *d_k_, *d_gate_, *running_, *d_running_;
};

}  // namespace detail

/// Adds the gradient of sum(dy y) + sum(d_final final) of gated linear attention.
///
/// @param size     tokens a chunk; 0: gated_linear_chunk's choice
/// @param initial  (sequences, H, N, P) or absent: what the forward pass began with
/// @param d_final  (sequences, H, N, P) or absent
/// @cost  12 T H N P flops; memory a state for every 16 chunks, of as many heads as threads.
template <Real T>
void gated_linear_vjp(const cpu::context& ctx, const gated_linear_operands<T>& o, index_t size,
                      view<const T, 4> initial, view<const T, 3> dy, view<const T, 4> d_final,
                      const gated_linear_gradients<T>& gradients) {
  ctx.parallel_for(o.sequences * o.heads, [&](index_t task) {
    detail::gated_backward<T>(o, task / o.heads, task % o.heads, gated_linear_chunk(size, o.keys()),
                              dy, gradients)
        .run(initial, d_final);
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                               \
  SSMLIB_INSTANTIATE(                                                                       \
      gated, void gated_linear_vjp<T>(const cpu::context&, const gated_linear_operands<T>&, \
                                      index_t, view<const T, 4>, view<const T, 3>,          \
                                      view<const T, 4>, const gated_linear_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
