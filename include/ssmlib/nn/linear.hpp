#pragma once

#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/rows.hpp>
#include <ssmlib/kernels/cpu/skinny.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/parameter.hpp>
#include <ssmlib/nn/pass.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace ssm {

namespace detail {

template <Floating T, Floating W, Backend B>
void check_linear(const char* operation, const tensor<T, 3, B>& x, const tensor<W, 2, B>& weight,
                  const tensor<W, 1, B>& bias) {
  if (!weight || weight.extent(1) != x.extent(2)) {
    throw shape_error("ssm: " + std::string(operation) + ": the input has " +
                      std::to_string(x.extent(2)) + " features, the weight is " +
                      to_string<2>(weight.extents()) + "; wanted (out x " +
                      std::to_string(x.extent(2)) + ")");
  }
  check_parameter<W, 1>(operation, "the bias", bias, {weight.extent(0)});
}

/// y = x W^T + bias over token rows. Rows do not influence each other's bits.
template <Real T>
void linear_rows(const cpu::context& ctx, bool fixed_order, view<const T, 2> x,
                 const tensor<T, 2>& weight, const tensor<T, 1>& bias, view<T, 2> y) {
  if (fixed_order) {
    const tensor<T, 2> w = weight.strides()[1] == 1 ? weight : weight.contiguous();
    kernels::rows_times_transposed<T, T>(ctx, x, w.const_view(), y, bias.const_view());
    return;
  }
  if (bias) {
    const index_t pieces = kernels::row_pieces(y.extent(0), y.extent(1));
    kernels::for_each_piece(ctx, y.extent(0), pieces, [&](index_t, index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        std::copy_n(bias.data(), bias.size(), y.data + t * y.stride(0));
      }
    });
  }
  kernels::gemm(ctx, T(1), x, transposed(weight.const_view()), bias ? T(1) : T(0), y);
}

/// dx += dy W, dW += dy^T x, d_bias += the sum of dy over tokens; absent gradients are skipped.
template <Real T>
void linear_rows_vjp(const cpu::context& ctx, view<const T, 2> x, const tensor<T, 2>& weight,
                     view<const T, 2> dy, view<T, 2> dx, view<T, 2> d_weight,
                     const tensor<T, 1>& d_bias) {
  if (dx) kernels::gemm(ctx, T(1), dy, weight.const_view(), T(1), dx);
  if (d_weight) kernels::gemm(ctx, T(1), transposed(dy), x, T(1), d_weight);
  if (d_bias) kernels::add_column_sums(ctx, dy, d_bias.data());
}

}  // namespace detail

template <Real T>
void apply_linear(const cpu::context& ctx, bool fixed_order, const tensor<T, 2>& x,
                  const tensor<T, 2>& weight, const tensor<T, 1>& bias, const tensor<T, 2>& y) {
  detail::linear_rows(ctx, fixed_order, x.const_view(), weight, bias, y.view());
}
template <Real T>
void apply_linear_vjp(const cpu::context& ctx, const tensor<T, 2>& x, const tensor<T, 2>& weight,
                      const tensor<T, 2>& dy, const tensor<T, 2>& dx, const tensor<T, 2>& d_weight,
                      const tensor<T, 1>& d_bias) {
  detail::linear_rows_vjp(ctx, x.const_view(), weight, dy.const_view(), dx.view(), d_weight.view(),
                          d_bias);
}

namespace op {

/// y = x W^T + bias for every token.
///
/// @param x       (b, T, in); may be a feature slice of a larger tensor
/// @param weight  (out, in)
/// @param bias    (out), or absent
/// @return        (b, T, out)
/// @throws shape_error  the sizes do not fit.
/// @cost   2 tokens in out flops, twice that backward. With p.fixed_order a token's bits do not
///         depend on how many tokens there are.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> linear(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                     const tensor<accum_t<T>, 2, B>& weight,
                                     const tensor<accum_t<T>, 1, B>& bias = {}) {
  detail::check_linear("linear", x, weight, bias);
  const typename B::scope scope(p.ctx);
  tensor<T, 3, B> y(x.extent(0), x.extent(1), weight.extent(0));
  const tensor<T, 2, B> w = detail::weight_of(p, weight);
  apply_linear(p.ctx, p.fixed_order, detail::input_tokens(x), w, bias, detail::input_tokens(y));
  if (p.tape == nullptr || !(p.tape->wants(x) || p.tape->wants(weight) || p.tape->wants(bias))) {
    return y;
  }
  p.tape->record(y, [x, w, weight, bias, y, &ctx = p.ctx, t = p.tape] {
    const detail::output_tokens<T, 3, B> dx(t->gradient(x));
    apply_linear_vjp(ctx, detail::input_tokens(x), w, detail::input_tokens(t->gradient(y)),
                     dx.get(), t->gradient(weight), t->gradient(bias));
    dx.finish();
  });
  return y;
}

}  // namespace op

struct linear_options {
  bool bias = false;
  std::uint64_t seed = 0;
  /// Multiplies the initial weight: output projections that feed a residual stream of L layers
  /// start smaller, for example by 1 / sqrt(2 L).
  double scale = 1.0;
};

/// y = x W^T + bias.
template <Floating T, Backend B = cpu>
struct linear {
  tensor<accum_t<T>, 2, B> weight;  ///< (out, in)
  tensor<accum_t<T>, 1, B> bias;    ///< (out), or absent

  /// Weight and bias from U(-1/sqrt(in), 1/sqrt(in)), the weight times the scale.
  [[nodiscard]] static linear make(index_t in, index_t out, const linear_options& options = {}) {
    using W = accum_t<T>;
    linear layer;
    const tensor<W, 2> weight = init::fan_in_uniform<W, 2>({out, in}, in, 2 * options.seed);
    if (options.scale != 1.0) {
      for (index_t i = 0; i < weight.size(); ++i)
        weight.data()[i] *= static_cast<W>(options.scale);
    }
    layer.weight = detail::on_backend<B>(weight);
    if (options.bias) {
      layer.bias =
          detail::on_backend<B>(init::fan_in_uniform<W, 1>({out}, in, 2 * options.seed + 1));
    }
    return layer;
  }

  [[nodiscard]] index_t in_features() const { return weight.extent(1); }
  [[nodiscard]] index_t out_features() const { return weight.extent(0); }

  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p, const tensor<T, 3, B>& x) const {
    return op::linear(p, x, weight, bias);
  }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::matrix);
    f("bias", self.bias, parameter_kind::bias);
  }
};

}  // namespace ssm
