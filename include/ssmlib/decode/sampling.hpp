#pragma once

#include <ssmlib/base/error.hpp>
#include <ssmlib/tensor/random.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

namespace ssm {

/// How the next token is taken from logits. Filters apply in the order temperature, top_k, top_p,
/// min_p, and then the rest is normalised.
struct sampling_options {
  double temperature = 0.0;  ///< 0: the most likely token (the first of equals)
  index_t top_k = 0;         ///< keep the k most likely; 0: all
  double top_p = 1.0;        ///< keep the fewest tokens whose probabilities reach p
  double min_p = 0.0;        ///< drop tokens less likely than min_p times the most likely
  std::uint64_t seed = 0;
};

/// @throws value_error  an option outside its range.
inline void check_sampling(const sampling_options& o) {
  if (!(o.temperature >= 0) || o.top_k < 0 || !(o.top_p > 0 && o.top_p <= 1) ||
      !(o.min_p >= 0 && o.min_p <= 1)) {
    throw value_error("ssm: sampling with temperature " + std::to_string(o.temperature) +
                      ", top_k " + std::to_string(o.top_k) + ", top_p " + std::to_string(o.top_p) +
                      ", min_p " + std::to_string(o.min_p) +
                      ": wanted temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1");
  }
}

/// The first largest logit.
template <Real T>
[[nodiscard]] std::int32_t argmax(std::span<const T> logits) {
  return static_cast<std::int32_t>(std::ranges::max_element(logits) - logits.begin());
}

/// The distribution that sampling draws from: `p` gets one probability per token, their sum is 1.
/// Draft and target of speculative sampling both go through this one function.
/// @cost O(V log V) with top_p, else O(V)
template <Real T>
void next_token_distribution(std::span<const T> logits, const sampling_options& o,
                             std::vector<double>& p) {
  p.assign(logits.size(), 0.0);
  if (o.temperature == 0.0) {
    p[static_cast<std::size_t>(argmax(logits))] = 1.0;
    return;
  }
  const double top = static_cast<double>(*std::ranges::max_element(logits));
  double sum = 0;
  for (std::size_t v = 0; v < p.size(); ++v) {
    p[v] = std::exp((static_cast<double>(logits[v]) - top) / o.temperature);
    sum += p[v];
  }
  const bool limit_count = o.top_k > 0 && static_cast<std::size_t>(o.top_k) < p.size();
  if (limit_count || o.top_p < 1.0) {
    std::vector<std::size_t> order(p.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
    std::size_t keep = limit_count ? static_cast<std::size_t>(o.top_k) : p.size();
    double kept = 0;
    for (std::size_t i = 0; i < keep; ++i)
      kept += p[order[i]];
    double reached = 0;
    for (std::size_t i = 0; i < keep; ++i) {
      reached += p[order[i]];
      if (reached >= o.top_p * kept) keep = i + 1;
    }
    for (std::size_t i = keep; i < order.size(); ++i)
      p[order[i]] = 0;
  }
  if (o.min_p > 0) {
    for (double& x : p) {
      if (x < o.min_p) x = 0;  // the most likely token has exp(0) = 1
    }
  }
  sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p)
    x /= sum;
}

/// The token at u of the cumulative distribution. @param u  in [0, 1)
[[nodiscard]] inline std::int32_t pick(std::span<const double> p, double u) {
  double sum = 0;
  std::size_t last = 0;
  for (std::size_t v = 0; v < p.size(); ++v) {
    if (p[v] <= 0) continue;
    sum += p[v];
    last = v;
    if (u < sum) break;
  }
  return static_cast<std::int32_t>(last);
}

/// What a random number is for, so that draws of one position are independent.
enum class draw : std::uint64_t { token = 0, draft = 1, accept = 2, residual = 3 };

/// In [0, 1); depends on these four numbers only, so that every run can be replayed.
[[nodiscard]] inline double random_draw(std::uint64_t seed, index_t sequence, index_t position,
                                        draw purpose) {
  const auto b =
      philox::block(seed, static_cast<std::uint64_t>(sequence),
                    static_cast<std::uint64_t>(position) * 4 + static_cast<std::uint64_t>(purpose));
  return static_cast<double>((std::uint64_t{b[0]} << 21) ^ (b[1] >> 11)) * 0x1p-53;
}

}  // namespace ssm
