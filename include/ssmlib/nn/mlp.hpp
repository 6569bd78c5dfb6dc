#pragma once

#include <ssmlib/kernels/cpu/activation.hpp>
#include <ssmlib/nn/linear.hpp>

#include <cstdint>

namespace ssm {

namespace op {

/// silu(gate) * up, element by element.
/// @param gate, up  (b, T, d); may be feature slices of one larger tensor
/// @throws shape_error  the shapes differ.
/// @source Shazeer 2020, arXiv:2002.05202.
template <Real T>
[[nodiscard]] tensor<T, 3> swiglu(const pass<T>& p, const tensor<T, 3>& gate,
                                  const tensor<T, 3>& up) {
  detail::check_same_shape("swiglu", "the gate", gate, "up", up);
  const tensor<T, 2> gates = detail::input_tokens(gate), ups = detail::input_tokens(up);
  tensor<T, 3> y(gate.extents());
  kernels::swiglu(p.ctx, gates.const_view(), ups.const_view(), detail::input_tokens(y).view());
  if (p.tape == nullptr || !(p.tape->wants(gate) || p.tape->wants(up))) return y;
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3> d_gate(t->gradient(gate)), d_up(t->gradient(up));
    kernels::swiglu_vjp(ctx, gates.const_view(), ups.const_view(),
                        detail::input_tokens(t->gradient(y)).const_view(), d_gate.get().view(),
                        d_up.get().view());
    d_gate.finish();
    d_up.finish();
  });
  return y;
}

/// GELU by tanh, element by element: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
/// @param x  (b, T, d)
/// @source Hendrycks and Gimpel 2016, arXiv:1606.08415.
template <Real T>
[[nodiscard]] tensor<T, 3> gelu_tanh(const pass<T>& p, const tensor<T, 3>& x) {
  const tensor<T, 2> rows = detail::input_tokens(x);
  tensor<T, 3> y(x.extents());
  kernels::gelu_tanh(p.ctx, rows.const_view(), detail::input_tokens(y).view());
  if (p.tape == nullptr || !p.tape->wants(x)) return y;
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3> dx(t->gradient(x));
    if (!dx.get()) return;
    kernels::gelu_tanh_vjp(ctx, rows.const_view(),
                           detail::input_tokens(t->gradient(y)).const_view(), dx.get().view());
    dx.finish();
  });
  return y;
}

}  // namespace op

struct mlp_options {
  bool bias = false;
  std::uint64_t seed = 0;
  /// Multiplies the initial weight of the output projection.
  double output_scale = 1.0;
};

/// down(silu(gate(x)) * up(x)): the MLP of Llama.
template <Real T>
struct swiglu_mlp {
  linear<T> gate_proj;  ///< (hidden, d)
  linear<T> up_proj;    ///< (hidden, d)
  linear<T> down_proj;  ///< (d, hidden)

  [[nodiscard]] static swiglu_mlp make(index_t features, index_t hidden,
                                       const mlp_options& o = {}) {
    const std::uint64_t seed = 3 * o.seed;
    return {linear<T>::make(features, hidden, {o.bias, seed, 1.0}),
            linear<T>::make(features, hidden, {o.bias, seed + 1, 1.0}),
            linear<T>::make(hidden, features, {o.bias, seed + 2, o.output_scale})};
  }
  [[nodiscard]] tensor<T, 3> operator()(const pass<T>& p, const tensor<T, 3>& x) const {
    return down_proj(p, op::swiglu(p, gate_proj(p, x), up_proj(p, x)));
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "gate_proj", self.gate_proj);
    visit(f, "up_proj", self.up_proj);
    visit(f, "down_proj", self.down_proj);
  }
};

/// fc2(gelu(fc1(x))) with GELU by tanh: the MLP of Phi and GPT.
template <Real T>
struct gelu_mlp {
  linear<T> fc1;  ///< (hidden, d)
  linear<T> fc2;  ///< (d, hidden)

  [[nodiscard]] static gelu_mlp make(index_t features, index_t hidden, const mlp_options& o = {}) {
    return {linear<T>::make(features, hidden, {o.bias, 2 * o.seed, 1.0}),
            linear<T>::make(hidden, features, {o.bias, 2 * o.seed + 1, o.output_scale})};
  }
  [[nodiscard]] tensor<T, 3> operator()(const pass<T>& p, const tensor<T, 3>& x) const {
    return fc2(p, op::gelu_tanh(p, fc1(p, x)));
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "fc1", self.fc1);
    visit(f, "fc2", self.fc2);
  }
};

}  // namespace ssm
