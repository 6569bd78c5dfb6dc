#pragma once

#include <ssmlib/expr/softmax.hpp>
#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/reduce.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/mixer/matrix_panels.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace ssm::detail {

/// Panels of softmax attention: exp(logits - log-sum-exp of the row), O(T) memory.
template <Real T>
class softmax_panels final : public matrix_panels<T> {
 public:
  softmax_panels(const softmax_mixer<T>& m, tape<T>* t, const cpu::context& ctx)
      : layout_(layout_of(m)),
        heads_(m.heads()),
        window_(m.is_causal ? m.window : 0),
        is_causal_(m.is_causal),
        alpha_(static_cast<T>(m.logits.alpha)),
        q_(input_tokens(m.logits.q)),
        k_(input_tokens(m.logits.k)),
        dq_(gradient_tokens(t, m.logits.q)),
        dk_(gradient_tokens(t, m.logits.k)),
        log_sum_(layout_.tokens(), heads_) {
    if (t) row_sum_ = tensor<T, 2>::zeros(layout_.tokens(), heads_);
    for (index_t i = 0; i < layout_.sequences(); ++i)
      find_log_sums(ctx, layout_.begin(i), layout_.end(i));
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return heads_; }
  [[nodiscard]] bool is_causal() const override { return is_causal_; }

  [[nodiscard]] bool has_cheap_rows() const override { return true; }
  void tile_into(const cpu::context& ctx, index_t, index_t row, index_t s0,
                 const tensor<T, 3>& out) const override {
    const index_t s1 = s0 + out.extent(2);
    for_row_blocks(ctx, out.extent(0), heads_, [&](index_t h, index_t r0, index_t r1) {
      using P = simd::pack<T>;
      logits(h, row + r0, row + r1, s0, s1, rows_of_head(out, h, r0, r1));
      for (index_t r = r0; r < r1; ++r) {
        const auto [first, last] = kept(row + r, s0, s1);
        const P sum(log_sum_(row + r, h));
        T* p = &out(r, h, 0);
        std::fill(p, p + first, T(0));
        simd::map<T>(last - first, p + first, p + first,
                     [&](P x) SSMLIB_LAMBDA_INLINE { return simd::exp(x - sum); });
        std::fill(p + last, p + (s1 - s0), T(0));
      }
    });
  }

  [[nodiscard]] bool needs_row_sums() const override { return true; }
  void observe(const cpu::context& ctx, index_t, index_t row, index_t, const tensor<T, 3>& values,
               const tensor<T, 3>& d) override {
    for_row_blocks(ctx, values.extent(0), heads_, [&](index_t h, index_t r0, index_t r1) {
      for (index_t r = r0; r < r1; ++r) {
        row_sum_(row + r, h) += kernels::dot<T>(d.extent(2), &values(r, h, 0), &d(r, h, 0));
      }
    });
  }

  // dS = P o (dP - sum_s P dP); dQ = alpha dS K; dK = alpha dS^T Q.
  void add_vjp(const cpu::context& ctx, index_t, index_t row, index_t s0,
               const tensor<T, 3>& values, const tensor<T, 3>& d) override {
    const index_t s1 = s0 + d.extent(2), rows = d.extent(0);
    const tensor<T, 3> ds(d.extents());
    for_row_blocks(ctx, rows, heads_, [&](index_t h, index_t r0, index_t r1) {
      using P = simd::pack<T>;
      for (index_t r = r0; r < r1; ++r) {
        const P sum(row_sum_(row + r, h));
        simd::map<T>(s1 - s0, &values(r, h, 0), &d(r, h, 0), &ds(r, h, 0),
                     [&](P p, P g) SSMLIB_LAMBDA_INLINE { return p * (g - sum); });
      }
    });
    for (index_t h = 0; h < heads_; ++h) {
      const index_t hq = group_of(h, heads_, q_.extent(1)), hk = group_of(h, heads_, k_.extent(1));
      const view<T, 2> tile = rows_of_head(ds, h, 0, rows);
      if (dq_) {
        kernels::gemm<T>(ctx, alpha_, tile, rows_of_head(k_, hk, s0, s1), T(1),
                         rows_of_head(dq_, hq, row, row + rows));
      }
      if (dk_) {
        kernels::gemm<T>(ctx, alpha_, transposed(tile), rows_of_head(q_, hq, row, row + rows), T(1),
                         rows_of_head(dk_, hk, s0, s1));
      }
    }
  }

 private:
  void logits(index_t h, index_t t0, index_t t1, index_t s0, index_t s1, view<T, 2> out) const {
    kernels::gemm<T>(alpha_, rows_of_head(q_, group_of(h, heads_, q_.extent(1)), t0, t1),
                     transposed(rows_of_head(k_, group_of(h, heads_, k_.extent(1)), s0, s1)), T(0),
                     out);
  }
  // Of the columns [s0, s1), those that token t attends to, counted from s0.
  [[nodiscard]] std::array<index_t, 2> kept(index_t t, index_t s0, index_t s1) const {
    if (!is_causal_) return {0, s1 - s0};
    const index_t last = std::clamp<index_t>(t + 1 - s0, 0, s1 - s0);
    const index_t first = window_ == 0 ? 0 : std::clamp<index_t>(t + 1 - window_ - s0, 0, last);
    return {first, last};
  }
  // Columns in tiles, each row's sum relative to its largest logit so far.
  void find_log_sums(const cpu::context& ctx, index_t begin, index_t end) {
    for_row_blocks(ctx, end - begin, heads_, [&](index_t h, index_t r0, index_t r1) {
      constexpr index_t columns = 256;
      constexpr T low = -std::numeric_limits<T>::infinity();
      const index_t t0 = begin + r0, t1 = begin + r1;
      const index_t last_key = is_causal_ ? t1 : end;
      const index_t first_key = window_ == 0 ? begin : std::max(begin, t0 + 1 - window_);
      const scratch<T> tile((r1 - r0) * columns);
      std::vector<T> largest(static_cast<std::size_t>(r1 - r0), low);
      std::vector<double> sum(static_cast<std::size_t>(r1 - r0), 0.0);
      for (index_t s0 = first_key; s0 < last_key; s0 += columns) {
        const index_t s1 = std::min(last_key, s0 + columns);
        logits(h, t0, t1, s0, s1, {tile.data(), {r1 - r0, s1 - s0}, {columns, 1}});
        for (index_t t = t0; t < t1; ++t) {
          const auto [first, last] = kept(t, s0, s1);
          if (first == last) continue;
          T& top = largest[static_cast<std::size_t>(t - t0)];
          double& total = sum[static_cast<std::size_t>(t - t0)];
          const T* x = tile.data() + (t - t0) * columns + first;
          const T now = std::max(top, largest_of(last - first, x));
          if (now == low) continue;
          total = total * std::exp(static_cast<double>(top - now)) +
                  static_cast<double>(sum_of_exp(last - first, x, now));
          top = now;
        }
      }
      for (index_t t = t0; t < t1; ++t) {
        log_sum_(t, h) =
            static_cast<T>(static_cast<double>(largest[static_cast<std::size_t>(t - t0)]) +
                           std::log(sum[static_cast<std::size_t>(t - t0)]));
      }
    });
  }
  [[nodiscard]] static T largest_of(index_t n, const T* x) {
    using P = simd::pack<T>;
    P top(-std::numeric_limits<T>::infinity());
    index_t i = 0;
    for (; i + P::width <= n; i += P::width)
      top = simd::max(top, P::load(x + i));
    T result = simd::horizontal_max(top);
    for (; i < n; ++i)
      result = std::max(result, x[i]);
    return result;
  }
  [[nodiscard]] static T sum_of_exp(index_t n, const T* x, T shift) {
    using P = simd::pack<T>;
    P sum(T(0));
    index_t i = 0;
    for (; i + P::width <= n; i += P::width)
      sum += simd::exp(P::load(x + i) - P(shift));
    T rest = 0;
    for (; i < n; ++i)
      rest += std::exp(x[i] - shift);
    return simd::horizontal_sum(sum) + rest;
  }

  sequence_layout layout_;
  index_t heads_, window_;
  bool is_causal_;
  T alpha_;
  tensor<T, 3> q_, k_, dq_, dk_;
  tensor<T, 2> log_sum_, row_sum_;
};

}  // namespace ssm::detail
