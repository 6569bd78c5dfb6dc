#include "support/catch.hpp"
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/state.hpp>
#include <ssmlib/tensor/random.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

using namespace ssm;

namespace {

template <Real T>
constexpr double tolerance = std::is_same_v<T, double> ? 1e-12 : 1e-5;

/// |a - b| / |b|, and infinite if anything is NaN.
template <class A, class B>
double relative_error(const A& a, const B& b) {
  REQUIRE(a.extents() == b.extents());
  const auto u = a.contiguous();
  const auto v = b.contiguous();
  double error = 0, norm = 0;
  for (index_t i = 0; i < u.size(); ++i) {
    const double x = static_cast<double>(u.data()[i]), y = static_cast<double>(v.data()[i]);
    if (std::isnan(x) || std::isnan(y)) return std::numeric_limits<double>::infinity();
    error += (x - y) * (x - y);
    norm += y * y;
  }
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

template <class T, int R>
bool same_bits(const tensor<T, R>& a, const tensor<T, R>& b) {
  REQUIRE(a.extents() == b.extents());
  bool same = true;
  a.zip_with(b,
             [&](const T& x, const T& y) { same = same && std::memcmp(&x, &y, sizeof(T)) == 0; });
  return same;
}

/// dense() * X in double: the definition.
template <class E>
tensor<double, 4> by_definition(const E& e) {
  const tensor<double, 4> m = e.mixer.dense();
  auto y = tensor<double, 4>::zeros(e.extents());
  const index_t heads = y.extent(2), length = e.x.extent(1);
  const bool packed = m.extent(2) != length;
  for (index_t b = 0; b < y.extent(0); ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t t = 0; t < length; ++t) {
        for (index_t s = 0; s < length; ++s) {
          const double w = packed ? m(0, h * m.extent(1) / heads, b * length + t, b * length + s)
                                  : m(b, h * m.extent(1) / heads, t, s);
          for (index_t p = 0; p < y.extent(3); ++p) {
            y(b, t, h, p) += w * static_cast<double>(e.x(b, s, h * e.x.extent(2) / heads, p));
          }
        }
      }
    }
  }
  return y;
}

struct sizes {
  index_t batch = 2, length = 37, heads = 4, query_heads = 4, key_heads = 4, value_heads = 4,
          mask_heads = 4, keys = 5, features = 7;
};

template <Real T>
struct operands {
  tensor<T, 4> q, k, x;
  tensor<T, 3> log_a, weight;
  tensor<T, 1> gamma, d;

  explicit operands(const sizes& s, double slowest = -0.4)
      : q(uniform<T, 4>({s.batch, s.length, s.query_heads, s.keys}, -1, 1, 1)),
        k(uniform<T, 4>({s.batch, s.length, s.key_heads, s.keys}, -1, 1, 2)),
        x(uniform<T, 4>({s.batch, s.length, s.value_heads, s.features}, -1, 1, 3)),
        log_a(uniform<T, 3>({s.batch, s.length, s.mask_heads}, slowest, 0, 4)),
        weight(uniform<T, 3>({s.batch, s.length, s.mask_heads}, 0.1, 1, 5)),
        gamma(uniform<T, 1>({s.mask_heads}, 0.8, 1, 6)),
        d(uniform<T, 1>({s.heads}, -1, 1, 7)) {}

  auto gram() const { return q * transpose(k) * 0.5; }
  auto linear_attention() const { return hadamard(causal, gram()) * x; }
  auto normalized() const {
    return normalize_rows(hadamard(causal, with_features(feature::elu_plus_one{}, gram()))) * x;
  }
  auto retention() const { return hadamard(decay(gamma), gram()) * x; }
  auto gated() const { return hadamard(semiseparable(log_a), gram()) * x; }
  auto mamba2() const { return (hadamard(semiseparable(log_a, weight), gram()) + diagonal(d)) * x; }

  template <class F>
  void for_each(F f) const {
    f("linear attention", linear_attention());
    f("normalized linear attention", normalized());
    f("retention", retention());
    f("gated", gated());
    f("mamba2", mamba2());
    f("mask: causal", causal_mask<T>{} * x);
    f("mask: decay", decay(gamma) * x);
    f("mask: semiseparable", semiseparable(log_a) * x);
  }
};

template <class E, class F>
void for_each_algorithm(const E& e, F f) {
  E::mixer_type::algorithms::for_each([&](auto algorithm) { f(e.with(algorithm)); });
}

/// Gradients of sum(dy * y) + sum(d_final * final), by the VJP and by central differences of the
/// recurrent form, for every operand and the initial state.
template <class E>
double worst_gradient_error(const E& e, bool with_state) {
  using M = typename E::mixer_type;
  const shape<4> extents = e.extents();
  const auto dy = uniform<double, 4>(extents, -1, 1, 21);
  tensor<double, 4> initial, d_final, d_initial;
  if constexpr (RecurrentMixer<M>) {
    if (with_state) {
      const shape<4> state{layout_of(e.mixer).sequences(), extents[2], e.mixer.key_size(),
                           e.mixer.state_features(extents[3])};
      initial = uniform<double, 4>(state, 0.1, 1, 22);
      d_final = uniform<double, 4>(state, -1, 1, 23);
      d_initial = tensor<double, 4>::zeros(state);
    }
  }
  E gradients = zeros_like(e);
  vjp_into(e, dy, gradients, {initial, d_final, d_initial});

  E probe = e;
  E::operands(probe, [](std::string_view, auto& t, operand) { t = t.clone(); });
  const auto loss = [&] {
    const auto reference = probe.with(alg::recurrent{});
    tensor<double, 4> y(extents), final;
    if (d_final) final = tensor<double, 4>(d_final.extents());
    eval_into(reference, y, {initial, final, {}, 0, nullptr});
    double sum = 0;
    y.zip_with(dy, [&](double a, double b) { sum += a * b; });
    if (d_final) final.zip_with(d_final, [&](double a, double b) { sum += a * b; });
    return sum;
  };
  double worst = 0;
  const auto compare = [&](auto& value, const auto& gradient) {
    double largest = 0, error = 0;
    for (index_t i = 0; i < value.size(); ++i) {
      double& element = value.data()[i];
      const double saved = element, step = 1e-6;
      element = saved + step;
      const double above = loss();
      element = saved - step;
      const double slope = (above - loss()) / (2 * step);
      element = saved;
      const double difference = std::abs(slope - gradient.data()[i]);
      error = std::isnan(difference) ? 1e300 : std::max(error, difference);
      largest = std::max(largest, std::abs(slope));
    }
    worst = std::max(worst, error / std::max(largest, 0.01));  // some gradients are 0 at T = 1
  };
  E::operands(probe, [&](std::string_view name, auto& value, operand) {
    E::operands(gradients, [&](std::string_view other, auto& gradient, operand) {
      if constexpr (std::same_as<decltype(value), decltype(gradient)>) {
        if (name == other) compare(value, gradient);
      }
    });
  });
  if (initial) compare(initial, d_initial);
  return worst;
}

}  // namespace

TEMPLATE_TEST_CASE("mixers/semiseparable: every algorithm multiplies by dense()",
                   "[mixers][semiseparable]", float, double) {
  const index_t length = GENERATE(1, 2, 7, 8, 9, 63, 64, 65, 150);
  sizes s;
  s.length = length;
  const operands<TestType> o(s);
  o.for_each([&](const char* name, const auto& e) {
    const auto expected = by_definition(e);
    for_each_algorithm(e, [&](const auto& product) {
      CAPTURE(name, length, product.algorithm.name);
      CHECK(relative_error(eval(product), expected) < tolerance<TestType>);
    });
    if constexpr (std::remove_cvref_t<decltype(e)>::mixer_type::algorithms::template contains<
                      alg::chunked>) {
      for (const index_t chunk : {1, 7, 16, 100}) {
        CAPTURE(name, length, chunk);
        CHECK(relative_error(eval(e.with(alg::chunked{chunk})), expected) < tolerance<TestType>);
      }
    }
  });
}

TEMPLATE_TEST_CASE("mixers/semiseparable: head counts broadcast by groups",
                   "[mixers][semiseparable]", float, double) {
  // query, key, value, mask, d heads; the largest is the result's.
  const auto heads = GENERATE(table<int, int, int, int, int>({{1, 1, 6, 6, 6},
                                                              {2, 1, 6, 6, 3},
                                                              {1, 3, 6, 6, 1},
                                                              {6, 2, 1, 3, 2},
                                                              {1, 1, 2, 8, 8},
                                                              {1, 1, 1, 1, 1},
                                                              {4, 4, 2, 1, 4}}));
  sizes s;
  std::tie(s.query_heads, s.key_heads, s.value_heads, s.mask_heads, s.heads) = heads;
  s.features = 33;
  const operands<TestType> o(s);
  o.for_each([&](const char* name, const auto& e) {
    const auto expected = by_definition(e);
    for_each_algorithm(e, [&](const auto& product) {
      CAPTURE(name, product.algorithm.name);
      CHECK(relative_error(eval(product), expected) < tolerance<TestType>);
    });
  });
}

TEST_CASE("mixers/semiseparable: the vjp of every operand and of the state is the derivative",
          "[mixers][semiseparable]") {
  const index_t length = GENERATE(1, 4, 5, 11);
  sizes s;
  s.batch = 1;
  s.length = length;
  s.heads = s.value_heads = s.mask_heads = 4;
  s.query_heads = 1;
  s.key_heads = 2;
  s.keys = 3;
  s.features = 3;
  const operands<double> o(s);
  o.for_each([&](const char* name, const auto& e) {
    for_each_algorithm(e, [&](const auto& product) {
      CAPTURE(name, length, product.algorithm.name);
      CHECK(worst_gradient_error(product, false) < 1e-7);
      CHECK(worst_gradient_error(product, true) < 1e-7);
    });
    if constexpr (std::remove_cvref_t<decltype(e)>::mixer_type::algorithms::template contains<
                      alg::chunked>) {
      CAPTURE(name, length);
      CHECK(worst_gradient_error(e.with(alg::chunked{4}), true) < 1e-7);
    }
  });
}

TEST_CASE("mixers/semiseparable: the vjp adds up over heads that share an operand",
          "[mixers][semiseparable]") {
  sizes s;
  s.batch = 2;
  s.length = 6;
  s.heads = 2;
  s.query_heads = 4;
  s.key_heads = 1;
  s.value_heads = 2;
  s.mask_heads = 1;
  s.keys = 2;
  s.features = 2;
  const operands<double> o(s);
  o.for_each([&](const char* name, const auto& e) {
    CAPTURE(name);
    CHECK(worst_gradient_error(e, true) < 1e-7);
  });
}

TEST_CASE("mixers/semiseparable: the vjp is the same for all chunk sizes over many panels",
          "[mixers][semiseparable]") {
  sizes s;
  s.batch = 3;
  s.length = 701;
  s.heads = s.value_heads = s.mask_heads = GENERATE(1, 4);
  s.query_heads = s.key_heads = 1;
  s.features = 64;
  const operands<double> o(s, -0.1);
  const auto e = o.mamba2();
  const auto dy = uniform<double, 4>(e.extents(), -1, 1, 9);
  const auto expected = vjp(e.with(alg::quadratic{}), dy);
  for (const index_t chunk : {16, 64, 300}) {
    CAPTURE(chunk);
    const auto g = vjp(e.with(alg::chunked{chunk}), dy);
    CHECK(relative_error(g.x, expected.x) < 1e-12);
    CHECK(relative_error(g.mixer.d, expected.mixer.d) < 1e-12);
    CHECK(relative_error(g.mixer.inner.kernel.q, expected.mixer.inner.kernel.q) < 1e-12);
    CHECK(relative_error(g.mixer.inner.kernel.k, expected.mixer.inner.kernel.k) < 1e-12);
    CHECK(relative_error(g.mixer.inner.mask.log_a, expected.mixer.inner.mask.log_a) < 1e-12);
    CHECK(relative_error(g.mixer.inner.mask.weight, expected.mixer.inner.mask.weight) < 1e-12);
  }
}

TEST_CASE("mixers/semiseparable: gradients in float agree with those in double",
          "[mixers][semiseparable]") {
  sizes s;
  s.length = 300;
  s.keys = 16;
  s.features = 24;
  s.query_heads = s.key_heads = 1;
  const operands<float> o(s);
  operands<double> exact(s);
  exact.q = cast<double>(o.q);
  exact.k = cast<double>(o.k);
  exact.x = cast<double>(o.x);
  exact.log_a = cast<double>(o.log_a);
  exact.weight = cast<double>(o.weight);
  exact.d = cast<double>(o.d);
  const auto dy = uniform<float, 4>(o.mamba2().extents(), -1, 1, 9);
  const auto expected = vjp(exact.mamba2().with(alg::quadratic{}), cast<double>(dy));
  for_each_algorithm(o.mamba2(), [&](const auto& e) {
    CAPTURE(e.algorithm.name);
    const auto g = vjp(e, dy);
    CHECK(relative_error(g.x, expected.x) < 1e-5);
    CHECK(relative_error(g.mixer.d, expected.mixer.d) < 1e-5);
    CHECK(relative_error(g.mixer.inner.kernel.q, expected.mixer.inner.kernel.q) < 1e-5);
    CHECK(relative_error(g.mixer.inner.kernel.k, expected.mixer.inner.kernel.k) < 1e-5);
    CHECK(relative_error(g.mixer.inner.mask.log_a, expected.mixer.inner.mask.log_a) < 1e-5);
    CHECK(relative_error(g.mixer.inner.mask.weight, expected.mixer.inner.mask.weight) < 1e-5);
  });
}

TEST_CASE("mixers/semiseparable: a vjp adds to its gradients and skips absent ones",
          "[mixers][semiseparable]") {
  const operands<double> o(sizes{});
  const auto e = o.mamba2();
  const auto dy = uniform<double, 4>(e.extents(), -1, 1, 9);
  const auto once = vjp(e, dy);
  auto twice = once;
  twice.x = once.x.clone();
  twice.mixer.inner.kernel = {};
  twice.mixer.inner.mask = {};
  twice.mixer.d = {};
  vjp_into(e, dy, twice, default_context<cpu>());
  auto doubled = once.x.clone();
  detail::add_to(doubled, once.x);
  CHECK(relative_error(twice.x, doubled) < 1e-15);
}

TEMPLATE_TEST_CASE("mixers/semiseparable: packed sequences give the bits of separate ones",
                   "[mixers][semiseparable]", float, double) {
  sizes s;
  s.batch = 1;
  s.length = 260;
  s.query_heads = 2;
  const operands<TestType> o(s);
  const auto layout = sequence_layout::from_lengths({0, 1, 130, 0, 3, 126, 0});
  o.for_each([&](const char* name, const auto& whole) {
    for_each_algorithm(whole.packed(layout), [&](const auto& e) {
      CAPTURE(name, e.algorithm.name);
      const auto y = eval(e);
      const auto dy = uniform<TestType, 4>(e.extents(), -1, 1, 9);
      const auto g = vjp(e, dy);
      for (index_t i = 0; i < layout.sequences(); ++i) {
        if (layout.length(i) == 0) continue;
        const index_t begin = layout.begin(i), end = layout.end(i);
        const auto alone = detail::slice_tokens(e, begin, end);
        CHECK(same_bits(eval(alone), y.slice(1, begin, end)));
        auto gradients = zeros_like(alone);
        vjp_into(alone, dy.slice(1, begin, end), gradients, default_context<cpu>());
        CHECK(same_bits(gradients.x, g.x.slice(1, begin, end)));
      }
      CHECK(relative_error(y, by_definition(e)) < tolerance<TestType>);
    });
  });
}

TEMPLATE_TEST_CASE("mixers/semiseparable: a sequence in two calls gives the result of one",
                   "[mixers][semiseparable]", float, double) {
  sizes s;
  s.batch = 1;
  s.length = 100;
  s.query_heads = 1;
  const operands<TestType> o(s);
  const index_t cut = GENERATE(1, 37, 64, 99);
  o.for_each([&](const char* name, const auto& whole) {
    using M = typename std::remove_cvref_t<decltype(whole)>::mixer_type;
    if constexpr (RecurrentMixer<M>) {
      for_each_algorithm(whole, [&](const auto& e) {
        CAPTURE(name, e.algorithm.name, cut);
        const auto expected = eval_with_state(e, {});
        const auto first = eval_with_state(detail::slice_tokens(e, 0, cut), {});
        const auto second =
            eval_with_state(detail::slice_tokens(e, cut, s.length), first.final_state);
        if (std::same_as<std::remove_cvref_t<decltype(e.algorithm)>, alg::recurrent>) {
          CHECK(same_bits(first.y, expected.y.slice(1, 0, cut)));
          CHECK(same_bits(second.y, expected.y.slice(1, cut, s.length)));
          CHECK(same_bits(second.final_state, expected.final_state));
        } else {
          CHECK(relative_error(first.y, expected.y.slice(1, 0, cut)) < tolerance<TestType>);
          CHECK(relative_error(second.y, expected.y.slice(1, cut, s.length)) < tolerance<TestType>);
          CHECK(relative_error(second.final_state, expected.final_state) < tolerance<TestType>);
        }
      });
    }
  });
}

TEST_CASE("mixers/semiseparable: the final state of an empty sequence is its initial state",
          "[mixers][semiseparable]") {
  sizes s;
  s.batch = 1;
  s.length = 5;
  const operands<double> o(s);
  const auto layout = sequence_layout::from_lengths({0, 5, 0});
  for_each_algorithm(o.mamba2().packed(layout), [&](const auto& e) {
    const auto initial = uniform<double, 4>({3, 4, s.keys, s.features}, -1, 1, 11);
    const auto with = eval_with_state(e, initial);
    CHECK(same_bits(with.final_state.slice(0, 0, 1), initial.slice(0, 0, 1)));
    CHECK(same_bits(with.final_state.slice(0, 2, 3), initial.slice(0, 2, 3)));
    const auto without = eval_with_state(e, {});
    CHECK(same_bits(without.final_state.slice(0, 2, 3),
                    tensor<double, 4>::zeros(1, 4, s.keys, s.features)));
  });
}

TEST_CASE("mixers/semiseparable: recurrent keeps the state before each token in the ring",
          "[mixers][semiseparable]") {
  sizes s;
  s.batch = 1;
  s.length = 9;
  const operands<double> o(s);
  const auto layout = sequence_layout::from_lengths({4, 5});
  const auto e = o.mamba2().packed(layout).with(alg::recurrent{});
  const index_t slots = 8, first[] = {6, 0};
  auto ring = tensor<double, 4>::zeros(slots * 2, 4, s.keys, s.features);
  tensor<double, 4> y(e.extents());
  eval_into(e, y, {{}, {}, ring, slots, first});
  for (index_t i = 0; i < 2; ++i) {
    for (index_t t = 0; t < layout.length(i); ++t) {
      const auto before =
          eval_with_state(detail::slice_tokens(e, layout.begin(i), layout.begin(i) + t), {});
      const index_t row = (first[i] + t) % slots * 2 + i;
      CHECK(same_bits(ring.slice(0, row, row + 1), before.final_state));
    }
  }
}

TEMPLATE_TEST_CASE("mixers/semiseparable: extreme decays mixed in a chunk stay finite and right",
                   "[mixers][semiseparable]", float, double) {
  sizes s;
  s.length = 90;
  const operands<TestType> o(s);
  const double infinity = std::numeric_limits<double>::infinity();
  const double values[] = {0,    -1e-8, -30, -1e4,  -0.01, -infinity, 0, -1e-20,
                           -103, -0.5,  -0., -90.5, -1e-3, -1e30,     0, -0.1};
  for (index_t i = 0; i < o.log_a.size(); ++i) {
    o.log_a.data()[i] = static_cast<TestType>(values[(i * 7 + i / 90) % 16]);
  }
  const auto e = o.mamba2();
  const auto expected = by_definition(e);
  const auto dy = uniform<TestType, 4>(e.extents(), -1, 1, 9);
  const auto gradient = vjp(e.with(alg::quadratic{}), dy);
  for_each_algorithm(e, [&](const auto& product) {
    CAPTURE(product.algorithm.name);
    CHECK(relative_error(eval(product), expected) < tolerance<TestType>);
    const auto g = vjp(product, dy);
    CHECK(relative_error(g.mixer.inner.mask.log_a, gradient.mixer.inner.mask.log_a) <
          tolerance<TestType>);
    CHECK(relative_error(g.mixer.inner.kernel.q, gradient.mixer.inner.kernel.q) <
          tolerance<TestType>);
    CHECK(relative_error(g.x, gradient.x) < tolerance<TestType>);
  });
}

TEST_CASE("mixers/semiseparable: nothing before a reset reaches what follows, infinities included",
          "[mixers][semiseparable]") {
  sizes s;
  s.batch = 1;
  s.length = 40;
  operands<float> o(s);
  for (index_t h = 0; h < 4; ++h)
    o.log_a(0, 20, h) = -std::numeric_limits<float>::infinity();
  for_each_algorithm(o.gated(), [&](const auto& e) {
    CAPTURE(e.algorithm.name);
    const auto before = eval(e);
    auto changed = e;
    changed.x = e.x.clone();
    for (index_t t = 0; t < 20; ++t)
      changed.x(0, t, 1, 2) = 1e30f;
    CHECK(same_bits(eval(changed).slice(1, 20, 40), before.slice(1, 20, 40)));
  });
}

TEST_CASE("mixers/semiseparable: outputs do not depend on later tokens, to the bit",
          "[mixers][semiseparable]") {
  sizes s;
  s.length = 140;
  const operands<float> o(s);
  o.for_each([&](const char* name, const auto& whole) {
    for_each_algorithm(whole, [&](const auto& e) {
      CAPTURE(name, e.algorithm.name);
      auto changed = e;
      using E = std::remove_cvref_t<decltype(e)>;
      E::operands(changed, [&](std::string_view, auto& t, operand kind) {
        if (kind == operand::parameter) return;
        t = t.clone();
        if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 3) t.slice(1, 77, 78).fill(-0.7f);
      });
      CHECK(same_bits(eval(changed).slice(1, 0, 77), eval(e).slice(1, 0, 77)));
    });
  });
}

TEST_CASE("mixers/semiseparable: results are the same bits with any number of threads",
          "[mixers][semiseparable][threads]") {
  sizes s;
  s.length = 500;
  s.heads = s.value_heads = s.mask_heads = GENERATE(1, 4);
  s.query_heads = s.key_heads = 1;
  s.features = 64;
  const operands<float> o(s);
  const cpu::context one(1), three(3);
  for_each_algorithm(o.mamba2(), [&](const auto& e) {
    CAPTURE(e.algorithm.name);
    CHECK(same_bits(eval(e, one), eval(e, three)));
    const auto dy = uniform<float, 4>(e.extents(), -1, 1, 9);
    const auto a = vjp(e, dy, one), b = vjp(e, dy, three);
    CHECK(same_bits(a.x, b.x));
    CHECK(same_bits(a.mixer.d, b.mixer.d));
    CHECK(same_bits(a.mixer.inner.kernel.q, b.mixer.inner.kernel.q));
    CHECK(same_bits(a.mixer.inner.kernel.k, b.mixer.inner.kernel.k));
    CHECK(same_bits(a.mixer.inner.mask.log_a, b.mixer.inner.mask.log_a));
  });
}

TEST_CASE("mixers/semiseparable: operands and gradients may be parts of one projection",
          "[mixers][semiseparable]") {
  sizes s;
  s.query_heads = s.key_heads = 1;
  const operands<double> o(s);
  const index_t x_size = 4 * s.features, row = x_size + 2 * s.keys + 3;
  tensor<double, 3> whole(2, s.length, row);
  whole.fill(std::nan(""));
  auto parts = o;
  parts.x = whole.slice(2, 0, x_size).reshape(index_t{2}, s.length, index_t{4}, s.features);
  parts.k = whole.slice(2, x_size, x_size + s.keys).reshape(index_t{2}, s.length, 1, s.keys);
  parts.q =
      whole.slice(2, x_size + s.keys, x_size + 2 * s.keys).reshape(index_t{2}, s.length, 1, s.keys);
  parts.x.copy_from(o.x);
  parts.k.copy_from(o.k);
  parts.q.copy_from(o.q);
  const auto dy = uniform<double, 4>(o.mamba2().extents(), -1, 1, 9);
  for_each_algorithm(o.mamba2(), [&](const auto& e) {
    const auto strided = parts.mamba2().with(e.algorithm);
    CHECK(same_bits(eval(strided), eval(e)));
    const auto expected = vjp(e, dy);
    const auto gradient = tensor<double, 3>::zeros(whole.extents());
    auto g = zeros_like(strided);
    g.x = parts.x.rebind(gradient.storage());
    g.mixer.inner.kernel.q = parts.q.rebind(gradient.storage());
    vjp_into(strided, dy, g, default_context<cpu>());
    CHECK(same_bits(g.x.clone(), expected.x));
    CHECK(same_bits(g.mixer.inner.kernel.q.clone(), expected.mixer.inner.kernel.q));
  });
}

TEST_CASE("mixers/semiseparable: T = 0 gives an empty result and the initial state",
          "[mixers][semiseparable]") {
  sizes s;
  s.length = 0;
  const operands<float> o(s);
  for_each_algorithm(o.mamba2(), [&](const auto& e) {
    const auto initial = uniform<float, 4>({2, 4, s.keys, s.features}, -1, 1, 11);
    const auto r = eval_with_state(e, initial);
    CHECK(r.y.size() == 0);
    CHECK(same_bits(r.final_state, initial));
  });
}

TEST_CASE("mixers/semiseparable: a gamma that is not positive is refused by head",
          "[mixers][semiseparable][error]") {
  const operands<float> o(sizes{});
  o.gamma(2) = 0;
  CHECK_THROWS_WITH(eval(o.retention()), ssm_test::contains("gamma of head 2 is 0.0"));
}

// The error model of docs/numerics.md: with n = 1 / (1 - a) tokens of memory and independent
// roundings of eps = 2^-24, the state of the recurrent form has the error eps sqrt(n), that of the
// chunked form eps sqrt(n / Q); sums of N (and Q) terms and the decays come on top.
TEST_CASE("mixers/semiseparable: 100,000 tokens in float stay within the bound in both forms",
          "[mixers][semiseparable][slow]") {
  sizes s;
  s.batch = 1;
  s.length = 100000;
  s.heads = s.value_heads = s.mask_heads = 2;
  s.query_heads = s.key_heads = 1;
  s.keys = 8;
  s.features = 8;
  operands<float> o(s);
  for (index_t i = 0; i < o.log_a.size(); ++i)
    o.log_a.data()[i] -= 0.001f;
  for (index_t t = 0; t < s.length; ++t) {
    for (index_t h = 0; h < 2; ++h)
      o.log_a(0, t, h) *= (h == 0 ? 1.0f : 0.003f);
  }
  operands<double> exact(s);
  exact.q = cast<double>(o.q);
  exact.k = cast<double>(o.k);
  exact.x = cast<double>(o.x);
  exact.log_a = cast<double>(o.log_a);
  exact.weight = cast<double>(o.weight);
  exact.d = cast<double>(o.d);
  const auto expected = eval(exact.mamba2().with(alg::recurrent{}));
  const double n = 1 / (1 - std::exp(-0.003 * 0.201)), eps = 0x1p-24, size = 64;
  CHECK(relative_error(eval(o.mamba2().with(alg::recurrent{})), expected) <
        eps * (4 + std::sqrt(n) + std::sqrt(8)));
  CHECK(relative_error(eval(o.mamba2().with(alg::chunked{})), expected) <
        eps * (4 + std::sqrt(n / size) + std::sqrt(size + 8)));
}

TEST_CASE("mixers/semiseparable: decays within the spacing of float of 1 do not bias the state",
          "[mixers][semiseparable]") {
  sizes s;
  s.batch = 1;
  s.length = 20000;
  s.heads = s.value_heads = s.mask_heads = s.query_heads = s.key_heads = 1;
  const operands<float> o(s);
  for (index_t t = 0; t < s.length; ++t)
    o.log_a(0, t, 0) = t % 2 == 0 ? -2e-8f : -1e-6f;
  operands<double> exact(s);
  exact.q = cast<double>(o.q);
  exact.k = cast<double>(o.k);
  exact.x = cast<double>(o.x);
  exact.log_a = cast<double>(o.log_a);
  const auto expected = eval(exact.gated().with(alg::recurrent{}));
  const double bound = 0x1p-24 * (4 + std::sqrt(20000.0) + std::sqrt(5.0));
  CHECK(relative_error(eval(o.gated().with(alg::recurrent{})), expected) < bound);
}

TEST_CASE("mixers/semiseparable: automatic takes single steps up to 16 tokens, then chunks",
          "[mixers][semiseparable]") {
  for (const index_t length : {1, 16, 17, 200}) {
    CAPTURE(length);
    sizes s;
    s.length = length;
    const operands<float> o(s);
    const auto e = o.mamba2();
    const auto y = eval(e.with(alg::automatic{}));
    if (length <= 16) {
      CHECK(same_bits(y, eval(e.with(alg::recurrent{}))));
    } else {
      CHECK(same_bits(y, eval(e.with(alg::chunked{}))));
    }
  }
}

// Mixers that other people write: the wrappers need nothing but what every mixer has.
TEST_CASE("mixers/wrappers: normalised rows and a diagonal work over a mixer without kernels",
          "[mixers][wrappers]") {
  sizes s;
  s.batch = 1;
  s.length = 9;
  s.heads = 2;
  s.query_heads = s.key_heads = s.value_heads = 2;
  s.keys = 2;
  s.features = 3;
  const operands<double> o(s);
  const auto positive = with_features(feature::exponential{}, o.gram());  // not causal
  const auto check = [&](const auto& e) {
    CHECK(relative_error(eval(e), by_definition(e)) < 1e-12);
    const auto dy = uniform<double, 4>(e.extents(), -1, 1, 9);
    auto gradients = vjp(e, dy);
    auto probe = e;
    probe.x = e.x.clone();
    for (index_t i = 0; i < probe.x.size(); i += 5) {
      double& element = probe.x.data()[i];
      const double saved = element;
      double slope = 0;
      for (const double sign : {1.0, -1.0}) {
        element = saved + sign * 1e-6;
        by_definition(probe).zip_with(dy,
                                      [&](double y, double g) { slope += sign * y * g / 2e-6; });
      }
      element = saved;
      CHECK(gradients.x.data()[i] == ssm_test::approx(slope).margin(1e-7));
    }
    return gradients;
  };
  const auto normalized = check((normalize_rows(positive) * o.x).with(alg::quadratic{}));
  const auto skipped = check(((positive + diagonal(o.d)) * o.x).with(alg::quadratic{}));
  CHECK(relative_error(normalized.mixer.inner.k, skipped.mixer.inner.k) > 0.1);
  const auto dd = skipped.mixer.d;
  double expected = 0;  // dL/dd_1 = sum of dy x over head 1
  const auto dy = uniform<double, 4>(o.x.extents(), -1, 1, 9);
  for (index_t t = 0; t < s.length; ++t) {
    for (index_t p = 0; p < s.features; ++p)
      expected += dy(0, t, 1, p) * o.x(0, t, 1, p);
  }
  CHECK(dd(1) == ssm_test::approx(expected));
}

TEST_CASE("mixers/semiseparable: without tokens, the initial state gets the final one's gradient",
          "[mixers][semiseparable][grad]") {
  sizes s;
  s.length = 0;
  operands<double>(s).for_each([](const char* name, const auto& e) {
    using E = std::remove_cvref_t<decltype(e)>;
    if constexpr (RecurrentMixer<typename E::mixer_type>) {
      CAPTURE(name);
      const auto extents = e.extents();
      const shape<4> state{layout_of(e.mixer).sequences(), extents[2], e.mixer.key_size(),
                           e.mixer.state_features(extents[3])};
      const auto d_final = uniform<double, 4>(state, -1, 1, 23);
      const auto d_initial = tensor<double, 4>::zeros(state);
      E gradients = zeros_like(e);
      vjp_into(e, tensor<double, 4>(extents), gradients, {{}, d_final, d_initial});
      CHECK(relative_error(d_initial, d_final) == 0);
    }
  });
}
