#pragma once

#include "curve.hpp"
#include "report.hpp"

#include <nlohmann/json.hpp>

#include <iosfwd>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace demo {

/// Pictures of the mixers' matrices, those of one place side by side.
struct picture_rows {
  std::vector<matrix_picture> teacher, before, after;
};

/// All that a run has found out, for its report.
struct findings {
  nlohmann::json results;               ///< what becomes summary.json
  std::map<std::string, curve> curves;  ///< of "MODEL" or "MODEL, STAGE"
  std::map<std::string, picture_rows> pictures;
  std::vector<std::pair<std::string, std::string>> samples;  ///< (whose, text)
};

/// What the terminal shows at the end.
[[nodiscard]] std::string result_table(const nlohmann::json& results);

/// The page: results, curves, matrices and text.
[[nodiscard]] std::string report_page(const findings& f);

/// The exit code of a run with these results: 1 where greedy text decoded speculatively differs
/// from plain greedy text, which it says in one sentence.
[[nodiscard]] int verdict(const nlohmann::json& results, std::ostream& errors);

}  // namespace demo
