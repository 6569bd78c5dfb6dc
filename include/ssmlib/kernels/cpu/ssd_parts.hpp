#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace ssm::kernels {

/// A scalar-gated linear recurrence over packed sequences, for every head h of `heads`:
///
///     S_t = a_t S_{t-1} + w_t k_t x_t^T,     y_t = alpha q_t^T S_t + d x_t
///
/// with S (key size x features). a_t is exp(log_a_t), or gamma of the head, or 1; w and d are 1 and
/// 0 where absent. An operand with G heads serves head h with its head h * G / heads; G divides
/// `heads`.
template <Real T>
struct ssd_problem {
  index_t heads = 0;
  view<const T, 3> q, k;    // (tokens, groups, key size)
  view<const T, 3> x;       // (tokens, groups, features)
  view<const T, 2> log_a;   // (tokens, groups) or absent
  view<const T, 2> weight;  // (tokens, groups) or absent
  view<const T, 1> gamma;   // (groups) or absent; > 0; not together with log_a
  view<const T, 1> d;       // (groups) or absent
  T alpha = T(1);
  const index_t* offsets = nullptr;  // of the sequences, one more than there are
  index_t sequences = 0;

  [[nodiscard]] index_t key_size() const { return q.extent(2); }
  [[nodiscard]] index_t features() const { return x.extent(2); }
};

/// Gradients of the operands, added to; absent ones are not computed. Shapes as the operands.
template <Real T>
struct ssd_gradients {
  view<T, 3> q, k, x;
  view<T, 2> log_a, weight;
  view<T, 1> gamma, d;
};

/// States before the first and after the last token, (sequences, heads, key size, features) with a
/// unit inner stride. Absent: zero, and not wanted. They may be the same memory.
template <Real T>
struct ssd_states {
  view<const T, 4> initial;
  view<T, 4> final;
};

namespace detail {

[[nodiscard]] inline index_t head_group(index_t h, index_t heads, index_t groups) {
  return h * groups / heads;
}

/// Rows [begin, begin + n) and columns [from, from + cols) of one head.
template <class T>
[[nodiscard]] view<T, 2> group_rows(const view<T, 3>& v, index_t begin, index_t n, index_t group,
                                    index_t from, index_t cols) {
  return {v.data + begin * v.strides[0] + group * v.strides[1] + from * v.strides[2],
          {n, cols},
          {v.strides[0], v.strides[2]}};
}
template <class T>
[[nodiscard]] view<T, 2> group_rows(const view<T, 3>& v, index_t begin, index_t n, index_t group) {
  return group_rows(v, begin, n, group, 0, v.extents[2]);
}
template <class T>
[[nodiscard]] view<T, 2> matrix(T* data, index_t rows, index_t cols, index_t step) {
  return {data, {rows, cols}, {step, 1}};
}

/// to[i] = factor[i] * from[i] for the rows of two matrices with unit inner strides.
template <Real T>
void scaled_rows(view<const T, 2> from, const T* factor, view<T, 2> to) {
  for (index_t i = 0; i < from.extents[0]; ++i) {
    const simd::pack<T> f(factor[i]);
    simd::map<T>(from.extents[1], from.data + i * from.strides[0], to.data + i * to.strides[0],
                 [f](simd::pack<T> v) { return f * v; });
  }
}
template <Real T>
void copy_matrix(view<const T, 2> from, view<T, 2> to) {
  for (index_t i = 0; i < from.extents[0]; ++i) {
    std::copy_n(from.data + i * from.strides[0], from.extents[1], to.data + i * to.strides[0]);
  }
}
/// The state matrix of one sequence and head, columns [from, from + cols).
template <class T>
[[nodiscard]] view<T, 2> state_matrix(const view<T, 4>& s, index_t sequence, index_t head,
                                      index_t from, index_t cols) {
  return {s.data + sequence * s.strides[0] + head * s.strides[1] + from,
          {s.extents[2], cols},
          {s.strides[2], 1}};
}

/// Heads as the kernels take them: few heads are cut along their features too, whose columns are
/// independent, so that one sequence still occupies several threads. A function of the shape.
struct ssd_lanes {
  index_t heads, features, slices;

  ssd_lanes(index_t heads_, index_t features_)
      : heads(heads_),
        features(features_),
        slices(std::clamp<index_t>(features_ / 32, 1, std::max<index_t>(1, 4 / heads_))) {}
  [[nodiscard]] index_t count() const { return heads * slices; }
  [[nodiscard]] index_t head(index_t lane) const { return lane / slices; }
  [[nodiscard]] index_t from(index_t lane) const { return cut(lane % slices); }
  [[nodiscard]] index_t width(index_t lane) const {
    return cut(lane % slices + 1) - cut(lane % slices);
  }

 private:
  [[nodiscard]] index_t cut(index_t s) const {
    return s == slices ? features : features * s / slices / 16 * 16;
  }
};

/// Consecutive sequences that are worked on together, `panel` tokens of each at a time.
struct ssd_wave {
  index_t first, last, panel, longest;

  [[nodiscard]] index_t count() const { return last - first; }
};

/// The next wave: sequences until there are enough tasks or `budget` tokens. Only the grouping of
/// work depends on it, never a result.
[[nodiscard]] inline ssd_wave next_wave(const index_t* offsets, index_t sequences, index_t first,
                                        index_t tasks, index_t budget, index_t chunk) {
  index_t last = first, total = 0, longest = 0;
  while (last < sequences) {
    const index_t length = offsets[last + 1] - offsets[last];
    const bool few_tasks = (last - first) * tasks < 8 && chunk <= budget / 2;
    if (last > first && !few_tasks && total + length > budget) break;
    total += length;
    longest = std::max(longest, length);
    ++last;
  }
  const index_t whole = std::max(chunk, round_up(longest, chunk));
  const index_t share = std::max(chunk, budget / (last - first) / chunk * chunk);
  return {first, last, total <= budget ? whole : std::min(whole, share), longest};
}

/// Reads ssd_decays: values only, which loops that store keep in registers.
template <Real T>
struct ssd_decay_pairs {
  using pack = simd::pack<T>;

  const T *high, *low;
  const index_t* firsts;
  bool decaying;
  typename pack::ivec lanes = [] {
    typename pack::ivec numbers{};
    for (int i = 0; i < pack::width; ++i)
      numbers[i] = i;
    return numbers;
  }();

  /// The first token that reaches token i.
  [[nodiscard]] index_t first(index_t i) const { return firsts[i]; }
  /// exp(Lambda_i - Lambda_j) for the lanes j, j + 1, ..., all of them in [first(i), i].
  [[nodiscard]] SSMLIB_ALWAYS_INLINE pack before(index_t i, index_t j) const {
    if (!decaying) return pack(T(1));
    pack sum = pack(high[i]) - pack::load(high + j);
    if constexpr (!std::is_same_v<T, double>) sum += pack(low[i]) - pack::load(low + j);
    return simd::exp(sum);
  }
  /// exp(Lambda_i - Lambda_j) for the lanes i, i + 1, ..., which token j reaches.
  [[nodiscard]] SSMLIB_ALWAYS_INLINE pack after(index_t i, index_t j) const {
    if (!decaying) return pack(T(1));
    pack sum = pack::load(high + i) - pack(high[j]);
    if constexpr (!std::is_same_v<T, double>) sum += pack::load(low + i) - pack(low[j]);
    return simd::exp(sum);
  }
  /// `before`, zero unless first(i) <= j <= i.
  [[nodiscard]] SSMLIB_ALWAYS_INLINE pack between(index_t i, index_t j) const {
    using integer = typename pack::traits::integer;
    const typename pack::ivec lane = lanes + static_cast<integer>(j);
    const typename pack::ivec inside =
        (typename pack::ivec)(lane >= static_cast<integer>(firsts[i])) &
        (typename pack::ivec)(lane <= static_cast<integer>(i));
    return simd::select(inside, before(i, j), pack(T(0)));
  }
};

/// The decays inside one chunk of one head. Lambda_i is the sum of the log decays from the chunk's
/// first token to token i, in two parts whose sum has about twice the precision of T, so that
/// differences of large sums keep theirs. A decay that T rounds to zero starts Lambda anew at zero:
/// tokens before it do not reach tokens from it on, and -inf needs no arithmetic.
template <Real T>
class ssd_decays {
 public:
  using pack = simd::pack<T>;

  explicit ssd_decays(index_t chunk)
      : stride_(round_up(chunk, pack::width)), space_(7 * stride_), first_(chunk) {}

  void set(const ssd_problem<T>& p, index_t begin, index_t n, index_t head);

  [[nodiscard]] index_t size() const { return n_; }
  /// exp(Lambda_i), from before the chunk to after token i.
  [[nodiscard]] const T* from_start() const { return space_.data() + 2 * stride_; }
  /// exp(Lambda_{n-1} - Lambda_j), from after token j to the chunk's end.
  [[nodiscard]] const T* to_end() const { return space_.data() + 3 * stride_; }
  [[nodiscard]] const T* weight() const { return space_.data() + 4 * stride_; }
  /// weight_j * to_end_j
  [[nodiscard]] const T* weighted_to_end() const { return space_.data() + 5 * stride_; }
  /// weight_j exp(Lambda_m - Lambda_j) with the last token m of the pack that j is in.
  [[nodiscard]] const T* weighted_to_pack_end() const { return space_.data() + 6 * stride_; }
  /// From before the chunk to its end.
  [[nodiscard]] T total() const { return total_; }

  /// The decays between tokens, as long as they are not set again.
  [[nodiscard]] ssd_decay_pairs<T> pairs() const {
    return {high(), low(), first_.data(), decaying_};
  }

 private:
  [[nodiscard]] T* high() const { return space_.data(); }
  [[nodiscard]] T* low() const { return space_.data() + stride_; }

  /// exp of anything lower is zero in T.
  static constexpr double reset_below = std::is_same_v<T, double> ? -746.0 : -104.0;

  index_t stride_, n_ = 0;
  scratch<T> space_;
  scratch<index_t> first_;
  bool decaying_ = false;
  T total_ = T(1);
};

template <Real T>
void ssd_decays<T>::set(const ssd_problem<T>& p, index_t begin, index_t n, index_t head) {
  n_ = n;
  decaying_ = p.log_a || p.gamma;
  T *start = space_.data() + 2 * stride_, *end = start + stride_, *w = end + stride_,
    *weighted = w + stride_, *near = weighted + stride_;
  const index_t padded = round_up(n, pack::width);
  const view<const T, 2>& a = p.log_a;
  const T* log_a =
      a ? a.data + begin * a.strides[0] + head_group(head, p.heads, a.extents[1]) * a.strides[1]
        : nullptr;
  double constant = 0.0;
  if (p.gamma) {
    constant = std::log(static_cast<double>(p.gamma(head_group(head, p.heads, p.gamma.extent(0)))));
  }
  index_t first = 0, reset = n;  // the first token of the running sum; the first reset
  double sum = 0.0;
  for (index_t i = 0; i < n; ++i) {
    const double l = log_a != nullptr ? static_cast<double>(log_a[i * a.strides[0]]) : constant;
    if (l < reset_below) {
      first = i;
      reset = std::min(reset, i);
      sum = 0.0;
    } else {
      sum += l;
    }
    first_[i] = first;
    high()[i] = static_cast<T>(sum);
    low()[i] = static_cast<T>(sum - static_cast<double>(high()[i]));
  }
  for (index_t i = n; i < padded; ++i)
    high()[i] = low()[i] = T(0);
  const view<const T, 2>& ws = p.weight;
  const index_t group = ws ? head_group(head, p.heads, ws.extents[1]) : 0;
  for (index_t i = 0; i < n; ++i)
    w[i] = ws ? ws(begin + i, group) : T(1);
  for (index_t i = n; i < padded; ++i)
    w[i] = T(0);
  for (index_t j = 0; j < padded; j += pack::width) {
    pairs().between(n - 1, j).store(end + j);
    (pack::load(end + j) * pack::load(w + j)).store(weighted + j);
    const index_t last = std::min(n, j + pack::width) - 1;
    (pairs().between(last, j) * pack::load(w + j)).store(near + j);
    simd::exp(pack::load(high() + j)).store(start + j);
  }
  std::fill(start + reset, start + padded, T(0));
  total_ = reset < n ? T(0) : start[n - 1];
}

}  // namespace detail
}  // namespace ssm::kernels
