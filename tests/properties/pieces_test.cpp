#include "mixers.hpp"

#include <vector>

namespace {

using namespace properties;

template <class T>
constexpr double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;

TEMPLATE_TEST_CASE("properties/pieces: results and gradients do not depend on the chunk size",
                   "[properties][pieces]", float, double) {
  const sizes s{.length = 131};
  const operands<TestType> o(s);
  const auto dy = ssm::uniform<double, 4>({s.batch, s.length, s.heads, s.features}, -1, 1, 77);
  o.for_each_recurrent([&](std::string_view mixer, const auto& e) {
    CAPTURE(mixer);
    for_each_algorithm(e, [&](auto product) {
      if constexpr (requires { product.algorithm.size; }) {
        product.algorithm.size = 64;
        const auto y = product_of(product);
        const auto g = ssm::vjp(product, ssm::cast<TestType>(dy));
        for (const index_t size : {1, 3, 16, 50, 128, 131, 1000}) {
          CAPTURE(size);
          product.algorithm.size = size;
          CHECK(ssm_test::relative_error(product_of(product), y) < bound<TestType>);
          CHECK(gradient_difference(ssm::vjp(product, ssm::cast<TestType>(dy)), g) <
                10 * bound<TestType>);
        }
      }
    });
  });
}

TEMPLATE_TEST_CASE("properties/pieces: a sequence may be cut anywhere", "[properties][pieces]",
                   float, double) {
  const sizes s{.length = 97};
  const operands<TestType> o(s);
  const std::vector<std::vector<index_t>> cuts = {
      {97}, {1, 96}, {96, 1}, {40, 57}, {17, 3, 64, 13}};
  o.for_each([&](std::string_view mixer, const auto& e) {
    CAPTURE(mixer);
    const auto expected = definition_of(e);
    for (const auto& lengths : cuts) {
      auto state = make_state(e, s.batch);
      const auto y = ssm_test::poisoned<TestType, 4>(e.extents());
      index_t begin = 0;
      for (const index_t n : lengths) {
        y.slice(1, begin, begin + n).copy_from(advance(tokens_of(e, begin, begin + n), state));
        begin += n;
      }
      CAPTURE(lengths);
      CHECK(ssm_test::relative_error(y, expected) < bound<TestType>);
    }
  });
}

TEST_CASE("properties/pieces: steps of 1 to 16 tokens have the same bits whatever the split",
          "[properties][pieces]") {
  const sizes s{.length = 50};
  const operands<float> o(s);
  o.for_each([&](std::string_view mixer, const auto& e) {
    CAPTURE(mixer);
    const auto stepped = [&](const std::vector<index_t>& lengths) {
      auto state = make_state(e, s.batch);
      const auto y = ssm_test::poisoned<float, 4>(e.extents());
      std::size_t next = 0;
      for (index_t begin = 0; begin < s.length;) {
        const index_t end = std::min(s.length, begin + lengths[next++ % lengths.size()]);
        y.slice(1, begin, end).copy_from(advance(tokens_of(e, begin, end), state));
        begin = end;
      }
      return y;
    };
    const auto ones = stepped({1});
    for (const auto& lengths : std::vector<std::vector<index_t>>{{16}, {2, 3, 11}, {7}, {15, 1}})
      CHECK(ssm_test::same_bits(stepped(lengths), ones));
  });
}

}  // namespace
