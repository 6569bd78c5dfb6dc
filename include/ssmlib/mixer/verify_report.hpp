#pragma once

#include <ssmlib/base/types.hpp>

#include <algorithm>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

namespace ssm {

struct verify_options {
  /// Sequence lengths; the default has both sides of the usual chunk and step sizes.
  std::vector<index_t> lengths = {1, 2, 15, 17, 63, 64, 65, 130};
  index_t batch = 2;
  std::uint64_t seed = 1;
  /// Largest relative error (norm of the difference over norm) of results and of gradients.
  /// 0: 1e-10 and 1e-5 in double, 2e-5 and 2e-3 in float, 1e-2 and 3e-2 in bf16.
  double result_bound = 0, gradient_bound = 0;
};

/// One line of a report.
struct verify_check {
  std::string claim;      ///< "forward equals dense()", ...
  std::string algorithm;  ///< or the operand, for gradients: "chunked, d log_a"
  index_t length = 0;
  double error = 0, bound = 0;

  [[nodiscard]] bool passed() const { return error <= bound; }  // NaN fails
};

/// What verify() found. Prints as a table.
struct verify_report {
  std::vector<verify_check> checks;
  /// Algorithms of the mixer's list that its backend has no kernels for: they were not run.
  std::vector<std::string> unpaired = {};

  [[nodiscard]] bool passed() const {
    return !checks.empty() &&
           std::ranges::all_of(checks, [](const verify_check& c) { return c.passed(); });
  }
  [[nodiscard]] index_t failures() const {
    return std::ranges::count_if(checks, [](const verify_check& c) { return !c.passed(); });
  }
  friend std::ostream& operator<<(std::ostream& out, const verify_report& report) {
    std::ostringstream text;  // keeps the stream's own format
    text << std::left << std::setw(44) << "claim" << std::setw(28) << "algorithm" << std::right
         << std::setw(7) << "length" << std::setw(11) << "error" << std::setw(11) << "bound\n";
    text << std::scientific << std::setprecision(1);
    for (const verify_check& c : report.checks) {
      text << std::left << std::setw(44) << c.claim << std::setw(28) << c.algorithm << std::right
           << std::setw(7) << c.length << std::setw(11) << c.error << std::setw(10) << c.bound
           << (c.passed() ? "  ok\n" : "  FAILED\n");
    }
    for (const std::string& name : report.unpaired)
      text << "not run: " << name << ", which this backend has no kernels for\n";
    text << report.checks.size() << " checks, " << report.failures() << " failed\n";
    return out << text.str();
  }
};

}  // namespace ssm
