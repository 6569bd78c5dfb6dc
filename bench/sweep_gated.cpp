#include "products.hpp"
#include "sweep.hpp"
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/gated_linear.hpp>

namespace bench {

void sweep_gated(session& s) {
  constexpr index_t H = sweep_heads, N = sweep_state, P = sweep_features;
  // Keys of about unit length, as the delta rule wants them.
  const auto head = [](index_t T, double scale, std::uint64_t seed) {
    return filled<4>({1, T, H, N}, -scale, scale, seed);
  };
  add_products(s,
               {.mixer = "gated_linear",
                .shape = "H8 N64 P64",
                .forward_work =
                    [](index_t T) {
                      return work{ssd_flops(T, H, P, N, H), unit::flops};
                    },
                .longest_quadratic = 2048},
               [=](index_t T) {
                 return gated(filled<4>({1, T, H, N}, -0.2, 0, 1),
                              head(T, 1, 2) * transpose(head(T, 1, 3))) *
                        head(T, 1, 4);
               });
  // Q K^T, K K^T and the triangular system of K and V in chunks of 64, three products with states.
  add_products(s,
               {.mixer = "delta_rule",
                .shape = "H8 N64 P64",
                .forward_work =
                    [](index_t T) {
                      return work{static_cast<double>(T) *
                                      static_cast<double>(H * (64 * (3 * N + 2 * P) + 6 * N * P)),
                                  unit::flops};
                    },
                .longest_quadratic = 2048},
               [=](index_t T) {
                 return delta_rule(filled<3>({1, T, H}, -0.1, 0, 1), filled<3>({1, T, H}, 0, 1, 2),
                                   head(T, 0.2, 3) * transpose(head(T, 0.2, 4))) *
                        head(T, 1, 5);
               });
}

}  // namespace bench
