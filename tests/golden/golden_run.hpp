#pragma once

#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/io/safetensors.hpp>

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace golden {

using ssm::index_t;
using ssm::tensor;

/// The largest error over its bound, and where.
struct worst_error {
  double share = 0;
  std::string where = "";
};

/// What was run and how near the references it came.
struct summary {
  std::size_t files = 0, runs = 0, comparisons = 0;
  worst_error in_float, in_double;
};

/// One reference file by one algorithm in one element type: every out.* and grad.* tensor of the
/// file must be compared, once.
///
/// The references were computed in double and stored in float. Bounds: double to 1e-6 of the
/// largest value; float to 1e-5 in norm and 1e-4 of the largest value (docs/numerics.md).
template <class T>
class run {
 public:
  run(summary& total, const ssm::safetensors_reader& file, std::string algorithm)
      : total_(total), file_(file), algorithm_(std::move(algorithm)) {
    ++total_.runs;
    for (const auto& entry : file.entries()) {
      if (entry.name.starts_with("out.") || entry.name.starts_with("grad.")) {
        open_.insert(entry.name);
      }
    }
  }
  run(const run&) = delete;
  run& operator=(const run&) = delete;

  template <int R>
  void compare(const std::string& name, const tensor<T, R>& actual) {
    const std::string at = file_.path().filename().string() + ", " + algorithm_ + ", " +
                           (sizeof(T) == 8 ? "double" : "float") + ", " + name;
    CAPTURE(at);
    REQUIRE(open_.erase(name) == 1);
    const auto expected = file_.template load<double, R>(name);
    REQUIRE(actual.extents() == expected.extents());
    ++total_.comparisons;
    if (expected.size() == 0) return;
    const double largest = ssm_test::largest_error(actual, expected);
    double share = largest / 1e-6;
    if constexpr (sizeof(T) == 4) {
      const double norm = ssm_test::relative_error(actual, expected);
      CAPTURE(norm);
      CHECK(norm < 1e-5);
      CHECK(largest < 1e-4);
      share = std::max(norm / 1e-5, largest / 1e-4);
    } else {
      CHECK(largest < 1e-6);
    }
    worst_error& worst = sizeof(T) == 8 ? total_.in_double : total_.in_float;
    if (!(share <= worst.share)) worst = {share, at};
  }

  /// Requires that nothing is left.
  void finish() const {
    for (const auto& name : open_)
      FAIL_CHECK(file_.path() << ", " << algorithm_ << ": " << name << " was not compared");
  }

 private:
  summary& total_;
  const ssm::safetensors_reader& file_;
  std::string algorithm_;
  std::set<std::string> open_;
};

/// f(algorithm, name) for every algorithm of a product's mixer; those that cut time into pieces
/// also with pieces so short that a sequence has several.
template <class E, class F>
void for_each_algorithm(const E& e, F f) {
  const index_t length = e.x.extent(1);
  E::mixer_type::algorithms::for_each([&](auto algorithm) {
    f(algorithm, std::string(algorithm.name));
    if constexpr (requires { algorithm.size; }) {
      algorithm.size = std::max<index_t>(1, (length + 2) / 3);
      f(algorithm, std::string(algorithm.name) + " " + std::to_string(algorithm.size));
    }
  });
}

// What runs the files of a family, in both element types; one source file each.
void run_softmax_attention(summary& total, const ssm::safetensors_reader& file);
void run_linear_attention(summary& total, const ssm::safetensors_reader& file);
void run_retention(summary& total, const ssm::safetensors_reader& file);
void run_toeplitz_attention(summary& total, const ssm::safetensors_reader& file);
void run_ssd(summary& total, const ssm::safetensors_reader& file);
void run_selective_scan(summary& total, const ssm::safetensors_reader& file);
void run_gated_linear_attention(summary& total, const ssm::safetensors_reader& file);
void run_gated_delta_rule(summary& total, const ssm::safetensors_reader& file);
void run_causal_conv1d(summary& total, const ssm::safetensors_reader& file);
void run_gated_rmsnorm(summary& total, const ssm::safetensors_reader& file);
void run_rope(summary& total, const ssm::safetensors_reader& file);
void run_matrix_orientation(summary& total, const ssm::safetensors_reader& file);
void run_hidden_state_alignment(summary& total, const ssm::safetensors_reader& file);
void run_kl_distillation(summary& total, const ssm::safetensors_reader& file);
void run_dpo_loss(summary& total, const ssm::safetensors_reader& file);
void run_adamw(summary& total, const ssm::safetensors_reader& file);

/// Runs every file of FOLDER/ops.
/// @throws std::runtime_error  the folder is absent or empty, or a name belongs to no family.
summary run_folder(const std::filesystem::path& folder);

}  // namespace golden
