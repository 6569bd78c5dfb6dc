#include "products.hpp"
#include "sweep.hpp"
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/wrappers.hpp>

namespace bench {

void sweep_linear(session& s) {
  constexpr index_t H = sweep_heads, N = sweep_state, P = sweep_features;
  const auto head = [](index_t T, std::uint64_t seed) {
    return filled<4>({1, T, H, N}, -1, 1, seed);
  };
  const auto flops = [](index_t T) { return work{ssd_flops(T, H, P, N, H), unit::flops}; };
  const auto phi = ssm::feature::elu_plus_one{};
  add_products(s, {.mixer = "linear_attention", .shape = "H8 N64 P64", .forward_work = flops},
               [=](index_t T) {
                 return hadamard(ssm::causal, head(T, 1) * transpose(head(T, 2))) * head(T, 3);
               });
  add_products(
      s, {.mixer = "normalized_linear", .shape = "H8 N64 P64, elu + 1", .forward_work = flops},
      [=](index_t T) {
        return normalize_rows(
                   hadamard(ssm::causal, with_features(phi, head(T, 1) * transpose(head(T, 2))))) *
               head(T, 3);
      });
  add_products(
      s, {.mixer = "retention", .shape = "H8 N64 P64", .forward_work = flops}, [=](index_t T) {
        return hadamard(decay(filled<1>({H}, 0.95, 0.999, 4)), head(T, 1) * transpose(head(T, 2))) *
               head(T, 3);
      });
}

}  // namespace bench
