#pragma once

#include "harness.hpp"
#include <ssmlib/lower/evaluate.hpp>

#include <benchmark/benchmark.h>

#include <cmath>
#include <string>

namespace bench {

enum class direction { forward, backward, both };

[[nodiscard]] inline std::string name_of(direction d) {
  return d == direction::forward    ? "forward"
         : d == direction::backward ? "backward"
                                    : "forward+backward";
}
/// The work of a direction, where forward is 1.
struct direction_factors {
  double forward = 1, backward = 2.5;
  [[nodiscard]] double of(direction d) const {
    return d == direction::forward    ? forward
           : d == direction::backward ? backward
                                      : forward + backward;
  }
};

/// What is timed of a product: eval, the vector-Jacobian product of all operands, or one after the
/// other. Gradients are added to standing tensors, as in training.
template <class E>
[[nodiscard]] std::function<void()> body_of(E e, direction d, const ssm::cpu::context& ctx) {
  if (d == direction::forward) {
    return [e, &ctx] {
      const auto y = ssm::eval(e, ctx);
      benchmark::DoNotOptimize(y.data());
    };
  }
  const auto dy = filled<4>(e.extents(), -1, 1, 99);
  return [e, dy, d, &ctx, gradients = ssm::zeros_like(e)]() mutable {
    if (d == direction::both) {
      const auto y = ssm::eval(e, ctx);
      benchmark::DoNotOptimize(y.data());
    }
    ssm::vjp_into(e, dy, gradients, {}, ctx);
  };
}

/// A mixer of the sweep.
struct sweep_entry {
  std::string mixer, shape;
  std::function<bench::work(index_t)> forward_work;
  direction_factors factors = {};
  double tiled_exponent = 2;         ///< the time of tiles grows as T to this power
  index_t longest_quadratic = 8192;  ///< beyond this a quadratic algorithm is not even tried
};

namespace detail {

/// Adds a case for every length that takes at most about the limit, by probing from the shortest.
template <class Make, class Alg>
void add_series(session& s, const sweep_entry& entry, Make make, Alg algorithm, direction d) {
  series row{entry.mixer, std::string(Alg::name), name_of(d), entry.shape, {}, {}};
  const double exponent = Alg::name == "quadratic" ? 2
                          : Alg::name == "tiled"   ? entry.tiled_exponent
                                                   : 1;
  std::vector<index_t> lengths = s.options().quick ? std::vector<index_t>{512, 2048}
                                                   : std::vector<index_t>{512, 2048, 8192, 65536};
  std::erase_if(lengths, [&](index_t length) { return !s.wants(row.name(length)); });
  if (lengths.empty()) return;
  double expected = 0;
  index_t before = 0;
  if (Alg::name == "quadratic") {  // some are definitions, slow from the start
    before = 64;
    const auto body = body_of(make(before).with(algorithm), d, s.context());
    expected = std::min(seconds_of(body), seconds_of(body));
  }
  for (const index_t length : lengths) {
    if (before > 0) {
      expected *= std::pow(static_cast<double>(length) / static_cast<double>(before), exponent);
    }
    before = length;
    if (expected > 1.5 * s.options().limit ||
        (Alg::name == "quadratic" && length > entry.longest_quadratic)) {
      row.left_out.push_back(length);
      continue;
    }
    const auto prepare = [&ctx = s.context(), make, algorithm, d, length] {
      return body_of(make(length).with(algorithm), d, ctx);
    };
    const auto body = prepare();
    expected = seconds_of(body);
    if (expected < 0.01) expected = seconds_of(body);
    if (expected > 2 * s.options().limit) {
      row.left_out.push_back(length);
      continue;
    }
    row.lengths.push_back(length);
    const work forward = entry.forward_work(length);
    s.add({.name = row.name(length),
           .work = {forward.amount * entry.factors.of(d), forward.unit},
           .prepare = prepare,
           .warm_up = expected < 0.15,
           .seconds = expected,
           .minimum_time = 0.015});
  }
  s.add(std::move(row));
}

}  // namespace detail

/// Every algorithm of a mixer in both directions; make(T) is the product at that length.
template <class Make>
void add_products(session& s, const sweep_entry& entry, Make make) {
  using mixer = typename decltype(make(index_t{1}))::mixer_type;
  mixer::algorithms::for_each([&](auto algorithm) {
    for (const direction d : {direction::forward, direction::both})
      detail::add_series(s, entry, make, algorithm, d);
  });
}

/// One product of a goal. The result is the case's name.
template <class Make>
void add_goal_product(session& s, const std::string& name, work w, direction d, Make make,
                      int threads = 0, double seconds = 0.05) {
  s.add({.name = name,
         .work = w,
         .prepare = [&ctx = threads == 0 ? s.context() : s.context(threads), make,
                     d] { return body_of(make(), d, ctx); },
         .repetitions = s.options().repetitions + 2,
         .seconds = seconds});
}

/// Chunks of 64 tokens, half of each square: the fixed count of every scalar-gated mixer,
/// T (64 N G + H (64 P + 4 N P)).
[[nodiscard]] inline double ssd_flops(index_t T, index_t H, index_t P, index_t N, index_t G) {
  const auto t = static_cast<double>(T);
  return t * static_cast<double>(64 * N * G + H * (64 * P + 4 * N * P));
}
/// 2 H T^2 D: half of the square, two products.
[[nodiscard]] inline double attention_flops(index_t T, index_t H, index_t D) {
  const auto t = static_cast<double>(T);
  return 2 * static_cast<double>(H * D) * t * t;
}

}  // namespace bench
