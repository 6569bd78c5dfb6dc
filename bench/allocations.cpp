#include "allocations.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>

#if defined(__GLIBC__)
#include <execinfo.h>
#include <unistd.h>

// glibc lets a program define malloc and offers its own under these names. free() needs no
// replacement: all blocks are glibc's.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
}
#endif

namespace bench {

namespace {

std::atomic<bool> counting{false};
std::atomic<std::size_t> counted{0};
std::atomic<int> traces_left{0};

[[maybe_unused]] void note() {
  if (!counting.load(std::memory_order_relaxed)) return;
  counted.fetch_add(1, std::memory_order_relaxed);
#if defined(__GLIBC__)
  if (traces_left.load(std::memory_order_relaxed) <= 0) return;
  traces_left.fetch_sub(1, std::memory_order_relaxed);
  counting.store(false);  // printing allocates
  void* frames[24];
  const int n = backtrace(frames, 24);
  backtrace_symbols_fd(frames, n, STDERR_FILENO);
  [[maybe_unused]] const auto written = write(STDERR_FILENO, "\n", 1);
  counting.store(true);
#endif
}

}  // namespace

allocation_count::allocation_count(bool trace) {
#if defined(__GLIBC__)
  void* frame = nullptr;
  backtrace(&frame, 1);  // its first call loads a library
#endif
  counted.store(0);
  traces_left.store(trace ? 12 : 0);
  counting.store(true);
}
allocation_count::~allocation_count() {
  counting.store(false);
}
std::size_t allocation_count::count() const {
  return counted.load();
}
bool allocation_count::works() {
#if defined(__GLIBC__)
  return true;
#else
  return false;
#endif
}

}  // namespace bench

#if defined(__GLIBC__)
extern "C" {
void* malloc(std::size_t n) {
  bench::note();
  return __libc_malloc(n);
}
void* calloc(std::size_t n, std::size_t size) {
  bench::note();
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t n) {
  bench::note();
  return __libc_realloc(p, n);
}
void* memalign(std::size_t alignment, std::size_t n) {
  bench::note();
  return __libc_memalign(alignment, n);
}
void* aligned_alloc(std::size_t alignment, std::size_t n) {
  bench::note();
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** p, std::size_t alignment, std::size_t n) {
  bench::note();
  *p = __libc_memalign(alignment, n);
  return *p == nullptr ? ENOMEM : 0;
}
}
#endif
