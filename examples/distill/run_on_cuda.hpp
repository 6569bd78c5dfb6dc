#pragma once

#include "corpus.hpp"
#include "settings.hpp"

#include <nlohmann/json.hpp>

#include <chrono>

namespace demo {

/// @throws usage_error  the program has no CUDA, or the machine no device.
void require_cuda_device();

/// As run_on<ssm::cpu>. In the program distill_cuda it is that of cuda/run_on_cuda.cpp, else that
/// of no_cuda.cpp, which refuses.
[[nodiscard]] nlohmann::json run_on_cuda(const settings& s, ssm::index_t held_out_bytes,
                                         ssm::index_t new_tokens, corpus text,
                                         std::chrono::steady_clock::time_point start);

}  // namespace demo
