#pragma once

#include <ssmlib/kernels/cuda/activation.cuh>

#include <cooperative_groups.h>
#include <cstdint>

/// @file
/// How threads walk rows of logits of any alignment, and the sums and probabilities they form.

namespace ssm::kernels::cuda::detail {

inline constexpr int logit_threads = 256;

/// Elements before the first that 16 bytes can be read at.
template <class T>
SSMLIB_DEVICE index_t head_of(const T* p) {
  const auto beyond = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(p) % 16);
  return static_cast<index_t>((16 - beyond) % 16 / sizeof(T));
}

template <class R>
SSMLIB_DEVICE R lowest_number();
template <>
SSMLIB_DEVICE float lowest_number<float>() {
  return -3.402823466e38f;
}
template <>
SSMLIB_DEVICE double lowest_number<double>() {
  return -1.7976931348623157e308;
}

/// What some threads know of a row: sums of e^(scale (z - largest)), for the teacher also weighted
/// with the difference of the logits.
template <class R>
struct logit_part {
  R largest, teacher_largest;
  double sum, teacher_sum, difference;

  SSMLIB_DEVICE static logit_part nothing() {
    return {lowest_number<R>(), lowest_number<R>(), 0, 0, 0};
  }
};

/// The same for one thread. The sums grow by one short sum at a time, so that float has bits for
/// rows of any length. Starting from the lowest number keeps -inf - -inf away.
template <bool Pair, class R>
struct logit_sums {
  R largest = lowest_number<R>(), sum = R(0);
  R teacher_largest = lowest_number<R>(), teacher_sum = R(0), difference = R(0);

  /// k is scale log2(e).
  template <int N>
  SSMLIB_DEVICE void add(const R (&student)[N], const R (&teacher)[N], R k) {
    R older, more = R(0);
    older = raise(largest, student, k);
#pragma unroll
    for (int e = 0; e < N; ++e)
      more += power_of_two((student[e] - largest) * k);
    sum = fma(sum, older, more);
    if constexpr (Pair) {
      R shifted = R(0);
      more = R(0);
      older = raise(teacher_largest, teacher, k);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const R p = power_of_two((teacher[e] - teacher_largest) * k);
        more += p;
        shifted = p > R(0) ? fma(p, teacher[e] - student[e], shifted) : shifted;
      }
      teacher_sum = fma(teacher_sum, older, more);
      difference = older > R(0) ? fma(difference, older, shifted) : shifted;
    }
  }

 private:
  /// Takes the largest of z into account; returns the factor of what is summed already.
  template <int N>
  SSMLIB_DEVICE static R raise(R& largest, const R (&z)[N], R k) {
    R top = largest;
#pragma unroll
    for (int e = 0; e < N; ++e)
      top = max(top, z[e]);
    const R factor = power_of_two((largest - top) * k);
    largest = top;
    return factor;
  }
};

/// The parts of a warp's lanes as one, in a fixed tree.
template <bool Pair, class R>
SSMLIB_DEVICE logit_part<R> combine_lanes(const logit_part<R>& mine, R k) {
  auto all = logit_part<R>::nothing();
  all.largest = warp_max(mine.largest);
  const R weight = power_of_two((mine.largest - all.largest) * k);
  all.sum = warp_sum(mine.sum * static_cast<double>(weight));
  if constexpr (Pair) {
    all.teacher_largest = warp_max(mine.teacher_largest);
    const R other = power_of_two((mine.teacher_largest - all.teacher_largest) * k);
    all.teacher_sum = warp_sum(mine.teacher_sum * static_cast<double>(other));
    all.difference = warp_sum(other > R(0) ? mine.difference * static_cast<double>(other) : 0.0);
  }
  return all;
}

/// e^(scale z - log_sum), with the rounding of log_sum undone.
template <class R>
struct softmax_of {
  R scale, shift, rest;
  SSMLIB_DEVICE softmax_of(R scale_value, double log_sum)
      : scale(scale_value),
        shift(static_cast<R>(log_sum)),
        rest(static_cast<R>((static_cast<double>(shift) - log_sum) * log2_of_e)) {}
  SSMLIB_DEVICE R operator()(R z) const {
    return power_of_two(fma(fma(scale, z, -shift), static_cast<R>(log2_of_e), rest));
  }
};

/// f(student, teacher) with arrays of logits, each element of [0, n) in one thread's array once;
/// arrays are filled up with -infinity. Without Pair both are the student.
template <bool Pair, class T, class F>
SSMLIB_DEVICE void for_logits(const T* student, const T* teacher, index_t n, int thread, int team,
                              F f) {
  using R = accum_t<T>;
  constexpr int vector = 16 / static_cast<int>(sizeof(T)), unroll = Pair ? 2 : 4;
  const R nothing = -static_cast<R>(INFINITY);
  index_t head = min(n, head_of(student));
  if (Pair && head_of(teacher) != head_of(student)) head = n;
  const index_t vectors = (n - head) / vector, rest = n - head - vectors * vector;
  for (index_t i = thread; i < vectors; i += index_t{unroll} * team) {
    numbers<T, vector> words[Pair ? 2 : 1][unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const index_t at = i + index_t{u} * team, c = head + (at < vectors ? at : i) * vector;
      words[0][u] = *reinterpret_cast<const numbers<T, vector>*>(student + c);
      if constexpr (Pair) words[1][u] = *reinterpret_cast<const numbers<T, vector>*>(teacher + c);
    }
    R zs[unroll * vector], zt[Pair ? unroll * vector : 1];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const bool mine = i + index_t{u} * team < vectors;
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        zs[u * vector + e] = mine ? widen(words[0][u].v[e]) : nothing;
        if constexpr (Pair) zt[u * vector + e] = mine ? widen(words[1][u].v[e]) : nothing;
      }
    }
    if constexpr (Pair) {
      f(zs, zt);
    } else {
      f(zs, zs);
    }
  }
  for (index_t e = thread; e < head + rest; e += team) {
    const index_t c = e < head ? e : e + vectors * vector;
    const R zs[1] = {widen(student[c])}, zt[1] = {Pair ? widen(teacher[c]) : R(0)};
    f(zs, zt);
  }
}

template <class T>
SSMLIB_DEVICE void fill_zeros(T* row, index_t begin, index_t end, int thread, int team) {
  if (row == nullptr) return;
  for (index_t c = begin + thread; c < end; c += team)
    row[c] = narrow<T>(accum_t<T>(0));
}

/// Where gradients go; either may be null.
template <class T>
struct logit_target {
  T *student, *teacher;
  bool add;

  template <int Count>
  SSMLIB_DEVICE void put(T* p, numbers<accum_t<T>, Count> x) const {
    using words = numbers<T, Count>;
    words out;
    if (add) {
      const words old = *reinterpret_cast<const words*>(p);
#pragma unroll
      for (int e = 0; e < Count; ++e)
        x.v[e] += widen(old.v[e]);
    }
#pragma unroll
    for (int e = 0; e < Count; ++e)
      out.v[e] = narrow<T>(x.v[e]);
    *reinterpret_cast<words*>(p) = out;
  }
};

/// Puts what f(i, student, teacher, d_student, d_teacher) computes of the elements of [begin, end).
template <bool Pair, class T, class F>
SSMLIB_DEVICE void put_logits(const T* student, const T* teacher, const logit_target<T>& to,
                              index_t begin, index_t end, int thread, int team, F f) {
  using R = accum_t<T>;
  constexpr int vector = 16 / static_cast<int>(sizeof(T));
  const auto put = [&]<int Count>(index_t c) {
    using words = numbers<T, Count>;
    const words s = *reinterpret_cast<const words*>(student + c);
    words t{};
    if constexpr (Pair) t = *reinterpret_cast<const words*>(teacher + c);
    numbers<R, Count> ds, dt;
#pragma unroll
    for (int e = 0; e < Count; ++e)
      f(c + e, widen(s.v[e]), widen(t.v[e]), ds.v[e], dt.v[e]);
    if (to.student) to.template put<Count>(to.student + c, ds);
    if constexpr (Pair) {
      if (to.teacher) to.template put<Count>(to.teacher + c, dt);
    }
  };
  const index_t n = end - begin;
  index_t head = head_of(student + begin);
  const bool alike = (!Pair || head_of(teacher + begin) == head) &&
                     (to.student == nullptr || head_of(to.student + begin) == head) &&
                     (!Pair || to.teacher == nullptr || head_of(to.teacher + begin) == head);
  head = alike ? min(n, head) : n;
  const index_t vectors = (n - head) / vector, rest = n - head - vectors * vector;
  for (index_t i = thread; i < vectors; i += team)
    put.template operator()<vector>(begin + head + i * vector);
  for (index_t e = thread; e < head + rest; e += team)
    put.template operator()<1>(begin + (e < head ? e : e + vectors * vector));
}

}  // namespace ssm::kernels::cuda::detail
