#pragma once

#include <ssmlib/backend/cuda.hpp>

#include <cstddef>
#include <memory>

namespace ssm {

namespace detail {
class cuda_counter;
}

/// A context on which nothing runs and nothing is allocated: it counts the bytes that the same work
/// would take from a real context's pool, block by block and in the same order.
///
/// Kernels go into the capture of a graph that is thrown away, blocks have addresses that nothing
/// lies behind, copies between host and device are left out, and what is read back is 0. So work
/// that decides by numbers it has computed on the device takes the way that zeros take.
///
///     cuda_dry_run dry;
///     const cuda::scope scope(dry.context());
///     ... // the work, on tensors made here
///     dry.peak();
///
/// What it cannot know: memory outside the pool (the CUDA context, code, cuFFT's tables), and what
/// the pool keeps beyond what is in use, which comes in pieces of 32 MiB.
class cuda_dry_run {
 public:
  /// @throws backend_error  there is no such device, or no driver.
  explicit cuda_dry_run(int device = 0);
  ~cuda_dry_run();
  cuda_dry_run(const cuda_dry_run&) = delete;
  cuda_dry_run& operator=(const cuda_dry_run&) = delete;

  [[nodiscard]] const cuda::context& context() const { return context_; }

  /// Bytes that blocks have now, and the part of them that is working memory of kernels.
  [[nodiscard]] std::size_t in_use() const;
  [[nodiscard]] std::size_t workspace() const;
  /// The most that they had at one time since reset_peak(), or from the start.
  [[nodiscard]] std::size_t peak() const;
  /// The part of peak() that was working memory of kernels.
  [[nodiscard]] std::size_t workspace_at_peak() const;
  void reset_peak() const;

 private:
  cuda::context context_;
  std::shared_ptr<detail::cuda_counter> counter_;
};

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/backend/cuda_dry_run_impl.hpp>
#endif
