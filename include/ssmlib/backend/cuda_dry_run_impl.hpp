#pragma once

#include <ssmlib/backend/cuda_dry_run.hpp>
#include <ssmlib/backend/cuda_impl.hpp>
#include <ssmlib/base/compiled.hpp>

#include <cstdint>
#include <memory>

namespace ssm {

namespace detail {

/// What a dry run has given out: addresses that nothing lies behind, and their bytes.
class cuda_counter final : public cuda_allocator {
 public:
  [[nodiscard]] void* allocate(std::size_t bytes) override {
    const bool is_workspace = workspace_scope::is_active();
    in_use += bytes;
    if (is_workspace) workspace += bytes;
    if (in_use > peak) {
      peak = in_use;
      workspace_at_peak = workspace;
    }
    std::uintptr_t& next = is_workspace ? next_workspace_ : next_;
    void* const address = reinterpret_cast<void*>(next);
    next += (bytes + 511) / 512 * 512;
    return address;
  }
  void release(void* data, std::size_t bytes) noexcept override {
    in_use -= bytes;
    if (reinterpret_cast<std::uintptr_t>(data) >= first_workspace) workspace -= bytes;
  }
  void reset_peak() {
    peak = in_use;
    workspace_at_peak = workspace;
  }

  std::size_t in_use = 0, peak = 0, workspace = 0, workspace_at_peak = 0;

 private:
  // Far from what the device or the host gives out; 16 TiB of the first, then 32 of the other.
  static constexpr std::uintptr_t first_workspace = std::uintptr_t{1} << 45;
  std::uintptr_t next_ = std::uintptr_t{1} << 44, next_workspace_ = first_workspace;
};

}  // namespace detail

SSMLIB_INLINE cuda_dry_run::cuda_dry_run(int device)
    : context_(device), counter_(std::make_shared<detail::cuda_counter>()) {
  context_.state_->is_dry_run = true;
  context_.set_allocator(counter_);
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
  return counter_->in_use;
}
SSMLIB_INLINE std::size_t cuda_dry_run::workspace() const {
  return counter_->workspace;
}
SSMLIB_INLINE std::size_t cuda_dry_run::peak() const {
  return counter_->peak;
}
SSMLIB_INLINE std::size_t cuda_dry_run::workspace_at_peak() const {
  return counter_->workspace_at_peak;
}
SSMLIB_INLINE void cuda_dry_run::reset_peak() const {
  counter_->reset_peak();
}

}  // namespace ssm
