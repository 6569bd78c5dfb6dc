#include "masked_attention_files.hpp"

namespace golden {

void run_linear_attention(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<linear_attention_files>(total, file);
}
void run_retention(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<retention_files>(total, file);
}
void run_toeplitz_attention(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<toeplitz_attention_files>(total, file);
}

}  // namespace golden
