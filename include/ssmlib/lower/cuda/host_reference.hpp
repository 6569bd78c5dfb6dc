#pragma once

#include <ssmlib/kernels/cuda/dense_product.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

#include <concepts>
#include <string_view>
#include <type_traits>
#include <utility>

namespace ssm {

/// @file
/// Products and gradients of a CUDA node by its twin on the host, in double: what alg::quadratic is
/// where there is no kernel for it. The host waits for the device.

namespace detail {

/// Every operand of `gradients` (a node's twin on the host) that `wanted` has, as zeros; no other.
template <class Twin, class M>
void keep_wanted(Twin& gradients, M& wanted) {
  Twin::operands(gradients, [&](std::string_view name, auto& t, operand) {
    bool found = false;
    M::operands(wanted, [&](std::string_view other, auto& w, operand) {
      found = found || (other == name && static_cast<bool>(w));
    });
    using Tensor = std::remove_cvref_t<decltype(t)>;
    t = found ? Tensor::zeros(t.extents()) : Tensor{};
  });
}

/// to += from, which is on the host in double.
template <Floating T, int R>
void add_from_host(const tensor<T, R, cuda>& to, const tensor<double, R>& from) {
  if (to) add_to(to, on_backend<cuda>(cast<T>(from)));
}
template <class M, class Twin>
void add_gradients_from_host(M& to, Twin& from) {
  Twin::operands(from, [&](std::string_view name, auto& t, operand) {
    if (!t) return;
    M::operands(to, [&](std::string_view other, auto& target, operand) {
      using From = std::remove_cvref_t<decltype(t)>;
      using To = std::remove_cvref_t<decltype(target)>;
      if constexpr (From::rank == To::rank) {
        if (other == name) add_from_host(target, t);
      }
    });
  });
}

/// y = dense() x, or the product with its transpose; the matrix is made on the host, in double.
template <class T>
void multiply_by_dense(const cuda::context& ctx, const tensor<double, 4>& dense, bool transposed,
                       const sequence_layout& sequences, bool packed, const tensor<T, 4, cuda>& x,
                       const tensor<T, 4, cuda>& y) {
  if (y.size() == 0) return;
  const device_layout layout(ctx, sequences);
  const tensor<double, 4, cuda> matrix = on_backend<cuda>(dense);
  kernels::cuda::dense_product_problem<T> p;
  p.matrix = matrix.const_view();
  if (transposed) std::swap(p.matrix.strides[2], p.matrix.strides[3]);
  p.x = x.const_view();
  p.packed = packed;
  p.offsets = layout.offsets;
  p.sequences = layout.sequences;
  p.max_length = layout.max_length;
  kernels::cuda::dense_product<T>(ctx.stream(), p, y.view());
}

/// dense() on the host, the product on the device; with a state, all of it is the twin's on the
/// host.
template <MatrixMixer M>
void apply_on_host(const cuda::context& ctx, const M& m,
                   const tensor<typename M::value_type, 4, cuda>& x,
                   const tensor<typename M::value_type, 4, cuda>& y,
                   const carry<typename M::value_type, cuda>& c) {
  using T = typename M::value_type;
  refuse_snapshots(c);
  if (c.initial || c.final) {
    const tensor<double, 4> result(y.extents());
    carry<double> states;
    states.initial = exact_on_host(c.initial);
    if (c.final) states.final = tensor<double, 4>(c.final.extents());
    apply_mixer(default_context<cpu>(), alg::quadratic{}, m.on_host(), exact_on_host(x), result,
                states);
    y.copy_from(on_backend<cuda>(cast<T>(result)));
    if (c.final) c.final.copy_from(on_backend<cuda>(cast<accum_t<T>>(states.final)));
    return;
  }
  multiply_by_dense(ctx, m.dense(), false, layout_of(m), static_cast<bool>(m.layout), x, y);
}

/// The gradient of the twin on the host, by its dense_vjp, its kernels or central differences:
/// whatever lower/ has for it there.
template <MatrixMixer M>
void apply_on_host_vjp(const M& m, const tensor<typename M::value_type, 4, cuda>& x,
                       const tensor<typename M::value_type, 4, cuda>& dy, M& dm,
                       const tensor<typename M::value_type, 4, cuda>& dx,
                       const carry_gradient<typename M::value_type, cuda>& c) {
  auto exact = m.on_host();
  auto gradients = exact;
  keep_wanted(gradients, dm);
  const tensor<double, 4> exact_x = exact_on_host(x);
  tensor<double, 4> d_x;
  if (dx) d_x = tensor<double, 4>::zeros(dx.extents());
  carry_gradient<double> states;
  states.initial = exact_on_host(c.initial);
  states.d_final = exact_on_host(c.d_final);
  if (c.d_initial) states.d_initial = tensor<double, 4>::zeros(c.d_initial.extents());
  apply_mixer_vjp(default_context<cpu>(), alg::quadratic{}, exact, exact_x, exact_on_host(dy),
                  gradients, d_x, states);
  add_gradients_from_host(dm, gradients);
  add_from_host(dx, d_x);
  add_from_host(c.d_initial, states.d_initial);
}

}  // namespace detail

}  // namespace ssm
