#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/cuda/conv1d.hpp>
#include <ssmlib/nn/cuda/discretize.hpp>
#include <ssmlib/nn/cuda/embedding.hpp>
#include <ssmlib/nn/cuda/l2_normalize.hpp>
#include <ssmlib/nn/cuda/mlp.hpp>
#include <ssmlib/nn/cuda/norm.hpp>
#include <ssmlib/nn/cuda/rope.hpp>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// Every layer on the device against the same layer on the CPU in double. Operands and cotangents
// are multiples of 1/64 below 4, which bf16 holds, so that both sides see the same numbers.

namespace {

using namespace ssm;
using ssm::detail::on_backend;
using ssm::detail::on_host;
using ssm_test::contains;

template <int R>
tensor<double, R> numbers(const shape<R>& extents, double low, double high, std::uint64_t seed) {
  const auto t = uniform<double, R>(extents, low, high, seed);
  for (index_t i = 0; i < t.size(); ++i)
    t.data()[i] = std::round(64 * t.data()[i]) / 64;
  return t;
}

/// An operand that has the type of activations, or, as a parameter, of sums.
template <int R>
struct activations {
  tensor<double, R> host;
  template <class T, class B>
  [[nodiscard]] tensor<T, R, B> on() const {
    return on_backend<B>(cast<T>(host));
  }
};
template <int R>
struct parameters {
  tensor<double, R> host;
  template <class T, class B>
  [[nodiscard]] tensor<accum_t<T>, R, B> on() const {
    return on_backend<B>(cast<accum_t<T>>(host));
  }
};
template <int R>
activations<R> activation(const shape<R>& extents, std::uint64_t seed) {
  return {numbers<R>(extents, -2, 2, seed)};
}
template <int R>
parameters<R> trained(const shape<R>& extents, std::uint64_t seed, double low = -1,
                      double high = 1) {
  return {numbers<R>(extents, low, high, seed)};
}

/// f(pass, operands...) is a tuple of outputs: they, and the gradients of the operands after two
/// backward passes, so that an operation that overwrites where it should add fails.
template <class T, class B, class F, class... X>
auto outputs_and_gradients(F f, const X&... x) {
  tape<T, B> tape;
  (tape.watch(x), ...);
  for (int i = 0; i < 2; ++i) {
    const auto outputs = f(pass<T, B>{.tape = &tape}, x...);
    std::apply(
        [&](const auto&... y) {
          std::uint64_t seed = 900;
          const auto fill = [&]<class U, int R>(const tensor<U, R, B>& y_i) {
            tape.gradient(y_i).copy_from(
                on_backend<B>(cast<U>(numbers<R>(y_i.extents(), -1, 1, ++seed))));
          };
          (fill(y), ...);
        },
        outputs);
    tape.backward();
  }
  return std::pair(std::apply([](const auto&... y) { return std::make_tuple(on_host(y)...); },
                              f(pass<T, B>{}, x...)),
                   std::make_tuple(on_host(tape.gradient(x))...));
}

/// Of U where activations are T. For bf16 the error is that of rounding the result, at most 2^-9
/// each of the three times that a gradient is stored; the sums of parameters stay in float.
template <class T, class U>
constexpr double tolerance() {
  if (std::is_same_v<T, double>) return 1e-10;
  return std::is_same_v<U, bf16> ? 8e-3 : 1e-5;
}

template <class T, class... U, class... V, int... R>
void check_equal(const std::tuple<tensor<U, R>...>& actual,
                 const std::tuple<tensor<V, R>...>& wanted) {
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    const auto check = [](std::size_t index, const auto& a, const auto& w) {
      using element = typename std::decay_t<decltype(a)>::value_type;
      CAPTURE(index);
      CHECK(a.extents() == w.extents());
      if (w.size() > 0) CHECK(ssm_test::relative_error(a, w) < (tolerance<T, element>()));
    };
    (check(I, std::get<I>(actual), std::get<I>(wanted)), ...);
  }
  (std::index_sequence_for<U...>{});
}

template <class T, class F, class... Operand>
void agrees(F f, const Operand&... operands) {
  const auto wanted = outputs_and_gradients<double, cpu>(f, operands.template on<double, cpu>()...);
  const auto actual = outputs_and_gradients<T, cuda>(f, operands.template on<T, cuda>()...);
  {
    INFO("outputs");
    check_equal<T>(actual.first, wanted.first);
  }
  INFO("gradients");
  check_equal<T>(actual.second, wanted.second);
}

template <class T, int R, class B>
std::vector<double> elements_of(const tensor<T, R, B>& t) {
  const auto host = cast<double>(on_host(t).contiguous());
  return {host.data(), host.data() + host.size()};
}

struct token_case {
  index_t batch, length;
};
/// Packed sequences, an empty one among them; 33 tokens.
sequence_layout five_sequences() {
  return sequence_layout::from_lengths({17, 0, 1, 2, 13});
}

}  // namespace

TEMPLATE_TEST_CASE("cuda/nn: RMSNorm, plain, gated and grouped, agrees with the CPU", "[cuda][nn]",
                   double, float, bf16) {
  const auto order = GENERATE(gate_order::none, gate_order::norm_first, gate_order::gate_first);
  const auto [batch, length] = GENERATE(token_case{1, 1}, token_case{3, 17}, token_case{1, 1009});
  const index_t group = GENERATE(40, 7), width = 7 * group;
  const bool shared = GENERATE(false, true);
  const index_t begin = GENERATE(8, 3);  // of a slice: rows that are aligned, and not
  CAPTURE(static_cast<int>(order), length, group, shared, begin);
  const norm_options options{.eps = 1e-3, .group = group};
  agrees<TestType>(
      [&](const auto& p, const auto& wide, const auto& weight) {
        const auto x = wide.slice(2, begin, begin + width);
        if (order == gate_order::none) {
          return std::make_tuple(op::rms_norm(p, x, weight, options));
        }
        const auto gate = wide.slice(2, 2 * begin + width, 2 * begin + 2 * width);
        return std::make_tuple(op::gated_rms_norm(p, x, gate, weight, order, options));
      },
      activation<3>({batch, length, 2 * width + 16}, 1),
      trained<1>({shared ? group : width}, 2, 0.5, 1.5));
}

TEMPLATE_TEST_CASE("cuda/nn: LayerNorm agrees with the CPU", "[cuda][nn]", double, float, bf16) {
  const auto [batch, length] = GENERATE(token_case{1, 1}, token_case{3, 17}, token_case{1, 1009});
  const index_t width = GENERATE(280, 40, 21);
  CAPTURE(length, width);
  agrees<TestType>(
      [](const auto& p, const auto& x, const auto& weight, const auto& bias) {
        return std::make_tuple(op::layer_norm(p, x, weight, bias, 1e-3));
      },
      activation<3>({batch, length, width}, 1), trained<1>({width}, 2, 0.5, 1.5),
      trained<1>({width}, 3));
}

TEMPLATE_TEST_CASE("cuda/nn: LayerNorm without a bias, of a slice, agrees with the CPU",
                   "[cuda][nn]", double, float, bf16) {
  agrees<TestType>(
      [](const auto& p, const auto& wide, const auto& weight) {
        return std::make_tuple(op::layer_norm(p, wide.slice(2, 3, 43), weight));
      },
      activation<3>({2, 17, 50}, 1), trained<1>({40}, 2, 0.5, 1.5));
}

TEMPLATE_TEST_CASE("cuda/nn: the causal convolution and its last inputs agree with the CPU",
                   "[cuda][nn]", double, float, bf16) {
  const index_t width = GENERATE(1, 2, 3, 4, 6);
  const auto act = GENERATE(conv1d_activation::none, conv1d_activation::silu);
  const bool ragged = GENERATE(false, true);
  const index_t channels = GENERATE(40, 37);
  CAPTURE(width, static_cast<int>(act), ragged, channels);
  const sequence_layout layout = ragged ? five_sequences() : sequence_layout{};
  const index_t batch = ragged ? 1 : 3, length = ragged ? 33 : 17;
  agrees<TestType>(
      [&]<class T, class B>(const pass<T, B>& p, const tensor<T, 3, B>& wide, const auto& weight,
                            const auto& bias, const auto& initial) {
        const auto x = wide.slice(2, 4, 4 + channels);
        auto r = op::causal_conv1d_with_state(p, x, weight, bias, {act, layout, initial});
        return std::make_tuple(r.y, r.final_state);
      },
      activation<3>({batch, length, channels + 8}, 1), trained<2>({channels, width}, 2),
      trained<1>({channels}, 3), activation<3>({ragged ? 5 : 3, width - 1, channels}, 4));
}

TEMPLATE_TEST_CASE("cuda/nn: a long convolution without bias or state agrees with the CPU",
                   "[cuda][nn]", double, float, bf16) {
  const index_t length = GENERATE(1, 1009);
  CAPTURE(length);
  agrees<TestType>(
      [](const auto& p, const auto& x, const auto& wide_weight) {
        // The filter is a part of a larger tensor, and so is its gradient.
        return std::make_tuple(op::causal_conv1d(p, x, wide_weight.slice(1, 1, 5)));
      },
      activation<3>({2, length, 280}, 1), trained<2>({280, 6}, 2));
}

TEMPLATE_TEST_CASE(
    "cuda/nn: steps of a convolution agree with the CPU whatever the split, and "
    "their bits do not depend on it",
    "[cuda][nn]", double, float, bf16) {
  const index_t width = GENERATE(1, 2, 3, 4, 6), channels = GENERATE(40, 37);
  CAPTURE(width, channels);
  const auto inputs = activation<3>({3, 16, channels + 8}, 1);
  const auto weights = trained<2>({channels, width}, 2);
  const auto biases = trained<1>({channels}, 3);
  // Before each piece two other tokens are taken, and taken back.
  const auto advanced = [&]<class T, class B>(const pass<T, B>& p,
                                              const std::vector<index_t>& pieces, bool detours) {
    const auto x = inputs.template on<T, B>().slice(2, 4, 4 + channels);
    const auto weight = weights.template on<T, B>();
    const auto bias = biases.template on<T, B>();
    const conv1d_options<T, B> options{conv1d_activation::silu, {}, {}};
    conv_state<T, B> state(3, channels, width, 2);
    const tensor<T, 3, B> y(x.extents());
    index_t t = 0;
    for (const index_t n : pieces) {
      if (detours) {
        (void)state.advance(p, x.slice(1, 9, 11), weight, bias, options);
        state.rollback(2);
      }
      y.slice(1, t, t + n).copy_from(state.advance(p, x.slice(1, t, t + n), weight, bias, options));
      t += n;
    }
    return std::pair(elements_of(y), on_host(y));
  };
  const pass<TestType, cuda> p;
  const auto [whole, y] = advanced(p, {16}, false);
  const auto wanted = advanced(pass<double>{}, {16}, false).second;
  CHECK(ssm_test::relative_error(y, wanted) < (tolerance<TestType, TestType>()));
  CHECK(advanced(p, std::vector<index_t>(16, 1), false).first == whole);
  CHECK(advanced(p, {5, 3, 8}, false).first == whole);
  CHECK(advanced(p, {1, 7, 2, 6}, true).first == whole);
}

TEMPLATE_TEST_CASE("cuda/nn: packed steps of a convolution have the bits of separate ones",
                   "[cuda][nn]", double, float, bf16) {
  using T = TestType;
  const index_t channels = 37;
  const auto x = activation<3>({1, 90, channels}, 1).on<T, cuda>();
  const auto weight = trained<2>({channels, 4}, 2).on<T, cuda>();
  const auto bias = trained<1>({channels}, 3).on<T, cuda>();
  const std::vector<index_t> lengths{3, 0, 70, 17};
  conv_state<T, cuda> state(4, channels, 4, 1);
  const pass<T, cuda> p;
  const auto together = [&] {
    return state.advance(p, x, weight, bias,
                         {conv1d_activation::silu, sequence_layout::from_lengths(lengths), {}});
  };
  const auto first = together(), second = together();
  index_t t = 0;
  for (const index_t n : lengths) {
    conv_state<T, cuda> alone(1, channels, 4, 1);
    const auto part = x.slice(1, t, t + n);
    const conv1d_options<T, cuda> options{conv1d_activation::silu, {}, {}};
    for (const auto& packed_rows : {first, second}) {
      const auto rows = alone.advance(p, part, weight, bias, options);
      CHECK(elements_of(rows) == elements_of(packed_rows.slice(1, t, t + n)));
    }
    t += n;
  }
}

TEMPLATE_TEST_CASE("cuda/nn: the rotary embedding agrees with the CPU", "[cuda][nn]", double, float,
                   bf16) {
  const bool interleaved = GENERATE(false, true);
  const double fraction = GENERATE(1.0, 0.5, 0.0);
  const index_t features = GENERATE(64, 40);
  const bool ragged = GENERATE(false, true);
  CAPTURE(interleaved, fraction, features, ragged);
  const std::vector<index_t> first{0, 5, 100000, 7, 31};
  const sequence_layout layout = ragged ? five_sequences().at_positions(first) : sequence_layout{};
  rope_options options{fraction, 10000.0, interleaved, {}};
  if (ragged) options.scaling = llama3_scaling{};
  agrees<TestType>(
      [&](const auto& p, const auto& wide) {
        return std::make_tuple(rope(p, wide.slice(3, 8, 8 + features), layout, options));
      },
      activation<4>({ragged ? 1 : 3, ragged ? 33 : 17, 7, features + 16}, 1));
}

TEMPLATE_TEST_CASE("cuda/nn: the embedding agrees with the CPU", "[cuda][nn]", double, float,
                   bf16) {
  const auto [batch, length] = GENERATE(token_case{1, 1}, token_case{3, 17}, token_case{1, 1009});
  const index_t vocabulary = GENERATE(3, 50), width = GENERATE(40, 21);
  CAPTURE(length, vocabulary, width);
  tensor<std::int32_t, 2> ids(batch, length);
  philox random(5);
  for (index_t i = 0; i < ids.size(); ++i)
    ids.data()[i] = static_cast<std::int32_t>(random.below(vocabulary));
  agrees<TestType>([&](const auto& p,
                       const auto& table) { return std::make_tuple(op::embedding(p, ids, table)); },
                   trained<2>({vocabulary, width}, 1));
}

TEST_CASE("cuda/nn: an id outside the vocabulary is refused by name", "[cuda][nn]") {
  const auto table = tensor<float, 2, cuda>::zeros(10, 4);
  const std::int32_t id = GENERATE(10, -1);
  const auto ids = tensor<std::int32_t, 2>::full({1, 3}, id);
  CHECK_THROWS_WITH(op::embedding(pass<bf16, cuda>{}, ids, table),
                    contains("token 0 has id " + std::to_string(id)) && contains("10 entries"));
}

TEMPLATE_TEST_CASE("cuda/nn: SwiGLU and GELU agree with the CPU", "[cuda][nn]", double, float,
                   bf16) {
  const auto [batch, length] = GENERATE(token_case{1, 1}, token_case{3, 17}, token_case{1, 1009});
  const index_t width = GENERATE(40, 21);
  CAPTURE(length, width);
  agrees<TestType>(
      [&](const auto& p, const auto& wide) {
        const auto x = wide.slice(2, 0, width), up = wide.slice(2, width, 2 * width);
        return std::make_tuple(op::swiglu(p, x, up), op::gelu_tanh(p, x));
      },
      activation<3>({batch, length, 2 * width + 8}, 1));
}

TEMPLATE_TEST_CASE("cuda/nn: vectors at length one agree with the CPU", "[cuda][nn]", double, float,
                   bf16) {
  const auto [batch, length] = GENERATE(token_case{1, 1}, token_case{3, 17}, token_case{1, 1009});
  const index_t width = GENERATE(64, 24, 7);
  CAPTURE(length, width);
  agrees<TestType>(
      [&](const auto& p, const auto& wide) {
        return std::make_tuple(op::l2_normalize(p, wide.slice(3, 4, 4 + width), 1e-3));
      },
      activation<4>({batch, length, 7, width + 8}, 1));
}

TEMPLATE_TEST_CASE("cuda/nn: step sizes and log decays agree with the CPU", "[cuda][nn]", double,
                   float, bf16) {
  const auto [batch, length] = GENERATE(token_case{1, 1}, token_case{3, 17}, token_case{1, 1009});
  const index_t heads = GENERATE(7, 40);
  const bool limited = GENERATE(false, true);
  CAPTURE(length, heads, limited);
  // No softplus of a multiple of 1/64 is so near to a limit that rounding decides.
  const step_limits limits = limited ? step_limits{0.5, 1.25} : step_limits{};
  agrees<TestType>(
      [&](const auto& p, const auto& wide, const auto& a, const auto& bias) {
        const auto r = discretize(p, wide.slice(2, 5, 5 + heads), a, bias, limits);
        return std::make_tuple(r.delta, r.log_a);
      },
      activation<3>({batch, length, heads + 8}, 1), trained<1>({heads}, 2, -3, -0.25),
      trained<1>({heads}, 3));
}

TEST_CASE("cuda/nn: no tokens give no tokens, and no gradient", "[cuda][nn]") {
  tape<bf16, cuda> tape;
  const auto x = tensor<bf16, 3, cuda>(2, 0, 8);
  const auto weight = trained<1>({8}, 1).on<bf16, cuda>();
  const auto taps = trained<2>({8, 4}, 2).on<bf16, cuda>();
  tape.watch(weight);
  tape.watch(taps);
  const pass<bf16, cuda> p{.tape = &tape};
  const auto y = op::causal_conv1d(p, op::rms_norm(p, x, weight), taps);
  CHECK(y.extents() == x.extents());
  (void)tape.gradient(y);
  tape.backward();
  CHECK(elements_of(tape.gradient(weight)) == std::vector<double>(8, 0.0));
  CHECK(elements_of(tape.gradient(taps)) == std::vector<double>(32, 0.0));
}
