#include "products.hpp"
#include "sweep.hpp"
#include <ssmlib/lower/gram.hpp>
#include <ssmlib/lower/toeplitz.hpp>

namespace bench {

namespace {

/// Two real transforms of length 2T a channel, 5/2 n log2 n flops each.
double transform_flops(index_t T, index_t products) {
  const auto t = static_cast<double>(T);
  return 10 * t * std::log2(2 * t) * static_cast<double>(products);
}

}  // namespace

void sweep_toeplitz(session& s) {
  constexpr index_t H = sweep_heads, N = sweep_state, P = sweep_features;
  const auto head = [](index_t T, std::uint64_t seed) {
    return filled<4>({1, T, H, N}, -1, 1, seed);
  };
  add_products(s,
               {.mixer = "toeplitz",
                .shape = "H8 P64",
                .forward_work =
                    [](index_t T) {
                      return work{transform_flops(T, H * P), unit::flops};
                    },
                .factors = {.forward = 1, .backward = 1.5}},
               [=](index_t T) {
                 return toeplitz(filled<2>({H, T}, -1, 1, 1)) * head(T, 2);
               });
  // A product with the mask for every pair of a key feature and a value feature.
  add_products(
      s,
      {.mixer = "masked_toeplitz",
       .shape = "H2 N16 P16",
       .forward_work =
           [](index_t T) {
             return work{transform_flops(T, 2 * 16 * 16), unit::flops};
           }},
      [](index_t T) {
        const auto part = [T](std::uint64_t seed) { return filled<4>({1, T, 2, 16}, -1, 1, seed); };
        return hadamard(toeplitz(filled<2>({2, T}, -1, 1, 1)), part(2) * transpose(part(3))) *
               part(4);
      });
  add_products(s,
               {.mixer = "low_rank",
                .shape = "H8 N64 P64",
                .forward_work =
                    [](index_t T) {
                      return work{4.0 * static_cast<double>(T * H * N * P), unit::flops};
                    }},
               [=](index_t T) { return head(T, 1) * transpose(head(T, 2)) * head(T, 3); });
}

}  // namespace bench
