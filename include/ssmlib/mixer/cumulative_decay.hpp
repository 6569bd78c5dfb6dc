#pragma once

#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/lower/semiseparable.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace ssm::detail {

/// The decay exp(log_a[s+1] + ... + log_a[t]) between any two tokens s <= t of a sequence, for the
/// masks causal (1 everywhere), decay and semiseparable, from sums in double. A log_a of -infinity
/// is a reset: exactly 0 between the tokens before it and those from it on.
template <Real T>
class cumulative_decay {
 public:
  cumulative_decay(const causal_mask<T>&, const sequence_layout&) {}
  cumulative_decay(const decay_mask<T>& m, const sequence_layout& layout) {
    const tensor<T, 1> gamma = mask_tokens<decay_mask<T>>(m).gamma;
    fill(gamma.extent(0), layout,
         [&](index_t, index_t h) { return std::log(static_cast<double>(gamma(h))); });
  }
  cumulative_decay(const semiseparable_mask<T>& m, const sequence_layout& layout) {
    const tensor<T, 2> log_a = input_tokens(m.log_a);
    fill(log_a.extent(1), layout,
         [&](index_t t, index_t h) { return static_cast<double>(log_a(t, h)); });
  }
  /// 0: no decay.
  [[nodiscard]] index_t heads() const { return sum_ ? sum_.extent(0) : 0; }

  /// Whether the decay from token `from` to all of [begin, end), all >= from, is 0 to after().
  [[nodiscard]] bool vanishes(index_t h, index_t from, index_t begin, index_t end) const {
    if (!sum_) return begin == end;
    const index_t resets = resets_(h, from);
    const double limit = sum_(h, from) + static_cast<double>(smallest());
    index_t t = begin;
    while (t < end && (resets_(h, t) != resets || sum_(h, t) <= limit))
      ++t;
    return t == end;
  }
  /// out[t - begin] = the decay from token `from` to each t of [begin, end), all >= from. Those
  /// below the smallest normal number are 0. Returns whether any is not 0.
  bool after(index_t h, index_t from, index_t begin, index_t end, T* out) const {
    if (!sum_) return ones(end - begin, out);
    const double origin = sum_(h, from);
    const index_t resets = resets_(h, from);
    return exponentials(end - begin, out, [&](index_t i) {
      return resets_(h, begin + i) == resets ? sum_(h, begin + i) - origin : never;
    });
  }
  /// out[s - begin] = the decay from each s of [begin, end) to token `to`, all <= to.
  bool before(index_t h, index_t to, index_t begin, index_t end, T* out) const {
    if (!sum_) return ones(end - begin, out);
    const double origin = sum_(h, to);
    const index_t resets = resets_(h, to);
    return exponentials(end - begin, out, [&](index_t i) {
      return resets_(h, begin + i) == resets ? origin - sum_(h, begin + i) : never;
    });
  }

 private:
  static constexpr double never = -std::numeric_limits<double>::infinity();

  /// The log of the smallest normal number.
  [[nodiscard]] static T smallest() {
    static const T result = std::log(std::numeric_limits<T>::min());
    return result;
  }
  static bool ones(index_t n, T* out) {
    std::fill_n(out, n, T(1));
    return n > 0;
  }
  template <class F>
  void fill(index_t heads, const sequence_layout& layout, F log_decay) {
    sum_ = tensor<double, 2>(heads, layout.tokens());
    resets_ = tensor<index_t, 2>(heads, layout.tokens());
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < layout.sequences(); ++i) {
        double sum = 0;
        index_t resets = 0;
        for (index_t t = layout.begin(i); t < layout.end(i); ++t) {
          const double x = log_decay(t, h);
          if (x == never) {
            ++resets;
          } else {
            sum += x;
          }
          sum_(h, t) = sum;
          resets_(h, t) = resets;
        }
      }
    }
  }
  template <class F>
  static bool exponentials(index_t n, T* out, F exponent) {
    using P = simd::pack<T>;
    const T limit = smallest();
    bool any = false;
    for (index_t i = 0; i < n; ++i) {
      const T x = static_cast<T>(exponent(i));
      // NaN stays.
      out[i] = x <= limit ? -std::numeric_limits<T>::infinity() : x;
      any = any || !(x <= limit);
    }
    if (any) {
      simd::map<T>(n, out, out, [](P x) SSMLIB_LAMBDA_INLINE { return simd::exp(x); });
    } else {
      std::fill_n(out, n, T(0));
    }
    return any;
  }

  tensor<double, 2> sum_;      // (H, tokens): log decays without the resets
  tensor<index_t, 2> resets_;  // (H, tokens): resets so far
};

}  // namespace ssm::detail
