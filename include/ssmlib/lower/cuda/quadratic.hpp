#pragma once

#include <ssmlib/lower/cuda/gram.hpp>
#include <ssmlib/lower/cuda/host_reference.hpp>

#include <concepts>

namespace ssm {

/// @file
/// alg::quadratic on CUDA: the reference that every mixer has, as on the CPU. Gram matrices and the
/// library's masks have kernels (lower/cuda/gram.hpp), wrappers what they stand around. That of
/// softmax, selective, gated and delta-rule mixers and of nodes of a user's own is this one: it
/// goes through the host, in double, and waits for the device: for tests and small problems.

/// @cost  O(T^2) time and memory, copies to the host, and the host waits.
template <MatrixMixer M>
requires std::same_as<typename M::backend, cuda>
void apply_mixer(const cuda::context& ctx, alg::quadratic, const M& m,
                 const tensor<typename M::value_type, 4, cuda>& x,
                 const tensor<typename M::value_type, 4, cuda>& y,
                 const carry<typename M::value_type, cuda>& c) {
  detail::apply_on_host(ctx, m, x, y, c);
}
template <MatrixMixer M>
requires std::same_as<typename M::backend, cuda>
void apply_mixer_vjp(const cuda::context&, alg::quadratic, const M& m,
                     const tensor<typename M::value_type, 4, cuda>& x,
                     const tensor<typename M::value_type, 4, cuda>& dy, M& dm,
                     const tensor<typename M::value_type, 4, cuda>& dx,
                     const carry_gradient<typename M::value_type, cuda>& c) {
  detail::apply_on_host_vjp(m, x, dy, dm, dx, c);
}

}  // namespace ssm
