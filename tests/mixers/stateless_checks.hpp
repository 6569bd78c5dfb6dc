#pragma once

// What every mixer without a state must do; see recurrent_checks.hpp for those with one.

#include "mixers/recurrent_checks.hpp"

namespace ssm_test {

/// The gradient of every operand along a random direction against central differences of
/// sum(dy * dense() X), in double, and the float gradients against the double ones. Gradients
/// begin at 1, to see that they are added to.
template <class Alg, class Make>
void check_stateless_vjp(const Make& make, index_t batch, index_t length, Alg algorithm) {
  CAPTURE(batch, length, algorithm.name);
  const auto e = make.template operator()<double>(batch, length).with(algorithm);
  const auto single = make.template operator()<float>(batch, length).with(algorithm);
  using E = std::remove_cvref_t<decltype(e)>;
  using F = std::remove_cvref_t<decltype(single)>;
  const auto dy = ssm::normal<double, 4>(e.extents(), 1, 902);
  const auto ones = [](std::string_view, auto& t, ssm::operand) {
    if (t) t.fill(1);
  };
  auto g = ssm::zeros_like(e);
  E::operands(g, ones);
  ssm::vjp_into(e, dy, g, ssm::default_context<ssm::cpu>());
  auto g32 = ssm::zeros_like(single);
  F::operands(g32, ones);
  ssm::vjp_into(single, ssm::cast<float>(dy), g32, ssm::default_context<ssm::cpu>());

  auto probe = e;
  index_t number = 0;
  E::operands(probe, [&](std::string_view name, auto& value, ssm::operand) {
    CAPTURE(std::string(name));
    using V = std::remove_cvref_t<decltype(value)>;
    const auto saved = value;
    const auto direction = ssm::normal<double, V::rank>(value.extents(), 1, 904);
    const auto loss_at = [&](double step) {
      value = saved.clone();
      for (index_t i = 0; i < value.size(); ++i)
        value.data()[i] += step * direction.data()[i];
      const auto y = dense_product(probe);
      double sum = 0;
      for (index_t i = 0; i < y.size(); ++i)
        sum += y.data()[i] * dy.data()[i];
      return sum;
    };
    const double slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
    value = saved;
    index_t other = 0;
    E::operands(g, [&](std::string_view, const auto& gradient, ssm::operand) {
      if (other++ != number) return;
      double along = 0, scale = 0;
      for (index_t i = 0; i < gradient.size(); ++i) {
        along += direction.data()[i] * (gradient.data()[i] - 1);
        scale += std::pow(gradient.data()[i] - 1, 2);
      }
      CHECK(std::abs(along - slope) <= 1e-7 * (1e-3 + std::sqrt(scale)));
      index_t narrow = 0;
      F::operands(g32, [&](std::string_view, const auto& t, ssm::operand) {
        if constexpr (std::remove_cvref_t<decltype(t)>::rank ==
                      std::remove_cvref_t<decltype(gradient)>::rank) {
          if (narrow++ == number) CHECK(relative_error(t, gradient) < 1e-5);
        } else {
          ++narrow;
        }
      });
    });
    ++number;
  });
}

/// Packed sequences give the bits that each gives alone: outputs and the gradients of the per-token
/// operands.
template <class Alg, class Make>
void check_stateless_packed(const Make& make, std::initializer_list<index_t> lengths,
                            Alg algorithm) {
  CAPTURE(algorithm.name);
  const auto layout = ssm::sequence_layout::from_lengths(lengths);
  const auto whole = make.template operator()<float>(1, layout.tokens()).with(algorithm);
  const auto together = whole.packed(layout);
  const auto dy = ssm::normal<float, 4>(together.extents(), 1, 912);
  const auto y = ssm::eval(together);
  const auto g = ssm::vjp(together, dy);
  for (index_t i = 0; i < layout.sequences(); ++i) {
    const index_t begin = layout.begin(i), end = layout.end(i);
    CAPTURE(begin, end);
    auto alone = tokens_of(whole, begin, end);
    alone.mixer.layout = ssm::sequence_layout::rectangular(1, end - begin);
    CHECK(same_bits(y.slice(1, begin, end), ssm::eval(alone)));
    if (begin == end) continue;
    const auto own = ssm::vjp(alone, dy.slice(1, begin, end).clone());
    using E = std::remove_cvref_t<decltype(alone)>;
    index_t number = 0;
    E::operands(g, [&](std::string_view, const auto& gradient, ssm::operand kind) {
      const index_t mine = number++;
      index_t other = 0;
      E::operands(own, [&](std::string_view, const auto& t, ssm::operand) {
        using A = std::remove_cvref_t<decltype(gradient)>;
        if constexpr (std::is_same_v<A, std::remove_cvref_t<decltype(t)>> && A::rank >= 3) {
          if (other == mine && kind == ssm::operand::per_token) {
            CHECK(same_bits(gradient.slice(1, begin, end), t));
          }
        }
        ++other;
      });
    });
  }
}

/// One thread and three give the same bits, forward and backward.
template <class Alg, class Make>
void check_stateless_threads(const Make& make, index_t batch, index_t length, Alg algorithm) {
  CAPTURE(algorithm.name, batch, length);
  const auto e = make.template operator()<float>(batch, length).with(algorithm);
  const auto dy = ssm::normal<float, 4>(e.extents(), 1, 922);
  const ssm::cpu::context one(1), three(3);
  CHECK(same_bits(ssm::eval(e, one), ssm::eval(e, three)));
  const auto g1 = ssm::vjp(e, dy, one), g3 = ssm::vjp(e, dy, three);
  using E = std::remove_cvref_t<decltype(e)>;
  index_t number = 0;
  E::operands(g1, [&](std::string_view name, const auto& a, ssm::operand) {
    CAPTURE(std::string(name));
    const index_t mine = number++;
    index_t other = 0;
    E::operands(g3, [&](std::string_view, const auto& b, ssm::operand) {
      if constexpr (std::is_same_v<decltype(a), decltype(b)>) {
        if (other == mine) CHECK(same_bits(a, b));
      }
      ++other;
    });
  });
}

}  // namespace ssm_test
