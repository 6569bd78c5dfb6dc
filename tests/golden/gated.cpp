#include "gated_files.hpp"

namespace golden {

void run_gated_linear_attention(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<gated_linear_attention_files>(total, file);
}
void run_gated_delta_rule(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<gated_delta_rule_files>(total, file);
}

}  // namespace golden
