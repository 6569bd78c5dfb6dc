// Row t of causal attention averages the values up to t, whatever the scores; equal scores make the
// average a plain one. The result then goes through a file.
#include <ssmlib/io.hpp>
#include <ssmlib/ssmlib.hpp>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>

double mean_of_running_sums();

int main() {
  using namespace ssm;
  const index_t length = 100;
  const auto q = tensor<float, 2>::zeros(length, 8), k = tensor<float, 2>::full({length, 8}, 1.0f);
  tensor<float, 2> v(length, 3);
  for (index_t t = 0; t < length; ++t) {
    for (index_t p = 0; p < 3; ++p)
      v(t, p) = static_cast<float>(t + p);
  }
  const tensor<float, 2> y = eval(softmax(q * transpose(k) + causal) * v);

  const auto path = std::filesystem::temp_directory_path() /
                    ("ssmlib_consumer_" + std::to_string(std::random_device{}()) + ".safetensors");
  safetensors_writer writer;
  writer.add("y", y);
  writer.write(path);
  const auto loaded = safetensors_reader(path).load<float, 2>("y");
  std::filesystem::remove(path);

  double worst = 0;
  for (index_t t = 0; t < length; ++t) {
    for (index_t p = 0; p < 3; ++p) {
      const double wanted = 0.5 * static_cast<double>(t) + static_cast<double>(p);
      worst = std::fmax(worst, std::fabs(loaded(t, p) - wanted));
    }
  }
  const double sums = mean_of_running_sums();
  std::printf("attention is off by %g, the mean running sum is %g\n", worst, sums);
  return worst < 1e-3 && sums == 2.5 ? 0 : 1;
}
