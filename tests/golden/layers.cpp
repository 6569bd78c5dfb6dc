#include "layers_files.hpp"

namespace golden {

void run_causal_conv1d(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<causal_conv1d_files>(total, file);
}
void run_gated_rmsnorm(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<gated_rmsnorm_files>(total, file);
}
void run_rope(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<rope_files>(total, file);
}

}  // namespace golden
