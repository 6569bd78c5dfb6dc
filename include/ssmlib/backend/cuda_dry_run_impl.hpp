#pragma once

#include <ssmlib/backend/cuda_dry_run.hpp>
#include <ssmlib/backend/cuda_impl.hpp>
#include <ssmlib/base/compiled.hpp>

#include <memory>

namespace ssm {

SSMLIB_INLINE cuda_dry_run::cuda_dry_run(int device) : context_(device) {
  context_.state_->counter = std::make_shared<detail::cuda_counter>();
  // Relaxed: what loads code or makes a library's handle on the way may allocate for itself.
  SSMLIB_CHECK_CUDA(cudaStreamBeginCapture(context_.stream(), cudaStreamCaptureModeRelaxed));
}

SSMLIB_INLINE cuda_dry_run::~cuda_dry_run() {
  cudaGraph_t graph = nullptr;
  (void)cudaStreamEndCapture(context_.stream(), &graph);
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  (void)cudaGetLastError();
}

SSMLIB_INLINE std::size_t cuda_dry_run::in_use() const {
  return context_.state_->counter->in_use;
}
SSMLIB_INLINE std::size_t cuda_dry_run::workspace() const {
  return context_.state_->counter->workspace;
}
SSMLIB_INLINE std::size_t cuda_dry_run::peak() const {
  return context_.state_->counter->peak;
}
SSMLIB_INLINE std::size_t cuda_dry_run::workspace_at_peak() const {
  return context_.state_->counter->workspace_at_peak;
}
SSMLIB_INLINE void cuda_dry_run::reset_peak() const {
  detail::cuda_counter& counter = *context_.state_->counter;
  counter.peak = counter.in_use;
  counter.workspace_at_peak = counter.workspace;
}

}  // namespace ssm
