#pragma once

#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <cuda_runtime_api.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

/// @file
/// What the CUDA benchmarks share: a row of the table, how it is timed, and the card's ceilings.

namespace cuda_bench {

/// One row: what is run, what it must at least read, write and compute, and what others need.
struct row {
  std::string name;
  std::function<void()> run;   ///< queues the work once on the context's stream, see made_first
  double bytes = 0;            ///< the fewest that can move
  double flops = 0;            ///< of matrix products
  std::optional<double> peer;  ///< milliseconds of the best peer, measured on another H100
  std::optional<double> goal;  ///< milliseconds
};

/// A row's work whose data are made when it is run first: make() returns what queues the work. So a
/// row that nobody asks for costs nothing, and a row's data live as long as its `run`.
template <class Make>
[[nodiscard]] std::function<void()> made_first(const ssm::cuda::context& ctx, Make make) {
  return [&ctx, make, run = std::function<void()>{}]() mutable {
    if (!run) {
      const ssm::cuda::scope scope(ctx);
      run = make();
    }
    run();
  };
}

/// Milliseconds of one run: the median of `repeats` event-timed batches of about `batch_ms` each,
/// after a warm-up.
[[nodiscard]] double time_of(const ssm::cuda::context& ctx, const std::function<void()>& run,
                             int repeats = 9, double batch_ms = 20);

struct ceilings {
  double copy;  ///< bytes a second, read and written
  double gemm;  ///< bf16 operations a second at 8192^3
};
[[nodiscard]] ceilings measure_ceilings(const ssm::cuda::context& ctx);

/// Random normal bf16 elements on the device.
template <int R>
[[nodiscard]] ssm::tensor<ssm::bf16, R, ssm::cuda> random_bf16(const ssm::shape<R>& extents,
                                                               double deviation,
                                                               std::uint64_t seed) {
  return ssm::to<ssm::cuda>(ssm::cast<ssm::bf16>(ssm::normal<float, R>(extents, deviation, seed)));
}

/// The pattern of NVIDIA's 8B hybrid (24 Mamba-2, 4 attention, 28 MLP layers) at width 2048: 1.7e9
/// parameters without the embedding.
[[nodiscard]] ssm::model_config hybrid_config();

void add_ssd_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_length_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_attention_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_selective_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_convolution_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_gated_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_training_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_decoding_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);
void add_generation_rows(std::vector<row>& rows, const ssm::cuda::context& ctx);

}  // namespace cuda_bench
