#pragma once

#include <ssmlib/kernels/cpu/activation.hpp>
#include <ssmlib/nn/linear.hpp>

#include <cstdint>

namespace ssm {

template <Real T>
void apply_swiglu(const cpu::context& ctx, const tensor<T, 2>& gate, const tensor<T, 2>& up,
                  const tensor<T, 2>& y) {
  kernels::swiglu(ctx, gate.const_view(), up.const_view(), y.view());
}
template <Real T>
void apply_swiglu_vjp(const cpu::context& ctx, const tensor<T, 2>& gate, const tensor<T, 2>& up,
                      const tensor<T, 2>& dy, const tensor<T, 2>& d_gate,
                      const tensor<T, 2>& d_up) {
  kernels::swiglu_vjp(ctx, gate.const_view(), up.const_view(), dy.const_view(), d_gate.view(),
                      d_up.view());
}
template <Real T>
void apply_gelu_tanh(const cpu::context& ctx, const tensor<T, 2>& x, const tensor<T, 2>& y) {
  kernels::gelu_tanh(ctx, x.const_view(), y.view());
}
template <Real T>
void apply_gelu_tanh_vjp(const cpu::context& ctx, const tensor<T, 2>& x, const tensor<T, 2>& dy,
                         const tensor<T, 2>& dx) {
  kernels::gelu_tanh_vjp(ctx, x.const_view(), dy.const_view(), dx.view());
}

namespace op {

/// silu(gate) * up, element by element.
/// @param gate, up  (b, T, d); may be feature slices of one larger tensor
/// @throws shape_error  the shapes differ.
/// @source Shazeer 2020, arXiv:2002.05202.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> swiglu(const pass<T, B>& p, const tensor<T, 3, B>& gate,
                                     const tensor<T, 3, B>& up) {
  detail::check_same_shape("swiglu", "the gate", gate, "up", up);
  const typename B::scope scope(p.ctx);
  const tensor<T, 2, B> gates = detail::input_tokens(gate), ups = detail::input_tokens(up);
  tensor<T, 3, B> y(gate.extents());
  apply_swiglu(p.ctx, gates, ups, detail::input_tokens(y));
  if (p.tape == nullptr || !(p.tape->wants(gate) || p.tape->wants(up))) return y;
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3, B> d_gate(t->gradient(gate)), d_up(t->gradient(up));
    apply_swiglu_vjp(ctx, gates, ups, detail::input_tokens(t->gradient(y)), d_gate.get(),
                     d_up.get());
    d_gate.finish();
    d_up.finish();
  });
  return y;
}

/// GELU by tanh, element by element: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
/// @param x  (b, T, d)
/// @source Hendrycks and Gimpel 2016, arXiv:1606.08415.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> gelu_tanh(const pass<T, B>& p, const tensor<T, 3, B>& x) {
  const typename B::scope scope(p.ctx);
  const tensor<T, 2, B> rows = detail::input_tokens(x);
  tensor<T, 3, B> y(x.extents());
  apply_gelu_tanh(p.ctx, rows, detail::input_tokens(y));
  if (p.tape == nullptr || !p.tape->wants(x)) return y;
  p.tape->record(y, [=, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3, B> dx(t->gradient(x));
    if (!dx.get()) return;
    apply_gelu_tanh_vjp(ctx, rows, detail::input_tokens(t->gradient(y)), dx.get());
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
template <Floating T, Backend B = cpu>
struct swiglu_mlp {
  linear<T, B> gate_proj;  ///< (hidden, d)
  linear<T, B> up_proj;    ///< (hidden, d)
  linear<T, B> down_proj;  ///< (d, hidden)

  [[nodiscard]] static swiglu_mlp make(index_t features, index_t hidden,
                                       const mlp_options& o = {}) {
    const std::uint64_t seed = 3 * o.seed;
    return {linear<T, B>::make(features, hidden, {o.bias, seed, 1.0}),
            linear<T, B>::make(features, hidden, {o.bias, seed + 1, 1.0}),
            linear<T, B>::make(hidden, features, {o.bias, seed + 2, o.output_scale})};
  }
  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p, const tensor<T, 3, B>& x) const {
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
template <Floating T, Backend B = cpu>
struct gelu_mlp {
  linear<T, B> fc1;  ///< (hidden, d)
  linear<T, B> fc2;  ///< (d, hidden)

  [[nodiscard]] static gelu_mlp make(index_t features, index_t hidden, const mlp_options& o = {}) {
    return {linear<T, B>::make(features, hidden, {o.bias, 2 * o.seed, 1.0}),
            linear<T, B>::make(hidden, features, {o.bias, 2 * o.seed + 1, o.output_scale})};
  }
  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p, const tensor<T, 3, B>& x) const {
    return fc2(p, op::gelu_tanh(p, fc1(p, x)));
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "fc1", self.fc1);
    visit(f, "fc2", self.fc2);
  }
};

}  // namespace ssm
