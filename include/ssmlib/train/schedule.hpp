#pragma once

#include <ssmlib/base/error.hpp>
#include <ssmlib/base/types.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

namespace ssm {

/// @file
/// Schedules: pure functions from a step (0 for the first) to what the learning rate is multiplied
/// by. A resumed run needs nothing but the step. Warm-up rises linearly, (step + 1) / warmup, so
/// that the first step already moves; `final` is reached at `steps`, after the last step, so that
/// the last one still moves.

/// Warm-up, then 1 for ever.
struct constant_schedule {
  index_t warmup = 0;

  /// @throws value_error  a negative step or warm-up.
  [[nodiscard]] double operator()(index_t step) const;
};

/// Warm-up, then half a cosine from 1 down to `final`, which stays.
/// @source Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
struct cosine_schedule {
  index_t steps;
  index_t warmup = 0;
  double final = 0;

  /// @throws value_error  a negative step, or the warm-up is longer than the run.
  [[nodiscard]] double operator()(index_t step) const;
};

enum class decay_shape {
  linear,         ///< 1 - p
  one_minus_sqrt  ///< 1 - sqrt(p)
};

/// Warm-up, stable, decay: warm-up, 1, then down to `final` over the last `decay` steps.
/// @source Hu et al. 2024, arXiv:2404.06395, section 4; the square root is that of
///         Haegele et al. 2024, arXiv:2405.18392.
struct wsd_schedule {
  index_t steps;
  index_t warmup = 0;
  index_t decay = 0;
  decay_shape shape = decay_shape::linear;
  double final = 0;

  /// @throws value_error  a negative step, or warm-up and decay are longer than the run.
  [[nodiscard]] double operator()(index_t step) const;
};

namespace detail {

inline void check_schedule(const char* name, index_t step, index_t warmup, index_t decay,
                           index_t steps) {
  if (step < 0 || warmup < 0 || decay < 0 || warmup > steps || decay > steps - warmup) {
    throw value_error("ssm: " + std::string(name) + ": step " + std::to_string(step) + ", " +
                      std::to_string(warmup) + " steps of warm-up and " + std::to_string(decay) +
                      " of decay in " + std::to_string(steps) +
                      " steps; wanted counts >= 0 and warm-up + decay <= steps");
  }
}

[[nodiscard]] inline double warmup_multiplier(index_t step, index_t warmup) {
  return static_cast<double>(step + 1) / static_cast<double>(warmup);
}

}  // namespace detail

inline double constant_schedule::operator()(index_t step) const {
  detail::check_schedule("constant_schedule", step, warmup, 0, warmup);
  return step < warmup ? detail::warmup_multiplier(step, warmup) : 1.0;
}

inline double cosine_schedule::operator()(index_t step) const {
  detail::check_schedule("cosine_schedule", step, warmup, 0, steps);
  if (step < warmup) return detail::warmup_multiplier(step, warmup);
  if (step >= steps) return final;
  const double progress = static_cast<double>(step - warmup) / static_cast<double>(steps - warmup);
  return final + (1 - final) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

inline double wsd_schedule::operator()(index_t step) const {
  detail::check_schedule("wsd_schedule", step, warmup, decay, steps);
  if (step < warmup) return detail::warmup_multiplier(step, warmup);
  if (step < steps - decay) return 1.0;
  if (step >= steps) return decay > 0 ? final : 1.0;
  const double progress = static_cast<double>(step - (steps - decay)) / static_cast<double>(decay);
  const double fallen = shape == decay_shape::linear ? progress : std::sqrt(progress);
  return 1 - (1 - final) * fallen;
}

}  // namespace ssm
