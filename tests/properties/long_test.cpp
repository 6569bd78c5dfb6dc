#include "mixers.hpp"

namespace {

using namespace properties;

// docs/numerics.md, "Long sequences": float over T tokens, relative to the norm.
double long_bound(index_t length) {
  return 0x1p-24 * std::sqrt(static_cast<double>(length));
}
/// Where decays are closer to 1 than float resolves, for mixers that multiply by a rounded decay.
double endless_bound(index_t length) {
  return 0x1p-24 * static_cast<double>(length);
}

/// Every linear-time algorithm in float and double, against the recurrent form in double.
template <class Make>
void check_long(const Make& make, bool rounded_decays = false) {
  const sizes s{.batch = 1,
                .length = 100000,
                .heads = 2,
                .query_heads = 1,
                .key_heads = 1,
                .keys = 4,
                .features = 2};
  const operands<float> single(s);
  operands<double> exact(s);
  // The same numbers: what float holds.
  exact.q = ssm::cast<double>(single.q);
  exact.k = ssm::cast<double>(single.k);
  exact.x = ssm::cast<double>(single.x);
  exact.log_gate = ssm::cast<double>(single.log_gate);
  exact.log_decay = ssm::cast<double>(single.log_decay);
  exact.step = ssm::cast<double>(single.step);
  exact.a = ssm::cast<double>(single.a);
  exact.gamma = ssm::cast<double>(single.gamma);
  exact.d = ssm::cast<double>(single.d);
  for (const double scale : {1.0, 1e-3, 1e-6}) {  // of the log decays: short to endless memory
    CAPTURE(scale);
    const auto e64 = make(exact, scale);
    const auto e32 = make(single, scale);
    const auto expected = product_of(e64.with(ssm::alg::recurrent{}));
    for_each_algorithm(e64, [&](const auto& product) {
      using A = typename std::remove_cvref_t<decltype(product)>::algorithm_type;
      if constexpr (!std::is_same_v<A, ssm::alg::quadratic>) {
        CHECK(ssm_test::relative_error(product_of(product), expected) < 1e-11);
      }
    });
    for_each_algorithm(e32, [&](const auto& product) {
      using A = typename std::remove_cvref_t<decltype(product)>::algorithm_type;
      if constexpr (!std::is_same_v<A, ssm::alg::quadratic>) {
        const double error = ssm_test::relative_error(product_of(product), expected);
        const bool endless = rounded_decays && scale < 1e-5;
        const double bound = endless ? endless_bound(s.length) : long_bound(s.length);
        INFO("float: " << error << " of " << bound);
        CHECK(error < bound);
      }
    });
  }
}

template <class T, int R>
tensor<T, R> scaled(const tensor<T, R>& t, double factor) {
  const auto out = t.clone();
  out.zip_with(out, [&](T& v, const T&) { v *= static_cast<T>(factor); });
  return out;
}

TEST_CASE("properties/long: linear attention holds its bound over 100,000 tokens",
          "[properties][long][slow]") {
  check_long([](auto o, double) { return o.linear(); });
}
TEST_CASE("properties/long: normalized linear attention holds its bound over 100,000 tokens",
          "[properties][long][slow]") {
  check_long([](auto o, double) { return o.normalized(); });
}
TEST_CASE("properties/long: retention holds its bound over 100,000 tokens",
          "[properties][long][slow]") {
  check_long([](auto o, double scale) {
    o.gamma = o.gamma.clone();
    for (index_t h = 0; h < o.gamma.extent(0); ++h) {
      // Representable in float, so that both element types have the same decay.
      o.gamma(h) = static_cast<float>(1 - scale * (1 - static_cast<double>(o.gamma(h))));
    }
    return o.retention();
  });
}
TEST_CASE("properties/long: Mamba-2 holds its bound over 100,000 tokens",
          "[properties][long][slow]") {
  check_long([](auto o, double scale) {
    o.log_decay = scaled(o.log_decay, scale);
    return o.mamba2();
  });
}
TEST_CASE("properties/long: the selective scan holds its bound over 100,000 tokens",
          "[properties][long][slow]") {
  check_long(
      [](auto o, double scale) {
        o.a = scaled(o.a, scale);
        return o.selective_scan();
      },
      true);
}
TEST_CASE("properties/long: gated linear attention holds its bound over 100,000 tokens",
          "[properties][long][slow]") {
  check_long(
      [](auto o, double scale) {
        o.log_gate = scaled(o.log_gate, scale);
        return o.gated_linear();
      },
      true);
}
TEST_CASE("properties/long: the delta rule holds its bound over 100,000 tokens",
          "[properties][long][slow]") {
  check_long([](auto o, double scale) {
    o.log_decay = scaled(o.log_decay, scale);
    return o.delta();
  });
}

}  // namespace
