#include "mixers/recurrent_checks.hpp"
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/wrappers.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

/// channels, features of X, state size, groups of C and of B, heads of X
struct selective_case {
  index_t channels = 12, features = 1, states = 16, c_groups = 1, b_groups = 1, x_heads = 12;
  double longest_step = 0.3;

  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto delta = uniform<T, 3>({batch, length, channels}, 0.001, longest_step, 1);
    const auto a = uniform<T, 2>({channels, states}, -4, -0.1, 2);
    const auto c = uniform<T, 4>({batch, length, c_groups, states}, -1, 1, 3);
    const auto b = uniform<T, 4>({batch, length, b_groups, states}, -1, 1, 4);
    const auto u = uniform<T, 4>({batch, length, x_heads, features}, -1, 1, 5);
    return selective(delta, a, c, b) * u;
  }
};

/// With + diagonal(D).
struct skipped_case {
  selective_case inner;
  index_t skips;

  template <class T>
  auto operator()(index_t batch, index_t length) const {
    auto e = inner.operator()<T>(batch, length);
    return (std::move(e.mixer) + diagonal(uniform<T, 1>({skips}, -1, 1, 7))) * e.x;
  }
};

constexpr selective_case plain{};
constexpr selective_case grouped{
    .channels = 24, .states = 5, .c_groups = 2, .b_groups = 6, .x_heads = 24};
constexpr selective_case wide{.channels = 43, .states = 3, .x_heads = 43};
constexpr selective_case shared{
    .channels = 4, .features = 3, .states = 2, .b_groups = 2, .x_heads = 8};
constexpr selective_case spread{.channels = 6, .features = 2, .states = 4, .x_heads = 3};

}  // namespace

TEST_CASE("mixers/selective: every algorithm multiplies by dense()", "[mixers][selective]") {
  const index_t length = GENERATE(1, 2, 31, 32, 33, 70);
  for (const selective_case& make : {plain, grouped, wide, shared, spread}) {
    CAPTURE(make.channels);
    check_forward(make, 2, length, alg::scan{});
    check_forward(make, 2, length, alg::scan{16});
    check_forward(make, 2, length, alg::recurrent{});
    check_forward(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/selective: gradients are those of finite differences", "[mixers][selective]") {
  const index_t length = GENERATE(1, 32, 45);
  for (const selective_case& make : {plain, grouped, wide, shared, spread}) {
    CAPTURE(make.channels);
    check_vjp(make, 2, length, alg::scan{});
    check_vjp(make, 2, length, alg::recurrent{});
    check_vjp(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/selective: the skip connection is part of the scan", "[mixers][selective]") {
  const index_t length = GENERATE(1, 45);
  for (const skipped_case& make :
       {skipped_case{plain, 12}, skipped_case{grouped, 24}, skipped_case{wide, 43},
        skipped_case{shared, 4}, skipped_case{shared, 8}, skipped_case{spread, 2}}) {
    CAPTURE(make.inner.channels, make.skips);
    check_forward(make, 2, length, alg::scan{});
    check_forward(make, 2, length, alg::scan{16});
    check_forward(make, 2, length, alg::recurrent{});
    check_vjp(make, 2, length, alg::scan{});
    check_vjp(make, 2, length, alg::recurrent{});
  }
}

TEST_CASE("mixers/selective: packed sequences have the bits that each has alone",
          "[mixers][selective]") {
  for (const selective_case& make : {plain, wide}) {
    check_packed(make, {5, 0, 1, 64, 33, 7}, alg::scan{});
    check_packed(make, {5, 0, 1, 64, 33, 7}, alg::scan{8});
    check_packed(make, {5, 0, 1, 64, 33, 7}, alg::recurrent{});
    check_packed(make, {5, 0, 1, 9}, alg::quadratic{});
  }
}

TEST_CASE("mixers/selective: a cut sequence continues from its state", "[mixers][selective]") {
  for (const selective_case& make : {plain, grouped}) {
    check_split(make, 41, alg::scan{});
    check_split(make, 41, alg::scan{7});
    check_split(make, 41, alg::recurrent{});
    check_split(make, 41, alg::quadratic{});
  }
}

TEST_CASE("mixers/selective: results do not depend on the number of threads",
          "[mixers][selective][threads]") {
  check_threads(wide, 3, 50, alg::scan{});
  check_threads(wide, 3, 50, alg::scan{16});
  check_threads(selective_case{.channels = 4, .x_heads = 4}, 1, 9000, alg::scan{});
}

TEST_CASE("mixers/selective: snapshots are the states before the last tokens",
          "[mixers][selective]") {
  check_snapshots(plain, 11, 4);
  check_snapshots(spread, 3, 5);
}

TEST_CASE("mixers/selective: one narrow sequence is cut in two by default", "[mixers][selective]") {
  // Long enough for the kernel's own choice; the state is forgotten on the way, so that the whole
  // agrees with the recurrent form to rounding.
  const auto e =
      selective_case{.channels = 3, .states = 2, .x_heads = 3}.operator()<float>(1, 8195);
  CHECK(relative_error(eval(e), eval(e.with(alg::recurrent{}))) < 1e-6);
}

TEST_CASE("mixers/selective: extreme steps give numbers", "[mixers][selective]") {
  const double step = GENERATE(0.0, 1e-12, 1e3, 1e30);
  CAPTURE(step);
  const auto e = plain.operator()<float>(1, 40);
  e.mixer.delta.fill(static_cast<float>(step));
  e.x.fill(step > 1 ? static_cast<float>(1 / step) : 1.0f);
  const auto y = eval(e);
  const auto expected = dense_product(e);
  const double size =
      std::max(1e-30, relative_error(expected, tensor<double, 4>::zeros(e.extents())));
  double worst = 0;
  for (index_t i = 0; i < y.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(y.data()[i]) - expected.data()[i]));
    REQUIRE(std::isfinite(y.data()[i]));
  }
  CHECK(worst <= 1e-6 * size);
  const auto g = vjp(e, y);
  CHECK(std::isfinite(relative_error(g.mixer.delta, g.mixer.delta)));
  CHECK(std::isfinite(relative_error(g.mixer.a, g.mixer.a)));
}

TEST_CASE("mixers/selective: a hundred thousand tokens stay within rounding",
          "[mixers][selective][slow]") {
  // The state is a sum of terms whose weights fall by exp(delta a): rounding errors do too.
  selective_case make{.channels = 2, .states = 2, .x_heads = 2};
  const auto exact = eval(make.operator()<double>(1, 100000));
  const auto single = make.operator()<float>(1, 100000);
  CHECK(relative_error(eval(single.with(alg::recurrent{})), exact) < 1e-5);
  CHECK(relative_error(eval(single.with(alg::scan{1000})), exact) < 1e-5);
}

TEST_CASE("mixers/selective: absent gradients are skipped", "[mixers][selective]") {
  const auto e = plain.operator()<double>(2, 20);
  const auto dy = uniform<double, 4>(e.extents(), -1, 1, 6);
  const auto all = vjp(e, dy);
  auto some = e;
  std::remove_cvref_t<decltype(some)>::operands(some,
                                                [](std::string_view, auto& t, operand) { t = {}; });
  some.mixer.b = tensor<double, 4>::zeros(e.mixer.b.extents());
  vjp_into(e, dy, some, carry_gradient<double>{});
  CHECK(same_bits(some.mixer.b, all.mixer.b));
}

TEST_CASE("mixers/selective: slices of larger tensors need no copies to be right",
          "[mixers][selective]") {
  const auto e = plain.operator()<double>(2, 20);
  const auto inside = [](const auto& t) {
    auto extents = t.extents();
    extents[2] += 5;
    std::remove_cvref_t<decltype(t)> larger(extents);
    const auto part = larger.slice(2, 3, 3 + t.extent(2));
    part.copy_from(t);
    return part;
  };
  const auto sliced =
      selective(inside(e.mixer.delta), e.mixer.a, inside(e.mixer.c), inside(e.mixer.b)) *
      inside(e.x);
  CHECK(same_bits(eval(sliced), eval(e)));
}

TEST_CASE("mixers/selective: sizes that do not fit are refused", "[mixers][selective][error]") {
  const tensor<float, 3> delta(2, 7, 12);
  const tensor<float, 4> c(2, 7, 1, 16), other(2, 7, 1, 8), five(2, 7, 5, 16);
  CHECK_THROWS_WITH(selective(delta, tensor<float, 2>(11, 16), c, c),
                    contains("delta has 12 channels, A is (11 x 16)"));
  CHECK_THROWS_WITH(selective(delta, tensor<float, 2>(12, 16), c, other),
                    contains("wanted the same state size"));
  CHECK_THROWS_WITH(selective(delta, tensor<float, 2>(12, 16), five, c), contains("5 groups"));
}
