#include <ssmlib/train/schedule.hpp>

#include <support/catch.hpp>

namespace {
using namespace ssm;
using ssm_test::contains;
}  // namespace

TEST_CASE("train/schedule: warm-up rises by equal parts and the first step moves",
          "[train][schedule]") {
  const constant_schedule constant{4};
  const cosine_schedule cosine{.steps = 100, .warmup = 4};
  const wsd_schedule wsd{.steps = 100, .warmup = 4, .decay = 10};
  for (const index_t step : {0, 1, 2, 3}) {
    const double expected = 0.25 * static_cast<double>(step + 1);
    CHECK(constant(step) == expected);
    CHECK(cosine(step) == expected);
    CHECK(wsd(step) == expected);
  }
  CHECK(constant(4) == 1.0);
  CHECK(constant(1000000) == 1.0);
  CHECK(constant_schedule{}(0) == 1.0);
}

TEST_CASE("train/schedule: the cosine passes through its known points", "[train][schedule]") {
  const cosine_schedule s{.steps = 110, .warmup = 10, .final = 0.1};
  const double tolerance = 1e-15;
  CHECK(s(10) == 1.0);
  CHECK(std::abs(s(60) - 0.55) <= tolerance);                                 // half way
  CHECK(std::abs(s(35) - (0.1 + 0.45 * (1 + std::sqrt(0.5)))) <= tolerance);  // a quarter
  CHECK(s(109) > 0.1);
  CHECK(s(110) == 0.1);
  CHECK(s(5000) == 0.1);
}

TEST_CASE("train/schedule: warmup-stable-decay is flat, then falls", "[train][schedule]") {
  const wsd_schedule linear{.steps = 100, .warmup = 10, .decay = 16, .final = 0.2};
  CHECK(linear(10) == 1.0);
  CHECK(linear(83) == 1.0);
  CHECK(linear(84) == 1.0);  // where the decay begins
  CHECK(std::abs(linear(88) - 0.8) <= 1e-15);
  CHECK(std::abs(linear(92) - 0.6) <= 1e-15);
  CHECK(linear(100) == 0.2);
  const wsd_schedule root{
      .steps = 100, .warmup = 10, .decay = 16, .shape = decay_shape::one_minus_sqrt};
  CHECK(root(84) == 1.0);
  CHECK(root(85) == 0.75);
  CHECK(root(88) == 0.5);
  CHECK(root(93) == 0.25);
  CHECK(root(100) == 0.0);
  CHECK(wsd_schedule{.steps = 5}(7) == 1.0);  // no decay at all
}

TEST_CASE("train/schedule: warm-up and decay longer than the run are refused",
          "[train][schedule][error]") {
  CHECK_THROWS_WITH((wsd_schedule{.steps = 10, .warmup = 6, .decay = 5}(0)),
                    contains("6 steps of warm-up and 5 of decay in 10 steps"));
  CHECK_THROWS_AS((cosine_schedule{.steps = 10, .warmup = 11}(0)), value_error);
  CHECK_THROWS_AS((cosine_schedule{.steps = 10}(-1)), value_error);
  CHECK_THROWS_AS(constant_schedule{-1}(0), value_error);
}
