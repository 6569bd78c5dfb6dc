#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/train/model_losses.hpp>

#include <algorithm>
#include <string>

namespace ssm::detail {

SSMLIB_INLINE tensor<std::int32_t, 2> target_mask(const token_batch& batch) {
  if (!batch.targets) return {};
  const tensor<std::int32_t, 2> targets = batch.targets.contiguous();
  const std::int32_t* first = targets.data();
  if (std::find(first, first + targets.size(), no_target) == first + targets.size()) return {};
  const tensor<std::int32_t, 2> mask(targets.extents());
  std::transform(first, first + targets.size(), mask.data(),
                 [](std::int32_t id) { return id == no_target ? 0 : 1; });
  return mask;
}

SSMLIB_INLINE void check_sum(const char* operation, const kl_options& options) {
  if (options.divide_by == 0) return;
  throw value_error("ssm: " + std::string(operation) + ": divide_by is " +
                    std::to_string(options.divide_by) +
                    "; wanted 0, the sum is divided by what it counts after the last micro-batch");
}

SSMLIB_INLINE void check_pairs(const char* operation, index_t chosen, index_t rejected) {
  if (chosen == rejected) return;
  throw shape_error("ssm: " + std::string(operation) + ": " + std::to_string(chosen) +
                    " chosen answers and " + std::to_string(rejected) +
                    " rejected ones; wanted pairs");
}

}  // namespace ssm::detail
