#include "mixers.hpp"

namespace {

using namespace properties;

/// e with all operands of token t changed.
template <class E>
E changed_at(E e, index_t t) {
  E::operands(e, [&](std::string_view, auto& value, operand kind) {
    if constexpr (std::remove_cvref_t<decltype(value)>::rank >= 2) {
      if (kind != operand::per_token || !value) return;
      value = value.clone();
      const auto token = value.slice(1, t, t + 1);
      token.zip_with(token, [](auto& v, const auto&) { v *= element<E>(0.5); });
    }
  });
  return e;
}

template <class T>
double largest(const tensor<T, 4>& t) {
  double size = 0;
  t.zip_with(t, [&](T a, T) { size = std::max(size, static_cast<double>(std::abs(a))); });
  return size;
}
template <class T>
double largest_difference(const tensor<T, 4>& a, const tensor<T, 4>& b) {
  double size = 0;
  a.zip_with(b, [&](T x, T y) { size = std::max(size, static_cast<double>(std::abs(x - y))); });
  return size;
}

TEMPLATE_TEST_CASE(
    "properties/causality: changing a token leaves the outputs before it as they were",
    "[properties][causality]", float, double) {
  const sizes s;
  const operands<TestType> o(s);
  const double unit = sizeof(TestType) == 8 ? 0x1p-53 : 0x1p-24;
  o.for_each([&](std::string_view mixer, const auto& e) {
    CAPTURE(mixer);
    for_each_algorithm(e, [&](auto product) {
      using E = decltype(product);
      const auto compare = [&] {
        const auto before = product_of(product);
        for (const index_t t : {index_t{1}, index_t{17}, s.length - 5, s.length - 1}) {
          CAPTURE(t);
          const auto after = product_of(changed_at(product, t));
          const auto left = before.slice(1, 0, t), right = after.slice(1, 0, t);
          if constexpr (by_transform<E>) {
            // docs/numerics.md: rounding is relative to the largest output of the column.
            CHECK(largest_difference(right, left) <
                  16 * unit * std::log2(2.0 * static_cast<double>(s.length)) * largest(before));
          } else {
            CHECK(ssm_test::same_bits(right, left));
          }
          CHECK_FALSE(ssm_test::same_bits(after, before));
        }
      };
      compare();
      if constexpr (requires { product.algorithm.size; }) {
        product.algorithm.size = 16;
        compare();
      }
    });
  });
}

}  // namespace
