#pragma once

#include "ceilings.hpp"
#include "harness.hpp"

#include <functional>
#include <string>
#include <vector>

namespace bench {

enum class verdict { met, missed, not_measured, information };

/// A line of the last table.
struct goal_row {
  std::string what, goal, measured;
  bench::verdict verdict = verdict::not_measured;
};

/// Turns the timings into rows when all have run.
using goal_report = std::function<void(const session&, const ceilings&, std::vector<goal_row>&)>;

// Each adds its cases and returns what makes rows of them. Those with checks besides times (peaks
// of memory, allocations) run them in the report.
[[nodiscard]] goal_report add_gemm_goals(session& s);
[[nodiscard]] goal_report add_ssd_goals(session& s);
[[nodiscard]] goal_report add_attention_goals(session& s);
[[nodiscard]] goal_report add_selective_goals(session& s);
[[nodiscard]] goal_report add_toeplitz_goals(session& s);
[[nodiscard]] goal_report add_training_goals(session& s);
[[nodiscard]] goal_report add_decoding_goals(session& s);

/// A row for a number that must reach `goal`; nothing was measured where it is 0.
[[nodiscard]] goal_row at_least(std::string what, std::string goal_text, double goal,
                                double measured, std::string measured_text);
[[nodiscard]] goal_row at_most(std::string what, std::string goal_text, double goal,
                               double measured, std::string measured_text);
/// The share of the ceiling that a case reached; 0 if it was not measured.
[[nodiscard]] double share_of(const session& s, const ceilings& c, const std::string& name);
/// "61 % (12.3 ms)"
[[nodiscard]] std::string share_text(const session& s, const ceilings& c, const std::string& name);

/// How much faster all threads are than one, divided by the same number of our GEMM; 0 if not
/// measured. The case of one thread is called name + "/threads1".
[[nodiscard]] goal_row scaling_row(const session& s, const ceilings& c, const std::string& what,
                                   const std::string& name);

/// Adds `c` twice: with all threads while another process spins on the first core, and with one
/// thread and no neighbour. make(ctx) is the prepare function.
void add_neighbour_cases(
    session& s, const std::string& name,
    const std::function<std::function<void()>(const ssm::cpu::context&)>& make);
[[nodiscard]] goal_row neighbour_row(const session& s, const std::string& what,
                                     const std::string& name);

}  // namespace bench
