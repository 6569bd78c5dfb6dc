#include "products.hpp"
#include "sweep.hpp"
#include <ssmlib/lower/softmax.hpp>

namespace bench {

void sweep_attention(session& s) {
  constexpr index_t H = sweep_heads, D = sweep_features, window = 256;
  const auto head = [](index_t T, std::uint64_t seed) {
    return filled<4>({1, T, H, D}, -1, 1, seed);
  };
  add_products(s,
               {.mixer = "attention",
                .shape = "H8 D64, causal",
                .forward_work =
                    [](index_t T) {
                      return work{attention_flops(T, H, D), unit::flops};
                    }},
               [=](index_t T) {
                 return softmax(head(T, 1) * transpose(head(T, 2)) * 0.125 + ssm::causal) *
                        head(T, 3);
               });
  add_products(s,
               {.mixer = "window_attention",
                .shape = "H8 D64, window 256",
                .forward_work =
                    [](index_t T) {
                      return work{4.0 * static_cast<double>(T * window * H * D), unit::flops};
                    },
                .tiled_exponent = 1},
               [=](index_t T) {
                 return softmax(head(T, 1) * transpose(head(T, 2)) * 0.125 + ssm::window(window)) *
                        head(T, 3);
               });
}

}  // namespace bench
