#include "verify_mixers.hpp"

namespace {

using properties::require_verified;

TEMPLATE_TEST_CASE("properties/verify: the mixers with richer gates pass", "[properties][verify]",
                   float, double) {
  SECTION("selective scan") {
    require_verified<TestType>([](const auto& o) { return o.selective_scan(); });
  }
  SECTION("gated linear attention") {
    require_verified<TestType>([](const auto& o) { return o.gated_linear(); });
  }
  SECTION("delta rule") {
    require_verified<TestType>([](const auto& o) { return o.delta(); });
  }
}

}  // namespace
