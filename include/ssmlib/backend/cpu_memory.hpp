#pragma once

#include <ssmlib/base/error.hpp>
#include <ssmlib/base/types.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <vector>

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
  static constexpr std::size_t alignment = 64;

  /// One pool for the process; never destroyed, so that static tensors may outlive main.
  static cpu_memory_pool& instance() {
    static auto* pool = new cpu_memory_pool;
    return *pool;
  }

  /// @throws backend_error  the system has no such block; names the bytes asked for and in use.
  [[nodiscard]] void* allocate(std::size_t bytes) {
    const size_class c = class_of(bytes);
    const std::scoped_lock lock(mutex_);
    stats_.in_use += c.bytes;
    stats_.peak = std::max(stats_.peak, stats_.in_use);
    auto& free = free_[c.index];
    if (!free.empty()) {
      void* block = free.back();
      free.pop_back();
      stats_.cached -= c.bytes;
      return block;
    }
    void* block = std::aligned_alloc(alignment, c.bytes);
    if (block == nullptr) {
      release_cache();
      block = std::aligned_alloc(alignment, c.bytes);
    }
    if (block == nullptr) {
      stats_.in_use -= c.bytes;
      throw backend_error("ssm: allocating " + std::to_string(bytes) + " bytes failed with " +
                          std::to_string(stats_.in_use) +
                          " bytes in use; use a smaller batch or a shorter sequence");
    }
    ++stats_.system_allocations;
    if (free.capacity() == 0) free.reserve(16);
    return block;
  }

  void deallocate(void* block, std::size_t bytes) noexcept {
    if (block == nullptr) return;
    const size_class c = class_of(bytes);
    const std::scoped_lock lock(mutex_);
    stats_.in_use -= c.bytes;
    try {
      if (stats_.cached + c.bytes > max_cached_) throw std::bad_alloc();
      free_[c.index].push_back(block);
      stats_.cached += c.bytes;
    } catch (const std::bad_alloc&) {
      std::free(block);
    }
  }

  /// Gives every cached block back to the system.
  void trim() {
    const std::scoped_lock lock(mutex_);
    release_cache();
  }

  /// Blocks beyond this many cached bytes go back to the system at once. Default 1 GiB.
  void set_max_cached(std::size_t bytes) {
    const std::scoped_lock lock(mutex_);
    max_cached_ = bytes;
    if (stats_.cached > bytes) release_cache();
  }

  [[nodiscard]] memory_stats stats() const {
    const std::scoped_lock lock(mutex_);
    return stats_;
  }

  void reset_peak() {
    const std::scoped_lock lock(mutex_);
    stats_.peak = stats_.in_use;
  }

 private:
  struct size_class {
    std::size_t index, bytes;
  };

  static size_class class_of(std::size_t bytes) {
    bytes = std::max<std::size_t>((bytes + alignment - 1) / alignment * alignment, 256);
    const std::size_t log = std::bit_width(bytes - 1) - 1;  // 2^log < bytes <= 2^(log+1)
    const std::size_t step = std::max<std::size_t>((std::size_t{1} << log) / 4, alignment);
    const std::size_t quarter = (bytes - (std::size_t{1} << log) + step - 1) / step;
    return {log * 4 + quarter - 1, (std::size_t{1} << log) + quarter * step};
  }

  void release_cache() {
    for (auto& blocks : free_) {
      for (void* block : blocks)
        std::free(block);
      blocks.clear();
    }
    stats_.cached = 0;
  }

  mutable std::mutex mutex_;
  std::array<std::vector<void*>, 64 * 4> free_;
  memory_stats stats_;
  std::size_t max_cached_ = std::size_t{1} << 30;
};

}  // namespace ssm
