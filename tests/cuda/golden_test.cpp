#include "golden/gated_files.hpp"
#include "golden/layers_files.hpp"
#include "golden/masked_attention_files.hpp"
#include "golden/mohawk_files.hpp"
#include "golden/selective_scan_files.hpp"
#include "golden/softmax_attention_files.hpp"
#include "golden/ssd_files.hpp"
#include "golden/training_files.hpp"
#include <ssmlib/cuda.hpp>

#include <cstdio>
#include <cstdlib>
#include <memory>

// The reference files of tests/golden on the device, in double, float and bf16.

template <class T>
struct golden::given_matrices<T, ssm::cuda> {
  static auto panels_of(const ssm::tensor<ssm::accum_t<T>, 4, ssm::cuda>& matrices) {
    return std::make_shared<ssm::detail::cuda_dense_panels<T>>(matrices);
  }
};

namespace {

using namespace golden;

constexpr family families[] = {
    {"softmax_attention", run_on<softmax_attention_files, ssm::cuda>},
    {"linear_attention_elu", run_on<linear_attention_files, ssm::cuda>},
    {"retention", run_on<retention_files, ssm::cuda>},
    {"toeplitz_attention", run_on<toeplitz_attention_files, ssm::cuda>},
    {"ssd", run_on<ssd_files, ssm::cuda>},
    {"selective_scan", run_on<selective_scan_files, ssm::cuda>},
    {"gated_linear_attention", run_on<gated_linear_attention_files, ssm::cuda>},
    {"gated_delta_rule", run_on<gated_delta_rule_files, ssm::cuda>},
    {"causal_conv1d_silu", run_on<causal_conv1d_files, ssm::cuda>},
    {"gated_rmsnorm", run_on<gated_rmsnorm_files, ssm::cuda>},
    {"rope", run_on<rope_files, ssm::cuda>},
    {"mohawk_matrix_orientation", run_on<matrix_orientation_files, ssm::cuda>},
    {"mohawk_hidden_state", run_on<hidden_state_alignment_files, ssm::cuda>},
    {"kl_distillation", run_on<kl_distillation_files, ssm::cuda>},
    {"dpo_loss", run_on<dpo_loss_files, ssm::cuda>},
    {"adamw", run_on<adamw_files, ssm::cuda>},
};

}  // namespace

TEST_CASE("cuda/golden: every reference file is met by every algorithm in double, float and bf16",
          "[cuda][golden]") {
  const char* folder = std::getenv("SSMLIB_GOLDENS");
  const summary total = run_folder(folder != nullptr ? folder : SSMLIB_TEST_DATA, families);
  std::printf("golden: %zu runs over %zu files, %zu tensors compared\n", total.runs, total.files,
              total.comparisons);
  for (const auto* worst : {&total.in_float, &total.in_double, &total.in_bf16}) {
    std::printf("golden: the largest error is %.2g of its bound: %s\n", worst->share,
                worst->where.c_str());
  }
  for (const auto& which : total.unpaired)
    std::printf("golden: the device has no kernels for %s\n", which.c_str());
  CHECK(total.unpaired.empty());
  CHECK(total.runs >= 4 * total.files);
}
