#include <ssmlib/expr/gram.hpp>
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/tensor/random.hpp>

#include <cmath>
#include <limits>
#include <numbers>
#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::contains;

template <class T, int R>
double relative_error(const tensor<T, R>& a, const tensor<T, R>& b) {
  REQUIRE(a.extents() == b.extents());
  double difference = 0, norm = 0;
  a.zip_with(b, [&](const T& x, const T& y) {
    difference += std::pow(static_cast<double>(x) - static_cast<double>(y), 2);
    norm += std::pow(static_cast<double>(y), 2);
  });
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}
template <class T, int R>
bool same_bits(const tensor<T, R>& a, const tensor<T, R>& b) {
  bool same = a.extents() == b.extents();
  if (same) {
    a.zip_with(b,
               [&](const T& x, const T& y) { same = same && std::memcmp(&x, &y, sizeof(T)) == 0; });
  }
  return same;
}

/// f(build) with a function that takes any operand, and the same function of a double.
template <class F>
void for_each_function(F f) {
  f(
      "negate", [](auto x) { return -x; }, [](double x) { return -x; });
  f(
      "exp", [](auto x) { return exp(x); }, [](double x) { return std::exp(x); });
  f(
      "log", [](auto x) { return log(square(x) + 0.5); },
      [](double x) { return std::log(x * x + 0.5); });
  f(
      "sqrt", [](auto x) { return sqrt(square(x) + 0.5); },
      [](double x) { return std::sqrt(x * x + 0.5); });
  f(
      "rsqrt", [](auto x) { return rsqrt(square(x) + 0.5); },
      [](double x) { return 1 / std::sqrt(x * x + 0.5); });
  f(
      "abs", [](auto x) { return abs(x); }, [](double x) { return std::abs(x); });
  f(
      "sigmoid", [](auto x) { return sigmoid(x); },
      [](double x) { return 1 / (1 + std::exp(-x)); });
  f(
      "silu", [](auto x) { return silu(x); }, [](double x) { return x / (1 + std::exp(-x)); });
  f(
      "relu", [](auto x) { return relu(x); }, [](double x) { return std::max(x, 0.0); });
  f(
      "gelu", [](auto x) { return gelu(x); },
      [](double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); });
  f(
      "gelu_tanh", [](auto x) { return gelu_tanh(x); },
      [](double x) {
        return 0.5 * x *
               (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
      });
  f(
      "tanh", [](auto x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  f(
      "softplus", [](auto x) { return softplus(x); },
      [](double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); });
  f(
      "elu", [](auto x) { return elu(x, 0.7); },
      [](double x) { return x > 0 ? x : 0.7 * std::expm1(x); });
  f(
      "clamp", [](auto x) { return clamp(x, -0.8, 1.1); },
      [](double x) { return std::clamp(x, -0.8, 1.1); });
  f(
      "divide", [](auto x) { return 2 / (x + 5); }, [](double x) { return 2 / (x + 5); });
  f(
      "subtract", [](auto x) { return 1 - x - 3; }, [](double x) { return 1 - x - 3; });
  f(
      "min", [](auto x) { return min(x, 0.3); }, [](double x) { return std::min(x, 0.3); });
  f(
      "max", [](auto x) { return max(0.3, x); }, [](double x) { return std::max(x, 0.3); });
}

TEMPLATE_TEST_CASE("expr/elementwise: every function equals its definition", "[expr][elementwise]",
                   float, double) {
  using T = TestType;
  const index_t n = GENERATE(1, 7, 16, 37, 40000);
  const auto x = normal<T, 1>({n}, 2.0, 3);
  for_each_function([&](const char* name, auto build, auto definition) {
    CAPTURE(name, n);
    tensor<T, 1> expected(n);
    for (index_t i = 0; i < n; ++i) {
      expected(i) = static_cast<T>(definition(static_cast<double>(x(i))));
    }
    // gelu_tanh is exp of about -8 at x = -3, which multiplies the rounding of its argument.
    CHECK(relative_error(eval(build(x)), expected) < (sizeof(T) == 4 ? 5e-7 : 4e-15));
  });
}

TEMPLATE_TEST_CASE("expr/elementwise: every gradient equals the slope of the definition",
                   "[expr][elementwise]", float, double) {
  using T = TestType;
  const index_t n = GENERATE(5, 16, 37);
  const auto x = normal<T, 1>({n}, 2.0, 4), dy = normal<T, 1>({n}, 1.0, 5);
  for_each_function([&](const char* name, auto build, auto definition) {
    CAPTURE(name, n);
    tensor<T, 1> expected(n), actual = tensor<T, 1>::full({n}, T(2));
    for (index_t i = 0; i < n; ++i) {
      const double at = static_cast<double>(x(i)), h = 1e-6;
      const double slope = (definition(at + h) - definition(at - h)) / (2 * h);
      expected(i) = static_cast<T>(2 + slope * static_cast<double>(dy(i)));
    }
    const auto e = build(x);
    auto gradients = e;
    decltype(gradients)::operands(gradients,
                                  [&](std::string_view, auto& g, operand) { g = actual; });
    vjp_into(e, dy, gradients);  // added to the 2 that was there
    CHECK(relative_error(actual, expected) < (sizeof(T) == 4 ? 1e-6 : 1e-8));
  });
}

TEST_CASE("expr/elementwise: values and slopes are finite where the functions have limits",
          "[expr][elementwise]") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float at : {-inf, -1e30f, -200.0f, 200.0f, 1e30f, inf}) {
    CAPTURE(at);
    const auto x = tensor<float, 1>::full({3}, at), one = tensor<float, 1>::full({3}, 1.0f);
    const auto check = [&](auto e, float slope_below, float slope_above) {
      const auto y = eval(e);
      CHECK(!std::isnan(y(1)));
      CHECK(vjp(e, one).a(1) == (at < 0 ? slope_below : slope_above));
    };
    check(sigmoid(x), 0, 0);
    check(silu(x), 0, 1);
    check(gelu(x), 0, 1);
    check(gelu_tanh(x), 0, 1);
    check(tanh(x), 0, 0);
    check(softplus(x), 0, 1);
    check(elu(x), 0, 1);
    check(relu(x), 0, 1);
  }
}

TEST_CASE("expr/elementwise: NaN goes through min, max, clamp and relu", "[expr][elementwise]") {
  const auto nan = tensor<float, 1>::full({5}, std::nanf(""));
  const auto one = tensor<float, 1>::full({5}, 1.0f);
  CHECK(std::isnan(eval(min(nan, one))(4)));
  CHECK(std::isnan(eval(min(one, nan))(4)));
  CHECK(std::isnan(eval(max(nan, one))(4)));
  CHECK(std::isnan(eval(max(one, nan))(4)));
  CHECK(std::isnan(eval(clamp(nan, -1, 1))(4)));
  CHECK(std::isnan(eval(relu(nan))(4)));
}

/// A reference for x * s + t with any shapes: plain loops over the four axes, in double.
template <class T, int R1, int R2, int R3>
struct naive {
  tensor<T, R1> x;
  tensor<T, R2> s;
  tensor<T, R3> t;
  template <int R>
  static double& at(const tensor<double, R>& a, const std::array<index_t, 4>& i) {
    index_t offset = 0;
    for (int d = 0; d < R; ++d) {
      const auto k = static_cast<std::size_t>(4 - R + d);
      offset += a.extent(d) == 1 ? 0 : i[k] * a.strides()[static_cast<std::size_t>(d)];
    }
    return a.data()[offset];
  }
  template <class F>
  static void loop(const shape<4>& n, F f) {
    std::array<index_t, 4> i{};
    for (i[0] = 0; i[0] < n[0]; ++i[0])
      for (i[1] = 0; i[1] < n[1]; ++i[1])
        for (i[2] = 0; i[2] < n[2]; ++i[2])
          for (i[3] = 0; i[3] < n[3]; ++i[3])
            f(i);
  }
};

template <class T, int R1, int R2, int R3>
void check_broadcast(const shape<R1>& nx, const shape<R2>& ns, const shape<R3>& nt) {
  CAPTURE(to_string<R1>(nx), to_string<R2>(ns), to_string<R3>(nt));
  using reference = naive<T, R1, R2, R3>;
  const auto x = normal<T, R1>(nx, 1.0, 1);
  const auto s = normal<T, R2>(ns, 1.0, 2);
  const auto t = normal<T, R3>(nt, 1.0, 3);
  const auto e = silu(x * s) + t;
  const auto y = eval(e);
  const auto dy = normal<T, decltype(e)::rank>(e.extents(), 1.0, 4);
  const auto g = vjp(e, dy);

  const auto x64 = cast<double>(x);
  const auto dy64 = cast<double>(dy);
  const auto s64 = cast<double>(s);
  const auto t64 = cast<double>(t);
  const auto y64 = tensor<double, decltype(e)::rank>::zeros(e.extents());
  const auto dx = tensor<double, R1>::zeros(nx);
  const auto ds = tensor<double, R2>::zeros(ns);
  const auto dt = tensor<double, R3>::zeros(nt);
  reference::loop(detail::aligned_extents(e.extents()), [&](const auto& i) {
    const double a = reference::at(x64, i), b = reference::at(s64, i), d = reference::at(dy64, i);
    const double sigma = 1 / (1 + std::exp(-a * b));
    reference::at(y64, i) = a * b * sigma + reference::at(t64, i);
    const double slope = sigma * (1 + a * b * (1 - sigma));
    reference::at(dx, i) += d * slope * b;
    reference::at(ds, i) += d * slope * a;
    reference::at(dt, i) += d;
  });
  const double tolerance = sizeof(T) == 4 ? 2e-6 : 1e-13;
  CHECK(relative_error(cast<double>(y), y64) < tolerance);
  CHECK(relative_error(cast<double>(g.a.a.a), dx) < tolerance);
  CHECK(relative_error(cast<double>(g.a.a.b), ds) < tolerance);
  CHECK(relative_error(cast<double>(g.b), dt) < tolerance);
}

TEMPLATE_TEST_CASE("expr/elementwise: operands are repeated along missing and single axes",
                   "[expr][elementwise]", float, double) {
  using T = TestType;
  check_broadcast<T, 3, 1, 1>({2, 5, 37}, {37}, {37});
  check_broadcast<T, 3, 1, 3>({2, 5, 37}, {1}, {2, 1, 37});
  check_broadcast<T, 4, 2, 3>({2, 5, 3, 9}, {3, 1}, {5, 1, 9});
  check_broadcast<T, 4, 4, 4>({2, 5, 1, 9}, {2, 5, 3, 1}, {1, 1, 3, 9});
  check_broadcast<T, 1, 3, 2>({9}, {2, 5, 1}, {5, 9});
  check_broadcast<T, 4, 3, 3>({1, 1, 1, 1}, {4, 1, 2}, {1, 3, 1});
  check_broadcast<T, 2, 1, 2>({900, 40}, {40}, {900, 1});          // several tasks
  check_broadcast<T, 1, 1, 1>({70000}, {1}, {70000});              // one row, cut
  check_broadcast<T, 3, 2, 2>({3, 200, 50}, {200, 50}, {200, 1});  // a large repeated operand
  check_broadcast<T, 3, 1, 3>({0, 5, 4}, {4}, {1, 5, 4});
}

TEST_CASE("expr/elementwise: results do not depend on the number of threads",
          "[expr][elementwise][threads]") {
  const auto x = normal<float, 3>({3, 400, 96}, 1.0, 1);
  const auto s = normal<float, 1>({96}, 1.0, 2);
  const auto r = normal<float, 3>({3, 400, 1}, 1.0, 3);
  const auto t = normal<float, 2>({400, 96}, 1.0, 4);
  const auto e = silu(x * s) * r + t;
  const auto d = normal<float, 3>({3, 400, 96}, 1.0, 6);
  const cpu::context one(1), three(3);
  CHECK(same_bits(eval(e, one), eval(e, three)));
  const auto g1 = vjp(e, d, one), g3 = vjp(e, d, three);
  CHECK(same_bits(g1.a.a.a.a, g3.a.a.a.a));
  CHECK(same_bits(g1.a.a.a.b, g3.a.a.a.b));
  CHECK(same_bits(g1.a.b, g3.a.b));
  CHECK(same_bits(g1.b, g3.b));
}

TEST_CASE("expr/elementwise: strided parts and slow strides read and write the right elements",
          "[expr][elementwise]") {
  const auto both = normal<double, 3>({2, 50, 74}, 1.0, 1);
  const auto gate = both.slice(2, 0, 37), up = both.slice(2, 37, 74);
  const auto dense = eval(silu(gate.clone()) * up.clone());
  CHECK(same_bits(eval(silu(gate) * up), dense));
  // A part of one feature has a stride between its elements.
  const auto column = both.slice(2, 5, 6).reshape(2, 50);
  const auto target = tensor<double, 3>::zeros(2, 50, 3);
  const auto destination = target.slice(2, 1, 2).reshape(2, 50);
  assign(destination, column * 2);
  CHECK(same_bits(destination.clone(), eval(column.clone() * 2)));
  CHECK(target(1, 3, 0) == 0.0);
  CHECK(target(1, 3, 2) == 0.0);
}

TEST_CASE("expr/elementwise: the gradients of parts are the parts of the gradient",
          "[expr][elementwise]") {
  const auto both = normal<double, 3>({2, 700, 74}, 1.0, 1);
  const auto gate = both.slice(2, 0, 37), up = both.slice(2, 37, 74);
  const auto dy = normal<double, 3>({2, 700, 37}, 1.0, 2);
  tape<double> t;
  t.watch(both);
  const auto y = eval(silu(gate) * up, &t);
  t.gradient(y).copy_from(dy);
  t.backward();
  const auto g = vjp(silu(gate.clone()) * up.clone(), dy);
  const auto whole = t.gradient(both);
  CHECK(same_bits(whole.slice(2, 0, 37).clone(), g.a.a));
  CHECK(same_bits(whole.slice(2, 37, 74).clone(), g.b));
}

TEST_CASE("expr/elementwise: an operand that occurs twice gets both gradients",
          "[expr][elementwise]") {
  const auto x = normal<double, 2>({300, 90}, 1.0, 1), dy = normal<double, 2>({300, 90}, 1.0, 2);
  tape<double> t;
  t.watch(x);
  const auto y = eval(x * sigmoid(x) + 3 * x, &t);
  t.gradient(y).copy_from(dy);
  t.backward();
  const auto expected = eval(dy * (vjp(silu(x), tensor<double, 2>::full({300, 90}, 1.0)).a + 3));
  CHECK(relative_error(t.gradient(x), expected) < 1e-14);
}

TEST_CASE("expr/elementwise: shifted parts of one tensor share a gradient safely",
          "[expr][elementwise][threads]") {
  const index_t n = 40000;
  const auto x = normal<double, 1>({n + 1}, 1.0, 1), dy = normal<double, 1>({n}, 1.0, 2);
  const auto run = [&](int threads) {
    const cpu::context ctx(threads);
    tape<double> t;
    t.watch(x);
    const auto y = eval(x.slice(0, 0, n) - 2 * x.slice(0, 1, n + 1), &t, ctx);
    t.gradient(y).copy_from(dy);
    t.backward();
    return t.gradient(x).clone();
  };
  const auto g = run(3);
  CHECK(same_bits(g, run(1)));
  CHECK(g(0) == dy(0));
  CHECK(g(77) == ssm_test::approx(dy(77) - 2 * dy(76)));
  CHECK(g(n) == -2 * dy(n - 1));
}

TEST_CASE("expr/elementwise: assign to an operand at the same place and at another",
          "[expr][elementwise]") {
  const auto original = normal<float, 1>({50000}, 1.0, 1);
  const auto x = original.clone();
  assign(x, x * 2 + original);
  CHECK(same_bits(x, eval(original * 2 + original)));
  const auto y = original.clone();
  assign(y.slice(0, 1, 50000), y.slice(0, 0, 49999) + 1);
  CHECK(same_bits(y.slice(0, 1, 50000), eval(original.slice(0, 0, 49999) + 1)));
}

TEST_CASE("expr/elementwise: bf16 operands are widened, and get their gradients rounded once",
          "[expr][elementwise]") {
  const auto wide = normal<float, 2>({30, 21}, 1.0, 1);
  const auto s = normal<float, 1>({21}, 1.0, 2);
  const auto narrow = cast<bf16>(wide);
  const auto rounded = cast<float>(narrow);
  const auto y = eval(narrow * s);
  STATIC_REQUIRE((std::is_same_v<decltype(y), const tensor<float, 2>>));
  CHECK(same_bits(y, eval(rounded * s)));
  const auto dy = normal<float, 2>({30, 21}, 1.0, 3);
  const auto g = vjp(narrow * s, dy);
  CHECK(same_bits(g.a, cast<bf16>(vjp(rounded * s, dy).a)));
  CHECK(same_bits(g.b, vjp(rounded * s, dy).b));
}

TEST_CASE("expr/elementwise: absent gradients are skipped", "[expr][elementwise]") {
  const auto a = normal<float, 1>({40}, 1.0, 1), b = normal<float, 1>({40}, 1.0, 2);
  const auto e = a * b;
  auto gradients = e;
  gradients.a = {};
  gradients.b = tensor<float, 1>::zeros(40);
  vjp_into(e, b, gradients);
  CHECK(same_bits(gradients.b, eval(a * b)));
  CHECK_FALSE(gradients.a);
}

TEST_CASE("expr/elementwise: the operators leave the mixers' own products alone",
          "[expr][elementwise][static]") {
  const auto q = normal<float, 4>({1, 4, 2, 3}, 1.0, 1);
  STATIC_REQUIRE((std::is_same_v<decltype(q * transpose(q)), gram<float, cpu>>));
  STATIC_REQUIRE((std::is_same_v<decltype(q * transpose(q) * 0.5), gram<float, cpu>>));
  STATIC_REQUIRE((std::is_same_v<decltype(q * transpose(q) * q), mix<gram<float, cpu>, 4>>));
  STATIC_REQUIRE(ElementwiseExpression<decltype(q * q)>);
}

TEST_CASE("expr/elementwise: shapes that do not fit are refused when the node is built",
          "[expr][elementwise][error]") {
  const auto a = tensor<float, 3>::zeros(2, 5, 4);
  CHECK_THROWS_WITH((a + tensor<float, 1>::zeros(3)),
                    contains("one operand is (2 x 5 x 4), the other (3)"));
  CHECK_THROWS_AS((a * tensor<float, 3>::zeros(2, 4, 4)), shape_error);
  CHECK_THROWS_WITH(assign(tensor<float, 1>::zeros(4), tensor<float, 1>::zeros(5) + 1),
                    contains("the expression is (5), the destination is (4)"));
  CHECK_THROWS_AS(vjp(a + 1, tensor<float, 3>::zeros(2, 5, 1)), shape_error);
  CHECK_THROWS_AS(clamp(a, 1, 0), value_error);
}

}  // namespace
