#include "ssd_files.hpp"

namespace golden {

void run_ssd(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<ssd_files>(total, file);
}

}  // namespace golden
