#pragma once

#include <ssmlib/lower/state.hpp>
#include <ssmlib/mixer/verify_packed.hpp>
#include <ssmlib/mixer/verify_reference.hpp>
#include <ssmlib/mixer/verify_report.hpp>
#include <ssmlib/tensor/random.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace ssm {

namespace detail {

template <class E>
class verifier {
 public:
  using M = typename E::mixer_type;
  using T = typename E::value_type;
  using B = typename E::backend;
  using twin_value = typename decltype(host_twin(std::declval<const E&>()))::value_type;

  verifier(const verify_options& options, verify_report& report)
      : options_(options),
        report_(report),
        result_bound_(bound(options.result_bound, 1e-10, 2e-5, 1e-2)),
        gradient_bound_(bound(options.gradient_bound, 1e-5, 2e-3, 3e-2)) {}

  template <class Make>
  void run(const Make& make) {
    // A short matrix may have nothing above its diagonal by chance: one of the longest decides.
    index_t longest = 2;
    for (const index_t length : options_.lengths)
      longest = std::max(longest, length);
    philox probe(options_.seed);
    const bool causal = is_causal(make(options_.batch, longest, probe).mixer.dense());
    each_algorithm([&](auto algorithm) {
      if constexpr (!runs<decltype(algorithm)>) report_.unpaired.emplace_back(algorithm.name);
    });
    for (const index_t length : options_.lengths) {
      philox random(options_.seed, static_cast<std::uint64_t>(length));
      const E e = make(options_.batch, length, random);
      const tensor<T, 4, B> dy = random_like(e.extents(), random);
      const tensor<double, 4> exact = definition(host_twin(e));
      each_algorithm([&](auto algorithm) {
        if constexpr (runs<decltype(algorithm)>) {
          const auto product = e.with(algorithm);
          add("forward equals dense()", algorithm.name, length,
              relative_error(eval4(product), exact), result_bound_);
          check_gradients(product, dy, random, length);
          check_packed(product, dy, length);
          if (causal) check_causal(product, length);
        }
      });
      if (causal) {
        check_advance(e, length);
        if (length >= 4) check_rollback(e, length);
      }
    }
  }

 private:
  // On the CPU a pairing that is missing is an error of the compiler's, as in eval().
  template <class Alg>
  static constexpr bool runs = std::same_as<B, cpu> || is_paired<M, Alg>();

  static double bound(double wanted, double in_double, double in_float, double in_bf16) {
    if (wanted > 0) return wanted;
    return std::same_as<T, double> ? in_double : std::same_as<T, float> ? in_float : in_bf16;
  }
  void add(std::string claim, std::string_view algorithm, index_t length, double error,
           double limit) {
    report_.checks.push_back({std::move(claim), std::string(algorithm), length, error, limit});
  }
  template <class F>
  static void each_algorithm(F f) {
    M::algorithms::for_each(f);
    if constexpr (!M::algorithms::template contains<alg::quadratic>) f(alg::quadratic{});
  }
  template <class P>
  static tensor<T, 4, B> eval4(const P& product) {
    tensor<T, 4, B> y(product.extents());
    y.fill(T(std::numeric_limits<float>::quiet_NaN()));
    eval_into(product, y);
    return y;
  }
  static tensor<T, 4, B> random_like(const shape<4>& extents, philox& random) {
    tensor<double, 4> t(extents);
    for (index_t i = 0; i < t.size(); ++i)
      t.data()[i] = random.normal();
    return on_backend<B>(cast<T>(t));
  }

  // dense() times x of a product on the host, in double.
  template <class P>
  static tensor<double, 4> definition(const P& e) {
    const tensor<double, 4> m = e.mixer.dense();
    tensor<double, 4> y(e.extents());
    const index_t heads = e.heads(), n = y.extent(1);
    const bool packed = static_cast<bool>(e.mixer.layout);  // one matrix over all tokens
    for (index_t b = 0; b < y.extent(0); ++b) {
      const index_t block = packed ? 0 : b, first = packed ? b * n : 0;
      for (index_t h = 0; h < heads; ++h) {
        const index_t hm = group_of(h, heads, m.extent(1)), hx = group_of(h, heads, e.x.extent(2));
        for (index_t t = 0; t < n; ++t) {
          for (index_t f = 0; f < y.extent(3); ++f) {
            double sum = 0;
            for (index_t s = 0; s < n; ++s) {
              sum += m(block, hm, first + t, first + s) * static_cast<double>(e.x(b, s, hx, f));
            }
            y(b, t, h, f) = sum;
          }
        }
      }
    }
    return y;
  }
  static bool is_causal(const tensor<double, 4>& m) {
    for (index_t b = 0; b < m.extent(0); ++b) {
      for (index_t h = 0; h < m.extent(1); ++h) {
        for (index_t t = 0; t < m.extent(2); ++t) {
          for (index_t s = t + 1; s < m.extent(3); ++s) {
            if (m(b, h, t, s) != 0) return false;
          }
        }
      }
    }
    return true;
  }
  template <class P>
  static double loss(const P& e, const tensor<double, 4>& dy) {
    const tensor<double, 4> y = definition(e);
    double sum = 0;
    for (index_t i = 0; i < y.size(); ++i)
      sum += y.data()[i] * dy.data()[i];
    return sum;
  }

  // Directional derivatives of sum(dy o dense() x), against the vjp: along the gradient itself,
  // which shows a wrong factor, and along two random directions, which show wrong places.
  template <class P>
  void check_gradients(const P& e, const tensor<T, 4, B>& dy, philox& random, index_t length) {
    P computed = zeros_like(e);
    vjp_into(e, dy, computed, carry_gradient<T, B>{});
    const auto exact = host_twin(e);
    auto gradients = host_twin(computed);
    const tensor<double, 4> exact_dy = exact_elements(dy);
    index_t count = 0;
    P::operands(computed, [&](std::string_view, auto&, operand) { ++count; });
    for (index_t which = 0; which < count; ++which) {
      std::string name;
      double worst = 0;
      for (int direction = 0; direction < 3; ++direction) {
        const double e1 =
            directional_error(exact, gradients, exact_dy, which, direction, random, name);
        worst = e1 <= worst ? worst : e1;  // keeps NaN
      }
      add("vjp equals finite differences", std::string(e.algorithm.name) + ", d " + name, length,
          worst, gradient_bound_);
    }
  }
  template <class P>
  double directional_error(const P& e, P& gradients, const tensor<double, 4>& dy, index_t which,
                           int direction, philox& random, std::string& name) {
    double inner = 0, square = 0;
    P above = e, below = e;
    index_t index = 0;
    std::vector<double> moved;
    P::operands(gradients, [&](std::string_view operand_name, auto& g, operand) {
      if (index++ != which) return;
      name = operand_name;
      moved.resize(static_cast<std::size_t>(g.size()));
      for (index_t i = 0; i < g.size(); ++i) {
        const double gi = static_cast<double>(g.data()[i]);
        moved[static_cast<std::size_t>(i)] = direction == 0 ? gi : random.normal();
        square += gi * gi;
      }
    });
    double length = 0;
    for (const double v : moved)
      length += v * v;
    if (!(length > 0)) return square > 0 || length != length ? 1.0 : 0.0;
    const double step = (std::same_as<twin_value, double> ? 1e-5 : 1e-3) / std::sqrt(length);
    const auto shift = [&](P& to, double sign, std::vector<double>& actual) {
      index_t at = 0;
      P::operands(to, [&](std::string_view, auto& t, operand) {
        if (at++ != which) return;
        t = t.clone();
        for (index_t i = 0; i < t.size(); ++i) {
          const auto k = static_cast<std::size_t>(i);
          t.data()[i] +=
              static_cast<std::remove_reference_t<decltype(t.data()[i])>>(sign * step * moved[k]);
          actual[k] += sign * static_cast<double>(t.data()[i]);
        }
      });
    };
    // What was really added, after rounding, is the direction.
    std::vector<double> actual(moved.size(), 0.0);
    shift(above, 1.0, actual);
    shift(below, -1.0, actual);
    double actual_square = 0;
    index = 0;
    P::operands(gradients, [&](std::string_view, auto& g, operand) {
      if (index++ != which) return;
      for (index_t i = 0; i < g.size(); ++i) {
        const double a = actual[static_cast<std::size_t>(i)];
        inner += static_cast<double>(g.data()[i]) * a;
        actual_square += a * a;
      }
    });
    const double difference = loss(above, dy) - loss(below, dy);
    // <g, v> of a random v is about |g| |v| / sqrt(n). Gradients that are zero by cancellation are
    // compared with the size of what cancels.
    const double count = static_cast<double>(std::max<std::size_t>(moved.size(), 1));
    const double scale =
        std::max({std::abs(difference), std::sqrt(square * actual_square / count),
                  1e-5 * norm(dy) * norm(definition(e)) * std::sqrt(actual_square)});
    return std::abs(inner - difference) / std::max(scale, 1e-30);
  }

  // One packed batch of uneven sequences against each sequence alone: the rows of results and of
  // gradients to the bit, gradients of parameters against the sum of the sequences'. A transform
  // may be padded to the longest sequence of the batch, beyond the CPU, and tiles of a matrix
  // begin elsewhere, so that the rounding differs of transforms, and of the gradients of a mask's
  // numbers by tiles.
  template <class P>
  void check_packed(const P& e, const tensor<T, 4, B>& dy, index_t length) {
    const index_t tokens = e.x.extent(0) * e.x.extent(1);
    const index_t first = tokens / 3;
    const std::vector<index_t> lengths = {first, 0, tokens - first};
    const auto whole = packed_tokens(e, sequence_layout::from_lengths(lengths));
    const tensor<T, 4, B> y = eval4(whole);
    const tensor<T, 4, B> dy_packed = as_packed(dy);
    auto gradients = zeros_like(whole);
    vjp_into(whole, dy_packed, gradients, carry_gradient<T, B>{});
    std::vector<packed_operand> operands = operands_of(gradients, 0, tokens);
    constexpr bool to_the_bit =
        std::same_as<B, cpu> || !std::same_as<typename P::algorithm_type, alg::structured>;
    constexpr bool gradients_to_the_bit =
        to_the_bit &&
        (std::same_as<B, cpu> || !std::same_as<typename P::algorithm_type, alg::quadratic>);
    double error = 0;
    bool same = true;
    index_t begin = 0;
    for (const index_t n : lengths) {
      if (n == 0) continue;
      const auto alone = slice_tokens(whole, begin, begin + n);
      const tensor<T, 4, B> y_alone = eval4(alone), rows = y.slice(1, begin, begin + n);
      same = same && equal_elements(y_alone, rows);
      const double e1 = relative_error(rows, y_alone);
      error = e1 <= error ? error : e1;  // keeps NaN
      auto own = zeros_like(alone);
      vjp_into(alone, dy_packed.slice(1, begin, begin + n), own, carry_gradient<T, B>{});
      const auto packed_part = operands_of(gradients, begin, begin + n);
      const auto separate = operands_of(own, 0, n);
      for (std::size_t k = 0; k < operands.size(); ++k)
        operands[k].compare(packed_part[k].values, separate[k].values);
      begin += n;
    }
    const std::string algorithm(e.algorithm.name);
    if (to_the_bit) {
      add("packed equals separate, to the bit", algorithm, length, same ? 0 : 1, 0);
    } else {
      add("packed equals separate", algorithm, length, error, result_bound_);
    }
    for (const packed_operand& o : operands) {
      if (o.per_token && gradients_to_the_bit) {
        add("packed vjp equals separate, to the bit", algorithm + ", d " + o.name, length,
            o.same ? 0 : 1, 0);
      } else if (o.per_token) {
        add("packed vjp equals separate", algorithm + ", d " + o.name, length, o.error(),
            gradient_bound_);
      } else {
        add("packed vjp equals the sum of separate", algorithm + ", d " + o.name, length,
            o.error_of_sum(), result_bound_);
      }
    }
  }
  template <class P>
  static auto packed_tokens(const P& e, const sequence_layout& layout) {
    auto all = slice_tokens(e, 0, layout.tokens());
    all.mixer.layout = layout;
    return all;
  }

  // Changing the last token leaves the outputs before it as they were.
  template <class P>
  void check_causal(const P& e, index_t length) {
    if (length < 2) return;
    P changed = e;
    changed.x = e.x.clone();
    const index_t n = e.x.extent(1);
    changed.x.slice(1, n - 1, n).fill(T(3.0f));
    const tensor<T, 4, B> a = eval4(e), b = eval4(changed);
    const double error = relative_error(a.slice(1, 0, n - 1).clone(), b.slice(1, 0, n - 1).clone());
    // An FFT mixes all outputs; its error stays within the bound of the results.
    const bool exact = !std::same_as<typename P::algorithm_type, alg::structured>;
    add("future tokens change nothing", e.algorithm.name, length, error,
        exact ? 0.0 : result_bound_);
  }

  void check_advance(const E& e, index_t length) {
    const tensor<double, 4> exact = definition(host_twin(e));
    auto in_pieces = make_state(e, options_.batch);
    const tensor<T, 4, B> pieces = run_pieces(e, in_pieces, {1, 17, 2, 40, 16, 3});
    add("pieces from a state equal one pass", "advance", length, relative_error(pieces, exact),
        result_bound_);
    auto by_one = make_state(e, options_.batch), by_five = make_state(e, options_.batch);
    const tensor<T, 4, B> ones = run_pieces(e, by_one, {1}), fives = run_pieces(e, by_five, {5, 2});
    add("steps have the same bits whatever the split", "advance", length,
        equal_elements(ones, fives) && by_one == by_five ? 0 : 1, 0);
    bool same = true;
    for (index_t b = 0; b < options_.batch; ++b) {
      const auto packed =
          packed_tokens(e, sequence_layout::rectangular(options_.batch, e.x.extent(1)));
      const auto alone = slice_tokens(packed, b * length, (b + 1) * length);
      auto state = make_state(alone, 1);
      same = same && equal_elements(run_pieces(alone, state, {5, 2}), fives.slice(0, b, b + 1));
    }
    add("steps have the same bits whatever the batch", "advance", length, same ? 0 : 1, 0);
  }

  void check_rollback(const E& e, index_t length) {
    const index_t undo = std::min<index_t>(3, length - 1);
    auto state = make_state(e, options_.batch, undo);
    (void)run_pieces(part(e, 0, length - undo), state, {20, 1});
    const auto before = state;
    const tensor<T, 4, B> first = run_pieces(part(e, length - undo, length), state, {undo});
    const auto after = state;
    state.rollback(undo);
    const bool restored = state == before;
    const tensor<T, 4, B> again = run_pieces(part(e, length - undo, length), state, {1});
    add("rollback restores the state, to the bit", "advance", length,
        restored && equal_elements(first, again) && state == after ? 0 : 1, 0);
  }

  // Tokens [begin, end) of every sequence.
  template <class P>
  static P part(const P& e, index_t begin, index_t end) {
    P p = e;
    P::operands(p, [&](std::string_view, auto& t, operand kind) {
      if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
        if (kind == operand::per_token && t) t = t.slice(1, begin, end);
      }
    });
    p.mixer.layout =
        p.mixer.layout ? sequence_layout::rectangular(e.x.extent(0), end - begin) : p.mixer.layout;
    return p;
  }
  template <class P, class S>
  static tensor<T, 4, B> run_pieces(const P& e, S& state, const std::vector<index_t>& sizes) {
    tensor<T, 4, B> y(e.extents());
    const index_t n = e.x.extent(1);
    std::size_t i = 0;
    for (index_t begin = 0; begin < n;) {
      const index_t end = std::min(n, begin + sizes[i++ % sizes.size()]);
      const P piece = part(e, begin, end);
      const auto rows = advance(piece, state);
      y.slice(1, begin, end).copy_from(promote(rows));
      begin = end;
    }
    return y;
  }

  const verify_options& options_;
  verify_report& report_;
  double result_bound_, gradient_bound_;
};

}  // namespace detail

/// Puts a mixer through the tests that the library's own mixers pass: every algorithm against
/// dense(), every vjp against finite differences of dense(), packed batches against separate
/// sequences, causality, stepping from a state against one pass, and rollback.
///
/// The mixer may live on any backend: the definition is computed on the host, from the mixer's twin
/// in double (on_host()) where it lives elsewhere. An algorithm of the mixer's list without kernels
/// on that backend is named in the report's `unpaired`.
///
/// @param make  make(batch, length, philox&) -> mixer * X with X of rank 4 and random operands;
///              parameters that have a length must do for batch * length tokens (packed batches)
/// @return      one line a check; prints as a table
/// @cost        dense() is O(T^2): keep the lengths and sizes small
template <class Make>
[[nodiscard]] verify_report verify(const Make& make, const verify_options& options = {}) {
  philox random(options.seed);
  using E = decltype(make(index_t{1}, index_t{1}, random));
  static_assert(E::rank == 4, "ssm: verify: make a product with X of rank 4, (b, T, H, P)");
  verify_report report;
  detail::verifier<E>(options, report).run(make);
  return report;
}

}  // namespace ssm
