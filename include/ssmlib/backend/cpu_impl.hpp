#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <thread>

namespace ssm::detail {

struct worker_pool::threads {
  explicit threads(int n) : pool(n) {}
  Eigen::ThreadPool pool;
};

SSMLIB_INLINE worker_pool::worker_pool(int workers)
    : threads_(std::make_unique<threads>(workers)), workers_(workers) {}

SSMLIB_INLINE worker_pool::~worker_pool() = default;

SSMLIB_INLINE void worker_pool::drain() {
  for (index_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
    try {
      function_(argument_, i);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }
}

// A worker may arrive after the loop it was called for has ended, and find the next one or none.
// `inside_` is raised before `open_` is read, and run() closes before it reads `inside_`: whoever
// sees the loop open keeps run() from returning, and nobody touches its fields otherwise.
SSMLIB_INLINE void worker_pool::help() {
  scheduled_.fetch_sub(1, std::memory_order_relaxed);
  inside_.fetch_add(1);
  if (open_.load()) {
    inside_task = true;
    drain();
    inside_task = false;
  }
  inside_.fetch_sub(1);
}

SSMLIB_INLINE void worker_pool::run(task_function f, void* argument, index_t count) {
  function_ = f;
  argument_ = argument;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  open_.store(true);
  const int wanted = static_cast<int>(std::min<index_t>(workers_, count - 1));
  while (scheduled_.load(std::memory_order_relaxed) < wanted) {
    scheduled_.fetch_add(1, std::memory_order_relaxed);
    threads_->pool.Schedule([this] { help(); });
  }
  inside_task = true;
  drain();
  inside_task = false;
  open_.store(false);
  for (int spins = 0; inside_.load() != 0; ++spins) {
    if (spins > 2000) std::this_thread::yield();
  }
  if (failed_.load()) std::rethrow_exception(std::exchange(failure_, nullptr));
}

}  // namespace ssm::detail

namespace ssm {

SSMLIB_INLINE cpu::context::context(int threads) : threads_(threads) {
  if (threads < 1) {
    throw value_error("ssm: cpu::context(" + std::to_string(threads) +
                      " threads): wanted at least 1");
  }
  if (threads > 1) pool_ = std::make_unique<detail::worker_pool>(threads - 1);
}

SSMLIB_INLINE int cpu::context::default_threads() {
  if (const char* text = std::getenv("SSMLIB_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1) return n;
  }
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

template <>
SSMLIB_INLINE cpu::context& default_context<cpu>() {
  static cpu::context ctx;
  return ctx;
}

}  // namespace ssm
