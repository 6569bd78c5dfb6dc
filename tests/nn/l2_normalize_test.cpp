#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/l2_normalize.hpp>

using namespace ssm;

TEST_CASE("nn/l2_normalize: rows are divided by their length", "[nn][l2_normalize]") {
  const double eps = GENERATE(0.0, 1e-6, 0.5);
  const auto x = uniform<float, 4>({2, 3, 4, 13}, -2, 2, 1);
  const auto y = op::l2_normalize(pass<float>{}, x, eps);
  for (index_t row = 0; row < 24; ++row) {
    double squares = eps;
    for (index_t i = 0; i < 13; ++i) {
      squares += static_cast<double>(x.data()[row * 13 + i]) * x.data()[row * 13 + i];
    }
    for (index_t i = 0; i < 13; ++i) {
      const double expected = x.data()[row * 13 + i] / std::sqrt(squares);
      REQUIRE(std::abs(y.data()[row * 13 + i] - expected) < 5e-7);
    }
  }
}

TEST_CASE("nn/l2_normalize: the gradient is that of differences", "[nn][l2_normalize]") {
  const double eps = GENERATE(0.0, 1e-3);
  const auto x = uniform<double, 4>({2, 3, 2, 7}, -1, 1, 1);
  const double error = ssm_test::gradient_error({ssm_test::flat(x)}, [&](const pass<double>& p) {
    return std::vector{ssm_test::flat(op::l2_normalize(p, x, eps))};
  });
  CHECK(error < 1e-7);
}

TEST_CASE("nn/l2_normalize: a slice of a larger tensor is read and its part of the gradient added",
          "[nn][l2_normalize]") {
  const auto larger = uniform<double, 4>({2, 3, 2, 12}, -1, 1, 1);
  const auto part = larger.slice(3, 4, 9);
  CHECK(ssm_test::relative_error(op::l2_normalize(pass<double>{}, part),
                                 op::l2_normalize(pass<double>{}, part.clone())) == 0);
  const double error =
      ssm_test::gradient_error({ssm_test::flat(larger)}, [&](const pass<double>& p) {
        return std::vector{ssm_test::flat(op::l2_normalize(p, part))};
      });
  CHECK(error < 1e-7);
}

TEST_CASE("nn/l2_normalize: zeros stay zeros without eps", "[nn][l2_normalize]") {
  const auto y = op::l2_normalize(pass<float>{}, tensor<float, 4>::zeros(1, 2, 1, 5), 0.0);
  for (index_t i = 0; i < y.size(); ++i)
    CHECK(y.data()[i] == 0.0f);
}

TEST_CASE("nn/l2_normalize: a negative eps is refused", "[nn][l2_normalize][error]") {
  CHECK_THROWS_WITH(op::l2_normalize(pass<float>{}, tensor<float, 4>(1, 1, 1, 2), -1.0),
                    ssm_test::contains("not negative"));
}
