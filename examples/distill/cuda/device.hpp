#pragma once

#include "../device.hpp"
#include "../error.hpp"
#include <ssmlib/cuda.hpp>

#include <cuda_runtime_api.h>

#include <string>

namespace demo {

template <>
struct device<ssm::cuda> {
  using value_type = ssm::bf16;  ///< beside parameters in float

  /// @throws usage_error  there is no device.
  [[nodiscard]] static ssm::cuda::context make_context(const settings&) {
    if (ssm::cuda::device_count() == 0) {
      throw usage_error(
          "there is no CUDA device, or no driver; leave out --device cuda to run on the CPU");
    }
    return ssm::default_context<ssm::cuda>();
  }
  [[nodiscard]] static std::string name(const ssm::cuda::context& ctx) {
    cudaDeviceProp properties{};
    SSMLIB_CHECK_CUDA(cudaGetDeviceProperties(&properties, ctx.device()));
    return properties.name;
  }
  template <class T, int R>
  [[nodiscard]] static ssm::tensor<T, R> to_host(const ssm::tensor<T, R, ssm::cuda>& t) {
    return ssm::to<ssm::cpu>(t);
  }
};

}  // namespace demo
