#include "../support/catch.hpp"
#include "compare.hpp"
#include <ssmlib/lower/cuda/elementwise.hpp>
#include <ssmlib/lower/elementwise.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

using namespace ssm;
using namespace ssm_test;

namespace {

/// An operand: an activation has the type under test, a parameter its accum_t.
template <int R>
struct activation {
  tensor<double, R> value;
  template <class T>
  using type = T;
};
template <int R>
struct weight {
  tensor<double, R> value;
  template <class T>
  using type = accum_t<T>;
};
template <class... I>
auto activations(std::uint64_t seed, I... extents) {
  constexpr int R = sizeof...(I);
  return activation<R>{normal<double, R>(shape<R>{extents...}, 1.0, seed)};
}
template <class... I>
auto weights(std::uint64_t seed, I... extents) {
  constexpr int R = sizeof...(I);
  return weight<R>{normal<double, R>(shape<R>{extents...}, 1.0, seed)};
}
template <class T, class Operand>
auto reference(const Operand& o) {
  return rounded<typename Operand::template type<T>>(o.value);
}
template <class T, class Operand>
auto device(const Operand& o) {
  return on_device<typename Operand::template type<T>>(o.value);
}

/// The largest errors, as multiples of the tolerance.
struct errors {
  double value = 0, gradients = 0;
};

/// f(operands...) on the device, rounded to To, against the CPU; gradients are added to 0.5.
template <class T, class To, class F, class... Operands>
errors compare(F f, const Operands&... operands) {
  const auto expected = f(reference<T>(operands)...);
  const auto e = f(device<T>(operands)...);
  errors worst;
  worst.value = error_of(eval_as<To>(e), eval(expected)) / tolerance<To>;

  constexpr int R = decltype(e)::rank;
  const auto dy = rounded<To>(uniform<double, R>(e.extents(), -1, 1, 99));
  const auto expected_gradients = vjp(expected, dy);
  auto gradients = zeros_like(e);
  auto begin = [](auto& g) { g.fill(typename std::remove_cvref_t<decltype(g)>::value_type(0.5f)); };
  detail::for_each_leaf(gradients, begin);
  vjp_into(e, on_device<To>(dy), gradients);

  std::vector<tensor<double, 1>> wanted;
  auto collect = [&](const auto& g) {
    wanted.push_back(g.reshape(g.size()).clone());
    for (index_t i = 0; i < g.size(); ++i)
      wanted.back()(i) += 0.5;
  };
  detail::for_each_leaf(expected_gradients, collect);
  std::size_t k = 0;
  auto check = [&](const auto& g) {
    using S = typename std::remove_cvref_t<decltype(g)>::value_type;
    const double error = error_of(g.reshape(g.size()), wanted[k++]) / tolerance<S>;
    worst.gradients = std::isnan(error) ? error : std::max(worst.gradients, error);
  };
  detail::for_each_leaf(gradients, check);
  return worst;
}

#define CHECK_ERRORS(...)               \
  do {                                  \
    const errors found = (__VA_ARGS__); \
    CHECK(found.value < 1);             \
    CHECK(found.gradients < 1);         \
  } while (false)

const auto add = [](const auto& a, const auto& b) { return a + b; };
const auto gated = [](const auto& y, const auto& gate) { return y * silu(gate); };
const auto gated_with_bias = [](const auto& y, const auto& gate, const auto& bias) {
  return y * silu(gate + bias);
};
const auto delta_decay = [](const auto& a_log, const auto& x, const auto& bias) {
  return -(exp(a_log) * softplus(x + bias));
};

}  // namespace

TEMPLATE_TEST_CASE("cuda/elementwise: the layers' expressions equal the CPU's",
                   "[cuda][elementwise]", bf16, float, double) {
  using T = TestType;
  using P = accum_t<T>;
  const index_t time = GENERATE(1, 17, 1009);
  CAPTURE(time);
  const auto x = activations(1, index_t{2}, time, index_t{280});
  const auto y = activations(2, index_t{2}, time, index_t{280});
  const auto z = activations(3, index_t{2}, time, index_t{280});
  const auto bias = weights(4, index_t{280});
  CHECK_ERRORS(compare<T, T>(add, x, y));
  CHECK_ERRORS(compare<T, T>([](auto a, auto b, auto c) { return a + b + c; }, x, y, z));
  CHECK_ERRORS(compare<T, T>(gated, x, y));
  CHECK_ERRORS(compare<T, T>(gated_with_bias, x, y, bias));
  CHECK_ERRORS(compare<T, T>([](auto a) { return softplus(a); }, x));
  CHECK_ERRORS(compare<T, P>([](auto a) { return -softplus(a); }, x));
  CHECK_ERRORS(compare<T, P>([](auto a) { return sigmoid(a); }, x));
  CHECK_ERRORS(compare<T, P>([](auto a) { return -exp(a); }, weights(5, index_t{40}, time)));
  CHECK_ERRORS(compare<T, P>([](auto a) { return a * 3; }, weights(6, time)));
  CHECK_ERRORS(compare<T, P>([](auto a, auto b) { return a + b * 0.25; }, weights(7, time),
                             weights(8, time)));
}

TEMPLATE_TEST_CASE("cuda/elementwise: repeated operands get the sums of their gradients",
                   "[cuda][elementwise]", bf16, float, double) {
  using T = TestType;
  using P = accum_t<T>;
  const auto x = activations(1, index_t{3}, index_t{1009}, index_t{7}, index_t{40});
  // Each kind of axis repeated: features kept, heads kept, tokens kept, nothing kept, and both
  // ends.
  CHECK_ERRORS(compare<T, T>(gated_with_bias, x, x, weights(2, index_t{40})));
  CHECK_ERRORS(compare<T, T>(gated_with_bias, x, x, weights(3, index_t{7}, index_t{1})));
  CHECK_ERRORS(compare<T, T>(gated_with_bias, x, x, weights(4, index_t{7}, index_t{40})));
  CHECK_ERRORS(compare<T, T>(gated_with_bias, x, x,
                             weights(5, index_t{3}, index_t{1009}, index_t{1}, index_t{1})));
  CHECK_ERRORS(compare<T, T>(gated_with_bias, x, x, weights(6, index_t{1})));
  CHECK_ERRORS(compare<T, T>(gated_with_bias, x, x,
                             weights(7, index_t{3}, index_t{1}, index_t{7}, index_t{1})));
  CHECK_ERRORS(compare<T, P>(delta_decay, weights(8, index_t{7}),
                             activations(9, index_t{2}, index_t{1009}, index_t{7}),
                             weights(10, index_t{7})));
  // The outer product: neither operand has the shape of the result.
  CHECK_ERRORS(compare<T, T>(add, activations(11, index_t{1009}, index_t{1}),
                             activations(12, index_t{1}, index_t{300})));
}

TEMPLATE_TEST_CASE("cuda/elementwise: feature slices are read and added to in place",
                   "[cuda][elementwise]", bf16, float, double) {
  using T = TestType;
  const index_t width = GENERATE(24, 7, 64);
  CAPTURE(width);
  const index_t offset = width == 64 ? 128 : 3;
  const auto both = normal<double, 3>({2, 37, 2 * width + offset}, 1.0, 1);
  const auto parts = [&](const auto& t) {
    return t.slice(2, 0, width) * silu(t.slice(2, width + offset, 2 * width + offset));
  };
  const auto x = on_device<T>(both);
  const auto dy = rounded<T>(uniform<double, 3>({2, 37, width}, -1, 1, 2));
  const auto e = parts(x);
  const auto expected = parts(rounded<T>(both));
  CHECK(error_of(eval_as<T>(e), eval(expected)) < tolerance<T>);

  const auto gradient = tensor<T, 3, cuda>::zeros(x.extents());
  const auto expected_gradient = tensor<double, 3>::zeros(both.extents());
  vjp_into(e, on_device<T>(dy), parts(gradient));
  vjp_into(expected, dy, parts(expected_gradient));
  CHECK(error_of(gradient, expected_gradient) < tolerance<T>);
}

TEST_CASE("cuda/elementwise: gradients that overlap lose nothing", "[cuda][elementwise]") {
  const auto values = normal<double, 1>({100001}, 1.0, 1);
  const auto shifted = [](const auto& t) {
    return t.slice(0, 0, 100000) * silu(t.slice(0, 1, 100001));
  };
  const auto dy = normal<double, 1>({100000}, 1.0, 2);
  const auto x = on_device<double>(values);
  const auto gradient = tensor<double, 1, cuda>::zeros(index_t{100001});
  const auto expected = tensor<double, 1>::zeros(index_t{100001});
  vjp_into(shifted(x), on_device<double>(dy), shifted(gradient));
  vjp_into(shifted(values), dy, shifted(expected));
  CHECK(error_of(gradient, expected) < tolerance<double>);
}

TEST_CASE("cuda/elementwise: an operand used twice gets both gradients", "[cuda][elementwise]") {
  const auto x = on_device<float>(normal<double, 2>({33, 129}, 1.0, 1));
  const auto dy = normal<double, 2>({33, 129}, 1.0, 2);
  const auto gradient = tensor<float, 2, cuda>::zeros(33, 129);
  vjp_into(x + x, on_device<float>(dy), gradient + gradient);
  CHECK(error_of(gradient, eval(2 * rounded<float>(dy))) < tolerance<float>);
}

TEST_CASE("cuda/elementwise: gradients of repeated operands have the same bits each time",
          "[cuda][elementwise]") {
  const auto y = on_device<bf16>(normal<double, 3>({2, 3001, 72}, 1.0, 1));
  const auto bias = on_device<float>(normal<double, 1>({72}, 1.0, 2));
  const auto dy = on_device<bf16>(normal<double, 3>({2, 3001, 72}, 1.0, 3));
  const auto e = y * silu(y + bias);
  const auto first = to<cpu>(vjp(e, dy).b.a.b);
  for (int run = 0; run < 20; ++run)
    CHECK(same_bits(to<cpu>(vjp(e, dy).b.a.b), first));
}

TEST_CASE("cuda/elementwise: assign writes in place, and aside where it overlaps",
          "[cuda][elementwise]") {
  const auto values = rounded<float>(normal<double, 1>({5000}, 1.0, 1));
  const auto other = rounded<float>(normal<double, 1>({4999}, 1.0, 2));
  auto expected = values.clone();
  const auto x = on_device<float>(values);
  assign(x, x + x);
  assign(expected, expected + expected);
  CHECK(error_of(x, expected) < tolerance<float>);
  assign(x.slice(0, 1, 5000), x.slice(0, 0, 4999) + on_device<float>(other));
  assign(expected.slice(0, 1, 5000), expected.slice(0, 0, 4999) + other);
  CHECK(error_of(x, expected) < tolerance<float>);
}

TEST_CASE("cuda/elementwise: conversions round to nearest and take strided parts",
          "[cuda][elementwise]") {
  const cuda::context& ctx = default_context<cuda>();
  const auto values = normal<double, 3>({3, 37, 50}, 1.0, 1);
  const auto part = values.slice(2, 3, 20);
  const auto x = on_device<double>(values).slice(2, 3, 20);
  CHECK(same_bits(to<cpu>(detail::as_type<float>(ctx, x)), cast<float>(part)));
  CHECK(same_bits(to<cpu>(detail::as_type<bf16>(ctx, detail::as_type<float>(ctx, x))),
                  cast<bf16>(cast<float>(part))));
  const auto half = on_device<bf16>(values);
  CHECK(same_bits(to<cpu>(detail::as_type<float>(ctx, half)), cast<float>(rounded<bf16>(values))));
  CHECK(detail::as_type<bf16>(ctx, half).data() == half.data());
}

TEST_CASE("cuda/elementwise: functions keep NaN and saturate at infinity", "[cuda][elementwise]") {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  auto values = tensor<double, 1>(shape<1>{4});
  values(0) = infinity, values(1) = -infinity, values(2) = nan, values(3) = -700;
  const auto x = on_device<float>(values);
  const auto ones = on_device<float>(tensor<double, 1>::full({4}, 1.0));
  const auto y = on_cpu(eval(ones * silu(x))), s = on_cpu(eval(softplus(x)));
  const auto dy = on_cpu(vjp(ones * silu(x), ones).b.a);
  CHECK(y(0) == infinity);
  CHECK(y(1) == 0);
  CHECK(std::isnan(y(2)));
  CHECK(y(3) == 0);
  CHECK(s(0) == infinity);
  CHECK(s(1) == 0);
  CHECK(std::isnan(s(2)));
  CHECK(dy(0) == 1);
  CHECK(dy(1) == 0);
  CHECK(std::isnan(dy(2)));
}

TEST_CASE("cuda/elementwise: a destination or dy of another shape is refused",
          "[cuda][elementwise][error]") {
  const auto x = tensor<float, 2, cuda>::zeros(3, 4), y = tensor<float, 2, cuda>::zeros(3, 5);
  CHECK_THROWS_WITH(assign(y, x + x), contains("the expression is (3 x 4), the destination is"));
  CHECK_THROWS_WITH(vjp_into(x + x, y, x + x), contains("dy is (3 x 5)"));
}

TEST_CASE("cuda/elementwise: nothing is launched for results without elements",
          "[cuda][elementwise]") {
  const auto x = tensor<float, 2, cuda>::zeros(0, 4);
  CHECK(eval(x + x).size() == 0);
  CHECK_NOTHROW(vjp(x + x, x));
}
