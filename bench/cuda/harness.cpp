#include "harness.hpp"

#include <algorithm>
#include <cmath>

namespace cuda_bench {

namespace {

class timer {
 public:
  explicit timer(cudaStream_t stream) : stream_(stream) {
    SSMLIB_CHECK_CUDA(cudaEventCreate(&begin_));
    SSMLIB_CHECK_CUDA(cudaEventCreate(&end_));
  }
  ~timer() {
    (void)cudaEventDestroy(begin_);
    (void)cudaEventDestroy(end_);
  }
  timer(const timer&) = delete;
  timer& operator=(const timer&) = delete;

  double operator()(int runs, const std::function<void()>& run) {
    SSMLIB_CHECK_CUDA(cudaEventRecord(begin_, stream_));
    for (int i = 0; i < runs; ++i)
      run();
    SSMLIB_CHECK_CUDA(cudaEventRecord(end_, stream_));
    SSMLIB_CHECK_CUDA(cudaEventSynchronize(end_));
    float ms = 0;
    SSMLIB_CHECK_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
    return static_cast<double>(ms) / runs;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_{}, end_{};
};

}  // namespace

double time_of(const ssm::cuda::context& ctx, const std::function<void()>& run, int repeats,
               double batch_ms) {
  const ssm::cuda::scope scope(ctx);
  timer time(ctx.stream());
  (void)time(2, run);
  const double once = time(2, run);
  const int runs = std::clamp(static_cast<int>(std::ceil(batch_ms / once)), 1, 1000);
  std::vector<double> ms;
  for (int i = 0; i < repeats; ++i)
    ms.push_back(time(runs, run));
  std::nth_element(ms.begin(), ms.begin() + repeats / 2, ms.end());
  return ms[static_cast<std::size_t>(repeats / 2)];
}

ceilings measure_ceilings(const ssm::cuda::context& ctx) {
  const ssm::cuda::scope scope(ctx);
  ceilings c{};
  {
    // 2 GiB, in 16-byte words: by the kernel that fills, twice the bytes of cudaMemcpy's own rate.
    const ssm::tensor<ssm::bf16, 1, ssm::cuda> from(ssm::index_t{1} << 30),
        to(ssm::index_t{1} << 30);
    from.fill(ssm::bf16(0.5f));
    c.copy = 2.0 * 0x1p31 / (1e-3 * time_of(ctx, [&] { to.copy_from(from); }));
  }
  const auto a = random_bf16<3>({1, 8192, 8192}, 0.05, 1),
             b = random_bf16<3>({1, 8192, 8192}, 0.05, 2);
  const ssm::tensor<ssm::bf16, 3, ssm::cuda> y(1, 8192, 8192);
  const ssm::kernels::cuda::gemm_problem<ssm::bf16, ssm::bf16> p{a.const_view(), b.const_view(),
                                                                 y.view()};
  c.gemm =
      2 * std::pow(8192.0, 3) / (1e-3 * time_of(ctx, [&] { ssm::kernels::cuda::gemm(ctx, p); }));
  return c;
}

}  // namespace cuda_bench
