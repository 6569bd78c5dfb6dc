#pragma once

#include <ssmlib/base/config.hpp>
#include <ssmlib/expr/concepts.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <utility>

namespace ssm {

/// Feature maps phi of linear attention, applied to queries and keys element by element. A map of
/// your own is a struct with these two static functions (x is float or double); for CUDA they are
/// SSMLIB_HOST_DEVICE, and nvcc compiles what uses them.
namespace feature {

struct identity {
  template <Floating T>
  SSMLIB_HOST_DEVICE static T value(T x) {
    return x;
  }
  template <Floating T>
  SSMLIB_HOST_DEVICE static T slope(T) {
    return T(1);
  }
};
/// elu(x) + 1 > 0. @source Katharopoulos et al. 2020, arXiv:2006.16236, eq. 7.
struct elu_plus_one {
  template <Floating T>
  SSMLIB_HOST_DEVICE static T value(T x) {
    return x > T(0) ? x + T(1) : std::exp(x);
  }
  template <Floating T>
  SSMLIB_HOST_DEVICE static T slope(T x) {
    return x > T(0) ? T(1) : std::exp(x);
  }
};
struct relu {
  template <Floating T>
  SSMLIB_HOST_DEVICE static T value(T x) {
    return x > T(0) ? x : T(0);
  }
  template <Floating T>
  SSMLIB_HOST_DEVICE static T slope(T x) {
    return x > T(0) ? T(1) : T(0);
  }
};
struct exponential {
  template <Floating T>
  SSMLIB_HOST_DEVICE static T value(T x) {
    return std::exp(x);
  }
  template <Floating T>
  SSMLIB_HOST_DEVICE static T slope(T x) {
    return std::exp(x);
  }
};

}  // namespace feature

template <class Phi>
concept FeatureMap = requires(float x, double y) {
  { Phi::value(x) } -> std::same_as<float>;
  { Phi::slope(y) } -> std::same_as<double>;
};

template <Floating T, Backend B>
struct transposed_tensor {
  tensor<T, 4, B> value;
};

/// K -> K^T, for `Q * transpose(K)`.
template <Floating T, int R, Backend B>
[[nodiscard]] transposed_tensor<T, B> transpose(const tensor<T, R, B>& k) {
  return {detail::promote(k)};
}

/// alpha phi(Q) phi(K)^T: entry (t, s) is alpha * phi(q_t) . phi(k_s). Rank = feature size.
template <Floating T, Backend B = cpu, FeatureMap Phi = feature::identity>
struct gram {
  using value_type = T;
  using backend = B;
  using structure = structure::low_rank;
  using algorithms = alg_list<alg::associative, alg::quadratic>;
  using feature_map = Phi;

  tensor<T, 4, B> q;  // (b, T, Hq, N)
  tensor<T, 4, B> k;  // (b, T, Hk, N)
  double alpha = 1.0;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return q.extent(0); }
  [[nodiscard]] index_t length() const { return q.extent(1); }
  [[nodiscard]] index_t heads() const { return std::max(q.extent(2), k.extent(2)); }
  [[nodiscard]] index_t key_size() const { return q.extent(3); }
  [[nodiscard]] static constexpr causality causal() { return causality::not_causal; }

  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("q", self.q, operand::per_token);
    f("k", self.k, operand::per_token);
  }

  [[nodiscard]] auto on_host() const {
    return gram<double, cpu, Phi>{detail::exact_on_host(q), detail::exact_on_host(k), alpha,
                                  layout};
  }
  /// Entry (t, s) of head h; t and s count over all tokens. The definition, in double; on the CPU.
  [[nodiscard]] double entry(index_t t, index_t s, index_t h, index_t heads) const {
    const index_t n = length(), hq = group_of(h, heads, q.extent(2)),
                  hk = group_of(h, heads, k.extent(2));
    double sum = 0;
    for (index_t i = 0; i < key_size(); ++i) {
      sum += Phi::value(static_cast<double>(q(t / n, t % n, hq, i))) *
             Phi::value(static_cast<double>(k(s / n, s % n, hk, i)));
    }
    return alpha * sum;
  }
  [[nodiscard]] tensor<double, 4> dense() const requires std::same_as<B, cpu> {
    return detail::dense_entries(
        *this, heads(), [&](index_t t, index_t s, index_t h) { return entry(t, s, h, heads()); });
  }
  [[nodiscard]] tensor<double, 4> dense() const requires(!std::same_as<B, cpu>) {
    return on_host().dense();
  }
};

/// Q K^T for every batch and head, lazily.
///
/// @param q   (b, T, Hq, N), or (T, H, N), or (T, N).
/// @param kt  transpose(K), K likewise; head counts may differ if one divides the other.
/// @throws shape_error  the feature sizes, batches, lengths or head counts do not fit.
/// @cost   O(1); nothing is evaluated.
template <Floating T, int R, Backend B>
[[nodiscard]] gram<T, B> operator*(const tensor<T, R, B>& q, transposed_tensor<T, B> kt) {
  tensor<T, 4, B> q4 = detail::promote(q);
  if (q4.extent(3) != kt.value.extent(3)) {
    throw shape_error("ssm: Q * transpose(K): Q is " + to_string<4>(q4.extents()) + ", K is " +
                      to_string<4>(kt.value.extents()) + ": the feature sizes differ");
  }
  detail::check_time("Q * transpose(K)", q4.extent(0), q4.extent(1), kt.value.extent(0),
                     kt.value.extent(1));
  detail::join_heads("Q * transpose(K)", q4.extent(2), kt.value.extent(2));
  return {std::move(q4), std::move(kt.value)};
}
template <Floating T, int R, Backend B, Real T2, Backend B2>
requires(!std::same_as<T, T2> || !std::same_as<B, B2>) gram<T, B>
operator*(const tensor<T, R, B>&, const transposed_tensor<T2, B2>&) {
  static_assert(std::same_as<B, B2>,
                "ssm: Q * transpose(K) mixes two backends; copy one operand with to<backend>(...)");
  static_assert(!std::same_as<B, B2> || std::same_as<T, T2>,
                "ssm: Q * transpose(K) mixes two element types; convert one with cast<T>(...)");
  return {};
}

/// Folds a scale into the gram matrix: Q * transpose(K) * (1 / sqrt(N)).
template <Floating T, Backend B, class Phi>
[[nodiscard]] gram<T, B, Phi> operator*(gram<T, B, Phi> g, double scale) {
  g.alpha *= scale;
  return g;
}

/// The gram matrix of mapped features, phi(Q) phi(K)^T: the kernel of linear attention.
template <FeatureMap Phi, Floating T, Backend B>
[[nodiscard]] gram<T, B, Phi> with_features(Phi, gram<T, B> g) {
  return {std::move(g.q), std::move(g.k), g.alpha, std::move(g.layout)};
}

/// U V^T, the low-rank matrix; the same node as U * transpose(V).
template <Floating T, int R, Backend B>
[[nodiscard]] gram<T, B> low_rank(const tensor<T, R, B>& u, const tensor<T, R, B>& v) {
  return u * transpose(v);
}

}  // namespace ssm
