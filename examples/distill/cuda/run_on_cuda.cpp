#include "../run_on_cuda.hpp"

#include "../job.hpp"
#include "device.hpp"

#include <utility>

void demo::require_cuda_device() {
  (void)device<ssm::cuda>::make_context({});
}

nlohmann::json demo::run_on_cuda(const settings& s, ssm::index_t held_out_bytes,
                                 ssm::index_t new_tokens, corpus text,
                                 std::chrono::steady_clock::time_point start) {
  return run_on<ssm::cuda>(s, held_out_bytes, new_tokens, std::move(text), start);
}
