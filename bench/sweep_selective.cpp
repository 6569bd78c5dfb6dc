#include "products.hpp"
#include "sweep.hpp"
#include <ssmlib/lower/selective.hpp>

namespace bench {

void sweep_selective(session& s) {
  constexpr index_t D = sweep_heads * sweep_features, N = 16;
  // The decays, once forward and once more backward.
  add_products(s,
               {.mixer = "selective",
                .shape = "d512 N16",
                .forward_work =
                    [](index_t T) {
                      return work{static_cast<double>(T * D * N), unit::exps};
                    },
                .factors = {.forward = 1, .backward = 1},
                .longest_quadratic = 2048},
               [](index_t T) {
                 return selective(filled<3>({1, T, D}, 0.001, 0.1, 1),
                                  filled<2>({D, N}, -16, -1, 2), filled<4>({1, T, 1, N}, -1, 1, 3),
                                  filled<4>({1, T, 1, N}, -1, 1, 4)) *
                        channels(filled<3>({1, T, D}, -1, 1, 5));
               });
}

}  // namespace bench
