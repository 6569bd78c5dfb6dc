#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/rope.hpp>

#include <numbers>

namespace {

using namespace ssm;

/// The definition, pair by pair in double. @param position  of each token
tensor<double, 4> by_definition(const tensor<double, 4>& x, const std::vector<index_t>& position,
                                const rope_options& o) {
  const index_t features = x.extent(3);
  const index_t pairs = static_cast<index_t>(o.fraction * static_cast<double>(features)) / 2;
  auto y = x.clone();
  for (index_t t = 0; t < x.extent(1); ++t) {
    for (index_t h = 0; h < x.extent(2); ++h) {
      for (index_t i = 0; i < pairs; ++i) {
        const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(2 * pairs);
        double theta = std::pow(o.base, exponent);
        if (o.scaling) {
          const double wavelength = 2 * std::numbers::pi / theta, n = o.scaling->original_length;
          const double smooth =
              (n / wavelength - o.scaling->low) / (o.scaling->high - o.scaling->low);
          if (wavelength > n / o.scaling->low) {
            theta /= o.scaling->factor;
          } else if (wavelength >= n / o.scaling->high) {
            theta = (1 - smooth) * theta / o.scaling->factor + smooth * theta;
          }
        }
        const double angle = static_cast<double>(position[static_cast<std::size_t>(t)]) * theta;
        const index_t a = o.interleaved ? 2 * i : i, b = o.interleaved ? 2 * i + 1 : i + pairs;
        y(0, t, h, a) = x(0, t, h, a) * std::cos(angle) - x(0, t, h, b) * std::sin(angle);
        y(0, t, h, b) = x(0, t, h, b) * std::cos(angle) + x(0, t, h, a) * std::sin(angle);
      }
    }
  }
  return y;
}

std::vector<index_t> counted(index_t n, index_t first = 0) {
  std::vector<index_t> positions;
  for (index_t t = 0; t < n; ++t)
    positions.push_back(first + t);
  return positions;
}

const auto pairings = {false, true};

}  // namespace

TEST_CASE("nn/rope: pairs are turned by their definition", "[nn][rope]") {
  const bool interleaved = GENERATE(false, true);
  const double fraction = GENERATE(0.0, 0.3, 0.5, 1.0);
  const index_t features = GENERATE(2, 6, 16, 40, 64);
  CAPTURE(interleaved, fraction, features);
  const rope_options options{.fraction = fraction, .interleaved = interleaved};
  const auto x = normal<double, 4>({1, 150, 3, features}, 1, 1);
  const auto expected = by_definition(x, counted(150), options);
  CHECK(ssm_test::relative_error(rope(pass<double>{}, x, {}, options), expected) < 1e-13);
  CHECK(ssm_test::relative_error(rope(pass<float>{}, cast<float>(x), {}, options), expected) <
        2e-7);
}

TEST_CASE("nn/rope: base and llama3 scaling set the angles", "[nn][rope]") {
  const double factor = GENERATE(8.0, 32.0);
  const rope_options options{.base = 500000.0, .scaling = llama3_scaling{.factor = factor}};
  const auto x = normal<double, 4>({1, 30, 2, 64}, 1, 1);
  const auto layout = sequence_layout::from_lengths({30}).at_positions(std::array{index_t{20000}});
  CHECK(ssm_test::relative_error(rope(pass<double>{}, x, layout, options),
                                 by_definition(x, counted(30, 20000), options)) < 1e-10);
}

TEST_CASE("nn/rope: positions far away keep the accuracy of float", "[nn][rope]") {
  const rope_options options;
  const index_t first = 1 << 20;
  const auto x = normal<double, 4>({1, 9, 1, 64}, 1, 1);
  const auto layout = sequence_layout::from_lengths({9}).at_positions(std::array{first});
  CHECK(ssm_test::relative_error(rope(pass<float>{}, cast<float>(x), layout, options),
                                 by_definition(x, counted(9, first), options)) < 2e-7);
}

TEST_CASE("nn/rope: products of queries and keys depend on their distance", "[nn][rope]") {
  for (const bool interleaved : pairings) {
    const rope_options options{.interleaved = interleaved};
    const auto one = normal<double, 4>({1, 1, 1, 32}, 1, 1);
    const auto other = normal<double, 4>({1, 1, 1, 32}, 1, 2);
    const auto product = [&](index_t p, index_t q) {
      const auto at = [&](const tensor<double, 4>& x, index_t position) {
        const auto layout = sequence_layout::from_lengths({1}).at_positions(std::array{position});
        return rope(pass<double>{}, x, layout, options);
      };
      const auto a = at(one, p), b = at(other, q);
      double sum = 0;
      for (index_t i = 0; i < 32; ++i)
        sum += a.data()[i] * b.data()[i];
      return sum;
    };
    CHECK(product(900, 877) == ssm_test::approx(product(23, 0)).epsilon(1e-11));
    CHECK_FALSE(product(900, 876) == ssm_test::approx(product(23, 0)).epsilon(1e-3));
  }
}

TEST_CASE("nn/rope: a token's bits depend on its position alone", "[nn][rope]") {
  for (const bool interleaved : pairings) {
    const rope_options options{.fraction = 0.5, .interleaved = interleaved};
    const auto x = normal<float, 4>({1, 230, 2, 20}, 1, 1);
    const auto whole = rope(pass<float>{}, x, {}, options);
    for (const index_t t : {0, 63, 64, 65, 229}) {
      const auto layout = sequence_layout::from_lengths({1}).at_positions(std::array{t});
      CHECK(ssm_test::same_bits(rope(pass<float>{}, x.slice(1, t, t + 1), layout, options),
                                whole.slice(1, t, t + 1)));
    }
  }
}

TEST_CASE("nn/rope: packed sequences start at their own positions", "[nn][rope]") {
  const rope_options options;
  const auto x = normal<double, 4>({1, 12, 2, 8}, 1, 1);
  const index_t first[] = {5, 99, 0, 70};
  const auto layout = sequence_layout::from_lengths({3, 0, 7, 2}).at_positions(first);
  CHECK(ssm_test::relative_error(
            rope(pass<double>{}, x, layout, options),
            by_definition(x, {5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 70, 71}, options)) < 1e-13);
}

TEST_CASE("nn/rope: rows of a batch count from zero without a layout", "[nn][rope]") {
  const auto x = normal<float, 4>({3, 11, 2, 8}, 1, 1);
  const auto y = rope(pass<float>{}, x, {}, {});
  CHECK(ssm_test::same_bits(y.slice(0, 2, 3), rope(pass<float>{}, x.slice(0, 2, 3), {}, {})));
}

TEST_CASE("nn/rope: the gradient is that of finite differences", "[nn][rope]") {
  const bool interleaved = GENERATE(false, true);
  const double fraction = GENERATE(0.0, 0.4, 1.0);
  const rope_options options{.fraction = fraction, .interleaved = interleaved};
  const auto x = normal<double, 4>({2, 70, 3, 10}, 1, 1);
  CHECK(ssm_test::gradient_error({ssm_test::flat(x)}, [&](const pass<double>& p) {
          return std::vector{ssm_test::flat(rope(p, x, {}, options))};
        }) < 1e-7);
}

TEST_CASE("nn/rope: heads of a projection are turned in place of a copy", "[nn][rope]") {
  const auto all = normal<float, 3>({2, 17, 48}, 1, 1);
  const auto part = all.slice(2, 16, 40).reshape(2, 17, 3, 8);
  tape<float> t;
  t.watch(all);
  const auto y = rope(pass<float>{.tape = &t}, part, {}, {});
  CHECK(ssm_test::same_bits(y, rope(pass<float>{}, part.clone(), {}, {})));
  t.gradient(y).fill(1.0f);
  t.backward();
  const auto g = t.gradient(all);
  CHECK(g(0, 3, 15) == 0.0f);
  CHECK(g(0, 3, 16) != 0.0f);
  CHECK(g(1, 3, 39) != 0.0f);
  CHECK(g(1, 3, 40) == 0.0f);
}

TEST_CASE("nn/rope: one thread and two give the same bits", "[nn][rope][threads]") {
  const cpu::context one(1), two(2);
  const auto x = normal<float, 4>({1, 777, 3, 24}, 1, 1);
  CHECK(ssm_test::same_bits(rope(pass<float>{one}, x, {}, {}), rope(pass<float>{two}, x, {}, {})));
}

TEST_CASE("nn/rope: options and layouts out of range are refused", "[nn][rope]") {
  const auto x = normal<float, 4>({1, 6, 1, 8}, 1, 1);
  const pass<float> p;
  CHECK_THROWS_WITH(rope(p, x, {}, {.fraction = 1.5}), ssm_test::contains("fraction in [0, 1]"));
  CHECK_THROWS_AS(rope(p, x, {}, {.base = 0.0}), value_error);
  CHECK_THROWS_AS(rope(p, x, {}, {.scaling = llama3_scaling{.low = 4, .high = 4}}), value_error);
  CHECK_THROWS_WITH(rope(p, x, sequence_layout::from_lengths({5}), {}),
                    ssm_test::contains("5 tokens"));
}
