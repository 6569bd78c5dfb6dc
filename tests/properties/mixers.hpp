#pragma once

#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/gated_linear.hpp>
#include <ssmlib/lower/kv_state.hpp>
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/lower/toeplitz.hpp>

#include <algorithm>
#include <string_view>
#include <type_traits>
#include <utility>

namespace properties {

using ssm::index_t;
using ssm::operand;
using ssm::shape;
using ssm::tensor;

struct sizes {
  index_t batch = 2, length = 70, heads = 4;
  index_t query_heads = 2, key_heads = 2;  ///< of Q, K, C and B
  index_t keys = 5, features = 3;
  index_t window = 9;
  std::uint64_t seed = 1;
};

/// Random operands of every mixer. Those of float are those of double, rounded.
template <class T>
struct operands {
  sizes s;
  std::uint64_t seed;  // of the next tensor; before them, because they are made from it
  tensor<T, 4> q, k, x, log_gate;
  tensor<T, 3> log_decay, step;  // step sizes and rates, in (0, 1)
  tensor<T, 2> kernel, a;
  tensor<T, 1> gamma, d;

  explicit operands(const sizes& wanted)
      : s(wanted),
        seed(100 * wanted.seed),
        q(random<4>({s.batch, s.length, s.query_heads, s.keys}, -1, 1)),
        k(random<4>({s.batch, s.length, s.key_heads, s.keys}, -1, 1)),
        x(random<4>({s.batch, s.length, s.heads, s.features}, -1, 1)),
        log_gate(random<4>({s.batch, s.length, s.heads, s.keys}, -0.5, 0)),
        log_decay(random<3>({s.batch, s.length, s.heads}, -0.5, 0)),
        step(random<3>({s.batch, s.length, s.heads}, 0.05, 0.95)),
        kernel(random<2>({s.heads, s.batch * s.length}, -1, 1)),
        a(random<2>({s.heads, s.keys}, -2, -0.1)),
        gamma(random<1>({s.heads}, 0.8, 1)),
        d(random<1>({s.heads}, -1, 1)) {
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t t = 0; t < s.length; ++t) {
        for (index_t h = 0; h < s.key_heads; ++h)
          normalize(&k(b, t, h, 0));
      }
    }
  }

  [[nodiscard]] auto gram() const { return q * ssm::transpose(k); }

  [[nodiscard]] auto attention() const { return softmax(gram() * 0.7 + ssm::causal) * x; }
  [[nodiscard]] auto window() const { return softmax(gram() + ssm::window(s.window)) * x; }
  [[nodiscard]] auto linear() const { return hadamard(ssm::causal, gram()) * x; }
  [[nodiscard]] auto normalized() const {
    return normalize_rows(
               hadamard(ssm::causal, with_features(ssm::feature::elu_plus_one{}, gram()))) *
           x;
  }
  [[nodiscard]] auto retention() const { return hadamard(decay(gamma), gram()) * x; }
  [[nodiscard]] auto mamba2() const {
    return (hadamard(semiseparable(log_decay, step), gram()) + diagonal(d)) * x;
  }
  [[nodiscard]] auto selective_scan() const { return (selective(step, a, q, k) + diagonal(d)) * x; }
  [[nodiscard]] auto gated_linear() const { return gated(log_gate, gram()) * x; }
  [[nodiscard]] auto delta() const { return delta_rule(log_decay, step, gram()) * x; }
  [[nodiscard]] auto toeplitz_attention() const { return hadamard(toeplitz(kernel), gram()) * x; }
  [[nodiscard]] auto toeplitz_mask() const { return toeplitz(kernel) * x; }

  /// Mixers with a state of fixed size.
  template <class F>
  void for_each_recurrent(F f) const {
    f("linear attention", linear());
    f("normalized linear attention", normalized());
    f("retention", retention());
    f("mamba2", mamba2());
    f("selective scan", selective_scan());
    f("gated linear attention", gated_linear());
    f("delta rule", delta());
  }
  template <class F>
  void for_each(F f) const {
    for_each_recurrent(f);
    f("attention", attention());
    f("window attention", window());
    f("toeplitz attention", toeplitz_attention());
    f("toeplitz", toeplitz_mask());
  }

 private:
  template <int R>
  tensor<T, R> random(const shape<R>& extents, double low, double high) {
    return ssm::uniform<T, R>(extents, low, high, seed++);
  }
  // Keys of length one at most, as the delta rule wants them.
  void normalize(T* key) const {
    double square = 0;
    for (index_t i = 0; i < s.keys; ++i)
      square += static_cast<double>(key[i]) * static_cast<double>(key[i]);
    for (index_t i = 0; i < s.keys; ++i)
      key[i] = static_cast<T>(static_cast<double>(key[i]) / std::sqrt(std::max(square, 1e-12)));
  }
};

template <class E>
using element = typename E::value_type;

/// f(product with an algorithm) for every algorithm of a product's mixer.
template <class E, class F>
void for_each_algorithm(const E& e, F f) {
  E::mixer_type::algorithms::for_each([&](auto algorithm) {
    CAPTURE(algorithm.name);
    f(e.with(algorithm));
  });
}

/// Whether an algorithm mixes all tokens by a transform, so that bits depend on later tokens.
template <class E>
inline constexpr bool by_transform =
    std::is_same_v<typename E::algorithm_type, ssm::alg::structured>;

/// mixer * X into a tensor of NaN, so that nothing may be left out.
template <class E>
tensor<element<E>, 4> product_of(const E& e) {
  const auto y = ssm_test::poisoned<element<E>, 4>(e.extents());
  ssm::eval_into(e, y);
  return y;
}

/// dense() times X, by loops in double.
template <class E>
tensor<double, 4> definition_of(const E& e) {
  const tensor<double, 4> m = e.mixer.dense();
  auto y = tensor<double, 4>::zeros(e.extents());
  const index_t heads = y.extent(2), length = y.extent(1);
  const bool packed = m.extent(2) != length;  // one matrix for the whole batch
  for (index_t b = 0; b < y.extent(0); ++b) {
    const index_t block = packed ? 0 : b, first = packed ? b * length : 0;
    for (index_t h = 0; h < heads; ++h) {
      const index_t hm = ssm::group_of(h, heads, m.extent(1)),
                    hx = ssm::group_of(h, heads, e.x.extent(2));
      for (index_t t = 0; t < length; ++t) {
        for (index_t s = 0; s < length; ++s) {
          const double weight = m(block, hm, first + t, first + s);
          for (index_t p = 0; p < y.extent(3); ++p)
            y(b, t, h, p) += weight * static_cast<double>(e.x(b, s, hx, p));
        }
      }
    }
  }
  return y;
}

/// The tokens [begin, end) of every sequence.
template <class E>
E tokens_of(E e, index_t begin, index_t end) {
  E::operands(e, [&](std::string_view, auto& t, operand kind) {
    if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
      if (kind == operand::per_token && t) t = t.slice(1, begin, end);
    }
  });
  e.mixer.layout = ssm::sequence_layout::rectangular(e.x.extent(0), end - begin);
  return e;
}

/// The largest |gradient of a - gradient of b| in norm, operand by operand; of products of one type
/// but for the algorithm and the element type.
template <class A, class B>
double gradient_difference(const A& a, const B& b) {
  double worst = 0;
  A::operands(a, [&](std::string_view name, const auto& left, operand) {
    B::operands(b, [&](std::string_view other, const auto& right, operand) {
      if constexpr (std::remove_cvref_t<decltype(left)>::rank ==
                    std::remove_cvref_t<decltype(right)>::rank) {
        if (name != other) return;
        const double error = ssm_test::relative_error(left, right);
        worst = error <= worst ? worst : error;  // keeps NaN
      }
    });
  });
  return worst;
}

}  // namespace properties
