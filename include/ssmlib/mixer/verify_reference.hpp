#pragma once

#include <ssmlib/lower/evaluate.hpp>

#include <cmath>
#include <concepts>
#include <utility>

namespace ssm::detail {

/// The elements on the host in double, dense.
template <Floating T, int R, Backend B>
[[nodiscard]] tensor<double, R> exact_elements(const tensor<T, R, B>& t) {
  return cast<double>(on_host(t));
}

template <Floating T, Backend B>
[[nodiscard]] double norm(const tensor<T, 4, B>& a) {
  double sum = 0;
  const tensor<double, 4> dense = exact_elements(a);
  for (index_t i = 0; i < dense.size(); ++i)
    sum += dense.data()[i] * dense.data()[i];
  return std::sqrt(sum);
}

/// || a - b || / || b ||, or || a || where b is zero.
template <Floating A, Floating C, Backend BA, Backend BC>
[[nodiscard]] double relative_error(const tensor<A, 4, BA>& a, const tensor<C, 4, BC>& b) {
  const tensor<double, 4> x = exact_elements(a), y = exact_elements(b);
  double difference = 0;
  for (index_t i = 0; i < x.size(); ++i) {
    const double d = x.data()[i] - y.data()[i];
    difference += d * d;
  }
  const double scale = norm(y);
  return std::sqrt(difference) / (scale > 0 ? scale : 1.0);
}

/// What the definition is computed from: a product on the CPU itself, of another backend its twin
/// on the host in double.
template <MatrixMixer M, int R, class Alg>
[[nodiscard]] auto host_twin(const mix<M, R, Alg>& e) {
  if constexpr (std::same_as<typename M::backend, cpu>) {
    return e;
  } else {
    auto exact = e.mixer.on_host();
    return mix<decltype(exact), R, Alg>{std::move(exact), exact_on_host(e.x), e.algorithm};
  }
}

/// Whether a backend has kernels for a mixer by an algorithm. Wrappers (+ diagonal, normalize_rows)
/// have what the mixer inside has.
template <class M, class Alg>
[[nodiscard]] constexpr bool is_paired() {
  using T = typename M::value_type;
  using B = typename M::backend;
  if constexpr (requires(const M& m) { m.inner; } && !std::same_as<Alg, alg::quadratic>) {
    return is_paired<decltype(M::inner), Alg>();
  } else {
    return requires(const typename B::context& ctx, const M& m, const tensor<T, 4, B>& x,
                    const carry<T, B>& c) {
      apply_mixer(ctx, Alg{}, m, x, x, c);
    };
  }
}

}  // namespace ssm::detail
