#pragma once

#include <ssmlib/expr/mask.hpp>

#include <cmath>
#include <concepts>
#include <string>

namespace ssm {

/// The selective scan of Mamba-1: a diagonal recurrence of N numbers for every channel d,
///
///     h_t[n] = exp(delta_t A[d, n]) h_{t-1}[n] + delta_t B_t[n] u_t,     y_t = sum_n C_t[n]
///     h_t[n],
///
/// as a matrix: entry (t, s) is sum_n C_t[n] exp(A[d, n] (delta_{s+1} + ... + delta_t)) B_s[n]
/// delta_s. Channels are heads of width 1, and the state of a channel is its N numbers.
/// @source Gu and Dao 2023, arXiv:2312.00752, section 3.
template <Floating T, Backend B = cpu>
struct selective_mixer {
  using value_type = T;
  using backend = B;
  using structure = structure::semiseparable;
  using algorithms = alg_list<alg::scan, alg::recurrent, alg::quadratic>;

  tensor<T, 3, B> delta;       // (b, T, D)
  tensor<accum_t<T>, 2, B> a;  // (D, N)
  tensor<T, 4, B> c;           // (b, T, Gc, N)
  tensor<T, 4, B> b;           // (b, T, Gb, N)
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return delta.extent(0); }
  [[nodiscard]] index_t length() const { return delta.extent(1); }
  [[nodiscard]] index_t heads() const { return delta.extent(2); }
  [[nodiscard]] index_t key_size() const { return a.extent(1); }
  [[nodiscard]] index_t state_features(index_t p) const { return p; }

  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("delta", self.delta, operand::per_token);
    f("a", self.a, operand::parameter);
    f("c", self.c, operand::per_token);
    f("b", self.b, operand::per_token);
  }

  [[nodiscard]] auto on_host() const {
    return selective_mixer<double>{detail::exact_on_host(delta), detail::exact_on_host(a),
                                   detail::exact_on_host(c), detail::exact_on_host(b), layout};
  }
  /// out[t - begin] = entry (t, s) for the tokens begin <= t < end of the sequence of token s.
  void column(index_t begin, index_t end, index_t s, index_t d,
              double* out) const requires std::same_as<B, cpu> {
    const index_t n = length();
    const index_t gc = group_of(d, heads(), c.extent(2)), gb = group_of(d, heads(), b.extent(2));
    double steps = 0;
    for (index_t t = begin; t < end; ++t) {
      if (t > s) steps += static_cast<double>(delta(t / n, t % n, d));
      double sum = 0;
      for (index_t i = 0; t >= s && i < key_size(); ++i) {
        const double decay = steps == 0 ? 1.0 : std::exp(static_cast<double>(a(d, i)) * steps);
        sum += static_cast<double>(c(t / n, t % n, gc, i)) * decay *
               static_cast<double>(b(s / n, s % n, gb, i));
      }
      out[t - begin] = sum * static_cast<double>(delta(s / n, s % n, d));
    }
  }
  void column(index_t begin, index_t end, index_t s, index_t d, double* out) const
      requires(!std::same_as<B, cpu>) {
    on_host().column(begin, end, s, d, out);
  }
  [[nodiscard]] tensor<double, 4> dense() const { return detail::dense_columns(*this); }
};

/// The selective scan as a mixer; multiply it by channels(u), u (b, T, D), or by (b, T, D, 1).
/// The skip connection is `+ diagonal(D)`, the gate an elementwise product outside.
///
/// @param delta  (b, T, D) or (T, D): step sizes, >= 0 for a stable recurrence (after softplus)
/// @param a      (D, N): negative, -exp(A_log)
/// @param c, b   (b, T, G, N), (T, G, N) or (T, N): read-out and input weights; channel d uses
/// group
///               d * G / D
/// @throws shape_error  batch, length, channels, groups or state sizes do not fit.
/// @cost   O(1); nothing is evaluated.
template <Floating T, int Rd, int Rc, int Rb, Backend B>
[[nodiscard]] selective_mixer<T, B> selective(const tensor<T, Rd, B>& delta,
                                              const tensor<accum_t<T>, 2, B>& a,
                                              const tensor<T, Rc, B>& c,
                                              const tensor<T, Rb, B>& b) {
  static_assert(Rd == 2 || Rd == 3, "ssm: selective: delta is (batch, time, channel)");
  selective_mixer<T, B> m{detail::promote_scalar(delta), a, detail::promote(c), detail::promote(b)};
  const index_t groups =
      detail::join_heads("selective(delta, A, C, B)", m.c.extent(2), m.b.extent(2));
  if (m.a.extent(0) != m.heads() || groups == 0 || m.heads() % groups != 0) {
    throw shape_error("ssm: selective(delta, A, C, B): delta has " + std::to_string(m.heads()) +
                      " channels, A is " + to_string<2>(m.a.extents()) + ", C and B have " +
                      std::to_string(groups) +
                      " groups; wanted A (channels x N) and groups that divide the channels");
  }
  if (m.c.extent(3) != m.key_size() || m.b.extent(3) != m.key_size()) {
    throw shape_error("ssm: selective(delta, A, C, B): A is " + to_string<2>(m.a.extents()) +
                      ", C is " + to_string<4>(m.c.extents()) + ", B is " +
                      to_string<4>(m.b.extents()) + "; wanted the same state size N last");
  }
  detail::check_time("selective(delta, A, C, B)", m.batch(), m.length(), m.c.extent(0),
                     m.c.extent(1));
  detail::check_time("selective(delta, A, C, B)", m.batch(), m.length(), m.b.extent(0),
                     m.b.extent(1));
  return m;
}

/// (b, T, D) -> (b, T, D, 1), (T, D) -> (1, T, D, 1): every channel a head of width 1, sharing the
/// elements. What a selective scan multiplies.
template <Floating T, int R, Backend B>
[[nodiscard]] tensor<T, 4, B> channels(const tensor<T, R, B>& u) {
  static_assert(R == 2 || R == 3, "ssm: channels(u): u is (batch, time, channel)");
  const tensor<T, 3, B> u3 = detail::promote_scalar(u);
  return u3.reshape(u3.extent(0), u3.extent(1), u3.extent(2), index_t{1});
}

}  // namespace ssm
