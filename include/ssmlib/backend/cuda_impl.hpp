#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/base/compiled.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <new>
#include <string>
#include <vector>

namespace ssm {

namespace detail {

/// Sets a device for a scope; the runtime's current device is a property of the thread.
class device_guard {
 public:
  explicit device_guard(int device) {
    SSMLIB_CHECK_CUDA(cudaGetDevice(&before_));
    if (before_ != device) SSMLIB_CHECK_CUDA(cudaSetDevice(device));
  }
  ~device_guard() { (void)cudaSetDevice(before_); }
  device_guard(const device_guard&) = delete;
  device_guard& operator=(const device_guard&) = delete;

 private:
  int before_ = 0;
};

struct cuda_state {
  int device = 0, arch = 0, arch_cap = std::numeric_limits<int>::max();
  cudaStream_t stream = nullptr;
  cudaMemPool_t pool = nullptr;
  bool allow_tf32 = false, is_dry_run = false;
  std::shared_ptr<cuda_allocator> allocator;  // absent: the pool
  std::shared_ptr<void> products, transforms;
  std::map<std::vector<double>, void*> constants;

  explicit cuda_state(int device_index) : device(device_index) {
    const int devices = cuda::device_count();
    if (device < 0 || device >= devices) {
      throw backend_error(
          "ssm: cuda::context(device " + std::to_string(device) + "): there " +
          (devices == 1 ? "is 1 device" : "are " + std::to_string(devices) + " devices") +
          "; give the index of one, or use the CPU");
    }
    const device_guard guard(device);
    int major = 0, minor = 0;
    SSMLIB_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    SSMLIB_CHECK_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    arch = 10 * major + minor;
    if (arch < 80) {
      throw backend_error("ssm: cuda::context: device " + std::to_string(device) + " is sm_" +
                          std::to_string(arch) + "; wanted sm_80 or newer");
    }
    SSMLIB_CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    SSMLIB_CHECK_CUDA(cudaMemPoolCreate(&pool, &properties));
    std::uint64_t keep = std::numeric_limits<std::uint64_t>::max();
    SSMLIB_CHECK_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
  }
  ~cuda_state() {
    if (stream) (void)cudaStreamSynchronize(stream);
    products.reset();  // its workspace is from the pool
    transforms.reset();
    for (const auto& [numbers, copy] : constants) {
      if (!is_dry_run) (void)cudaFreeAsync(copy, stream);
    }
    if (pool) (void)cudaMemPoolDestroy(pool);
    if (stream) (void)cudaStreamDestroy(stream);
  }
  cuda_state(const cuda_state&) = delete;
  cuda_state& operator=(const cuda_state&) = delete;
};

/// The current context of this thread; none means the default one.
inline thread_local std::shared_ptr<cuda_state> current_cuda;

}  // namespace detail

SSMLIB_INLINE int cuda::device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  (void)cudaGetLastError();
  return 0;
}

SSMLIB_INLINE cuda::context::context(int device)
    : state_(std::make_shared<detail::cuda_state>(device)) {}

SSMLIB_INLINE cuda::context cuda::current() {
  return detail::current_cuda ? context(detail::current_cuda) : default_context<cuda>();
}

SSMLIB_INLINE int cuda::context::device() const {
  return state_->device;
}
SSMLIB_INLINE cudaStream_t cuda::context::stream() const {
  return state_->stream;
}
SSMLIB_INLINE int cuda::context::arch() const {
  return std::min(state_->arch, state_->arch_cap);
}
SSMLIB_INLINE void cuda::context::set_arch_cap(int arch) const {
  state_->arch_cap = arch;
}

SSMLIB_INLINE void cuda::context::synchronize() const {
  if (is_dry_run()) return;
  SSMLIB_CHECK_CUDA(cudaStreamSynchronize(state_->stream));
}

SSMLIB_INLINE memory_stats cuda::context::memory() const {
  std::uint64_t used = 0, peak = 0, reserved = 0;
  SSMLIB_CHECK_CUDA(cudaMemPoolGetAttribute(state_->pool, cudaMemPoolAttrUsedMemCurrent, &used));
  SSMLIB_CHECK_CUDA(cudaMemPoolGetAttribute(state_->pool, cudaMemPoolAttrUsedMemHigh, &peak));
  SSMLIB_CHECK_CUDA(
      cudaMemPoolGetAttribute(state_->pool, cudaMemPoolAttrReservedMemCurrent, &reserved));
  memory_stats stats;
  stats.in_use = used;
  stats.peak = peak;
  stats.cached = reserved - std::min(reserved, used);
  return stats;
}

SSMLIB_INLINE void cuda::context::reset_peak() const {
  std::uint64_t zero = 0;
  SSMLIB_CHECK_CUDA(cudaMemPoolSetAttribute(state_->pool, cudaMemPoolAttrUsedMemHigh, &zero));
}

SSMLIB_INLINE void cuda::context::trim() const {
  synchronize();
  SSMLIB_CHECK_CUDA(cudaMemPoolTrimTo(state_->pool, 0));
}

SSMLIB_INLINE cudaMemPool_t cuda::context::pool() const {
  return state_->pool;
}
SSMLIB_INLINE void cuda::context::copy(void* to, const void* from, std::size_t bytes,
                                       cudaMemcpyKind kind) const {
  if (kind != cudaMemcpyDeviceToDevice) note_host_copy();
  if (bytes == 0 || is_dry_run()) return;
  SSMLIB_CHECK_CUDA(cudaMemcpyAsync(to, from, bytes, kind, state_->stream));
}
SSMLIB_INLINE bool cuda::context::is_dry_run() const {
  return state_->is_dry_run;
}
SSMLIB_INLINE void cuda::context::set_allocator(std::shared_ptr<cuda_allocator> allocator) const {
  state_->allocator = std::move(allocator);
}
SSMLIB_INLINE const std::shared_ptr<cuda_allocator>& cuda::context::allocator() const {
  return state_->allocator;
}
SSMLIB_INLINE void cuda::context::note_host_copy() const {
  if (state_->allocator) state_->allocator->note_host_copy();
}
SSMLIB_INLINE const double* cuda::context::constants(const double* numbers, std::size_t n) const {
  const auto found = state_->constants.try_emplace(std::vector<double>(numbers, numbers + n)).first;
  if (found->second == nullptr) {
    const std::size_t bytes = std::max<std::size_t>(n, 1) * sizeof(double);
    found->second = is_dry_run() ? state_->allocator->allocate(bytes) : allocate_from_pool(bytes);
    // From the key, which stays: the copy may read it later.
    if (!is_dry_run()) {
      SSMLIB_CHECK_CUDA(cudaMemcpyAsync(found->second, found->first.data(), n * sizeof(double),
                                        cudaMemcpyHostToDevice, state_->stream));
    }
  }
  return static_cast<const double*>(found->second);
}
SSMLIB_INLINE void cuda::context::set_allow_tf32(bool allow) const {
  state_->allow_tf32 = allow;
}
SSMLIB_INLINE bool cuda::context::allow_tf32() const {
  return state_->allow_tf32;
}
SSMLIB_INLINE std::shared_ptr<void>& cuda::context::products() const {
  return state_->products;
}

SSMLIB_INLINE std::shared_ptr<void>& cuda::context::transforms() const {
  return state_->transforms;
}

SSMLIB_INLINE void* cuda::context::allocate_from_pool(std::size_t bytes) const {
  const detail::cuda_state& own = *state_;
  const detail::device_guard guard(own.device);
  void* data = nullptr;
  cudaError_t status = cudaMallocFromPoolAsync(&data, bytes, own.pool, own.stream);
  if (status == cudaErrorMemoryAllocation) {  // freed blocks may wait for the stream to get there
    (void)cudaGetLastError();
    SSMLIB_CHECK_CUDA(cudaStreamSynchronize(own.stream));
    SSMLIB_CHECK_CUDA(cudaMemPoolTrimTo(own.pool, 0));
    status = cudaMallocFromPoolAsync(&data, bytes, own.pool, own.stream);
  }
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    std::size_t free = 0, total = 0;
    SSMLIB_CHECK_CUDA(cudaMemGetInfo(&free, &total));
    throw backend_error("ssm: allocating " + std::to_string(bytes) + " bytes on device " +
                        std::to_string(own.device) + " failed with " + std::to_string(free) +
                        " of " + std::to_string(total) +
                        " bytes free; use a smaller batch or a shorter sequence");
  }
  detail::check_cuda(status, "cudaMallocFromPoolAsync");
  return data;
}

SSMLIB_INLINE cuda_memory::block* cuda_memory::create(std::size_t bytes) {
  const cuda::context ctx = cuda::current();
  auto block = std::make_unique<detail::cuda_block>();
  block->bytes = bytes;
  block->owner = ctx.state_;
  block->source = ctx.allocator();
  // A block of no bytes has an address too: a tensor without elements is not an absent one.
  const std::size_t wanted = std::max<std::size_t>(bytes, 1);
  block->data = block->source ? block->source->allocate(wanted) : ctx.allocate_from_pool(wanted);
  return block.release();
}

SSMLIB_INLINE void cuda_memory::destroy(memory_block* base) noexcept {
  const std::unique_ptr<detail::cuda_block> block(static_cast<detail::cuda_block*>(base));
  if (block->source) {
    block->source->release(block->data, std::max<std::size_t>(block->bytes, 1));
  } else {
    (void)cudaFreeAsync(block->data, block->owner->stream);
  }
}

template <>
SSMLIB_INLINE cuda::context& default_context<cuda>() {
  static auto* ctx = new cuda::context;  // never destroyed: the driver may end before statics do
  return *ctx;
}

SSMLIB_INLINE cuda::scope::scope(const cuda::context& ctx)
    : before_(std::exchange(detail::current_cuda, ctx.state_)) {}
SSMLIB_INLINE cuda::scope::~scope() {
  detail::current_cuda = std::move(before_);
}

}  // namespace ssm
