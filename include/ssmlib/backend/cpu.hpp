#pragma once

#include <ssmlib/backend/backend.hpp>
#include <ssmlib/backend/cpu_memory.hpp>
#include <ssmlib/base/config.hpp>
#include <ssmlib/base/types.hpp>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <string_view>
#include <type_traits>
#include <utility>

namespace ssm {

namespace detail {

/// The threads behind a context. Its members are defined in cpu_impl.hpp, the one header
/// of this layer that includes Eigen (for Eigen::ThreadPool, which spins briefly and then parks).
class worker_pool {
 public:
  explicit worker_pool(int workers);
  ~worker_pool();
  worker_pool(const worker_pool&) = delete;
  worker_pool& operator=(const worker_pool&) = delete;

  using task_function = void (*)(void* argument, index_t task);
  /// Runs f(argument, 0 .. count-1) once each; returns when all are done. Tasks are claimed one
  /// by one, so a thread that the system has put aside delays nobody but its own task.
  void run(task_function f, void* argument, index_t count);

 private:
  void help();
  void drain();
  struct threads;

  std::unique_ptr<threads> threads_;
  int workers_ = 0;
  task_function function_ = nullptr;
  void* argument_ = nullptr;
  index_t count_ = 0;
  alignas(64) std::atomic<index_t> next_{0};
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  std::atomic<int> scheduled_{0};
  std::exception_ptr failure_;
  std::atomic<bool> failed_{false};
};

/// True inside a task: nested parallel loops run in place.
inline thread_local bool inside_task = false;

}  // namespace detail

/// The CPU backend.
struct cpu {
  static constexpr std::string_view name = "cpu";
  using memory_resource = cpu_memory_pool;

  /// Threads for the kernels. Used by one thread of the program at a time.
  class context {
   public:
    /// @param threads  >= 1, the calling thread included. Results do not depend on it.
    explicit context(int threads);
    context() : context(default_threads()) {}

    [[nodiscard]] int threads() const { return threads_; }

    /// f(i) for i in [0, n), in parallel. Each i is one task; make tasks of 10 us or more. The
    /// first exception thrown by a task is rethrown here after all have ended.
    template <class F>
    void parallel_for(index_t n, F&& f) const {
      if (n <= 0) return;
      if (n == 1 || pool_ == nullptr || detail::inside_task) {
        for (index_t i = 0; i < n; ++i)
          f(i);
        return;
      }
      auto call = [](void* argument, index_t i) {
        (*static_cast<std::remove_reference_t<F>*>(argument))(i);
      };
      pool_->run(call, const_cast<void*>(static_cast<const void*>(&f)), n);
    }

    /// f(begin, end) over [0, n) in `pieces` parts of nearly equal size that are multiples of
    /// `step`. The parts depend on the arguments only, never on the number of threads.
    template <class F>
    void parallel_ranges(index_t n, index_t pieces, index_t step, F&& f) const {
      if (n <= 0) return;
      const index_t units = (n + step - 1) / step;
      pieces = std::min(pieces, units);
      parallel_for(pieces, [&](index_t p) {
        const index_t begin = units * p / pieces * step;
        const index_t end = std::min(n, units * (p + 1) / pieces * step);
        if (begin < end) f(begin, end);
      });
    }

    /// The environment variable SSMLIB_THREADS, else the number of cores.
    [[nodiscard]] static int default_threads();

   private:
    int threads_ = 1;
    std::unique_ptr<detail::worker_pool> pool_;
  };

  /// Memory belongs to no context, so there is nothing to make current.
  struct no_context {};
  struct [[maybe_unused]] scope {
    explicit scope(const context&) {}
    explicit scope(no_context) {}
  };
  [[nodiscard]] static no_context current() { return {}; }
};
static_assert(Backend<cpu>);

template <>
[[nodiscard]] cpu::context& default_context<cpu>();

/// Uninitialised working memory of one kernel call, from the pool.
template <class T>
class scratch {
 public:
  explicit scratch(index_t n)
      : bytes_(static_cast<std::size_t>(n) * sizeof(T)),
        data_(static_cast<T*>(cpu_memory_pool::instance().allocate(bytes_))) {}
  ~scratch() { cpu_memory_pool::instance().deallocate(data_, bytes_); }
  scratch(const scratch&) = delete;
  scratch& operator=(const scratch&) = delete;

  [[nodiscard]] T* data() const { return data_; }
  T& operator[](index_t i) const { return data_[i]; }

 private:
  std::size_t bytes_;
  T* data_;
};

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/backend/cpu_impl.hpp>
#endif
