#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/types.hpp>
#include <ssmlib/tensor/random.hpp>
#include <ssmlib/tensor/view.hpp>

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

/// @file
/// Device memory, random data, errors and times for the programs that check kernels.

namespace ssm_test {

using ssm::bf16;
using ssm::index_t;
using ssm::view;

/// Device memory of `size` elements.
template <class T>
class device_array {
 public:
  device_array() = default;
  explicit device_array(index_t size) : size_(size) {
    SSMLIB_CHECK_CUDA(
        cudaMalloc(reinterpret_cast<void**>(&data_), std::max<index_t>(size, 1) * sizeof(T)));
  }
  explicit device_array(const std::vector<T>& host)
      : device_array(static_cast<index_t>(host.size())) {
    upload(host);
  }
  device_array(device_array&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
  }
  device_array& operator=(device_array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~device_array() { cudaFree(data_); }

  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] index_t size() const { return size_; }
  void upload(const std::vector<T>& host) {
    SSMLIB_CHECK_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyDefault));
    wait();
  }
  [[nodiscard]] std::vector<T> download() const {
    std::vector<T> host(static_cast<std::size_t>(size_));
    SSMLIB_CHECK_CUDA(cudaMemcpy(host.data(), data_, host.size() * sizeof(T), cudaMemcpyDefault));
    return host;
  }
  /// NaN in every element.
  void poison() { fill(0xff); }
  void zero() { fill(0); }

 private:
  void fill(int byte) {
    SSMLIB_CHECK_CUDA(cudaMemset(data_, byte, size_ * sizeof(T)));
    wait();
  }
  /// The host does not wait for a memset, nor do streams that are not blocking, as those here.
  static void wait() { SSMLIB_CHECK_CUDA(cudaStreamSynchronize(nullptr)); }

  T* data_ = nullptr;
  index_t size_ = 0;
};

template <class T>
[[nodiscard]] view<T, 2> rows_of(T* data, index_t rows, index_t columns, index_t step = 0) {
  return {data, {rows, columns}, {step == 0 ? columns : step, 1}};
}

template <class T>
[[nodiscard]] T make(double x) {
  return static_cast<T>(static_cast<float>(x));
}
template <>
inline double make<double>(double x) {
  return x;
}
template <class T>
[[nodiscard]] double number(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return static_cast<double>(static_cast<float>(x));
  } else {
    return static_cast<double>(x);
  }
}

template <class T>
[[nodiscard]] std::vector<T> random_values(index_t n, double low, double high, std::uint64_t seed) {
  std::vector<T> v(static_cast<std::size_t>(n));
  ssm::philox random(seed);
  for (T& x : v)
    x = make<T>(random.uniform(low, high));
  return v;
}

/// ||out - ref|| / ||ref||; NaN where either has one.
class relative_error {
 public:
  void add(double out, double reference) {
    difference_ += (out - reference) * (out - reference);
    norm_ += reference * reference;
  }
  [[nodiscard]] double value() const { return std::sqrt(difference_ / norm_); }

 private:
  double difference_ = 0, norm_ = 0;
};

template <class T>
[[nodiscard]] bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Prints each claim with its verdict and counts those that fail.
class verdicts {
 public:
  void check(const std::string& claim, bool holds, double error = -1) {
    if (!holds) ++failed_;
    ++all_;
    if (error >= 0 || error != error) {
      std::printf("%-78s %9.2e %s\n", claim.c_str(), error, holds ? "ok" : "FAILED");
    } else {
      std::printf("%-88s %s\n", claim.c_str(), holds ? "ok" : "FAILED");
    }
  }
  [[nodiscard]] int finish() const {
    std::printf("%d claims, %d failed\n", all_, failed_);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  int all_ = 0, failed_ = 0;
};

/// A recorded sequence of launches.
class graph {
 public:
  template <class F>
  graph(cudaStream_t stream, F record) : stream_(stream) {
    cudaGraph_t recorded = nullptr;
    SSMLIB_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    record();
    SSMLIB_CHECK_CUDA(cudaStreamEndCapture(stream, &recorded));
    SSMLIB_CHECK_CUDA(cudaGraphInstantiate(&graph_, recorded, 0));
    SSMLIB_CHECK_CUDA(cudaGraphDestroy(recorded));
  }
  graph(const graph&) = delete;
  graph& operator=(const graph&) = delete;
  ~graph() { cudaGraphExecDestroy(graph_); }

  void launch() const { SSMLIB_CHECK_CUDA(cudaGraphLaunch(graph_, stream_)); }
  /// The median time of a launch in milliseconds.
  [[nodiscard]] double time(int repeats = 25) const {
    cudaEvent_t start, stop;
    SSMLIB_CHECK_CUDA(cudaEventCreate(&start));
    SSMLIB_CHECK_CUDA(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = 0; i < repeats + 3; ++i) {
      SSMLIB_CHECK_CUDA(cudaEventRecord(start, stream_));
      launch();
      SSMLIB_CHECK_CUDA(cudaEventRecord(stop, stream_));
      SSMLIB_CHECK_CUDA(cudaEventSynchronize(stop));
      float ms = 0;
      SSMLIB_CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
      if (i >= 3) times.push_back(ms);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    std::ranges::sort(times);
    return static_cast<double>(times[times.size() / 2]);
  }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

template <class T>
__global__ void copy_kernel(const T* from, T* to, index_t n) {
  const index_t step = index_t{gridDim.x} * blockDim.x;
  for (index_t i = blockIdx.x * index_t{blockDim.x} + threadIdx.x; i < n; i += 4 * step) {
    T held[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * step < n) held[j] = from[i + j * step];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * step < n) to[i + j * step] = held[j];
    }
  }
}

/// Bytes a second that a copy of 1 GiB by a kernel reads and writes.
[[nodiscard]] inline double copy_bandwidth(cudaStream_t stream) {
  constexpr index_t bytes = index_t{1} << 30, pieces = bytes / 16;
  const device_array<uint4> from(pieces), to(pieces);
  SSMLIB_CHECK_CUDA(cudaMemset(from.data(), 0x5a, bytes));
  double best = 0;
  for (const unsigned blocks : {132u * 8, 132u * 32, 65536u}) {
    const graph copies(stream, [&] {
      for (int i = 0; i < 4; ++i)
        copy_kernel<<<blocks, 256, 0, stream>>>(from.data(), to.data(), pieces);
    });
    best = std::max(best, 4 * 2.0 * static_cast<double>(bytes) / (1e-3 * copies.time(9)));
  }
  return best;
}

}  // namespace ssm_test
