#include "error.hpp"
#include "run_on_cuda.hpp"

void demo::require_cuda_device() {
  throw usage_error(
      "this program was built without CUDA; on a machine with nvcc, ./dev demo --device cuda "
      "builds "
      "the one that has it");
}

nlohmann::json demo::run_on_cuda(const settings&, ssm::index_t, ssm::index_t, corpus,
                                 std::chrono::steady_clock::time_point) {
  require_cuda_device();
  return {};
}
