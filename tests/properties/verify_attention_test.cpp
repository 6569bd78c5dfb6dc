#include "verify_mixers.hpp"

namespace {

using properties::require_verified;

TEMPLATE_TEST_CASE("properties/verify: attention and Toeplitz masks pass", "[properties][verify]",
                   float, double) {
  SECTION("causal attention") {
    require_verified<TestType>([](const auto& o) { return o.attention(); });
  }
  SECTION("full attention") {
    require_verified<TestType>([](const auto& o) { return softmax(o.gram()) * o.x; });
  }
  SECTION("window attention") {
    require_verified<TestType>([](const auto& o) { return o.window(); });
  }
  SECTION("Toeplitz attention") {
    require_verified<TestType>([](const auto& o) { return o.toeplitz_attention(); });
  }
  SECTION("Toeplitz") {
    require_verified<TestType>([](const auto& o) { return o.toeplitz_mask(); });
  }
}

}  // namespace
