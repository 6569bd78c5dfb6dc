#pragma once

#include <ssmlib/base/types.hpp>

#include <atomic>
#include <cstddef>

namespace ssm {

/// The head of a counted block of memory: what the tensors that share it have in common. A
/// backend's memory resource creates and destroys them, and may keep more in a derived class.
struct memory_block {
  std::atomic<index_t> count{1};
  std::size_t bytes = 0;  ///< as asked for
  void* data = nullptr;
};

}  // namespace ssm
