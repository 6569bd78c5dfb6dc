// The CUDA benchmarks: one table of rows through the public API, with the card's ceilings measured
// in the same run. Peers' figures are those of docs/performance.md, measured on another H100.

#include "harness.hpp"

#include <cstdio>
#include <cstring>

namespace {

constexpr auto all_rows = {
    cuda_bench::add_ssd_rows,        cuda_bench::add_attention_rows,
    cuda_bench::add_selective_rows,  cuda_bench::add_convolution_rows,
    cuda_bench::add_gated_rows,      cuda_bench::add_training_rows,
    cuda_bench::add_generation_rows, cuda_bench::add_length_rows,
};

}  // namespace

int main(int argc, char** argv) {
  using namespace cuda_bench;
  if (ssm::cuda::device_count() == 0) {
    std::fputs(
        "ssmlib_cuda_bench: there is no CUDA device, or no driver; run it where there is one\n",
        stderr);
    return 2;
  }
  const bool is_once = argc > 1 && std::strcmp(argv[1], "--once") == 0;
  const char* filter = argc > 1 + is_once ? argv[1 + is_once] : "";
  if (std::strcmp(filter, "--help") == 0) {
    std::puts(
        "usage: ssmlib_cuda_bench [--once] [PART OF A ROW'S NAME]\n"
        "  --once  runs each row once and prints no times: for a profiler");
    return 0;
  }
  try {
    const ssm::cuda::context ctx;
    const auto is_wanted = [&](const row& r) { return r.name.find(filter) != std::string::npos; };
    if (is_once) {
      for (const auto add : all_rows) {
        std::vector<row> rows;
        add(rows, ctx);
        for (row& r : rows) {
          if (!is_wanted(r)) continue;
          r.run();
          ctx.synchronize();
          r.run = {};
        }
      }
      return 0;
    }
    cudaDeviceProp device{};
    SSMLIB_CHECK_CUDA(cudaGetDeviceProperties(&device, ctx.device()));
    const ceilings top = measure_ceilings(ctx);
    std::printf("%s, %d multiprocessors; copy %.2f TB/s, bf16 GEMM %.0f TFLOP/s\n", device.name,
                device.multiProcessorCount, top.copy / 1e12, top.gemm / 1e12);
    std::printf("%-56s %9s %9s %7s %7s %9s %6s %9s %6s\n", "", "ms", "floor ms", "bytes%", "flops%",
                "peer ms", "x", "goal ms", "x");
    for (const auto add : all_rows) {
      std::vector<row> rows;
      add(rows, ctx);
      for (row& r : rows) {
        if (!is_wanted(r)) continue;
        const double ms = time_of(ctx, r.run);
        r.run = {};  // with its data
        const double by_bytes = 1e3 * r.bytes / top.copy, by_flops = 1e3 * r.flops / top.gemm;
        std::printf("%-56s %9.4f %9.4f %7.1f %7.1f", r.name.c_str(), ms,
                    std::max(by_bytes, by_flops), 100 * by_bytes / ms, 100 * by_flops / ms);
        for (const auto& other : {r.peer, r.goal}) {
          if (other) {
            std::printf(" %9.3f %6.2f", *other, *other / ms);
          } else {
            std::printf(" %9s %6s", "-", "-");
          }
        }
        std::puts("");
        std::fflush(stdout);
      }
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
