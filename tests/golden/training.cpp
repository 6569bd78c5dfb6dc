#include "training_files.hpp"

namespace golden {

void run_kl_distillation(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<kl_distillation_files>(total, file);
}
void run_dpo_loss(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<dpo_loss_files>(total, file);
}
void run_adamw(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<adamw_files>(total, file);
}

}  // namespace golden
