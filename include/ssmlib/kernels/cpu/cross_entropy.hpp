#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/rows.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

/// @file
/// One row of logits at a time: log-sum-exp, softmax gradients and divergences. Sums run in packs
/// of T over 1024 elements and in double beyond, so their error does not grow with the vocabulary.

namespace ssm::kernels {

namespace detail {

/// The sum over [0, n) of pieces f(begin, count), in double.
template <Real T, class F>
SSMLIB_ALWAYS_INLINE double sum_in_double(index_t n, F f) {
  constexpr index_t block = 1024;
  double total = 0;
  for (index_t begin = 0; begin < n; begin += block) {
    total += static_cast<double>(f(begin, std::min(block, n - begin)));
  }
  return total;
}

/// e^(scale z - log_sum) with the rounding of log_sum to T undone by a factor.
template <Real T>
struct shifted_exp {
  shifted_exp(T scale_value, double log_sum)
      : scale(scale_value),
        shift(static_cast<T>(log_sum)),
        factor(static_cast<T>(std::exp(static_cast<double>(shift) - log_sum))) {}
  SSMLIB_ALWAYS_INLINE simd::pack<T> operator()(simd::pack<T> z) const {
    using P = simd::pack<T>;
    return P(factor) * simd::exp(simd::fma(P(scale), z, P(-shift)));
  }
  T scale, shift, factor;
};

}  // namespace detail

/// The largest of z[0 .. n), -infinity for n = 0.
template <Real T>
[[nodiscard]] T row_max(index_t n, const T* z) {
  using P = simd::pack<T>;
  P best(-std::numeric_limits<T>::infinity());
  index_t i = 0;
  for (; i + P::width <= n; i += P::width)
    best = simd::max(best, P::load(z + i));
  T result = simd::horizontal_max(best);
  for (; i < n; ++i)
    result = std::max(result, z[i]);
  return result;
}

/// log(sum of e^(scale z)); scale > 0. Logits of -infinity take no part.
template <Real T>
[[nodiscard]] double log_sum_exp(index_t n, const T* z, T scale) {
  using P = simd::pack<T>;
  const T largest = row_max(n, z);
  if (largest == -std::numeric_limits<T>::infinity()) return static_cast<double>(largest);
  const double sum = detail::sum_in_double<T>(n, [&](index_t begin, index_t count) {
    return detail::sum_packs<T>(count, [&](index_t i, index_t lanes, P acc) SSMLIB_LAMBDA_INLINE {
      const P e = simd::exp((detail::load_up_to(z + begin + i, lanes) - P(largest)) * P(scale));
      return acc + (lanes == P::width ? e : e * detail::lanes_below<T>(lanes));
    });
  });
  return static_cast<double>(scale) * static_cast<double>(largest) + std::log(sum);
}

/// out = or += g softmax(scale z), given log_sum_exp; `out` may be z.
template <bool Add, Real T>
void add_softmax(index_t n, const T* z, T scale, double log_sum, T g, T* out) {
  using P = simd::pack<T>;
  const detail::shifted_exp<T> probability(scale, log_sum);
  detail::for_packs<T>(n, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
    const P d = P(g) * probability(detail::load_up_to(z + i, count));
    if constexpr (Add) {
      detail::add_up_to(out + i, count, d);
    } else {
      detail::store_up_to(out + i, count, d);
    }
  });
}

/// The two rows of a divergence and their log-sums, both scaled by 1 / temperature.
template <Real T>
struct divergence_row {
  index_t n;
  const T *student, *teacher;
  T scale;
  double student_log_sum, teacher_log_sum;
};

namespace detail {
/// f(i, count, p_teacher, log p_teacher - log p_student); the latter is 0 where p_teacher is.
template <Real T, class F>
SSMLIB_ALWAYS_INLINE void for_divergence(const divergence_row<T>& r, index_t begin, index_t n,
                                         F f) {
  using P = simd::pack<T>;
  const shifted_exp<T> teacher(r.scale, r.teacher_log_sum);
  const P offset(static_cast<T>(r.student_log_sum - r.teacher_log_sum));
  for_packs<T>(n, [&](index_t i, index_t count) SSMLIB_LAMBDA_INLINE {
    const P zt = load_up_to(r.teacher + begin + i, count);
    const P zs = load_up_to(r.student + begin + i, count);
    P p = teacher(zt);
    if (count != P::width) p *= lanes_below<T>(count);
    const P log_ratio = select(p > P(T(0)), simd::fma(zt - zs, P(r.scale), offset), P(T(0)));
    f(begin + i, count, p, log_ratio);
  });
}
}  // namespace detail

/// KL(teacher || student) = sum of p_teacher (log p_teacher - log p_student).
template <Real T>
[[nodiscard]] double kl_divergence(const divergence_row<T>& r) {
  using P = simd::pack<T>;
  return detail::sum_in_double<T>(r.n, [&](index_t begin, index_t count) {
    P sum(T(0));
    detail::for_divergence(r, begin, count,
                           [&](index_t, index_t, P p, P log_ratio)
                               SSMLIB_LAMBDA_INLINE { sum = simd::fma(p, log_ratio, sum); });
    return simd::horizontal_sum(sum);
  });
}

/// The gradients of g KL with respect to scale z_student and scale z_teacher:
/// g (p_student - p_teacher) and g p_teacher (log p_teacher - log p_student - KL). Either may be
/// null; they may be the rows themselves.
template <bool Add, Real T>
void kl_divergence_vjp(const divergence_row<T>& r, double divergence, T g, T* d_student,
                       T* d_teacher) {
  using P = simd::pack<T>;
  const detail::shifted_exp<T> student(r.scale, r.student_log_sum);
  const auto put = [](T* to, index_t count, P x) SSMLIB_LAMBDA_INLINE {
    if constexpr (Add) {
      detail::add_up_to(to, count, x);
    } else {
      detail::store_up_to(to, count, x);
    }
  };
  detail::for_divergence(
      r, 0, r.n, [&](index_t i, index_t count, P p, P log_ratio) SSMLIB_LAMBDA_INLINE {
        if (d_student) {
          // Rounded before p is taken from it, so that equal rows have the gradient 0: a compiler
          // may otherwise fuse the product at the end of q with the difference.
          P q = student(detail::load_up_to(r.student + i, count));
          asm("" : "+m"(q));
          put(d_student + i, count, P(g) * (q - p));
        }
        if (d_teacher) {
          put(d_teacher + i, count, P(g) * p * (log_ratio - P(static_cast<T>(divergence))));
        }
      });
}

#define SSMLIB_DETAIL_LIST(T)                                                                  \
  SSMLIB_INSTANTIATE(layers, double log_sum_exp<T>(index_t, const T*, T));                     \
  SSMLIB_INSTANTIATE(layers, void add_softmax<false, T>(index_t, const T*, T, double, T, T*)); \
  SSMLIB_INSTANTIATE(layers, void add_softmax<true, T>(index_t, const T*, T, double, T, T*));  \
  SSMLIB_INSTANTIATE(layers, double kl_divergence<T>(const divergence_row<T>&));               \
  SSMLIB_INSTANTIATE(                                                                          \
      layers, void kl_divergence_vjp<false, T>(const divergence_row<T>&, double, T, T*, T*));  \
  SSMLIB_INSTANTIATE(layers,                                                                   \
                     void kl_divergence_vjp<true, T>(const divergence_row<T>&, double, T, T*, T*))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
