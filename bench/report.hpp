#pragma once

#include "ceilings.hpp"
#include "goals.hpp"
#include "harness.hpp"

namespace bench {

/// The tables: machine and ceilings, the sweep, the goals. On standard output, and as Markdown in
/// options.markdown.
void print_report(const session& s, const ceilings& c, const std::vector<goal_row>& rows);

}  // namespace bench
