#pragma once

#include <ssmlib/mixer/dense_panels.hpp>
#include <ssmlib/mixer/product_panels.hpp>
#include <ssmlib/mixer/semiseparable_panels.hpp>
#include <ssmlib/mixer/softmax_panels.hpp>

#include <concepts>
#include <memory>
#include <utility>

namespace ssm {

/// The panels of a mixer: entries from the operands for softmax attention and the semiseparable
/// family, products with columns of the identity for all others. (For CUDA:
/// mixer/cuda/panels.hpp.)
/// @param t  the tape that holds its operands' gradients; null: read only
/// @throws shape_error  an operand with a gradient whose batch and time do not merge.
template <MatrixMixer M>
requires std::same_as<typename M::backend, cpu>
[[nodiscard]] std::shared_ptr<matrix_panels<typename M::value_type>> panels(
    M m, tape<typename M::value_type>* t = nullptr,
    [[maybe_unused]] const cpu::context& ctx = default_context<cpu>()) {
  using T = typename M::value_type;
  if constexpr (std::same_as<M, softmax_mixer<T>>) {
    return std::make_shared<detail::softmax_panels<T>>(m, t, ctx);
  } else if constexpr (detail::semiseparable_parts<M>::exist) {
    return detail::semiseparable_parts<M>::panels(m, t, ctx);
  } else {
    return std::make_shared<detail::product_panels<M>>(std::move(m), t);
  }
}
/// Matrices that are already there, (b, H, T, T).
template <Real T>
[[nodiscard]] std::shared_ptr<matrix_panels<T>> panels(tensor<T, 4> matrices) {
  return std::make_shared<detail::dense_panels<T>>(std::move(matrices));
}

}  // namespace ssm
