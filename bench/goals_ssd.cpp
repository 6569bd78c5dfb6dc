#include "goals.hpp"
#include "products.hpp"
#include <ssmlib/lower/semiseparable.hpp>

namespace bench {

namespace {

constexpr index_t H = 24, P = 64, N = 128, G = 1;  // Mamba-2 130M
constexpr index_t usual = 2048, longest = 262144;

auto product(index_t T) {
  return hadamard(
             semiseparable(filled<3>({1, T, H}, -0.1, 0, 1), filled<3>({1, T, H}, 0, 0.1, 2)),
             filled<4>({1, T, G, N}, -1, 1, 3) * transpose(filled<4>({1, T, G, N}, -1, 1, 4))) *
         filled<4>({1, T, H, P}, -1, 1, 5);
}
work work_of(index_t T, double factor) {
  return {factor * ssd_flops(T, H, P, N, G), unit::flops};
}

/// Bytes of the pool that a run needs beyond its operands, a token.
double bytes_a_token(index_t T, direction d, const ssm::cpu::context& ctx) {
  auto& pool = ssm::cpu_memory_pool::instance();
  const auto body = body_of(product(T), d, ctx);
  const std::size_t before = pool.stats().in_use;
  pool.reset_peak();
  body();
  return static_cast<double>(pool.stats().peak - before) / static_cast<double>(T);
}

goal_row memory_row(const std::string& what, direction d, index_t length,
                    const ssm::cpu::context& ctx) {
  const double few = bytes_a_token(usual, d, ctx), many = bytes_a_token(length, d, ctx);
  return at_most(what, "linear: <= 1.1 x the bytes a token of T = 2,048", 1.1, many / few,
                 digits(many, 5) + " bytes a token at T = " + std::to_string(length) + ", " +
                     digits(few, 5) + " at 2048");
}

}  // namespace

goal_report add_ssd_goals(session& s) {
  add_goal_product(s, "goal/ssd/forward", work_of(usual, 1), direction::forward,
                   [] { return product(usual); });
  add_goal_product(
      s, "goal/ssd/forward/threads1", work_of(usual, 1), direction::forward,
      [] { return product(usual); }, 1);
  add_goal_product(s, "goal/ssd/forward+backward", work_of(usual, 3.5), direction::both,
                   [] { return product(usual); });
  const index_t length = s.options().quick ? longest / 16 : longest;
  add_goal_product(
      s, "goal/ssd/long", work_of(length, 1), direction::forward,
      [length] { return product(length); }, 0, s.options().quick ? 0.2 : 1.6);
  add_neighbour_cases(s, "goal/ssd/forward", [](const ssm::cpu::context& ctx) {
    return body_of(product(usual), direction::forward, ctx);
  });
  return [length, &ctx = s.context()](const session& done, const ceilings& c,
                                      std::vector<goal_row>& rows) {
    rows.push_back(at_least("SSD chunked forward, b1 T2048 H24 P64 N128 G1", ">= 60 %", 0.60,
                            share_of(done, c, "goal/ssd/forward"),
                            share_text(done, c, "goal/ssd/forward")));
    rows.push_back(at_least("SSD chunked forward + backward, the same shape", ">= 45 %", 0.45,
                            share_of(done, c, "goal/ssd/forward+backward"),
                            share_text(done, c, "goal/ssd/forward+backward")));
    const timing few = done.time_of("goal/ssd/forward"), many = done.time_of("goal/ssd/long");
    const double ratio = few && many ? many.median / few.median * static_cast<double>(usual) /
                                           static_cast<double>(length)
                                     : 0;
    rows.push_back(at_most("SSD time a token, T = " + std::to_string(length) + " against 2048",
                           "<= 1.10", 1.10, ratio, digits(ratio)));
    if (done.wants("goal/ssd/memory")) {
      rows.push_back(memory_row("SSD peak memory, forward", direction::forward, length, ctx));
      rows.push_back(
          memory_row("SSD peak memory, forward + backward", direction::both, length / 4, ctx));
    }
    rows.push_back(scaling_row(done, c, "SSD forward, all threads against 1", "goal/ssd/forward"));
    rows.push_back(neighbour_row(done, "SSD forward beside a busy neighbour", "goal/ssd/forward"));
  };
}

}  // namespace bench
