#include "verify_mixers.hpp"

namespace {

using properties::require_verified;

TEMPLATE_TEST_CASE("properties/verify: the semiseparable mixers pass", "[properties][verify]",
                   float, double) {
  SECTION("linear attention") {
    require_verified<TestType>([](const auto& o) { return o.linear(); });
  }
  SECTION("normalized linear attention") {
    require_verified<TestType>([](const auto& o) { return o.normalized(); });
  }
  SECTION("retention") {
    require_verified<TestType>([](const auto& o) { return o.retention(); });
  }
  SECTION("Mamba-2") {
    require_verified<TestType>([](const auto& o) { return o.mamba2(); });
  }
}

}  // namespace
