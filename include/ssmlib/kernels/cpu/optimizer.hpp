#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/kernels/cpu/pack.hpp>

#include <cstring>

/// @file
/// What an optimiser does to every value of a model: element by element, so that results depend
/// neither on how the values are cut into tasks nor on alignment.

namespace ssm::kernels {

/// The constants of one AdamW step, the same for every value of a parameter.
template <Real T>
struct adamw_step {
  T gradient_scale;
  T beta1, beta2;
  T rest1, rest2;  ///< 1 - beta1 and 1 - beta2, each rounded once
  T keep;          ///< 1 - learning rate * weight decay
  T rate;          ///< learning rate / (1 - beta1^t)
  T root_factor;   ///< 1 / sqrt(1 - beta2^t)
  T epsilon;
};

/// m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
/// w = keep w - rate m / (root_factor sqrt(v) + epsilon), for n values; g is scaled first.
template <Real T>
inline void adamw(index_t n, const adamw_step<T>& c, const T* gradient, T* first, T* second,
                  T* value) {
  using P = simd::pack<T>;
  const P scale(c.gradient_scale), b1(c.beta1), b2(c.beta2), keep(c.keep), rate(-c.rate);
  const P rest1(c.rest1), rest2(c.rest2), root(c.root_factor), epsilon(c.epsilon);
  const auto update = [=](P g, P& m, P& v, P& w) SSMLIB_LAMBDA_INLINE {
    g = g * scale;
    m = simd::fma(b1, m, rest1 * g);
    v = simd::fma(b2, v, rest2 * g * g);
    w = simd::fma(rate, m / simd::fma(root, simd::sqrt(v), epsilon), keep * w);
  };
  index_t i = 0;
  for (; i + P::width <= n; i += P::width) {
    P m = P::load(first + i), v = P::load(second + i), w = P::load(value + i);
    update(P::load(gradient + i), m, v, w);
    m.store(first + i);
    v.store(second + i);
    w.store(value + i);
  }
  if (i < n) {
    const index_t rest = n - i;
    P m = P::load_part(first + i, rest), v = P::load_part(second + i, rest);
    P w = P::load_part(value + i, rest);
    update(P::load_part(gradient + i, rest), m, v, w);
    m.store_part(first + i, rest);
    v.store_part(second + i, rest);
    w.store_part(value + i, rest);
  }
}

/// Sum of x[i]^2 in double: neither the squares nor their sum leave the range of float, and the
/// order is fixed by n alone.
template <Real T>
[[nodiscard]] inline double sum_of_squares_in_double(index_t n, const T* x) {
  using D = simd::pack<double>;
  constexpr int w = D::width;
  typedef T part __attribute__((vector_size(w * sizeof(T))));
  D sums[4] = {D(0.0), D(0.0), D(0.0), D(0.0)};
  const auto add = [](D& sum, const T* p) SSMLIB_LAMBDA_INLINE {
    part lanes;
    std::memcpy(&lanes, p, sizeof(lanes));
    const D wide(__builtin_convertvector(lanes, typename D::vec));
    sum = simd::fma(wide, wide, sum);
  };
  index_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    simd::unroll<4>([&](auto u) SSMLIB_LAMBDA_INLINE { add(sums[u], x + i + u * w); });
  double rest = 0;
  for (; i < n; ++i)
    rest += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return simd::horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

}  // namespace ssm::kernels
