#include "mixer_operands.hpp"
#include "support/catch.hpp"
#include <ssmlib/lower/cuda/gram.hpp>
#include <ssmlib/lower/cuda/quadratic.hpp>
#include <ssmlib/lower/cuda/semiseparable.hpp>
#include <ssmlib/lower/cuda/softmax.hpp>
#include <ssmlib/lower/cuda/toeplitz.hpp>
#include <ssmlib/lower/gram.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/lower/toeplitz.hpp>
#include <ssmlib/mixer/verify.hpp>

#include <sstream>
#include <string>
#include <vector>

// verify() on the device: every mixer by each algorithm of its list, as on the CPU.

using namespace ssm;
using namespace ssm_test;

namespace {

/// Sizes of the kernels for any size, and of those for the usual ones.
mixer_sizes general_sizes() {
  return {.heads = 2, .query_heads = 1, .key_heads = 2, .mask_heads = 2, .keys = 3, .features = 2};
}
mixer_sizes usual_sizes() {
  return {
      .heads = 2, .query_heads = 2, .key_heads = 1, .mask_heads = 2, .keys = 64, .features = 64};
}

template <Floating T, class Make>
verify_report verified(const Make& make, mixer_sizes s, std::vector<index_t> lengths) {
  return verify(
      [&](index_t batch, index_t length, philox& random) {
        s.batch = batch, s.length = length;
        s.seed = 100 * (random.bits() % 1000);
        return make(on_device<T>(random_operands(s)));
      },
      {.lengths = std::move(lengths)});
}

/// Every algorithm of the list has kernels on the device, and passes.
template <Floating T, class Make>
void require_verified(const Make& make, const std::vector<index_t>& lengths = {1, 2, 17, 65}) {
  std::vector<verify_report> reports{verified<T>(make, general_sizes(), lengths)};
  if (!std::same_as<T, double>) reports.push_back(verified<T>(make, usual_sizes(), {17, 130}));
  for (const verify_report& report : reports) {
    std::ostringstream table;
    table << report;
    INFO(table.str());
    CHECK(report.passed());
    CHECK(report.unpaired.empty());
  }
}

}  // namespace

TEMPLATE_TEST_CASE("cuda/verify: attention passes", "[cuda][verify]", float, double, bf16) {
  SECTION("causal") {
    require_verified<TestType>(causal_attention);
  }
  SECTION("to all") {
    require_verified<TestType>(
        [](const auto& o) { return softmax(o.q * transpose(o.k) * 0.7) * o.x; });
  }
  SECTION("window") {
    require_verified<TestType>(window_attention);
  }
}

TEMPLATE_TEST_CASE("cuda/verify: the semiseparable mixers pass", "[cuda][verify]", float, double,
                   bf16) {
  SECTION("linear attention") {
    require_verified<TestType>(
        [](const auto& o) { return hadamard(causal, o.q * transpose(o.k)) * o.x; });
  }
  SECTION("normalised linear attention") {
    // One or two tokens leave gradients that cancel to the rounding of bf16.
    require_verified<TestType>(normalized_attention, std::same_as<TestType, bf16>
                                                         ? std::vector<index_t>{17, 65}
                                                         : std::vector<index_t>{1, 2, 17, 65});
  }
  SECTION("retention") {
    require_verified<TestType>(retention);
  }
  SECTION("Mamba-2") {
    require_verified<TestType>(mamba2);
  }
}

TEMPLATE_TEST_CASE("cuda/verify: the mixers with richer gates pass", "[cuda][verify]", float,
                   double, bf16) {
  SECTION("selective scan") {
    require_verified<TestType>(mamba1);
  }
  SECTION("gated linear attention") {
    require_verified<TestType>(gated_attention);
  }
  SECTION("delta rule") {
    require_verified<TestType>(delta_attention);
  }
}

TEMPLATE_TEST_CASE("cuda/verify: masks by themselves pass", "[cuda][verify]", float, double, bf16) {
  SECTION("ones") {
    require_verified<TestType>([](const auto& o) {
      using X = std::remove_cvref_t<decltype(o.x)>;
      return causal_mask<typename X::value_type, typename X::backend>{} * o.x;
    });
  }
  SECTION("decay") {
    require_verified<TestType>([](const auto& o) { return decay(o.own_gamma) * o.x; });
  }
  SECTION("semiseparable") {
    require_verified<TestType>(
        [](const auto& o) { return semiseparable(o.own_log_a, o.own_weight) * o.x; });
  }
}

TEMPLATE_TEST_CASE("cuda/verify: matrices without a state pass", "[cuda][verify]", float, double,
                   bf16) {
  SECTION("Gram") {
    require_verified<TestType>([](const auto& o) { return (o.q * transpose(o.k) * 0.5) * o.x; });
  }
  SECTION("window") {
    require_verified<TestType>(
        [](const auto& o) { return hadamard(window(6), o.q * transpose(o.k)) * o.x; });
  }
  SECTION("Toeplitz attention") {
    require_verified<TestType>(
        [](const auto& o) { return hadamard(toeplitz(o.kernel), o.q * transpose(o.k)) * o.x; });
  }
  SECTION("Toeplitz") {
    require_verified<TestType>([](const auto& o) { return toeplitz(o.own_kernel) * o.x; });
  }
}
