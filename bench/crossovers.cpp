#include "products.hpp"
#include "sweep.hpp"
#include <ssmlib/lower/gram.hpp>
#include <ssmlib/lower/toeplitz.hpp>

#include <initializer_list>

namespace bench {

namespace {

/// Both algorithms of a mixer at lengths around the one where alg::automatic changes.
template <class Make>
void add_crossover(session& s, const std::string& mixer, const std::string& shape,
                   std::initializer_list<index_t> lengths, Make make) {
  using node = typename decltype(make(index_t{1}))::mixer_type;
  for (const index_t T : lengths) {
    crossover row{mixer, shape, T, {}, {}};
    {
      const auto e = make(T);
      row.chosen = std::string(choose_algorithm(e.mixer, T, e.x.extent(3)));
    }
    node::algorithms::for_each([&](auto algorithm) {
      row.algorithms.emplace_back(algorithm.name);
      s.add({.name = row.name(row.algorithms.back()),
             .prepare = [&ctx = s.context(), make, T, algorithm] {
               return body_of(make(T).with(algorithm), direction::forward, ctx);
             }});
    });
    s.add(std::move(row));
  }
}

}  // namespace

void add_crossovers(session& s) {
  constexpr index_t H = sweep_heads;
  const auto part = [](index_t T, index_t features, std::uint64_t seed) {
    return filled<4>({1, T, H, features}, -1, 1, seed);
  };
  add_crossover(s, "low_rank", "H8 N64 P64", {32, 64, 128, 256}, [=](index_t T) {
    return part(T, 64, 1) * transpose(part(T, 64, 2)) * part(T, 64, 3);
  });
  for (const index_t P : {1, 64}) {
    add_crossover(s, "toeplitz_P" + std::to_string(P), "H8 P" + std::to_string(P),
                  {64, 128, 256, 512, 1024}, [=](index_t T) {
                    return toeplitz(filled<2>({H, T}, -1, 1, 1)) * part(T, P, 2);
                  });
  }
  add_crossover(s, "masked_toeplitz", "H8 N16 P16", {512, 1024, 2048}, [=](index_t T) {
    return hadamard(toeplitz(filled<2>({H, T}, -1, 1, 1)),
                    part(T, 16, 2) * transpose(part(T, 16, 3))) *
           part(T, 16, 4);
  });
}

}  // namespace bench
