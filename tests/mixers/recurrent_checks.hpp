#pragma once

// What every mixer with a state of fixed size must do, as functions that a test file calls with its
// own cases. A case is a functor: make<T>(batch, length) gives mixer * X with the same numbers for
// float (rounded) and double.

#include "support/catch.hpp"
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/tensor/random.hpp>

#include <cmath>
#include <cstring>
#include <limits>

namespace ssm_test {

using ssm::index_t;
using ssm::shape;
using ssm::tensor;

/// |a - expected| / |expected| in the Euclidean norm; infinite where a is not a number.
template <class A, class B, int R>
double relative_error(const tensor<A, R>& a, const tensor<B, R>& expected) {
  REQUIRE(a.extents() == expected.extents());
  const auto x = a.contiguous();
  const auto y = expected.contiguous();
  double difference = 0, size = 0;
  for (index_t i = 0; i < x.size(); ++i) {
    const double u = static_cast<double>(x.data()[i]), v = static_cast<double>(y.data()[i]);
    difference += (u - v) * (u - v);
    size += v * v;
  }
  if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
  return size == 0 ? std::sqrt(difference) : std::sqrt(difference / size);
}

template <class T, int R>
bool same_bits(const tensor<T, R>& a, const tensor<T, R>& b) {
  if (a.extents() != b.extents()) return false;
  const auto x = a.contiguous(), y = b.contiguous();
  return x.size() == 0 ||
         std::memcmp(x.data(), y.data(), static_cast<std::size_t>(x.size()) * sizeof(T)) == 0;
}

/// dense() times X, by loops in double.
template <class E>
tensor<double, 4> dense_product(const E& e) {
  const tensor<double, 4> m = e.mixer.dense();
  auto y = tensor<double, 4>::zeros(e.extents());
  const bool packed = m.extent(0) != e.x.extent(0) || m.extent(2) != e.x.extent(1);
  const index_t time = e.x.extent(1), rows = m.extent(2);
  for (index_t b = 0; b < m.extent(0); ++b) {
    for (index_t h = 0; h < y.extent(2); ++h) {
      const index_t hm = h * m.extent(1) / y.extent(2), hx = h * e.x.extent(2) / y.extent(2);
      for (index_t t = 0; t < rows; ++t) {
        for (index_t s = 0; s < rows; ++s) {
          const double entry = m(b, hm, t, s);
          for (index_t p = 0; entry != 0 && p < y.extent(3); ++p) {
            y(packed ? t / time : b, t % time, h, p) +=
                entry * static_cast<double>(e.x(packed ? s / time : b, s % time, hx, p));
          }
        }
      }
    }
  }
  return y;
}

template <class E>
shape<4> state_shape(const E& e) {
  return {ssm::layout_of(e.mixer).sequences(), e.heads(), e.mixer.key_size(),
          e.mixer.state_features(e.x.extent(3))};
}

/// Every algorithm of make's mixer, both dtypes, against dense().
template <class Alg, class Make>
void check_forward(const Make& make, index_t batch, index_t length, Alg algorithm) {
  CAPTURE(batch, length, algorithm.name);
  const auto exact = make.template operator()<double>(batch, length);
  const auto single = make.template operator()<float>(batch, length);
  const tensor<double, 4> expected = dense_product(exact);
  tensor<double, 4> y64(exact.extents());
  tensor<float, 4> y32(single.extents());
  y64.fill(std::numeric_limits<double>::quiet_NaN());
  y32.fill(std::numeric_limits<float>::quiet_NaN());
  ssm::eval_into(exact.with(algorithm), y64);
  ssm::eval_into(single.with(algorithm), y32);
  CHECK(relative_error(y64, expected) < 1e-12);
  CHECK(relative_error(y32, dense_product(single)) < 1e-5);
}

/// sum(dy y) + sum(d_final final), by the recurrent form.
template <class E>
double loss_of(const E& e, const tensor<double, 4>& initial, const tensor<double, 4>& dy,
               const tensor<double, 4>& d_final) {
  const auto r = ssm::eval_with_state(e.with(ssm::alg::recurrent{}), initial);
  double sum = 0;
  for (index_t i = 0; i < dy.size(); ++i)
    sum += dy.data()[i] * r.y.data()[i];
  for (index_t i = 0; i < d_final.size(); ++i) {
    sum += d_final.data()[i] * r.final_state.data()[i];
  }
  return sum;
}

template <class E, class T>
struct all_gradients {
  E operands;
  tensor<T, 4> initial;
};

/// The vjp of y and the final state with gradients that begin with the value `start`, to see that
/// they are added to.
template <class E, class T>
all_gradients<E, T> gradients_of(const E& e, const tensor<T, 4>& initial, const tensor<T, 4>& dy,
                                 const tensor<T, 4>& d_final, T start = T(0)) {
  all_gradients<E, T> g{ssm::zeros_like(e), tensor<T, 4>::full(state_shape(e), start)};
  E::operands(g.operands, [&](std::string_view, auto& t, ssm::operand) {
    if (t) t.fill(start);
  });
  ssm::vjp_into(e, dy, g.operands, {initial, d_final, g.initial});
  return g;
}

/// Directional derivatives along random directions of every operand and of the initial state,
/// against central differences, in double; and the float gradient against the double one.
template <class Alg, class Make>
void check_vjp(const Make& make, index_t batch, index_t length, Alg algorithm,
               double float_bound = 1e-5) {
  CAPTURE(batch, length, algorithm.name);
  const auto e = make.template operator()<double>(batch, length).with(algorithm);
  const tensor<double, 4> initial = ssm::uniform<double, 4>(state_shape(e), -1, 1, 901);
  const tensor<double, 4> dy = ssm::uniform<double, 4>(e.extents(), -1, 1, 902);
  const tensor<double, 4> d_final = ssm::uniform<double, 4>(state_shape(e), -1, 1, 903);
  const auto g = gradients_of(e, initial, dy, d_final);

  const auto compare = [&](std::string_view name, auto& value, const auto& gradient,
                           const auto& probe, const auto& start) {
    CAPTURE(std::string(name));
    const auto saved = value.clone();
    const auto direction = ssm::uniform<double, std::remove_cvref_t<decltype(value)>::rank>(
        value.extents(), -1, 1, 904);
    double along = 0, scale = 0;
    for (index_t i = 0; i < direction.size(); ++i) {
      along += direction.data()[i] * gradient.data()[i];
      scale += gradient.data()[i] * gradient.data()[i];
    }
    const double step = 1e-5;
    value = saved.clone();
    for (index_t i = 0; i < value.size(); ++i)
      value.data()[i] += step * direction.data()[i];
    const double above = loss_of(probe, start, dy, d_final);
    for (index_t i = 0; i < value.size(); ++i) {
      value.data()[i] = saved.data()[i] - step * direction.data()[i];
    }
    const double below = loss_of(probe, start, dy, d_final);
    value = saved;
    const double slope = (above - below) / (2 * step);
    CHECK(std::abs(slope - along) <= 1e-7 * (1e-3 + std::sqrt(scale)));
  };
  auto probe = e;
  std::remove_cvref_t<decltype(e)>::operands(
      probe, [&](std::string_view name, auto& value, ssm::operand) {
        std::remove_cvref_t<decltype(e)>::operands(
            g.operands, [&](std::string_view other, const auto& gradient, ssm::operand) {
              if constexpr (std::is_same_v<std::remove_cvref_t<decltype(gradient)>,
                                           std::remove_cvref_t<decltype(value)>>) {
                if (name == other) compare(name, value, gradient, probe, initial);
              }
            });
      });
  tensor<double, 4> start = initial;
  compare("initial", start, g.initial, probe, start);

  const auto single = make.template operator()<float>(batch, length).with(algorithm);
  const auto g32 = gradients_of(single, ssm::cast<float>(initial), ssm::cast<float>(dy),
                                ssm::cast<float>(d_final), 1.0f);
  const auto close = [&](std::string_view name, const auto& narrow, const auto& wide) {
    CAPTURE(std::string(name));
    auto shifted = wide.clone();
    for (index_t i = 0; i < shifted.size(); ++i)
      shifted.data()[i] += 1.0;
    CHECK(relative_error(narrow, shifted) < float_bound);
  };
  std::remove_cvref_t<decltype(single)>::operands(
      g32.operands, [&](std::string_view name, const auto& narrow, ssm::operand) {
        std::remove_cvref_t<decltype(e)>::operands(
            g.operands, [&](std::string_view other, const auto& wide, ssm::operand) {
              if constexpr (std::remove_cvref_t<decltype(narrow)>::rank ==
                            std::remove_cvref_t<decltype(wide)>::rank) {
                if (name == other) close(name, narrow, wide);
              }
            });
      });
  close("initial", g32.initial, g.initial);
}

/// Tokens [begin, end) of every per-token operand of a product with batch 1.
template <class E>
E tokens_of(E e, index_t begin, index_t end) {
  E::operands(e, [&](std::string_view, auto& t, ssm::operand kind) {
    if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
      if (kind == ssm::operand::per_token && t) t = t.slice(1, begin, end);
    }
  });
  e.mixer.layout = {};
  return e;
}

/// Packed sequences give the bits that each gives alone: outputs, final states, gradients.
template <class Alg, class Make>
void check_packed(const Make& make, std::initializer_list<index_t> lengths, Alg algorithm) {
  CAPTURE(algorithm.name);
  const auto layout = ssm::sequence_layout::from_lengths(lengths);
  const auto whole = make.template operator()<float>(1, layout.tokens()).with(algorithm);
  const auto together = whole.packed(layout);
  const tensor<float, 4> initial = ssm::uniform<float, 4>(state_shape(together), -1, 1, 911);
  const tensor<float, 4> dy = ssm::uniform<float, 4>(together.extents(), -1, 1, 912);
  const auto all = ssm::eval_with_state(together, initial);
  const auto g = gradients_of(together, initial, dy, initial);
  for (index_t i = 0; i < layout.sequences(); ++i) {
    const index_t begin = layout.begin(i), end = layout.end(i);
    if (begin == end) {
      CHECK(same_bits(all.final_state.slice(0, i, i + 1), initial.slice(0, i, i + 1)));
      continue;
    }
    const auto alone = tokens_of(whole, begin, end);
    const tensor<float, 4> mine = initial.slice(0, i, i + 1);
    const auto r = ssm::eval_with_state(alone, mine);
    CHECK(same_bits(all.y.slice(1, begin, end), r.y));
    CHECK(same_bits(all.final_state.slice(0, i, i + 1), r.final_state));
    const auto own = gradients_of(alone, mine, dy.slice(1, begin, end).clone(), mine);
    CHECK(same_bits(g.initial.slice(0, i, i + 1), own.initial));
    CHECK(same_bits(g.operands.x.slice(1, begin, end), own.operands.x));
  }
}

/// A sequence cut at any place: `recurrent` has the same bits, others agree to rounding.
template <class Alg, class Make>
void check_split(const Make& make, index_t length, Alg algorithm) {
  CAPTURE(algorithm.name, length);
  const auto e = make.template operator()<double>(1, length).with(algorithm);
  const tensor<double, 4> initial = ssm::uniform<double, 4>(state_shape(e), -1, 1, 921);
  const auto whole = ssm::eval_with_state(e, initial);
  for (const index_t cut : {index_t{1}, length / 2, length - 1}) {
    const auto first = ssm::eval_with_state(tokens_of(e, 0, cut), initial);
    const auto second = ssm::eval_with_state(tokens_of(e, cut, length), first.final_state);
    if (std::is_same_v<Alg, ssm::alg::recurrent>) {
      CHECK(same_bits(first.y, whole.y.slice(1, 0, cut)));
      CHECK(same_bits(second.y, whole.y.slice(1, cut, length)));
      CHECK(same_bits(second.final_state, whole.final_state));
    } else {
      CHECK(relative_error(first.y, whole.y.slice(1, 0, cut)) < 1e-12);
      CHECK(relative_error(second.y, whole.y.slice(1, cut, length)) < 1e-12);
      CHECK(relative_error(second.final_state, whole.final_state) < 1e-12);
    }
  }
}

/// One thread and two give the same bits, forward and backward.
template <class Alg, class Make>
void check_threads(const Make& make, index_t batch, index_t length, Alg algorithm) {
  CAPTURE(algorithm.name);
  const auto e = make.template operator()<float>(batch, length).with(algorithm);
  using E = std::remove_cvref_t<decltype(e)>;
  const ssm::cpu::context one(1), two(2);
  const auto y = ssm::eval(e, one);
  CHECK(same_bits(y, ssm::eval(e, two)));
  const auto g1 = ssm::vjp(e, y, one), g2 = ssm::vjp(e, y, two);
  E::operands(g1, [&](std::string_view name, const auto& a, ssm::operand) {
    E::operands(g2, [&](std::string_view other, const auto& b, ssm::operand) {
      if constexpr (std::is_same_v<decltype(a), decltype(b)>) {
        if (name == other) CHECK(same_bits(a, b));
      }
    });
  });
}

/// Snapshots hold the states before the last tokens.
template <class Make>
void check_snapshots(const Make& make, index_t length, index_t slots) {
  const auto e = make.template operator()<float>(1, length).with(ssm::alg::recurrent{});
  const tensor<float, 4> initial = ssm::uniform<float, 4>(state_shape(e), -1, 1, 931);
  shape<4> ring_shape = state_shape(e);
  ring_shape[0] = slots;
  const tensor<float, 4> ring(ring_shape);
  tensor<float, 4> y(e.extents());
  const index_t first = 7;
  ssm::eval_into(e, y, {initial, {}, ring, slots, &first});
  for (index_t t = std::max<index_t>(1, length - slots); t < length; ++t) {
    CAPTURE(t);
    const auto before = ssm::eval_with_state(tokens_of(e, 0, t), initial);
    const index_t slot = (first + t) % slots;
    CHECK(same_bits(ring.slice(0, slot, slot + 1), before.final_state));
  }
}

}  // namespace ssm_test
