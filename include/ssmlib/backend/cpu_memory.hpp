#pragma once

#include <ssmlib/backend/memory_block.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/base/types.hpp>

#include <cstddef>

namespace ssm {

/// What the pool has handed out, in bytes. `peak` is the largest `in_use` since reset_peak().
struct memory_stats {
  std::size_t in_use = 0, peak = 0, cached = 0;
  std::size_t system_allocations = 0;  ///< requests that the cache could not serve
};

/// A cache of aligned blocks, so that loops that allocate the same sizes again (training steps,
/// decoding) do not reach the system allocator. Size classes are four per power of two: at most
/// 25 % is wasted. Thread safe. Blocks are aligned to 64 bytes.
class cpu_memory_pool {
 public:
  using block = memory_block;
  static constexpr std::size_t alignment = 64;

  /// One pool for the process; never destroyed, so that static tensors may outlive main.
  static cpu_memory_pool& instance();

  /// @throws backend_error  the system has no such block; names the bytes asked for and in use.
  [[nodiscard]] void* allocate(std::size_t bytes);
  void deallocate(void* block, std::size_t bytes) noexcept;

  /// A counted block of the one pool, its head in front of its bytes. @throws backend_error
  [[nodiscard]] static memory_block* create(std::size_t bytes);
  static void destroy(memory_block* block) noexcept;

  /// Gives every cached block back to the system.
  void trim();

  /// Blocks beyond this many cached bytes go back to the system at once. Default 1 GiB.
  void set_max_cached(std::size_t bytes);

  [[nodiscard]] memory_stats stats() const;
  void reset_peak();

 private:
  cpu_memory_pool();

  struct storage;
  storage* storage_;
};

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/backend/cpu_memory_impl.hpp>
#endif
