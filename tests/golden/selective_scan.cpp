#include "selective_scan_files.hpp"

namespace golden {

void run_selective_scan(summary& total, const ssm::safetensors_reader& file) {
  run_on_cpu<selective_scan_files>(total, file);
}

}  // namespace golden
