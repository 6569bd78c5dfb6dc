#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/types.hpp>
#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

/// @file
/// What the GPU checks of row kernels share: device buffers with random rows, norms of errors, and
/// medians of graph replays.

namespace ssm::cuda_check {

inline bool failed = false;

inline bool have_device() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
  std::printf("no CUDA device was found, so nothing was checked\n");
  return false;
}

/// Whether the program was called with --small: no long sequences, no large batches and no timing,
/// as under compute-sanitizer.
inline bool wants_small(int argc, char** argv) {
  return argc > 1 && std::strncmp(argv[1], "--small", 7) == 0;
}
/// --small-bf16 leaves out the other types too: racecheck takes a hundred times as long.
inline bool wants_bf16_only(int argc, char** argv) {
  return argc > 1 && std::strcmp(argv[1], "--small-bf16") == 0;
}

inline int finish() {
  std::printf(failed ? "FAILED\n" : "all passed\n");
  return failed ? 1 : 0;
}

/// f(0) ... f(n - 1) on all cores.
template <class F>
void parallel(index_t n, F f) {
  std::atomic<index_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (index_t k = next++; k < n; k = next++)
        f(k);
    });
  }
  for (auto& t : threads)
    t.join();
}
inline void add_to(double& x, double y) {
  std::atomic_ref<double>(x).fetch_add(y);
}

template <class T>
class buffer {
 public:
  buffer() = default;
  explicit buffer(index_t n) : n_(n) {
    if (n > 0) SSMLIB_CHECK_CUDA(cudaMalloc(&data_, n * sizeof(T)));
  }
  explicit buffer(const std::vector<T>& v) : buffer(static_cast<index_t>(v.size())) {
    SSMLIB_CHECK_CUDA(cudaMemcpy(data_, v.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  buffer(buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), n_(o.n_) {}
  buffer& operator=(buffer o) noexcept {
    std::swap(data_, o.data_);
    n_ = o.n_;
    return *this;
  }
  ~buffer() { cudaFree(data_); }
  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] index_t size() const { return n_; }
  /// NaN in every type.
  void poison() {
    if (n_ > 0) SSMLIB_CHECK_CUDA(cudaMemset(data_, 0xff, n_ * sizeof(T)));
  }
  [[nodiscard]] std::vector<T> host() const {
    std::vector<T> v(n_);
    if (n_ > 0) {
      SSMLIB_CHECK_CUDA(cudaMemcpy(v.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    }
    return v;
  }

 private:
  T* data_ = nullptr;
  index_t n_ = 0;
};

template <class T>
T from_double(double x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bf16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}
template <class T>
double to_double(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return static_cast<float>(x);
  } else {
    return x;
  }
}

template <class T>
__global__ void fill_kernel(T* to, index_t n, std::uint64_t seed, double low, double high) {
  const index_t stride = index_t{gridDim.x} * blockDim.x;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    std::uint64_t z = seed * 0x9e3779b97f4a7c15u + (i + 1) * 0xd1b54a32d192ed03u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const float x = static_cast<float>(low + (high - low) * ((z >> 40) * 0x1p-24));
    if constexpr (std::is_same_v<T, bf16>) {
      to[i] = kernels::cuda::narrow<bf16>(x);
    } else {
      to[i] = static_cast<T>(x);
    }
  }
}

/// Rows of `width` numbers, each followed by `pad` that belong to no one.
template <class T>
class rows_buffer {
 public:
  rows_buffer() = default;
  rows_buffer(index_t rows, index_t width, index_t pad = 0)
      : rows_(rows), width_(width), stride_(width + pad), data_(rows * (width + pad) + pad) {}

  void fill_device(std::uint64_t seed, double low, double high) {
    if (data_.size() == 0) return;
    fill_kernel<<<1024, 256>>>(data_.data(), data_.size(), seed, low, high);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  std::vector<double> fill(std::uint64_t seed, double low, double high) {
    fill_device(seed, low, high);
    return read();
  }
  void poison() { data_.poison(); }
  void set(double x) {
    data_ = buffer<T>(std::vector<T>(static_cast<std::size_t>(data_.size()), from_double<T>(x)));
  }
  [[nodiscard]] std::vector<double> read(double shift = 0) const {
    const auto all = data_.host();
    std::vector<double> v(rows_ * width_);
    for (index_t r = 0; r < rows_; ++r)
      for (index_t c = 0; c < width_; ++c)
        v[r * width_ + c] = to_double(all[offset() + r * stride_ + c]) + shift;
    return v;
  }
  [[nodiscard]] T* data() const { return data_.data() + offset(); }
  [[nodiscard]] view<const T, 2> matrix() const { return {data(), {rows_, width_}, {stride_, 1}}; }
  [[nodiscard]] view<T, 2> mutable_matrix() { return {data(), {rows_, width_}, {stride_, 1}}; }
  [[nodiscard]] view<const T, 3> heads(index_t h) const {
    return {data(), {rows_, h, width_ / h}, {stride_, width_ / h, 1}};
  }
  [[nodiscard]] view<T, 3> mutable_heads(index_t h) {
    return {data(), {rows_, h, width_ / h}, {stride_, width_ / h, 1}};
  }

 private:
  [[nodiscard]] index_t offset() const { return stride_ - width_; }
  index_t rows_ = 0, width_ = 0, stride_ = 0;
  buffer<T> data_;
};

/// ||out - wanted|| / ||wanted||; NaN is an error of its own.
inline double relative_error(const std::vector<double>& out, const std::vector<double>& wanted) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    difference += (out[i] - wanted[i]) * (out[i] - wanted[i]);
    size += wanted[i] * wanted[i];
  }
  if (size == 0) return std::sqrt(difference);
  return std::sqrt(difference / size);
}

/// What gradients are added to: a power of 2 near their root mean square, so that rounding the sum
/// hides no more of the addend than rounding the addend would.
inline double start_of(const std::vector<double>& gradient) {
  double sum = 0;
  for (double x : gradient)
    sum += x * x;
  if (sum == 0) return 1;
  return std::exp2(std::round(std::log2(sum / static_cast<double>(gradient.size())) / 2));
}

/// One line a case: errors, marked where they are above their bound.
class table {
 public:
  void row(const std::string& name, const char* type) {
    line_ = name + std::string(name.size() < 10 ? 10 - name.size() : 1, ' ') + type;
    bad_ = false;
  }
  void error(const char* what, const std::vector<double>& out, const std::vector<double>& wanted,
             double bound) {
    const double e = relative_error(out, wanted);
    const bool fine = e <= bound;  // false for NaN
    char text[64];
    std::snprintf(text, sizeof text, " %s %.1e%s", what, e, fine ? "" : "(!)");
    line_ += text;
    bad_ = bad_ || !fine;
  }
  void end() {
    std::printf("%s%s\n", line_.c_str(), bad_ ? "  FAILED" : "");
    failed = failed || bad_;
  }

 private:
  std::string line_;
  bool bad_ = false;
};

/// The median of 25 replays of a graph that holds what `launch` does on a stream.
template <class F>
double median_ms(F launch) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  SSMLIB_CHECK_CUDA(cudaStreamCreate(&stream));
  SSMLIB_CHECK_CUDA(cudaEventCreate(&begin));
  SSMLIB_CHECK_CUDA(cudaEventCreate(&end));
  launch(stream);  // loads the kernels
  SSMLIB_CHECK_CUDA(cudaStreamSynchronize(stream));
  SSMLIB_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch(stream);
  SSMLIB_CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  SSMLIB_CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  std::vector<float> times;
  // After checks on the CPU the card needs some tens of milliseconds of work to reach its speed.
  double warm = 0;
  while (times.size() < 25) {
    float ms = 0;
    SSMLIB_CHECK_CUDA(cudaEventRecord(begin, stream));
    SSMLIB_CHECK_CUDA(cudaGraphLaunch(exec, stream));
    SSMLIB_CHECK_CUDA(cudaEventRecord(end, stream));
    SSMLIB_CHECK_CUDA(cudaEventSynchronize(end));
    SSMLIB_CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (warm >= 50) times.push_back(ms);
    warm += ms;
  }
  SSMLIB_CHECK_CUDA(cudaGraphExecDestroy(exec));
  SSMLIB_CHECK_CUDA(cudaGraphDestroy(graph));
  SSMLIB_CHECK_CUDA(cudaEventDestroy(begin));
  SSMLIB_CHECK_CUDA(cudaEventDestroy(end));
  SSMLIB_CHECK_CUDA(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

/// Bytes read and written a second by a large copy on the device.
inline double copy_bandwidth() {
  const index_t n = index_t{1} << 30;
  buffer<unsigned char> from(n), to(n);
  const double ms = median_ms([&](cudaStream_t s) {
    SSMLIB_CHECK_CUDA(cudaMemcpyAsync(to.data(), from.data(), n, cudaMemcpyDeviceToDevice, s));
  });
  return 2.0 * n / (ms * 1e-3);
}

}  // namespace ssm::cuda_check
