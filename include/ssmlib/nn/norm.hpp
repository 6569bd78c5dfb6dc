#pragma once

#include <ssmlib/kernels/cpu/norm.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/parameter.hpp>
#include <ssmlib/nn/pass.hpp>

#include <string>

namespace ssm {

/// Where silu(gate) enters a gated norm: norm_first is norm(x) * silu(gate), gate_first is
/// norm(x * silu(gate)).
using kernels::gate_order;

struct norm_options {
  double eps = 1e-5;
  /// Features that are normalised together; 0: all.
  index_t group = 0;
};

/// The groups of a norm that have been checked.
struct norm_groups {
  index_t size;         ///< features that are normalised together
  index_t weight_step;  ///< size, or 0 where the groups share the weight
  double eps;
};

namespace detail {

template <Floating T, Backend B>
[[nodiscard]] norm_groups check_rms_norm(index_t width, const tensor<T, 1, B>& weight,
                                         const norm_options& options) {
  const index_t group = options.group == 0 ? width : options.group;
  if (group < 1 || width % group != 0) {
    throw shape_error("ssm: rms_norm: groups of " + std::to_string(options.group) +
                      " features do not divide " + std::to_string(width) +
                      " features; wanted a divisor, or 0 for all");
  }
  const bool shared = weight.size() == group && group != width;
  check_parameter<T, 1>("rms_norm", "the weight", weight, {shared ? group : width});
  if (!weight) throw shape_error("ssm: rms_norm: the weight is absent; give one per feature");
  return {group, shared ? 0 : group, options.eps};
}

template <Real T>
[[nodiscard]] kernels::rms_norm_problem<T> rms_norm_problem(const tensor<T, 2>& x,
                                                            const tensor<T, 2>& gate,
                                                            const tensor<T, 1>& weight,
                                                            const norm_groups& g) {
  return {x.const_view(), gate.const_view(), weight.data(),
          g.size,         g.weight_step,     static_cast<T>(g.eps)};
}

}  // namespace detail

template <Real T>
void apply_rms_norm(const cpu::context& ctx, gate_order order, const tensor<T, 2>& x,
                    const tensor<T, 2>& gate, const tensor<T, 1>& weight, const norm_groups& groups,
                    const tensor<T, 2>& y) {
  kernels::rms_norm(ctx, order, detail::rms_norm_problem(x, gate, weight, groups), y.view());
}
template <Real T>
void apply_rms_norm_vjp(const cpu::context& ctx, gate_order order, const tensor<T, 2>& x,
                        const tensor<T, 2>& gate, const tensor<T, 1>& weight,
                        const norm_groups& groups, const tensor<T, 2>& dy, const tensor<T, 2>& dx,
                        const tensor<T, 2>& d_gate, const tensor<T, 1>& d_weight) {
  kernels::rms_norm_vjp(ctx, order, detail::rms_norm_problem(x, gate, weight, groups),
                        dy.const_view(),
                        {dx.view(), d_gate.view(), d_weight.data(), weight.size()});
}
template <Real T>
void apply_layer_norm(const cpu::context& ctx, const tensor<T, 2>& x, const tensor<T, 1>& weight,
                      const tensor<T, 1>& bias, double eps, const tensor<T, 2>& y) {
  kernels::layer_norm(ctx, x.const_view(), weight.data(), bias.data(), static_cast<T>(eps),
                      y.view());
}
template <Real T>
void apply_layer_norm_vjp(const cpu::context& ctx, const tensor<T, 2>& x,
                          const tensor<T, 1>& weight, double eps, const tensor<T, 2>& dy,
                          const tensor<T, 2>& dx, const tensor<T, 1>& d_weight,
                          const tensor<T, 1>& d_bias) {
  kernels::layer_norm_vjp(ctx, x.const_view(), weight.data(), static_cast<T>(eps), dy.const_view(),
                          {dx.view(), d_weight.data(), d_bias.data()});
}

namespace detail {

/// The three forms; `gate` is absent for gate_order::none.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> rms_norm(const pass<T, B>& p, gate_order order,
                                       const tensor<T, 3, B>& x, const tensor<T, 3, B>& gate,
                                       const tensor<accum_t<T>, 1, B>& weight,
                                       const norm_options& options) {
  const norm_groups groups = check_rms_norm(x.extent(2), weight, options);
  const typename B::scope scope(p.ctx);
  const tensor<T, 2, B> rows = input_tokens(x), gates = input_tokens(gate);
  tensor<T, 3, B> y(x.extents());
  apply_rms_norm(p.ctx, order, rows, gates, weight, groups, input_tokens(y));
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(gate) || p.tape->wants(weight))) {
    return y;
  }
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const output_tokens<T, 3, B> dx(t->gradient(x)), d_gate(t->gradient(gate));
    apply_rms_norm_vjp(ctx, order, rows, gates, weight, groups, input_tokens(t->gradient(y)),
                       dx.get(), d_gate.get(), t->gradient(weight));
    dx.finish();
    d_gate.finish();
  });
  return y;
}

}  // namespace detail

namespace op {

/// y = x / sqrt(mean(x^2) + eps) * weight, over all features or over groups of them.
///
/// @param x       (b, T, d); may be a feature slice of a larger tensor
/// @param weight  (d), or (group) that all groups share
/// @return        (b, T, d)
/// @throws shape_error  the sizes do not fit.
/// @source Zhang and Sennrich 2019, arXiv:1910.07467.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> rms_norm(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                       const tensor<accum_t<T>, 1, B>& weight,
                                       const norm_options& options = {}) {
  return detail::rms_norm(p, gate_order::none, x, tensor<T, 3, B>{}, weight, options);
}

/// RMSNorm with a gate: rms_norm(x) * silu(gate), or rms_norm(x * silu(gate)).
///
/// @param gate  (b, T, d)
/// @throws shape_error  the sizes do not fit.
/// @source Dao and Gu 2024, arXiv:2405.21060 (the norm before Mamba-2's output projection).
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> gated_rms_norm(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                             const tensor<T, 3, B>& gate,
                                             const tensor<accum_t<T>, 1, B>& weight,
                                             gate_order order, const norm_options& options = {}) {
  detail::check_same_shape("gated_rms_norm", "x", x, "the gate", gate);
  if (order == gate_order::none) {
    throw value_error(
        "ssm: gated_rms_norm: gate_order::none has no gate; call rms_norm, or choose norm_first or "
        "gate_first");
  }
  return detail::rms_norm(p, order, x, gate, weight, options);
}

/// y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
///
/// @param x       (b, T, d)
/// @param weight  (d)
/// @param bias    (d), or absent
/// @throws shape_error  the sizes do not fit.
/// @source Ba, Kiros and Hinton 2016, arXiv:1607.06450.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> layer_norm(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                         const tensor<accum_t<T>, 1, B>& weight,
                                         const tensor<accum_t<T>, 1, B>& bias = {},
                                         double eps = 1e-5) {
  if (!weight) throw shape_error("ssm: layer_norm: the weight is absent; give one per feature");
  detail::check_parameter<accum_t<T>, 1>("layer_norm", "the weight", weight, {x.extent(2)});
  detail::check_parameter<accum_t<T>, 1>("layer_norm", "the bias", bias, {x.extent(2)});
  const typename B::scope scope(p.ctx);
  const tensor<T, 2, B> rows = detail::input_tokens(x);
  tensor<T, 3, B> y(x.extents());
  apply_layer_norm(p.ctx, rows, weight, bias, eps, detail::input_tokens(y));
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(weight) || p.tape->wants(bias))) {
    return y;
  }
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3, B> dx(t->gradient(x));
    apply_layer_norm_vjp(ctx, rows, weight, eps, detail::input_tokens(t->gradient(y)), dx.get(),
                         t->gradient(weight), t->gradient(bias));
    dx.finish();
  });
  return y;
}

}  // namespace op

/// RMSNorm with a weight of ones at the start.
template <Floating T, Backend B = cpu>
struct rms_norm {
  tensor<accum_t<T>, 1, B> weight;  ///< (d), or (group)
  norm_options options;

  [[nodiscard]] static rms_norm make(index_t features, const norm_options& options = {}) {
    return {tensor<accum_t<T>, 1, B>::full({features}, 1), options};
  }
  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p, const tensor<T, 3, B>& x) const {
    return op::rms_norm(p, x, weight, options);
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::norm);
  }
};

/// RMSNorm with a gate.
template <Floating T, Backend B = cpu>
struct gated_rms_norm {
  tensor<accum_t<T>, 1, B> weight;  ///< (d), or (group)
  gate_order order = gate_order::gate_first;
  norm_options options;

  [[nodiscard]] static gated_rms_norm make(index_t features,
                                           gate_order order = gate_order::gate_first,
                                           const norm_options& options = {}) {
    return {tensor<accum_t<T>, 1, B>::full({features}, 1), order, options};
  }
  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                           const tensor<T, 3, B>& gate) const {
    return op::gated_rms_norm(p, x, gate, weight, order, options);
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::norm);
  }
};

/// LayerNorm with a weight of ones and a bias of zeros at the start.
template <Floating T, Backend B = cpu>
struct layer_norm {
  tensor<accum_t<T>, 1, B> weight;  ///< (d)
  tensor<accum_t<T>, 1, B> bias;    ///< (d), or absent
  double eps = 1e-5;

  [[nodiscard]] static layer_norm make(index_t features, double eps = 1e-5, bool bias = true) {
    layer_norm layer{tensor<accum_t<T>, 1, B>::full({features}, 1), {}, eps};
    if (bias) layer.bias = tensor<accum_t<T>, 1, B>::zeros(features);
    return layer;
  }
  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p, const tensor<T, 3, B>& x) const {
    return op::layer_norm(p, x, weight, bias, eps);
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::norm);
    f("bias", self.bias, parameter_kind::norm);
  }
};

}  // namespace ssm
