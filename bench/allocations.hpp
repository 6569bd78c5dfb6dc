#pragma once

#include <cstddef>

namespace bench {

/// Counts what the program asks of the system allocator (malloc and its kin, operator new
/// included) while it lives. One at a time; the tensors' pool is behind it, so that a request that
/// the pool serves from its cache does not count.
class allocation_count {
 public:
  /// @param trace  print the call stack of the first few to standard error
  explicit allocation_count(bool trace = false);
  ~allocation_count();
  allocation_count(const allocation_count&) = delete;
  allocation_count& operator=(const allocation_count&) = delete;

  [[nodiscard]] std::size_t count() const;
  /// False where this C library's malloc cannot be counted.
  [[nodiscard]] static bool works();
};

}  // namespace bench
