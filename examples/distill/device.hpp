#pragma once

#include "settings.hpp"
#include <ssmlib/ssmlib.hpp>

#include <string>

namespace demo {

/// What differs between the devices that a run may use; for CUDA see cuda/device.hpp.
template <class B>
struct device;

template <>
struct device<ssm::cpu> {
  using value_type = float;  ///< of the models' activations

  [[nodiscard]] static ssm::cpu::context make_context(const settings& s) {
    return s.threads > 0 ? ssm::cpu::context(s.threads) : ssm::cpu::context();
  }
  /// For the report: "on ...".
  [[nodiscard]] static std::string name(const ssm::cpu::context& ctx) {
    return "the CPU, " + std::to_string(ctx.threads()) + " threads";
  }
  template <class T, int R>
  [[nodiscard]] static ssm::tensor<T, R> to_host(const ssm::tensor<T, R>& t) {
    return t;
  }
};

}  // namespace demo
