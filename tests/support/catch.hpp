#pragma once

// The only place that includes Catch2: one test source builds with major versions 2 and 3.

#if SSMLIB_CATCH2_MAJOR >= 3
#include <catch2/catch_approx.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators_all.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <string>
#include <utility>

namespace ssm_test {
using approx = Catch::Approx;
inline auto contains(std::string s) {
  return Catch::Matchers::ContainsSubstring(std::move(s));
}
}  // namespace ssm_test
#else
#include <catch2/catch.hpp>

#include <string>
#include <utility>

namespace ssm_test {
using approx = Catch::Detail::Approx;  // v2's Catch::Approx names a vector matcher
inline auto contains(std::string s) {
  return Catch::Matchers::Contains(std::move(s));
}
}  // namespace ssm_test
#endif
