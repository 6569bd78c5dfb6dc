#pragma once

#include <ssmlib/expr/concepts.hpp>

#include <cmath>
#include <concepts>
#include <string>
#include <type_traits>
#include <vector>

namespace ssm {

/// A structured T x T mask L of masked attention L o (Q K^T). A mask is itself a mixer
/// (`semiseparable(log_a) * X` is a scan). Its definition is one function:
///
///   column(begin, end, s, h, out)   out[t - begin] = L[t, s] of head h for the tokens
///                                   begin <= t < end of the sequence that holds token s
///
/// Tokens count over the whole batch. batch() and length() may be 0: a mask of any length.
template <class L>
concept DefinedMask = MatrixMixer<L> && requires(const L& l, double* out) {
  l.column(index_t{}, index_t{}, index_t{}, index_t{}, out);
};

namespace detail {
/// The algorithms of a semiseparable mask by itself. On the CPU a scan has no use for chunks.
template <class B>
using scan_algorithms =
    std::conditional_t<std::same_as<B, cpu>, alg_list<alg::recurrent, alg::quadratic>,
                       alg_list<alg::chunked, alg::recurrent, alg::quadratic>>;

/// dense() of a mask from its columns.
template <class L>
[[nodiscard]] tensor<double, 4> dense_columns(const L& l, const sequence_layout& layout,
                                              bool packed, index_t batch, index_t length,
                                              index_t heads) {
  if constexpr (!std::same_as<typename L::backend, cpu>) {
    return dense_columns(l.on_host(), layout, packed, batch, length, heads);
  } else {
    const index_t n = packed ? layout.tokens() : length;
    auto out = tensor<double, 4>::zeros(packed ? 1 : batch, heads, n, n);
    std::vector<double> column(static_cast<std::size_t>(n));
    for (index_t i = 0; i < layout.sequences(); ++i) {
      const index_t begin = layout.begin(i), end = layout.end(i), base = packed ? 0 : begin;
      for (index_t h = 0; h < heads; ++h) {
        for (index_t s = begin; s < end; ++s) {
          l.column(begin, end, s, h * l.heads() / heads, column.data());
          for (index_t t = begin; t < end; ++t) {
            out(packed ? 0 : i, h, t - base, s - base) =
                column[static_cast<std::size_t>(t - begin)];
          }
        }
      }
    }
    return out;
  }
}
template <class L>
[[nodiscard]] tensor<double, 4> dense_columns(const L& l) {
  return dense_columns(l, layout_of(l), static_cast<bool>(l.layout), l.batch(), l.length(),
                       l.heads());
}
}  // namespace detail

/// 1 where s <= t: as a mask of hadamard it makes linear attention, added to a gram matrix
/// (`Q * transpose(K) + causal`) it makes causal softmax attention.
template <Floating T = float, Backend B = cpu>
struct causal_mask {
  using value_type = T;
  using backend = B;
  using structure = structure::causal_ones;
  using algorithms = detail::scan_algorithms<B>;

  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return layout ? 1 : 0; }
  [[nodiscard]] index_t length() const { return layout ? layout.tokens() : 0; }
  [[nodiscard]] index_t heads() const { return 1; }
  template <class Self, class F>
  static void operands(Self&, F&&) {}
  [[nodiscard]] auto on_host() const { return causal_mask<double>{layout}; }
  void column(index_t begin, index_t end, index_t s, index_t, double* out) const {
    for (index_t t = begin; t < end; ++t)
      out[t - begin] = t >= s ? 1.0 : 0.0;
  }
  [[nodiscard]] tensor<double, 4> dense() const { return detail::dense_columns(*this); }
};

/// The tag behind `causal`: takes the element type and backend of what it is combined with.
struct causal_t {};
inline constexpr causal_t causal{};

/// Keep a query's own token and the size - 1 before it: t - size < s <= t.
struct window_t {
  index_t size;
};
/// A sliding window, for `Q * transpose(K) + window(w)`. @throws value_error  size < 1.
[[nodiscard]] inline window_t window(index_t size) {
  if (size < 1) {
    throw value_error("ssm: window(" + std::to_string(size) +
                      "): wanted at least 1, the token itself");
  }
  return {size};
}

/// 1 where t - size < s <= t: hadamard(window(w), Q * transpose(K)) is linear attention over the
/// last w tokens.
template <Floating T = float, Backend B = cpu>
struct window_mask {
  using value_type = T;
  using backend = B;
  using structure = structure::banded;
  using algorithms = alg_list<alg::quadratic>;

  index_t size = 1;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return layout ? 1 : 0; }
  [[nodiscard]] index_t length() const { return layout ? layout.tokens() : 0; }
  [[nodiscard]] index_t heads() const { return 1; }
  [[nodiscard]] static constexpr causality causal() { return causality::causal; }
  template <class Self, class F>
  static void operands(Self&, F&&) {}
  [[nodiscard]] auto on_host() const { return window_mask<double>{size, layout}; }
  void column(index_t begin, index_t end, index_t s, index_t, double* out) const {
    for (index_t t = begin; t < end; ++t)
      out[t - begin] = t >= s && t - s < size ? 1.0 : 0.0;
  }
  [[nodiscard]] tensor<double, 4> dense() const { return detail::dense_columns(*this); }
};

/// L[t, s] = gamma_h^(t - s), s <= t: the decay of retention, one number a head in (0, 1].
/// @source Sun et al. 2023, arXiv:2307.08621, eq. 5.
template <Floating T, Backend B = cpu>
struct decay_mask {
  using value_type = T;
  using backend = B;
  using structure = structure::one_semiseparable;
  using algorithms = detail::scan_algorithms<B>;

  tensor<T, 1, B> gamma;  // (H)
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return layout ? 1 : 0; }
  [[nodiscard]] index_t length() const { return layout ? layout.tokens() : 0; }
  [[nodiscard]] index_t heads() const { return gamma.extent(0); }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("gamma", self.gamma, operand::parameter);
  }
  [[nodiscard]] auto on_host() const {
    return decay_mask<double>{detail::exact_on_host(gamma), layout};
  }
  void column(index_t begin, index_t end, index_t s, index_t h, double* out) const
      requires(!std::same_as<B, cpu>) {
    on_host().column(begin, end, s, h, out);
  }
  void column(index_t begin, index_t end, index_t s, index_t h,
              double* out) const requires std::same_as<B, cpu> {
    double power = 1.0;
    for (index_t t = begin; t < end; ++t) {
      out[t - begin] = t >= s ? power : 0.0;
      if (t >= s) power *= static_cast<double>(gamma(h));
    }
  }
  [[nodiscard]] tensor<double, 4> dense() const { return detail::dense_columns(*this); }
};

/// The decay mask of retention. @param gamma  (H), in (0, 1]: the CPU refuses others when it
/// multiplies; on CUDA numbers are not looked at, and one below 0 gives NaN, or its powers by
/// alg::recurrent.
template <Floating T, Backend B>
[[nodiscard]] decay_mask<T, B> decay(const tensor<T, 1, B>& gamma) {
  return {gamma};
}

/// The 1-semiseparable mask of a scalar-gated recurrence:
///
///     L[t, s] = exp(log_a[s+1] + ... + log_a[t]) * weight[s]   for t >= s,     0   for t < s
///
/// weight (absent: 1) scales columns; Mamba-2 passes the step size Delta.
template <Floating T, Backend B = cpu>
struct semiseparable_mask {
  using value_type = T;
  using backend = B;
  using structure = structure::one_semiseparable;
  using algorithms = detail::scan_algorithms<B>;

  tensor<T, 3, B> log_a;   // (b, T, H)
  tensor<T, 3, B> weight;  // (b, T, H) or absent
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return log_a.extent(0); }
  [[nodiscard]] index_t length() const { return log_a.extent(1); }
  [[nodiscard]] index_t heads() const { return log_a.extent(2); }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("log_a", self.log_a, operand::per_token);
    if (self.weight) f("weight", self.weight, operand::per_token);
  }
  [[nodiscard]] auto on_host() const {
    return semiseparable_mask<double>{detail::exact_on_host(log_a), detail::exact_on_host(weight),
                                      layout};
  }
  void column(index_t begin, index_t end, index_t s, index_t h, double* out) const
      requires(!std::same_as<B, cpu>) {
    on_host().column(begin, end, s, h, out);
  }
  void column(index_t begin, index_t end, index_t s, index_t h,
              double* out) const requires std::same_as<B, cpu> {
    const index_t n = length();
    const double w = weight ? static_cast<double>(weight(s / n, s % n, h)) : 1.0;
    double sum = 0.0;
    for (index_t t = begin; t < end; ++t) {
      if (t > s) sum += static_cast<double>(log_a(t / n, t % n, h));
      out[t - begin] = t >= s ? std::exp(sum) * w : 0.0;
    }
  }
  [[nodiscard]] tensor<double, 4> dense() const { return detail::dense_columns(*this); }
};

/// The 1-semiseparable decay matrix L of a scalar-gated recurrence, as a lazy node.
///
/// @param log_a   (b, T, H), (T, H) or (T): natural log of each token's decay, <= 0 for a stable
///                recurrence. The first token's acts on the initial state only.
/// @throws shape_error  the weight has another shape.
/// @cost   O(1); nothing is evaluated.
/// @source Dao and Gu 2024, arXiv:2405.21060, section 3.2 (1-SS matrices).
template <Floating T, int R, Backend B>
[[nodiscard]] semiseparable_mask<T, B> semiseparable(const tensor<T, R, B>& log_a) {
  return {detail::promote_scalar(log_a), {}};
}
/// With a weight per column. @param weight  as log_a.
template <Floating T, int R, Backend B>
[[nodiscard]] semiseparable_mask<T, B> semiseparable(const tensor<T, R, B>& log_a,
                                                     const tensor<T, R, B>& weight) {
  if (log_a.extents() != weight.extents()) {
    throw shape_error("ssm: semiseparable(log_a, weight): log_a is " +
                      to_string<R>(log_a.extents()) + ", weight is " +
                      to_string<R>(weight.extents()) + "; wanted the same shape");
  }
  return {detail::promote_scalar(log_a), detail::promote_scalar(weight)};
}

/// The causal Toeplitz mask L[t, s] = kernel[h, t - s] for t >= s.
template <Floating T, Backend B = cpu>
struct toeplitz_mask {
  using value_type = T;
  using backend = B;
  using structure = structure::toeplitz;
  using algorithms = alg_list<alg::structured, alg::quadratic>;

  tensor<T, 2, B> kernel;  // (H, >= the longest sequence)
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return layout ? 1 : 0; }
  [[nodiscard]] index_t length() const { return layout ? layout.tokens() : 0; }
  [[nodiscard]] index_t heads() const { return kernel.extent(0); }
  [[nodiscard]] static constexpr causality causal() { return causality::causal; }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("kernel", self.kernel, operand::parameter);
  }
  /// @throws shape_error  a sequence of `length` tokens needs more distances than the kernel has.
  void check_length(index_t length) const {
    if (length > kernel.extent(1)) {
      throw shape_error("ssm: toeplitz(kernel): the kernel is " + to_string<2>(kernel.extents()) +
                        ", (head x distance), the longest sequence has " + std::to_string(length) +
                        " tokens; wanted at least as many distances");
    }
  }
  [[nodiscard]] auto on_host() const {
    return toeplitz_mask<double>{detail::exact_on_host(kernel), layout};
  }
  void column(index_t begin, index_t end, index_t s, index_t h, double* out) const
      requires(!std::same_as<B, cpu>) {
    on_host().column(begin, end, s, h, out);
  }
  void column(index_t begin, index_t end, index_t s, index_t h,
              double* out) const requires std::same_as<B, cpu> {
    check_length(end - begin);
    for (index_t t = begin; t < end; ++t) {
      out[t - begin] = t >= s ? static_cast<double>(kernel(h, t - s)) : 0.0;
    }
  }
  [[nodiscard]] tensor<double, 4> dense() const { return detail::dense_columns(*this); }
};

/// @param kernel  (H, T') or (T'), T' at least the longest sequence: kernel[h, d] weighs the token
///                d places before. The length is checked when the mask meets its tokens; for a
///                packed batch that is longer than the kernel, pack Q * transpose(K) before it is
///                masked.
template <Floating T, int R, Backend B>
[[nodiscard]] toeplitz_mask<T, B> toeplitz(const tensor<T, R, B>& kernel) {
  static_assert(R <= 2, "ssm: a Toeplitz kernel is (head, distance) or (distance)");
  if constexpr (R == 2) {
    return {kernel};
  } else {
    return {kernel.reshape(index_t{1}, kernel.extent(0))};
  }
}

}  // namespace ssm
