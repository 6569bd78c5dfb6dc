#include "mixers.hpp"

#include <array>

namespace {

using namespace properties;

/// (b, T, G, N) -> (b, T, H, N), each head of G repeated.
template <class T>
tensor<T, 4> repeated(const tensor<T, 4>& t, index_t heads) {
  tensor<T, 4> all(t.extent(0), t.extent(1), heads, t.extent(3));
  for (index_t h = 0; h < heads; ++h) {
    const index_t g = ssm::group_of(h, heads, t.extent(2));
    all.slice(2, h, h + 1).copy_from(t.slice(2, g, g + 1));
  }
  return all;
}
/// (b, T, H, N) -> (b, T, G, N), the heads of a group summed.
template <class T>
tensor<T, 4> folded(const tensor<T, 4>& t, index_t groups) {
  auto sum = tensor<T, 4>::zeros(t.extent(0), t.extent(1), groups, t.extent(3));
  for (index_t h = 0; h < t.extent(2); ++h) {
    const index_t g = ssm::group_of(h, t.extent(2), groups);
    ssm::detail::add_to(sum.slice(2, g, g + 1), t.slice(2, h, h + 1));
  }
  return sum;
}

TEST_CASE(
    "properties/shapes: a shared head is the same as a repeated one, and its gradient the sum",
    "[properties][shapes]") {
  for (const auto& heads : {std::array<index_t, 2>{1, 1}, {2, 2}, {4, 1}, {1, 2}, {2, 4}}) {
    const index_t query_heads = heads[0], key_heads = heads[1];
    CAPTURE(query_heads, key_heads);
    const sizes s{.length = 21, .query_heads = query_heads, .key_heads = key_heads};
    const operands<double> shared(s);
    operands<double> own = shared;
    own.q = repeated(shared.q, s.heads);
    own.k = repeated(shared.k, s.heads);
    const auto dy = ssm::uniform<double, 4>(shared.x.extents(), -1, 1, 5);
    const auto compare = [&](std::string_view mixer, const auto& a, const auto& b) {
      CAPTURE(mixer);
      using M = typename std::remove_cvref_t<decltype(a)>::mixer_type;
      M::algorithms::for_each([&](auto algorithm) {
        CAPTURE(algorithm.name);
        CHECK(ssm_test::relative_error(product_of(a.with(algorithm)),
                                       product_of(b.with(algorithm))) < 1e-13);
        auto expected = ssm::vjp(b.with(algorithm), dy);
        decltype(expected)::operands(expected, [&](std::string_view name, auto& gradient, operand) {
          if constexpr (std::remove_cvref_t<decltype(gradient)>::rank == 4) {
            if (name == "q" || name == "c") gradient = folded(gradient, query_heads);
            if (name == "k" || name == "b") gradient = folded(gradient, key_heads);
          }
        });
        CHECK(gradient_difference(ssm::vjp(a.with(algorithm), dy), expected) < 1e-12);
      });
    };
    compare("mamba2", shared.mamba2(), own.mamba2());
    compare("attention", shared.attention(), own.attention());
    compare("selective scan", shared.selective_scan(), own.selective_scan());
    compare("gated linear attention", shared.gated_linear(), own.gated_linear());
    compare("delta rule", shared.delta(), own.delta());
    compare("toeplitz attention", shared.toeplitz_attention(), own.toeplitz_attention());
  }
}

TEMPLATE_TEST_CASE("properties/shapes: any head size and any length, from one token on, is right",
                   "[properties][shapes]", float, double) {
  const double bound = sizeof(TestType) == 8 ? 1e-12 : 1e-5;
  for (const auto& [keys, features, length] : {std::array<index_t, 3>{1, 1, 1},
                                               {3, 7, 1},
                                               {7, 1, 2},
                                               {5, 9, 3},
                                               {17, 13, 19},
                                               {33, 31, 6},
                                               {1, 3, 66},
                                               {9, 1, 67},
                                               {13, 5, 65}}) {
    CAPTURE(keys, features, length);
    const operands<TestType> o(
        {.length = length, .heads = 2, .keys = keys, .features = features, .window = 4});
    o.for_each([&](std::string_view mixer, const auto& e) {
      CAPTURE(mixer);
      const auto expected = definition_of(e);
      for_each_algorithm(e, [&](const auto& product) {
        CHECK(ssm_test::relative_error(product_of(product), expected) < bound);
      });
    });
  }
}

TEST_CASE("properties/shapes: a window longer than the sequence is causal attention",
          "[properties][shapes]") {
  for (const index_t length : {1, 5, 8}) {
    const operands<double> o({.length = length, .window = 9});
    const auto expected = definition_of(softmax(o.gram() + ssm::causal) * o.x);
    for_each_algorithm(o.window(), [&](const auto& product) {
      CHECK(ssm_test::relative_error(product_of(product), expected) < 1e-13);
    });
    auto state = make_state(o.window(), o.s.batch);
    CHECK(ssm_test::relative_error(advance(o.window(), state), expected) < 1e-13);
  }
}

}  // namespace
