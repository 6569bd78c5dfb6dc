#include "products.hpp"
#include "sweep.hpp"
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/wrappers.hpp>

namespace bench {

void sweep_ssd(session& s) {
  constexpr index_t H = sweep_heads, N = sweep_state, P = sweep_features;
  add_products(s,
               {.mixer = "ssd",
                .shape = "H8 N64 P64 G1, with D",
                .forward_work =
                    [](index_t T) {
                      return work{ssd_flops(T, H, P, N, 1), unit::flops};
                    }},
               [](index_t T) {
                 return (hadamard(semiseparable(filled<3>({1, T, H}, -0.1, 0, 1),
                                                filled<3>({1, T, H}, 0, 0.1, 2)),
                                  filled<4>({1, T, 1, N}, -1, 1, 3) *
                                      transpose(filled<4>({1, T, 1, N}, -1, 1, 4))) +
                         diagonal(filled<1>({H}, 0.5, 1, 5))) *
                        filled<4>({1, T, H, P}, -1, 1, 6);
               });
}

}  // namespace bench
