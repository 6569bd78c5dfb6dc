#pragma once

#include <ssmlib/base/error.hpp>

#include <cuda_runtime_api.h>

#include <string>

/// Throws ssm::backend_error with the call and the driver's reason unless it succeeded.
#define SSMLIB_CHECK_CUDA(...) ::ssm::detail::check_cuda((__VA_ARGS__), #__VA_ARGS__)

namespace ssm::detail {

inline void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // what is not sticky must not fail the next call as well
  throw backend_error("ssm: " + std::string(call) + " failed: " + cudaGetErrorName(status) + " (" +
                      cudaGetErrorString(status) + ")");
}

}  // namespace ssm::detail
