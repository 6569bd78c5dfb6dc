#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/conv1d.hpp>

namespace {

using namespace ssm;
using ssm_test::flat;

/// The definition in double, for sequences packed along time.
tensor<double, 3> by_definition(const tensor<double, 3>& x, const tensor<double, 2>& weight,
                                const tensor<double, 1>& bias, conv1d_activation activation,
                                const sequence_layout& layout, const tensor<double, 3>& initial) {
  const index_t width = weight.extent(1), channels = x.extent(2);
  const auto rows = x.contiguous().reshape(x.extent(0) * x.extent(1), channels);
  tensor<double, 3> y(x.extents());
  for (index_t i = 0; i < layout.sequences(); ++i) {
    for (index_t t = layout.begin(i); t < layout.end(i); ++t) {
      for (index_t c = 0; c < channels; ++c) {
        double sum = bias ? bias(c) : 0.0;
        for (index_t j = 0; j < width; ++j) {
          const index_t s = t - (width - 1) + j;
          if (s >= layout.begin(i)) {
            sum += weight(c, j) * rows(s, c);
          } else if (initial) {
            sum += weight(c, j) * initial(i, width - 1 - (layout.begin(i) - s), c);
          }
        }
        if (activation == conv1d_activation::silu) sum /= 1 + std::exp(-sum);
        y.data()[t * channels + c] = sum;
      }
    }
  }
  return y;
}

const sequence_layout ragged = sequence_layout::from_lengths({3, 0, 1, 9, 2});  // 15 tokens

TEST_CASE("nn/conv1d: the convolution is its definition", "[nn][conv1d]") {
  const index_t width = GENERATE(1, 2, 3, 4, 5, 7);
  const index_t channels = GENERATE(1, 8, 13);
  const auto activation = GENERATE(conv1d_activation::none, conv1d_activation::silu);
  const bool with_bias = GENERATE(false, true), with_initial = GENERATE(false, true);
  CAPTURE(width, channels, static_cast<int>(activation), with_bias, with_initial);
  const auto x = uniform<double, 3>({1, 15, channels}, -2, 2, 1);
  const auto weight = uniform<double, 2>({channels, width}, -1, 1, 2);
  const auto bias = with_bias ? uniform<double, 1>({channels}, -1, 1, 3) : tensor<double, 1>{};
  const auto initial =
      with_initial ? uniform<double, 3>({5, width - 1, channels}, -1, 1, 4) : tensor<double, 3>{};
  const auto expected = by_definition(x, weight, bias, activation, ragged, initial);
  CHECK(ssm_test::relative_error(
            op::causal_conv1d(pass<double>{}, x, weight, bias, {activation, ragged, initial}),
            expected) < 1e-14);
  CHECK(ssm_test::relative_error(
            op::causal_conv1d(
                pass<float>{}, cast<float>(x), cast<float>(weight),
                with_bias ? cast<float>(bias) : tensor<float, 1>{},
                {activation, ragged, with_initial ? cast<float>(initial) : tensor<float, 3>{}}),
            expected) < 1e-6);
}

TEST_CASE(
    "nn/conv1d: gradients of x, weight, bias, initial and final state are those of differences",
    "[nn][conv1d]") {
  const index_t width = GENERATE(1, 2, 3, 4, 6);
  const auto activation = GENERATE(conv1d_activation::none, conv1d_activation::silu);
  const bool packed = GENERATE(false, true);
  CAPTURE(width, static_cast<int>(activation), packed);
  const index_t b = packed ? 1 : 3;
  const auto wide = uniform<double, 3>({b, 15 / b, 20}, -2, 2, 1);
  const auto weight = uniform<double, 2>({13, width}, -1, 1, 2);
  const auto bias = uniform<double, 1>({13}, -1, 1, 3);
  const auto initial = uniform<double, 3>({packed ? 5 : 3, width - 1, 13}, -1, 1, 4);
  std::vector<tensor<double, 1>> inputs{flat(wide), flat(weight), flat(bias)};
  if (width > 1) inputs.push_back(flat(initial));
  CHECK(ssm_test::gradient_error(inputs, [&](const pass<double>& p) {
          const auto r = op::causal_conv1d_with_state(
              p, wide.slice(2, 3, 16), weight, bias,
              {activation, packed ? ragged : sequence_layout{}, initial});
          std::vector<tensor<double, 1>> outputs{flat(r.y)};
          if (width > 1) outputs.push_back(flat(r.final_state));
          return outputs;
        }) < 1e-7);
}

TEST_CASE("nn/conv1d: gradients without an initial state are those of differences",
          "[nn][conv1d]") {
  const auto layer = causal_conv1d<double>::make(70, 4, 1);
  const auto x = uniform<double, 3>({1, 15, 70}, -2, 2, 2);
  CHECK(ssm_test::gradient_error(
            {flat(x), flat(layer.weight), flat(layer.bias)},
            [&](const pass<double>& p) { return std::vector{flat(layer(p, x, ragged))}; }) < 1e-7);
}

TEST_CASE("nn/conv1d: packed sequences have the bits of separate ones", "[nn][conv1d]") {
  const auto layer = causal_conv1d<float>::make(13, 4, 1);
  const auto x = uniform<float, 3>({1, 15, 13}, -2, 2, 2);
  const auto together = layer(pass<float>{}, x, ragged);
  for (index_t i = 0; i < ragged.sequences(); ++i) {
    const auto alone = layer(pass<float>{}, x.slice(1, ragged.begin(i), ragged.end(i)));
    CHECK(ssm_test::same_bits(alone, together.slice(1, ragged.begin(i), ragged.end(i))));
  }
}

TEST_CASE("nn/conv1d: packed sequences have the input gradients of separate ones, to the bit",
          "[nn][conv1d]") {
  const auto layer = causal_conv1d<float>::make(13, 4, 1);
  const auto x = uniform<float, 3>({1, 15, 13}, -2, 2, 2);
  const auto dy = uniform<float, 3>({1, 15, 13}, -1, 1, 3);
  const auto gradient = [&](index_t begin, index_t end, const sequence_layout& layout) {
    const auto part = x.slice(1, begin, end).clone();
    tape<float> tape;
    tape.watch(part);
    const auto y = layer(pass<float>{.tape = &tape}, part, layout);
    tape.gradient(y).copy_from(dy.slice(1, begin, end));
    tape.backward();
    return tape.gradient(part);
  };
  const auto together = gradient(0, 15, ragged);
  for (index_t i = 0; i < ragged.sequences(); ++i) {
    if (ragged.length(i) == 0) continue;
    CHECK(ssm_test::same_bits(gradient(ragged.begin(i), ragged.end(i), {}),
                              together.slice(1, ragged.begin(i), ragged.end(i))));
  }
}

TEST_CASE("nn/conv1d: outputs and gradients have the same bits with any number of threads",
          "[nn][conv1d][threads]") {
  const auto layer = causal_conv1d<float>::make(200, 4, 1);
  const auto x = uniform<float, 3>({2, 400, 200}, -2, 2, 2);
  std::vector<tensor<float, 1>> first;
  for (const int threads : {1, 2, 3}) {
    const cpu::context ctx(threads);
    tape<float> tape;
    tape.watch(x);
    tape.watch(layer.weight);
    tape.watch(layer.bias);
    const auto y = layer(pass<float>{ctx, &tape}, x);
    tape.gradient(y).copy_from(uniform<float, 3>(y.extents(), -1, 1, 3));
    tape.backward();
    const std::vector all{flat(y), flat(tape.gradient(x)), flat(tape.gradient(layer.weight)),
                          flat(tape.gradient(layer.bias))};
    if (first.empty()) {
      for (const auto& t : all)
        first.push_back(t.clone());
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      CHECK(ssm_test::same_bits(all[i], first[i]));
  }
}

TEST_CASE("nn/conv1d: advance gives every token the same bits whatever the split", "[nn][conv1d]") {
  const index_t width = GENERATE(1, 2, 4, 6), piece = GENERATE(1, 2, 3, 7, 20);
  CAPTURE(width, piece);
  const auto layer = causal_conv1d<float>::make(13, width, 1);
  const auto x = uniform<float, 3>({3, 20, 13}, -2, 2, 2);
  const auto whole = layer(pass<float>{}, x);
  auto state = layer.make_state(3, GENERATE(0, 2));
  for (index_t t = 0; t < 20; t += piece) {
    const index_t end = std::min<index_t>(20, t + piece);
    CHECK(ssm_test::same_bits(layer.advance(pass<float>{}, x.slice(1, t, end), state),
                              whole.slice(1, t, end)));
  }
}

TEST_CASE("nn/conv1d: advance takes different numbers of tokens per sequence, also none",
          "[nn][conv1d]") {
  const auto layer = causal_conv1d<float>::make(13, 4, 1);
  const auto x = uniform<float, 3>({2, 9, 13}, -2, 2, 2);
  const auto whole = layer(pass<float>{}, x);
  auto state = layer.make_state(2);
  const std::array<std::array<index_t, 2>, 4> counts{{{2, 0}, {0, 5}, {6, 1}, {1, 3}}};
  std::array<index_t, 2> at{};
  for (const auto& count : counts) {
    const auto layout = sequence_layout::from_lengths({count[0], count[1]});
    tensor<float, 3> piece(1, layout.tokens(), 13), expected(1, layout.tokens(), 13);
    for (index_t i = 0; i < 2; ++i) {
      const auto n = static_cast<std::size_t>(i);
      const auto part = [&](const tensor<float, 3>& t) {
        return t.slice(0, i, i + 1).slice(1, at[n], at[n] + count[n]);
      };
      piece.slice(1, layout.begin(i), layout.end(i)).copy_from(part(x));
      expected.slice(1, layout.begin(i), layout.end(i)).copy_from(part(whole));
      at[n] += count[n];
    }
    CHECK(ssm_test::same_bits(layer.advance(pass<float>{}, piece, state, layout), expected));
  }
  CHECK(state.position(0) == 9);
  CHECK(state.position(1) == 9);
}

TEST_CASE("nn/conv1d: the window of a state is the final state of a pass", "[nn][conv1d]") {
  const auto layer = causal_conv1d<float>::make(13, 4, 1);
  const auto x = uniform<float, 3>({2, 9, 13}, -2, 2, 2);
  const index_t length = GENERATE(1, 2, 3, 9);
  const auto part = x.slice(1, 0, length);
  auto state = layer.make_state(2, 3);
  (void)layer.advance(pass<float>{}, part, state);
  const auto r = op::causal_conv1d_with_state(pass<float>{}, part, layer.weight, layer.bias);
  CHECK(ssm_test::same_bits(state.window(), r.final_state));
}

TEST_CASE("nn/conv1d: a rolled back state equals one that never saw the tokens", "[nn][conv1d]") {
  const index_t undo = GENERATE(0, 1, 3, 4);
  const auto layer = causal_conv1d<float>::make(13, 4, 1);
  const auto x = uniform<float, 3>({2, 30, 13}, -2, 2, 2);
  auto state = layer.make_state(2, 4), reference = layer.make_state(2, 4);
  for (const auto& [begin, end] : {std::pair<index_t, index_t>{0, 11}, {11, 13}, {13, 16}}) {
    (void)layer.advance(pass<float>{}, x.slice(1, begin, end), state);
  }
  (void)layer.advance(pass<float>{}, x.slice(1, 0, 16 - undo), reference);
  state.rollback(undo);
  CHECK(state == reference);
  CHECK(ssm_test::same_bits(layer.advance(pass<float>{}, x.slice(1, 20, 29), state),
                            layer.advance(pass<float>{}, x.slice(1, 20, 29), reference)));
}

TEST_CASE("nn/conv1d: sequences roll back by different numbers of tokens", "[nn][conv1d]") {
  const auto layer = causal_conv1d<float>::make(13, 4, 1);
  const auto x = uniform<float, 3>({2, 12, 13}, -2, 2, 2);
  const auto whole = layer(pass<float>{}, x);
  auto state = layer.make_state(2, 4);
  (void)layer.advance(pass<float>{}, x.slice(1, 0, 10), state);
  const std::array<index_t, 2> undo{1, 4};
  state.rollback(undo);
  const auto layout = sequence_layout::from_lengths({1, 1});
  tensor<float, 3> piece(1, 2, 13), expected(1, 2, 13);
  for (const index_t i : {0, 1}) {
    const index_t t = 10 - undo[static_cast<std::size_t>(i)];
    piece.slice(1, i, i + 1).copy_from(x.slice(0, i, i + 1).slice(1, t, t + 1));
    expected.slice(1, i, i + 1).copy_from(whole.slice(0, i, i + 1).slice(1, t, t + 1));
  }
  CHECK(ssm_test::same_bits(layer.advance(pass<float>{}, piece, state, layout), expected));
}

TEST_CASE("nn/conv1d: more than max_rollback tokens cannot be undone, and nothing changes",
          "[nn][conv1d][error]") {
  const auto layer = causal_conv1d<float>::make(5, 4, 1);
  const auto x = uniform<float, 3>({2, 12, 5}, -2, 2, 2);
  auto state = layer.make_state(2, 3);
  (void)layer.advance(pass<float>{}, x, state);
  const auto before = state;
  CHECK_THROWS_WITH(state.rollback(4),
                    ssm_test::contains("rollback(4)") && ssm_test::contains("max_rollback 3"));
  const std::array<index_t, 2> partly{1, 5};
  CHECK_THROWS_AS(state.rollback(partly), value_error);
  CHECK(state == before);
  CHECK(state.position(0) == 12);
}

TEST_CASE("nn/conv1d: a copy of a state is a fork", "[nn][conv1d]") {
  const auto layer = causal_conv1d<float>::make(5, 4, 1);
  const auto x = uniform<float, 3>({1, 8, 5}, -2, 2, 2);
  auto state = layer.make_state(1, 2);
  (void)layer.advance(pass<float>{}, x.slice(1, 0, 4), state);
  auto fork = state;
  CHECK(fork == state);
  (void)layer.advance(pass<float>{}, x.slice(1, 4, 6), fork);
  CHECK_FALSE(fork == state);
  fork = state;
  CHECK(fork == state);
  CHECK(ssm_test::same_bits(layer.advance(pass<float>{}, x.slice(1, 4, 8), state),
                            layer.advance(pass<float>{}, x.slice(1, 4, 8), fork)));
}

TEST_CASE("nn/conv1d: single steps reach the system allocator only at the start", "[nn][conv1d]") {
  const auto layer = causal_conv1d<float>::make(64, 4, 1);
  const auto x = uniform<float, 3>({2, 1, 64}, -2, 2, 2);
  auto state = layer.make_state(2, 4);
  const cpu::context ctx(1);
  for (int step = 0; step < 3; ++step)
    (void)layer.advance(pass<float>{ctx}, x, state);
  const auto before = cpu_memory_pool::instance().stats().system_allocations;
  for (int step = 0; step < 100; ++step)
    (void)layer.advance(pass<float>{ctx}, x, state);
  CHECK(cpu_memory_pool::instance().stats().system_allocations == before);
}

TEST_CASE("nn/conv1d: sizes that do not fit are refused by shape", "[nn][conv1d][error]") {
  const auto layer = causal_conv1d<float>::make(5, 4, 1);
  const auto x = tensor<float, 3>::zeros(2, 3, 5);
  const pass<float> p;
  CHECK_THROWS_WITH(layer(p, tensor<float, 3>::zeros(2, 3, 6)),
                    ssm_test::contains("x is (2 x 3 x 6), the weight is (5 x 4)"));
  CHECK_THROWS_WITH(layer(p, x, sequence_layout::from_lengths({5})),
                    ssm_test::contains("the layout has 5 tokens"));
  CHECK_THROWS_WITH(op::causal_conv1d(p, x, layer.weight, layer.bias,
                                      {.initial = tensor<float, 3>::zeros(2, 4, 5)}),
                    ssm_test::contains("the initial state is (2 x 4 x 5), wanted (2 x 3 x 5)"));
  auto state = layer.make_state(3);
  CHECK_THROWS_AS(layer.advance(p, x, state), shape_error);
  auto narrow = conv_state<float>(2, 4, 4);
  CHECK_THROWS_AS(layer.advance(p, x, narrow), shape_error);
}

}  // namespace
