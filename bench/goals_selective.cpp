#include "goals.hpp"
#include "products.hpp"
#include <ssmlib/lower/selective.hpp>

namespace bench {

goal_report add_selective_goals(session& s) {
  constexpr index_t T = 2048, D = 1536, N = 16;
  add_goal_product(
      s, "goal/selective/forward", {static_cast<double>(T * D * N), unit::exps}, direction::forward,
      [] {
        return selective(filled<3>({1, T, D}, 0.001, 0.1, 1), filled<2>({D, N}, -16, -1, 2),
                         filled<4>({1, T, 1, N}, -1, 1, 3), filled<4>({1, T, 1, N}, -1, 1, 4)) *
               channels(filled<3>({1, T, D}, -1, 1, 5));
      });
  return [](const session& done, const ceilings& c, std::vector<goal_row>& rows) {
    rows.push_back(at_least("selective scan forward, T2048 d1536 N16", ">= 50 % of vector exp",
                            0.50, share_of(done, c, "goal/selective/forward"),
                            share_text(done, c, "goal/selective/forward")));
  };
}

}  // namespace bench
