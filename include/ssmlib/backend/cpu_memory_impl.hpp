#pragma once

#include <ssmlib/backend/cpu_memory.hpp>
#include <ssmlib/base/compiled.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <vector>

namespace ssm {

struct cpu_memory_pool::storage {
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
    for (auto& blocks : free) {
      for (void* block : blocks)
        std::free(block);
      blocks.clear();
    }
    stats.cached = 0;
  }

  std::mutex mutex;
  std::array<std::vector<void*>, 64 * 4> free;
  memory_stats stats;
  std::size_t max_cached = std::size_t{1} << 30;
};

SSMLIB_INLINE cpu_memory_pool::cpu_memory_pool() : storage_(new storage) {}

SSMLIB_INLINE cpu_memory_pool& cpu_memory_pool::instance() {
  static auto* pool = new cpu_memory_pool;
  return *pool;
}

SSMLIB_INLINE void* cpu_memory_pool::allocate(std::size_t bytes) {
  storage& s = *storage_;
  const auto c = storage::class_of(bytes);
  const std::scoped_lock lock(s.mutex);
  s.stats.in_use += c.bytes;
  s.stats.peak = std::max(s.stats.peak, s.stats.in_use);
  auto& free = s.free[c.index];
  if (!free.empty()) {
    void* block = free.back();
    free.pop_back();
    s.stats.cached -= c.bytes;
    return block;
  }
  void* block = std::aligned_alloc(alignment, c.bytes);
  if (block == nullptr) {
    s.release_cache();
    block = std::aligned_alloc(alignment, c.bytes);
  }
  if (block == nullptr) {
    s.stats.in_use -= c.bytes;
    throw backend_error("ssm: allocating " + std::to_string(bytes) + " bytes failed with " +
                        std::to_string(s.stats.in_use) +
                        " bytes in use; use a smaller batch or a shorter sequence");
  }
  ++s.stats.system_allocations;
  if (free.capacity() == 0) free.reserve(16);
  return block;
}

SSMLIB_INLINE void cpu_memory_pool::deallocate(void* block, std::size_t bytes) noexcept {
  if (block == nullptr) return;
  storage& s = *storage_;
  const auto c = storage::class_of(bytes);
  const std::scoped_lock lock(s.mutex);
  s.stats.in_use -= c.bytes;
  try {
    if (s.stats.cached + c.bytes > s.max_cached) throw std::bad_alloc();
    s.free[c.index].push_back(block);
    s.stats.cached += c.bytes;
  } catch (const std::bad_alloc&) {
    std::free(block);
  }
}

SSMLIB_INLINE memory_block* cpu_memory_pool::create(std::size_t bytes) {
  static_assert(sizeof(memory_block) <= alignment);
  auto* head = new (instance().allocate(alignment + bytes)) memory_block;
  head->bytes = bytes;
  head->data = reinterpret_cast<char*>(head) + alignment;
  return head;
}

SSMLIB_INLINE void cpu_memory_pool::destroy(memory_block* block) noexcept {
  const std::size_t bytes = block->bytes;
  block->~memory_block();
  instance().deallocate(block, alignment + bytes);
}

SSMLIB_INLINE void cpu_memory_pool::trim() {
  const std::scoped_lock lock(storage_->mutex);
  storage_->release_cache();
}

SSMLIB_INLINE void cpu_memory_pool::set_max_cached(std::size_t bytes) {
  const std::scoped_lock lock(storage_->mutex);
  storage_->max_cached = bytes;
  if (storage_->stats.cached > bytes) storage_->release_cache();
}

SSMLIB_INLINE memory_stats cpu_memory_pool::stats() const {
  const std::scoped_lock lock(storage_->mutex);
  return storage_->stats;
}

SSMLIB_INLINE void cpu_memory_pool::reset_peak() {
  const std::scoped_lock lock(storage_->mutex);
  storage_->stats.peak = storage_->stats.in_use;
}

}  // namespace ssm
