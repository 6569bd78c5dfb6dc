#include "goals.hpp"
#include "products.hpp"
#include <ssmlib/lower/toeplitz.hpp>

namespace bench {

goal_report add_toeplitz_goals(session& s) {
  constexpr index_t T = 16384, P = 64;
  const auto add = [&](auto algorithm) {
    add_goal_product(
        s, "goal/toeplitz/" + std::string(algorithm.name), {}, direction::forward, [=] {
          return (toeplitz(filled<2>({1, T}, -1, 1, 1)) * filled<4>({1, T, 1, P}, -1, 1, 2))
              .with(algorithm);
        });
  };
  add(ssm::alg::structured{});
  add(ssm::alg::quadratic{});
  return [](const session& done, const ceilings&, std::vector<goal_row>& rows) {
    const timing fft = done.time_of("goal/toeplitz/structured");
    const timing square = done.time_of("goal/toeplitz/quadratic");
    const double ratio = fft && square ? square.median / fft.median : 0;
    rows.push_back(at_least("Toeplitz by FFT against quadratic, T16384 P64", ">= 3x", 3, ratio,
                            digits(ratio) + "x (" + digits(1e3 * fft.median) + " against " +
                                digits(1e3 * square.median) + " ms)"));
  };
}

}  // namespace bench
