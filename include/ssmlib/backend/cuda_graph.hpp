#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/base/types.hpp>

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ssm {

namespace detail {

/// The memory of a piece of work that is repeated: blocks that its first run took from the pool,
/// kept so that the same run finds them again. What is released is free for whoever asks next, in
/// the order of the stream. Blocks in use keep their arena.
class cuda_arena final : public cuda_allocator {
 public:
  explicit cuda_arena(const cuda::context& ctx) : stream_(ctx.stream()) {}
  ~cuda_arena() override {
    for (auto& [bytes, blocks] : blocks_) {
      for (void* block : blocks.free)
        (void)cudaFreeAsync(block, stream_);
    }
  }
  cuda_arena(const cuda_arena&) = delete;
  cuda_arena& operator=(const cuda_arena&) = delete;

  [[nodiscard]] void* allocate(std::size_t bytes) override {
    blocks_of_a_size& blocks = blocks_[size_of(bytes)];
    if (blocks.free.empty()) {
      if (recording) {
        throw backend_error("ssm: the work of a CUDA graph that is being recorded asks for " +
                            std::to_string(bytes) +
                            " bytes more than in its first run; let it do the same every time, and "
                            "let go of its last results first");
      }
      blocks.free.reserve(blocks.made + 1);  // release() must not throw
      blocks.free.push_back(cuda::current().allocate_from_pool(size_of(bytes)));
      ++blocks.made;
    }
    void* const block = blocks.free.back();
    blocks.free.pop_back();
    return block;
  }
  void release(void* data, std::size_t bytes) noexcept override {
    blocks_[size_of(bytes)].free.push_back(data);
  }
  void note_host_copy() override { copies_host = true; }

  bool recording = false;    ///< nothing may be allocated
  bool copies_host = false;  ///< the work copied between host and device

 private:
  /// Blocks of a size serve requests of that size only: then the same requests in the same order
  /// need no more of them.
  [[nodiscard]] static std::size_t size_of(std::size_t bytes) { return (bytes + 511) / 512 * 512; }

  struct blocks_of_a_size {
    std::vector<void*> free;
    std::size_t made = 0;
  };

  cudaStream_t stream_;  // not the context, which may be keeping blocks of this
  std::unordered_map<std::size_t, blocks_of_a_size> blocks_;
};

}  // namespace detail

/// Work on a context's stream that is queued again and again with the same sizes and addresses: the
/// first time as always, the second time recorded as a CUDA graph, from then on by one launch.
///
/// The work may allocate tensors. Those of its first run stay the graph's: recording it allocates
/// nothing, and what a later run leaves lies where the recorded one left it. Work that copies to or
/// from the host cannot be recorded: it is queued as always every time.
class cuda_graph {
 public:
  explicit cuda_graph(cuda::context ctx) : ctx_(std::move(ctx)) {}
  ~cuda_graph() { reset(); }
  cuda_graph(cuda_graph&& other) noexcept
      : ctx_(other.ctx_),
        arena_(std::move(other.arena_)),
        graph_(std::exchange(other.graph_, nullptr)) {}
  cuda_graph& operator=(cuda_graph&& other) noexcept {
    std::swap(ctx_, other.ctx_);
    std::swap(arena_, other.arena_);
    std::swap(graph_, other.graph_);
    return *this;
  }

  /// Queues work(): false where that was the launch of the recorded graph, so that what work() does
  /// besides on the host is left to the caller.
  ///
  /// The work lets go of the tensors that it made in the last run before it makes new ones.
  /// @throws what work() throws; the next run is a first one then.
  template <class F>
  bool run(F&& work) {
    if (graph_ != nullptr) {
      SSMLIB_CHECK_CUDA(cudaGraphLaunch(graph_, ctx_.stream()));
      return false;
    }
    if (ctx_.allocator() || (arena_ && arena_->copies_host)) {
      work();
      return true;
    }
    const cuda::scope scope(ctx_);
    if (!arena_) {
      arena_ = std::make_shared<detail::cuda_arena>(ctx_);
      const arena_scope mine(*this);
      try {
        work();
      } catch (...) {
        arena_.reset();
        throw;
      }
      return true;
    }
    record(work);
    SSMLIB_CHECK_CUDA(cudaGraphLaunch(graph_, ctx_.stream()));
    return true;
  }

  /// Whether the next run() is one launch.
  [[nodiscard]] bool is_recorded() const { return graph_ != nullptr; }
  /// Forgets the recording and its memory: what the work refers to has moved.
  void reset() {
    if (graph_ != nullptr) {
      (void)cudaStreamSynchronize(ctx_.stream());  // it may be running
      (void)cudaGraphExecDestroy(std::exchange(graph_, nullptr));
    }
    arena_.reset();
  }

 private:
  /// While it lives, new tensors of the context get their memory from the arena.
  class arena_scope {
   public:
    explicit arena_scope(const cuda_graph& g) : ctx_(g.ctx_) { ctx_.set_allocator(g.arena_); }
    ~arena_scope() { ctx_.set_allocator(nullptr); }
    arena_scope(const arena_scope&) = delete;
    arena_scope& operator=(const arena_scope&) = delete;

   private:
    const cuda::context& ctx_;
  };

  template <class F>
  void record(F&& work) {
    cudaGraph_t recorded = nullptr;
    const auto end = [&] {
      arena_->recording = false;
      return cudaStreamEndCapture(ctx_.stream(), &recorded);
    };
    try {
      const arena_scope mine(*this);
      SSMLIB_CHECK_CUDA(cudaStreamBeginCapture(ctx_.stream(), cudaStreamCaptureModeThreadLocal));
      arena_->recording = true;
      work();
    } catch (...) {
      (void)end();
      (void)cudaGetLastError();
      if (recorded != nullptr) (void)cudaGraphDestroy(recorded);
      arena_.reset();
      throw;
    }
    SSMLIB_CHECK_CUDA(end());
    const cudaError_t status = cudaGraphInstantiate(&graph_, recorded, 0);
    (void)cudaGraphDestroy(recorded);
    detail::check_cuda(status, "cudaGraphInstantiate");
  }

  cuda::context ctx_;
  std::shared_ptr<detail::cuda_arena> arena_;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace ssm
