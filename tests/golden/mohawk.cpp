#include "mohawk_files.hpp"

namespace golden {

void run_matrix_orientation(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<matrix_orientation_files>(total, file);
}
void run_hidden_state_alignment(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<hidden_state_alignment_files>(total, file);
}

}  // namespace golden
