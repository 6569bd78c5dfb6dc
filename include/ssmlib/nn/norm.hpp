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

namespace detail {

template <Real T>
[[nodiscard]] kernels::rms_norm_problem<T> rms_norm_problem(const tensor<T, 2>& x,
                                                            const tensor<T, 2>& gate,
                                                            const tensor<T, 1>& weight,
                                                            const norm_options& options) {
  const index_t width = x.extent(1), group = options.group == 0 ? width : options.group;
  if (group < 1 || width % group != 0) {
    throw shape_error("ssm: rms_norm: groups of " + std::to_string(options.group) +
                      " features do not divide " + std::to_string(width) +
                      " features; wanted a divisor, or 0 for all");
  }
  const bool shared = weight.size() == group && group != width;
  check_parameter<T, 1>("rms_norm", "the weight", weight, {shared ? group : width});
  if (!weight) throw shape_error("ssm: rms_norm: the weight is absent; give one per feature");
  return {x.const_view(), gate.const_view(),  weight.data(),
          group,          shared ? 0 : group, static_cast<T>(options.eps)};
}

/// The three forms; `gate` is absent for gate_order::none.
template <Real T>
[[nodiscard]] tensor<T, 3> rms_norm(const pass<T>& p, gate_order order, const tensor<T, 3>& x,
                                    const tensor<T, 3>& gate, const tensor<T, 1>& weight,
                                    const norm_options& options) {
  const tensor<T, 2> rows = input_tokens(x), gates = input_tokens(gate);
  const auto problem = rms_norm_problem(rows, gates, weight, options);
  tensor<T, 3> y(x.extents());
  kernels::rms_norm(p.ctx, order, problem, input_tokens(y).view());
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(gate) || p.tape->wants(weight))) {
    return y;
  }
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const output_tokens<T, 3> dx(t->gradient(x)), d_gate(t->gradient(gate));
    const tensor<T, 1> d_weight = t->gradient(weight);
    kernels::rms_norm_vjp(ctx, order, rms_norm_problem(rows, gates, weight, options),
                          input_tokens(t->gradient(y)).const_view(),
                          {dx.get().view(), d_gate.get().view(), d_weight.data(), weight.size()});
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
template <Real T>
[[nodiscard]] tensor<T, 3> rms_norm(const pass<T>& p, const tensor<T, 3>& x,
                                    const tensor<T, 1>& weight, const norm_options& options = {}) {
  return detail::rms_norm(p, gate_order::none, x, tensor<T, 3>{}, weight, options);
}

/// RMSNorm with a gate: rms_norm(x) * silu(gate), or rms_norm(x * silu(gate)).
///
/// @param gate  (b, T, d)
/// @throws shape_error  the sizes do not fit.
/// @source Dao and Gu 2024, arXiv:2405.21060 (the norm before Mamba-2's output projection).
template <Real T>
[[nodiscard]] tensor<T, 3> gated_rms_norm(const pass<T>& p, const tensor<T, 3>& x,
                                          const tensor<T, 3>& gate, const tensor<T, 1>& weight,
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
template <Real T>
[[nodiscard]] tensor<T, 3> layer_norm(const pass<T>& p, const tensor<T, 3>& x,
                                      const tensor<T, 1>& weight, const tensor<T, 1>& bias = {},
                                      double eps = 1e-5) {
  if (!weight) throw shape_error("ssm: layer_norm: the weight is absent; give one per feature");
  detail::check_parameter<T, 1>("layer_norm", "the weight", weight, {x.extent(2)});
  detail::check_parameter<T, 1>("layer_norm", "the bias", bias, {x.extent(2)});
  const tensor<T, 2> rows = detail::input_tokens(x);
  tensor<T, 3> y(x.extents());
  kernels::layer_norm(p.ctx, rows.const_view(), weight.data(), bias.data(), static_cast<T>(eps),
                      detail::input_tokens(y).view());
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(weight) || p.tape->wants(bias))) {
    return y;
  }
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3> dx(t->gradient(x));
    const tensor<T, 1> d_weight = t->gradient(weight), d_bias = t->gradient(bias);
    kernels::layer_norm_vjp(ctx, rows.const_view(), weight.data(), static_cast<T>(eps),
                            detail::input_tokens(t->gradient(y)).const_view(),
                            {dx.get().view(), d_weight.data(), d_bias.data()});
    dx.finish();
  });
  return y;
}

}  // namespace op

/// RMSNorm with a weight of ones at the start.
template <Real T>
struct rms_norm {
  tensor<T, 1> weight;  ///< (d), or (group)
  norm_options options;

  [[nodiscard]] static rms_norm make(index_t features, const norm_options& options = {}) {
    return {tensor<T, 1>::full({features}, T(1)), options};
  }
  [[nodiscard]] tensor<T, 3> operator()(const pass<T>& p, const tensor<T, 3>& x) const {
    return op::rms_norm(p, x, weight, options);
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::norm);
  }
};

/// RMSNorm with a gate.
template <Real T>
struct gated_rms_norm {
  tensor<T, 1> weight;  ///< (d), or (group)
  gate_order order = gate_order::gate_first;
  norm_options options;

  [[nodiscard]] static gated_rms_norm make(index_t features,
                                           gate_order order = gate_order::gate_first,
                                           const norm_options& options = {}) {
    return {tensor<T, 1>::full({features}, T(1)), order, options};
  }
  [[nodiscard]] tensor<T, 3> operator()(const pass<T>& p, const tensor<T, 3>& x,
                                        const tensor<T, 3>& gate) const {
    return op::gated_rms_norm(p, x, gate, weight, order, options);
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::norm);
  }
};

/// LayerNorm with a weight of ones and a bias of zeros at the start.
template <Real T>
struct layer_norm {
  tensor<T, 1> weight;  ///< (d)
  tensor<T, 1> bias;    ///< (d), or absent
  double eps = 1e-5;

  [[nodiscard]] static layer_norm make(index_t features, double eps = 1e-5, bool bias = true) {
    layer_norm layer{tensor<T, 1>::full({features}, T(1)), {}, eps};
    if (bias) layer.bias = tensor<T, 1>::zeros(features);
    return layer;
  }
  [[nodiscard]] tensor<T, 3> operator()(const pass<T>& p, const tensor<T, 3>& x) const {
    return op::layer_norm(p, x, weight, bias, eps);
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::norm);
    f("bias", self.bias, parameter_kind::norm);
  }
};

}  // namespace ssm
