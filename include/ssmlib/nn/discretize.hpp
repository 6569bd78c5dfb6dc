#pragma once

#include <ssmlib/kernels/cpu/discretize.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/pass.hpp>

#include <limits>
#include <string>

namespace ssm {

/// The clamp of a step size, after the softplus.
struct step_limits {
  double low = 0.0;
  double high = std::numeric_limits<double>::infinity();

  friend bool operator==(const step_limits&, const step_limits&) = default;
};

template <Floating T, Backend B = cpu>
struct discretized {
  tensor<accum_t<T>, 3, B> delta;  ///< (b, T, H) step sizes
  tensor<accum_t<T>, 3, B> log_a;  ///< (b, T, H) log decays
};

template <Real T>
void apply_discretize(const cpu::context& ctx, const tensor<T, 2>& dt, const tensor<T, 1>& a,
                      const tensor<T, 1>& dt_bias, const step_limits& limits,
                      const tensor<T, 2>& delta, const tensor<T, 2>& log_a) {
  const kernels::discretize_problem<T> problem{dt.const_view(), a.data(), dt_bias.data(),
                                               static_cast<T>(limits.low),
                                               static_cast<T>(limits.high)};
  kernels::discretize(ctx, problem, delta.view(), log_a.view());
}
template <Real T>
void apply_discretize_vjp(const cpu::context& ctx, const tensor<T, 2>& dt, const tensor<T, 1>& a,
                          const tensor<T, 1>& dt_bias, const step_limits& limits,
                          const tensor<T, 2>& d_delta, const tensor<T, 2>& d_log_a,
                          const tensor<T, 2>& d_dt, const tensor<T, 1>& d_a,
                          const tensor<T, 1>& d_bias) {
  const kernels::discretize_problem<T> problem{dt.const_view(), a.data(), dt_bias.data(),
                                               static_cast<T>(limits.low),
                                               static_cast<T>(limits.high)};
  kernels::discretize_vjp(ctx, problem, d_delta.const_view(), d_log_a.const_view(),
                          {d_dt.view(), d_a.data(), d_bias.data()});
}

/// Step sizes and log decays of Mamba-2:
///
///     delta = clamp(softplus(dt + dt_bias), low, high),     log_a = A_h delta
///
/// softplus is the identity above 20. Outside the limits the gradient of dt is zero.
/// @param dt       (b, T, H); may be a feature slice of a larger tensor
/// @param a        (H), negative
/// @param dt_bias  (H), or absent
/// @throws shape_error  the sizes do not fit.
/// @throws value_error  low > high.
/// @cost   an exp and a log an element; nothing but the operands is kept for the backward pass.
/// @source Dao and Gu 2024, arXiv:2405.21060, section 7; Gu and Dao 2023, arXiv:2312.00752, 3.5.
template <Floating T, Backend B>
[[nodiscard]] discretized<T, B> discretize(const pass<T, B>& p, const tensor<T, 3, B>& dt,
                                           const tensor<accum_t<T>, 1, B>& a,
                                           const tensor<accum_t<T>, 1, B>& dt_bias = {},
                                           const step_limits& limits = {}) {
  if (!a) throw shape_error("ssm: discretize: A is absent; give one number per head");
  detail::check_parameter<accum_t<T>, 1>("discretize", "A", a, {dt.extent(2)});
  detail::check_parameter<accum_t<T>, 1>("discretize", "dt_bias", dt_bias, {dt.extent(2)});
  if (!(limits.low <= limits.high)) {
    throw value_error("ssm: discretize: the limits are " + std::to_string(limits.low) + " and " +
                      std::to_string(limits.high) + "; wanted low <= high");
  }
  const typename B::scope scope(p.ctx);
  const tensor<T, 2, B> rows = detail::input_tokens(dt);
  const discretized<T, B> r{tensor<accum_t<T>, 3, B>(dt.extents()),
                            tensor<accum_t<T>, 3, B>(dt.extents())};
  apply_discretize(p.ctx, rows, a, dt_bias, limits, detail::input_tokens(r.delta),
                   detail::input_tokens(r.log_a));
  if (p.tape == nullptr || !(p.tape->wants(dt) || p.tape->wants(a) || p.tape->wants(dt_bias))) {
    return r;
  }
  p.tape->record_outputs(
      [=, t = p.tape, &ctx = p.ctx] {
        const detail::output_tokens<T, 3, B> d_dt(t->gradient(dt));
        apply_discretize_vjp(ctx, rows, a, dt_bias, limits,
                             detail::input_tokens(t->gradient(r.delta)),
                             detail::input_tokens(t->gradient(r.log_a)), d_dt.get(), t->gradient(a),
                             t->gradient(dt_bias));
        d_dt.finish();
      },
      r.delta, r.log_a);
  return r;
}

}  // namespace ssm
