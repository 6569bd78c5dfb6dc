#include "softmax_attention_files.hpp"

namespace golden {

void run_softmax_attention(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<softmax_attention_files>(total, file);
}

}  // namespace golden
