#pragma once

#include "check.cuh"
#include <ssmlib/kernels/cuda/quadratic.hpp>

#include <cmath>
#include <vector>

/// @file
/// Masked products of a gram matrix and their gradients by loops over the pairs of tokens, in
/// double: what the GPU checks of the quadratic and Toeplitz kernels compare with.

namespace ssm::cuda_check {

struct quadratic_reference {
  using numbers = std::vector<double>;

  kernels::cuda::quadratic_mask_kind kind;
  std::vector<index_t> offsets;
  index_t heads, q_heads, k_heads, x_heads, mask_heads, n, p;
  bool gram;  // with q and k
  index_t window = 0, distances = 0;
  double alpha = 1;
  numbers q, k, x, dy;                   // (tokens, heads, features)
  numbers gamma, log_a, weight, kernel;  // weight may be empty
  numbers y, dq, dk, dx, d_gamma, d_log_a, d_weight, d_kernel, sums;

  [[nodiscard]] index_t tokens() const { return offsets.back(); }

  void run(bool gradients) {
    y.assign(tokens() * heads * p, 0);
    dq.assign(q.size(), 0), dk.assign(k.size(), 0), dx.assign(x.size(), 0);
    d_gamma.assign(gamma.size(), 0), d_weight.assign(weight.size(), 0);
    d_log_a.assign(log_a.size(), 0), d_kernel.assign(kernel.size(), 0);
    sums.assign(log_a.size(), 0);
    const auto sequences = static_cast<index_t>(offsets.size()) - 1;
    for (index_t i = 0; i < sequences && !log_a.empty(); ++i) {
      for (index_t e = offsets[i] * mask_heads; e < offsets[i + 1] * mask_heads; ++e) {
        const bool first = e < (offsets[i] + 1) * mask_heads;
        sums[e] = (first ? 0 : sums[e - mask_heads]) + std::max(log_a[e], -1e6);
      }
    }
    std::vector<std::pair<index_t, index_t>> tasks;  // (sequence, its block of 256 rows)
    for (index_t i = 0; i < sequences; ++i)
      for (index_t t = 0; t < offsets[i + 1] - offsets[i]; t += 256)
        tasks.emplace_back(i, t);
    parallel(static_cast<index_t>(tasks.size()) * heads, [&](index_t task) {
      const auto [i, t0] = tasks[task / heads];
      block(i, t0, task % heads, gradients);
    });
  }

 private:
  using mask_kind = kernels::cuda::quadratic_mask_kind;

  static double dot(const double* a, const double* b, index_t count) {
    double sum = 0;
    for (index_t e = 0; e < count; ++e)
      sum += a[e] * b[e];
    return sum;
  }
  static void axpy(double scale, const double* a, double* to, index_t count) {
    for (index_t e = 0; e < count; ++e)
      add_to(to[e], scale * a[e]);
  }

  void block(index_t i, index_t t0, index_t h, bool gradients) {
    const index_t begin = offsets[i], length = offsets[i + 1] - begin;
    const index_t hq = h * q_heads / heads, hk = h * k_heads / heads, hx = h * x_heads / heads;
    const index_t hm = h * mask_heads / heads;
    std::vector<double> spread(log_a.empty() ? 0 : length + 1),
        by_distance(kernel.empty() ? 0 : length);
    double of_gamma = 0;
    for (index_t t = t0; t < std::min(t0 + 256, length); ++t) {
      const bool window_only = kind == mask_kind::window;
      const index_t first = window_only ? std::max<index_t>(0, t - window + 1) : 0;
      for (index_t s = first; s < (kind == mask_kind::none ? length : t + 1); ++s) {
        const index_t d = t - s, tk = begin + t, sk = begin + s;
        double l = 1, unweighted = 1;
        if (kind == mask_kind::decay) l = std::pow(gamma[hm], static_cast<double>(d));
        if (kind == mask_kind::toeplitz) l = kernel[hm * distances + d];
        if (kind == mask_kind::semiseparable) {
          l = unweighted = std::exp(sums[tk * mask_heads + hm] - sums[sk * mask_heads + hm]);
          if (!weight.empty()) l *= weight[sk * mask_heads + hm];
        }
        const double* xs = &x[(sk * x_heads + hx) * p];
        const index_t qt = (tk * q_heads + hq) * n, ks = (sk * k_heads + hk) * n;
        const double g = gram ? alpha * dot(&q[qt], &k[ks], n) : 1;
        double* yt = &y[(tk * heads + h) * p];
        for (index_t e = 0; e < p; ++e)
          yt[e] += l * g * xs[e];
        if (!gradients) continue;
        const double* dyt = &dy[(tk * heads + h) * p];
        const double through = dot(dyt, xs, p), dl = through * g;
        if (gram) axpy(l * alpha * through, &k[ks], &dq[qt], n);
        if (gram) axpy(l * alpha * through, &q[qt], &dk[ks], n);
        axpy(l * g, dyt, &dx[(sk * x_heads + hx) * p], p);
        if (kind == mask_kind::decay && d > 0) {
          of_gamma += dl * static_cast<double>(d) * std::pow(gamma[hm], static_cast<double>(d - 1));
        }
        if (!by_distance.empty()) by_distance[d] += dl;
        if (!weight.empty()) add_to(d_weight[sk * mask_heads + hm], dl * unweighted);
        if (!spread.empty()) spread[s + 1] += dl * l, spread[t + 1] -= dl * l;
      }
    }
    if (!gamma.empty()) add_to(d_gamma[hm], of_gamma);
    double running = 0;
    for (index_t t = 0; t < length; ++t) {
      if (!by_distance.empty()) add_to(d_kernel[hm * distances + t], by_distance[t]);
      if (spread.empty()) continue;
      running += spread[t];
      add_to(d_log_a[(begin + t) * mask_heads + hm], running);
    }
  }
};

}  // namespace ssm::cuda_check
