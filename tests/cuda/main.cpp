// The tests of the CUDA backend. Without a device they are listed as always, and each says that it
// is skipped.

#include <ssmlib/backend/cuda.hpp>

#if SSMLIB_CATCH2_MAJOR >= 3
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#include <algorithm>
#include <cstdio>
#include <string_view>

int main(int argc, char** argv) {
  const bool listing = std::any_of(
      argv, argv + argc, [](std::string_view argument) { return argument.starts_with("--list"); });
  if (!listing && ssm::cuda::device_count() == 0) {
    std::puts("skipped: there is no CUDA device, or no driver; run this where there is one");
    return 2;
  }
  return Catch::Session().run(argc, argv);
}
