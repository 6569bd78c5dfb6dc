#pragma once

#include "gradient_check.hpp"
#include <ssmlib/io/safetensors.hpp>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace ssm_test {

/// The reference files of an operation, by the beginning of their names, in order. The folder that
/// holds ops/ is SSMLIB_GOLDENS where set.
inline std::vector<std::filesystem::path> golden_files(std::string_view prefix) {
  const char* folder = std::getenv("SSMLIB_GOLDENS");
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(
           std::filesystem::path(folder != nullptr ? folder : SSMLIB_TEST_DATA) / "ops")) {
    if (entry.path().filename().string().starts_with(prefix)) files.push_back(entry.path());
  }
  std::ranges::sort(files);
  return files;
}

/// Whether a result agrees with the reference, which was computed in double and stored in float:
/// double to 1e-6 of the largest value, float to 1e-5 in norm and 1e-4 of the largest value.
template <class T, int R>
bool agrees(const ssm::safetensors_reader& file, const std::string& name,
            const ssm::tensor<T, R>& actual) {
  const auto expected = file.load<double, R>(name);
  if constexpr (std::same_as<T, double>) {
    return largest_error(actual, expected) < 1e-6;
  } else {
    return relative_error(actual, expected) < 1e-5 && largest_error(actual, expected) < 1e-4;
  }
}

}  // namespace ssm_test
