#include "goals.hpp"
#include "products.hpp"
#include <ssmlib/lower/softmax.hpp>

namespace bench {

namespace {

constexpr index_t T = 2048, H = 12, D = 64;

auto product() {
  const auto part = [](std::uint64_t seed) { return filled<4>({1, T, H, D}, -1, 1, seed); };
  return softmax(part(1) * transpose(part(2)) * 0.125 + ssm::causal) * part(3);
}
work work_of(double factor) {
  return {factor * attention_flops(T, H, D), unit::flops};
}

}  // namespace

goal_report add_attention_goals(session& s) {
  add_goal_product(s, "goal/attention/forward", work_of(1), direction::forward, product);
  add_goal_product(s, "goal/attention/forward/threads1", work_of(1), direction::forward, product,
                   1);
  add_goal_product(s, "goal/attention/backward", work_of(2.5), direction::backward, product);
  return [](const session& done, const ceilings& c, std::vector<goal_row>& rows) {
    rows.push_back(at_least("tiled attention forward, H12 D64 T2048 causal", ">= 60 %", 0.60,
                            share_of(done, c, "goal/attention/forward"),
                            share_text(done, c, "goal/attention/forward")));
    rows.push_back(at_least("tiled attention backward, the same shape", ">= 45 %", 0.45,
                            share_of(done, c, "goal/attention/backward"),
                            share_text(done, c, "goal/attention/backward")));
    rows.push_back(scaling_row(done, c, "tiled attention forward, all threads against 1",
                               "goal/attention/forward"));
  };
}

}  // namespace bench
