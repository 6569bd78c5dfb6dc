#pragma once

#include <ssmlib/backend/backend.hpp>
#include <ssmlib/backend/cpu_memory.hpp>
#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/backend/memory_block.hpp>
#include <ssmlib/backend/unwritten_memory.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string_view>
#include <utility>

namespace ssm {

class cuda_allocator;

namespace detail {
struct cuda_state;

/// What this thread allocates in such a scope is working memory of kernels, which plans of memory
/// count apart.
class workspace_scope {
 public:
  workspace_scope() : before_(std::exchange(active_, true)) {}
  ~workspace_scope() { active_ = before_; }
  workspace_scope(const workspace_scope&) = delete;
  workspace_scope& operator=(const workspace_scope&) = delete;

  [[nodiscard]] static bool is_active() { return active_; }

 private:
  inline static thread_local bool active_ = false;
  bool before_;
};

/// A block of device memory.
struct cuda_block : memory_block {
  std::shared_ptr<cuda_state> owner;
  std::shared_ptr<cuda_allocator> source;       ///< absent: the owner's pool
  std::unique_ptr<unwritten_memory> unwritten;  ///< while it stands for zeros, else null
};
}  // namespace detail

class cuda_dry_run;

/// Where tensors of the CUDA backend get their bytes: the pool of the calling thread's current
/// context, in the order of its stream.
struct cuda_memory {
  using block = detail::cuda_block;
  /// @throws backend_error  out of memory; names the bytes asked for, free and total. The context
  ///                        stays usable.
  [[nodiscard]] static block* create(std::size_t bytes);
  /// Frees after the work that the block's context has been given so far.
  static void destroy(memory_block* block) noexcept;
};

/// What a context takes its blocks from in place of its pool: the arena of a capture, or a dry run
/// that only counts.
class cuda_allocator {
 public:
  virtual ~cuda_allocator() = default;
  /// @return memory aligned to 256 bytes. @throws backend_error  there is none.
  [[nodiscard]] virtual void* allocate(std::size_t bytes) = 0;
  /// Takes a block back, to be used again after the work that the context has been given so far.
  virtual void release(void* data, std::size_t bytes) noexcept = 0;
  /// Told of every copy between host and device: work that has one cannot be recorded.
  virtual void note_host_copy() {}
};

/// The CUDA backend.
///
/// Work is asynchronous on the context's stream; `synchronize()` and copies to the host wait. Two
/// contexts are independent: what one has made, another may use after a synchronize() of the first.
struct cuda {
  static constexpr std::string_view name = "cuda";
  using memory_resource = cuda_memory;

  /// A device, a stream, a memory pool. Copies are handles to the same. Used by one thread of the
  /// program at a time.
  class context {
   public:
    /// @throws backend_error  there is no such device, or no driver.
    explicit context(int device = 0);
    [[nodiscard]] int device() const;
    [[nodiscard]] cudaStream_t stream() const;
    /// The compute capability, as 90, at most the cap: kernels that need more are not taken.
    [[nodiscard]] int arch() const;
    /// Lets a test run the kernels of an older architecture on a newer card.
    void set_arch_cap(int arch) const;

    /// Waits for everything given so far. @throws backend_error  what went wrong in it.
    void synchronize() const;

    /// Bytes of the pool: handed out now, their peak, and kept for reuse.
    [[nodiscard]] memory_stats memory() const;
    void reset_peak() const;
    /// Gives what is kept for reuse back to the device.
    void trim() const;
    /// What the context's memory comes from.
    [[nodiscard]] cudaMemPool_t pool() const;
    /// Memory of the pool itself, for what stands in for it; give it back with cudaFreeAsync.
    /// @throws backend_error  out of memory.
    [[nodiscard]] void* allocate_from_pool(std::size_t bytes) const;

    /// From now on new blocks come from `allocator`, or from the pool again where it is null. A
    /// block goes back to what it came from and keeps that alive.
    void set_allocator(std::shared_ptr<cuda_allocator> allocator) const;
    [[nodiscard]] const std::shared_ptr<cuda_allocator>& allocator() const;
    /// For whoever copies between host and device on the context's stream by other means.
    void note_host_copy() const;
    /// Numbers of the host on the device, copied when they are first asked for and kept as long as
    /// the context: the constants of a layer.
    [[nodiscard]] const double* constants(const double* numbers, std::size_t n) const;

    /// Queues a copy of bytes to the host, or on the device. What comes from the host goes through
    /// tensors (detail::elements<cuda>::write), which may be changed as soon as that returns.
    void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const;
    /// Whether this is the context of a cuda_dry_run: nothing runs on it, and its memory cannot be
    /// read.
    [[nodiscard]] bool is_dry_run() const;

    /// Lets products of float matrices round their factors to TF32 (10 bits of mantissa). Off at
    /// first: float products have the bits of float.
    void set_allow_tf32(bool allow) const;
    [[nodiscard]] bool allow_tf32() const;
    /// What matrix products keep between calls (kernels/cuda/gemm.hpp); empty before the first.
    [[nodiscard]] std::shared_ptr<void>& products() const;
    /// What Fourier transforms keep between calls (lower/cuda/toeplitz.hpp); empty before the
    /// first.
    [[nodiscard]] std::shared_ptr<void>& transforms() const;

   private:
    friend struct cuda_memory;
    friend struct cuda;
    friend class ssm::cuda_dry_run;
    explicit context(std::shared_ptr<detail::cuda_state> state) : state_(std::move(state)) {}

    std::shared_ptr<detail::cuda_state> state_;
  };

  /// Makes a context the current one of this thread: new tensors belong to it. Outside of any scope
  /// that is the default context. Evaluations open one for the context that they are given.
  class scope {
   public:
    explicit scope(const context& ctx);
    ~scope();
    scope(const scope&) = delete;
    scope& operator=(const scope&) = delete;

   private:
    std::shared_ptr<detail::cuda_state> before_;
  };
  /// The context that new tensors of this thread belong to.
  [[nodiscard]] static context current();

  /// The number of devices; 0 without a driver.
  [[nodiscard]] static int device_count();
};
static_assert(Backend<cuda>);

template <>
[[nodiscard]] cuda::context& default_context<cuda>();

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/backend/cuda_impl.hpp>
#endif
