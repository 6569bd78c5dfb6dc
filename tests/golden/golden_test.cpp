#include "golden_run.hpp"

#include <cstdio>
#include <cstdlib>
#include <unistd.h>
#include <utility>

namespace golden {

namespace {

constexpr family families[] = {
    {"softmax_attention", run_softmax_attention},
    {"linear_attention_elu", run_linear_attention},
    {"retention", run_retention},
    {"toeplitz_attention", run_toeplitz_attention},
    {"ssd", run_ssd},
    {"selective_scan", run_selective_scan},
    {"gated_linear_attention", run_gated_linear_attention},
    {"gated_delta_rule", run_gated_delta_rule},
    {"causal_conv1d_silu", run_causal_conv1d},
    {"gated_rmsnorm", run_gated_rmsnorm},
    {"rope", run_rope},
    {"mohawk_matrix_orientation", run_matrix_orientation},
    {"mohawk_hidden_state", run_hidden_state_alignment},
    {"kl_distillation", run_kl_distillation},
    {"dpo_loss", run_dpo_loss},
    {"adamw", run_adamw},
};

}  // namespace

}  // namespace golden

namespace {

std::filesystem::path scratch_folder(const char* name) {
  const auto folder = std::filesystem::temp_directory_path() /
                      ("ssmlib-golden-" + std::to_string(::getpid()) + "-" + name);
  std::filesystem::create_directories(folder / "ops");
  return folder;
}

TEST_CASE("golden/ops: every reference file is met by every algorithm in float and double",
          "[golden]") {
  const char* folder = std::getenv("SSMLIB_GOLDENS");
  const golden::summary total =
      golden::run_folder(folder != nullptr ? folder : SSMLIB_TEST_DATA, golden::families);
  std::printf("golden: %zu runs over %zu files, %zu tensors compared\n", total.runs, total.files,
              total.comparisons);
  for (const auto* worst : {&total.in_float, &total.in_double}) {
    std::printf("golden: the largest error is %.2g of its bound: %s\n", worst->share,
                worst->where.c_str());
  }
  CHECK(total.runs >= 2 * total.files);
}

TEST_CASE("golden/ops: a folder without files fails", "[golden]") {
  const auto folder = scratch_folder("empty");
  CHECK_THROWS_WITH(golden::run_folder(folder, golden::families),
                    ssm_test::contains("holds no files"));
  std::filesystem::remove_all(folder);
  CHECK_THROWS_WITH(golden::run_folder(folder, golden::families),
                    ssm_test::contains("is not a folder"));
}

TEST_CASE("golden/ops: a file of an unknown operation fails", "[golden]") {
  const auto folder = scratch_folder("unknown");
  ssm::safetensors_writer writer;
  writer.add("out.y", ssm::tensor<float, 1>::zeros(3));
  writer.write(folder / "ops" / "ssdx.safetensors");
  CHECK_THROWS_WITH(golden::run_folder(folder, golden::families),
                    ssm_test::contains("no operation"));
  std::filesystem::remove_all(folder);
}

}  // namespace
