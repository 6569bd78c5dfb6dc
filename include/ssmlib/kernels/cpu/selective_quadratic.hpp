#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/selective_vjp.hpp>

#include <algorithm>
#include <cmath>

/// @file
/// The selective scan by its matrix, a channel at a time, in double: the reference that the scans
/// are compared with, which like them takes and gives states and gradients.

namespace ssm::kernels {

namespace detail {

/// One channel of one sequence. Sums of delta over (s, t] are differences of running sums, which
/// are kept with what rounding took from them: a large step leaves later small ones exact.
template <Real T>
class selective_channel {
 public:
  selective_channel(const selective_operands<T>& o, index_t sequence, index_t channel)
      : o_(o),
        begin_(o.offsets[sequence]),
        length_(o.offsets[sequence + 1] - begin_),
        channel_(channel),
        c_group_(channel * o.c.extents[1] / o.channels()),
        b_group_(channel * o.b.extents[1] / o.channels()),
        sums_(length_ + 1),
        lost_(length_ + 1) {
    sums_[0] = lost_[0] = 0;
    for (index_t t = 0; t < length_; ++t) {
      const double before = sums_[t], step = delta(t), sum = before + step, added = sum - before;
      sums_[t + 1] = sum;
      lost_[t + 1] = lost_[t] + ((before - (sum - added)) + (step - added));
    }
  }

  [[nodiscard]] index_t length() const { return length_; }
  [[nodiscard]] index_t row(index_t t) const { return begin_ + t; }
  [[nodiscard]] index_t c_group() const { return c_group_; }
  [[nodiscard]] index_t b_group() const { return b_group_; }
  [[nodiscard]] double delta(index_t t) const { return value(o_.delta(row(t), channel_)); }
  [[nodiscard]] double u(index_t t) const { return value(o_.u(row(t), channel_)); }
  [[nodiscard]] double a(index_t n) const { return value(o_.a(channel_, n)); }
  [[nodiscard]] double c(index_t t, index_t n) const { return value(o_.c(row(t), c_group_, n)); }
  [[nodiscard]] double b(index_t t, index_t n) const { return value(o_.b(row(t), b_group_, n)); }
  /// delta_first + ... + delta_{end-1}
  [[nodiscard]] double steps(index_t first, index_t end) const {
    return (sums_[end] - sums_[first]) + (lost_[end] - lost_[first]);
  }
  [[nodiscard]] double decay(index_t first, index_t end, index_t n) const {
    return first == end ? 1.0 : std::exp(a(n) * steps(first, end));
  }

 private:
  static double value(T x) { return static_cast<double>(x); }

  const selective_operands<T>& o_;
  index_t begin_, length_, channel_, c_group_, b_group_;
  scratch<double> sums_, lost_;
};

}  // namespace detail

/// y = M u with M materialised entry by entry, and the states at both ends.
/// @cost O(T^2 D N) exponentials.
template <Real T>
void selective_quadratic(const cpu::context& ctx, const selective_operands<T>& o,
                         view<const T, 3> initial, view<T, 3> final, view<T, 2> y) {
  const index_t channels = o.channels(), states = o.states();
  ctx.parallel_for(o.sequences * channels, [&](index_t task) {
    const index_t i = task / channels, d = task % channels;
    const detail::selective_channel<T> m(o, i, d);
    const index_t length = m.length();
    for (index_t t = 0; t < length; ++t) {
      double sum = 0;
      for (index_t n = 0; n < states; ++n) {
        double state = 0;
        for (index_t s = 0; s <= t; ++s) {
          state += m.decay(s + 1, t + 1, n) * m.b(s, n) * m.delta(s) * m.u(s);
        }
        if (initial) state += m.decay(0, t + 1, n) * static_cast<double>(initial(i, d, n));
        sum += m.c(t, n) * state;
      }
      y(m.row(t), d) = static_cast<T>(sum);
    }
    for (index_t n = 0; final && n < states; ++n) {
      double state = 0;
      for (index_t s = 0; s < length; ++s) {
        state += m.decay(s + 1, length, n) * m.b(s, n) * m.delta(s) * m.u(s);
      }
      if (initial) state += m.decay(0, length, n) * static_cast<double>(initial(i, d, n));
      final(i, d, n) = static_cast<T>(state);
    }
  });
}

/// Adds the gradients, pair of tokens by pair of tokens. In one thread: channels share gradients.
template <Real T>
void selective_quadratic_vjp(const selective_operands<T>& o, view<const T, 3> initial,
                             view<const T, 2> dy, view<const T, 3> d_final,
                             const selective_gradients<T>& to) {
  const auto value = [](T x) { return static_cast<double>(x); };
  const auto add = [](T& sum, double x) { sum = static_cast<T>(static_cast<double>(sum) + x); };
  for (index_t i = 0; i < o.sequences; ++i) {
    for (index_t d = 0; d < o.channels(); ++d) {
      const detail::selective_channel<T> m(o, i, d);
      const index_t length = m.length(), states = o.states();
      // Gradients of a product over delta_first .. delta_{end-1}: added at `first`, taken at `end`.
      scratch<double> d_steps(length + 1);
      std::fill_n(d_steps.data(), length + 1, 0.0);
      for (index_t n = 0; n < states; ++n) {
        double d_a = 0;
        const auto spread = [&](index_t first, index_t end, double weight) {
          double steps = 0;
          for (index_t r = first; r < end; ++r)
            steps += m.delta(r);
          if (first != end && weight != 0) d_a += weight * steps;
          d_steps[first] += weight == 0 ? 0.0 : weight * m.a(n);
          d_steps[end] -= weight == 0 ? 0.0 : weight * m.a(n);
        };
        // The final state is one more row, which reads the state itself.
        for (index_t t = 0; t <= length; ++t) {
          const bool last = t == length;
          if (last && !d_final) break;
          const index_t end = last ? length : t + 1;
          const double out = last ? value(d_final(i, d, n)) : value(dy(m.row(t), d)) * m.c(t, n);
          double state = 0;
          for (index_t s = 0; s < end; ++s) {
            const double decay = m.decay(s + 1, end, n), input = m.delta(s) * m.u(s);
            state += decay * m.b(s, n) * input;
            const double through = out * decay;
            if (to.b) add(to.b(m.row(s), m.b_group(), n), through * input);
            if (to.u) add(to.u(m.row(s), d), through * m.b(s, n) * m.delta(s));
            if (to.delta) add(to.delta(m.row(s), d), through * m.b(s, n) * m.u(s));
            spread(s + 1, end, through * m.b(s, n) * input);
          }
          const double decay = m.decay(0, end, n);
          if (initial) {
            state += decay * value(initial(i, d, n));
            spread(0, end, out * decay * value(initial(i, d, n)));
          }
          if (to.initial) add(to.initial(i, d, n), out * decay);
          if (to.c && !last) add(to.c(m.row(t), m.c_group(), n), value(dy(m.row(t), d)) * state);
        }
        if (to.a) add(to.a(d, n), d_a);
      }
      double running = 0;
      for (index_t t = 0; t < length && to.delta; ++t) {
        running += d_steps[t];
        add(to.delta(m.row(t), d), running);
      }
    }
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(                                                                            \
      selective, void selective_quadratic<T>(const cpu::context&, const selective_operands<T>&,  \
                                             view<const T, 3>, view<T, 3>, view<T, 2>));         \
  SSMLIB_INSTANTIATE(                                                                            \
      selective, void selective_quadratic_vjp<T>(const selective_operands<T>&, view<const T, 3>, \
                                                 view<const T, 2>, view<const T, 3>,             \
                                                 const selective_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
