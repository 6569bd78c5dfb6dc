#pragma once

#include <ssmlib/expr/hadamard.hpp>
#include <ssmlib/expr/selective.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/mixer/mamba2.hpp>
#include <ssmlib/mixer/options.hpp>
#include <ssmlib/mixer/sequence_mixer.hpp>

#include <cmath>
#include <cstdint>
#include <utility>

namespace ssm {

/// Mamba: the selective scan, one decay per channel and state,
///
///     M_c[t, s] = sum_n C_t[n] exp(A[c, n] (delta_{s+1} + ... + delta_t)) B_s[n] delta_s + D_c
///
/// with a silu gate outside. Channels are heads of one feature.
/// @source Gu and Dao 2023, arXiv:2312.00752, section 3.
template <Floating T, Backend B = cpu>
class mamba1 : public sequence_mixer<mamba1<T, B>, T, B> {
 public:
  mamba1() = default;
  /// @throws value_error  an option out of range.
  mamba1(const mamba1_options& options, std::uint64_t seed) : options_(detail::completed(options)) {
    const auto& o = options_;
    in_proj = linear<T, B>::make(o.width, 2 * o.inner, {.seed = seed});
    conv1d = causal_conv1d<T, B>::make(o.inner, o.conv_width, seed + 1, o.activation);
    x_proj = linear<T, B>::make(o.inner, o.dt_rank + 2 * o.state, {.seed = seed + 3});
    dt_proj = linear<T, B>::make(o.dt_rank, o.inner, {.seed = seed + 4});
    dt_proj.bias = detail::initial_dt_bias<T, B>(o.inner, o.dt_min, o.dt_max, o.dt_floor, seed + 5);
    tensor<accum_t<T>, 2> logs(o.inner, o.state);
    for (index_t c = 0; c < o.inner; ++c) {
      for (index_t n = 0; n < o.state; ++n) {
        logs(c, n) = static_cast<accum_t<T>>(std::log(static_cast<double>(n + 1)));
      }
    }
    a_log = detail::on_backend<B>(logs);
    d = tensor<accum_t<T>, 1, B>::full({o.inner}, 1);
    out_proj = linear<T, B>::make(o.inner, o.width, {.seed = seed + 6, .scale = o.out_scale});
  }

  linear<T, B> in_proj, x_proj, dt_proj, out_proj;
  causal_conv1d<T, B> conv1d;      // (inner, W)
  tensor<accum_t<T>, 2, B> a_log;  // (inner, N)
  tensor<accum_t<T>, 1, B> d;      // (inner)

  [[nodiscard]] const mamba1_options& options() const { return options_; }
  [[nodiscard]] index_t width() const { return options_.width; }
  [[nodiscard]] index_t conv_channels() const { return options_.inner; }
  [[nodiscard]] index_t conv_width() const { return options_.conv_width; }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "in_proj", self.in_proj);
    visit(f, "conv1d", self.conv1d);
    visit(f, "x_proj", self.x_proj);
    visit(f, "dt_proj", self.dt_proj);
    f("A_log", self.a_log, parameter_kind::decay);
    f("D", self.d, parameter_kind::decay);
    visit(f, "out_proj", self.out_proj);
  }

  [[nodiscard]] auto project(const pass<T, B>& p, const tensor<T, 3, B>& u,
                             const sequence_layout& layout, conv_state<T, B>* state) const {
    const auto& o = options_;
    const auto [x_in, z] = detail::split_features<2>(in_proj(p, u), {o.inner, o.inner});
    const tensor<T, 3, B> x = detail::convolve(p, conv1d, x_in, layout, state);
    const auto [low_rank_dt, b, c] =
        detail::split_features<3>(x_proj(p, x), {o.dt_rank, o.state, o.state});
    const tensor<T, 3, B> delta = eval(p, softplus(dt_proj(p, low_rank_dt)));
    const auto a = eval(-exp(a_log), p.tape, p.ctx);
    auto matrix =
        selective(delta, a, detail::split_heads(c, 1), detail::split_heads(b, 1)) + diagonal(d);
    auto product = packed(layout, std::move(matrix)) * channels(x);
    return projected<decltype(product), T, B>{std::move(product), z};
  }
  template <class Parts>
  [[nodiscard]] tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y,
                                       const Parts& parts) const {
    return out_proj(p, eval(p, detail::merge_heads(y) * silu(parts.gate)));
  }

 private:
  mamba1_options options_;
};

}  // namespace ssm
