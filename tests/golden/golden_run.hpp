#pragma once

#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/io/safetensors.hpp>
#include <ssmlib/mixer/verify_reference.hpp>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace golden {

using ssm::index_t;
using ssm::tensor;

/// The largest error over its bound, and where.
struct worst_error {
  double share = 0;
  std::string where = "";
};

/// Where the numbers of a file come in: as they are, or where a run in bf16 would hold them,
/// rounded to it.
enum class rounding { none, to_bf16 };

/// What was run and how near the references it came.
struct summary {
  std::size_t files = 0, runs = 0, comparisons = 0;
  worst_error in_float, in_double, in_bf16;
  /// In norm, by file and tensor: what rounding operands and results to bf16 does by itself.
  std::map<std::string, double> rounding_errors;
  /// File and algorithm, where the backend has no kernels for it.
  std::set<std::string> unpaired;
};

/// A file and how its numbers enter operations on T.
template <class T, class B = ssm::cpu>
struct inputs {
  explicit inputs(const ssm::safetensors_reader& from, rounding r = rounding::none)
      : file(from), how(r) {}

  /// Whether a run in bf16 has this result in the type of its sums.
  [[nodiscard]] bool is_exact(const std::string& name) const {
    const std::string last = name.substr(name.find('.') + 1);
    return exact.contains(last) || last == "loss" || last == "trajectory" ||
           (last == "final_state" && exact.contains("initial_state"));
  }

  const ssm::safetensors_reader& file;
  const rounding how;
  mutable std::set<std::string> exact{};  // what parameter() has loaded
};

/// A tensor that bf16 would round: rounded in place.
template <class T, class B, class U, int R>
tensor<U, R, B> stored(const inputs<T, B>& in, const tensor<U, R, B>& t) {
  if constexpr (std::is_same_v<U, double> && std::is_same_v<B, ssm::cpu>) {
    if (in.how == rounding::to_bf16) t.copy_from(ssm::cast<double>(ssm::cast<ssm::bf16>(t)));
  }
  return t;
}
/// A tensor of the file, of the type of activations.
template <int R, class T, class B>
tensor<T, R, B> values(const inputs<T, B>& in, const std::string& name) {
  return stored(in,
                ssm::detail::on_backend<B>(ssm::cast<T>(in.file.template load<double, R>(name))));
}
/// The same, of the type of sums: parameters, states, decays.
template <int R, class T, class B>
tensor<ssm::accum_t<T>, R, B> parameter(const inputs<T, B>& in, const std::string& name) {
  in.exact.insert(name.substr(name.find('.') + 1));
  return ssm::detail::on_backend<B>(
      ssm::cast<ssm::accum_t<T>>(in.file.template load<double, R>(name)));
}

/// One reference file by one algorithm in one element type: every out.* and grad.* tensor of the
/// file must be compared, once.
///
/// The references were computed in double and stored in float. Bounds: double to 1e-6 of the
/// largest value; float to 1e-5 in norm and 1e-4 of the largest value; bf16 to twice the error that
/// rounding operands and results has in double (docs/numerics.md).
template <class T, class B = ssm::cpu>
class run {
 public:
  run(summary& total, const inputs<T, B>& in, std::string algorithm)
      : total_(total), in_(in), algorithm_(std::move(algorithm)) {
    ++total_.runs;
    for (const auto& entry : in.file.entries()) {
      if (entry.name.starts_with("out.") || entry.name.starts_with("grad.")) {
        open_.insert(entry.name);
      }
    }
  }
  run(const run&) = delete;
  run& operator=(const run&) = delete;

  template <class U, int R>
  void compare(const std::string& name, const tensor<U, R, B>& result) {
    const std::string file = in_.file.path().filename().string(),
                      at = file + ", " + algorithm_ + ", " + std::to_string(sizeof(T)) +
                           " bytes, " + name;
    CAPTURE(at);
    REQUIRE(open_.erase(name) == 1);
    const auto expected = in_.file.template load<double, R>(name);
    REQUIRE(result.extents() == expected.extents());
    ++total_.comparisons;
    if (expected.size() == 0) return;
    auto actual = ssm::cast<double>(ssm::detail::on_host(result));
    if (in_.how == rounding::to_bf16) {
      if (!in_.is_exact(name)) actual = ssm::cast<double>(ssm::cast<ssm::bf16>(actual));
      double& error = total_.rounding_errors[file + name];
      error = std::max(error, ssm_test::relative_error(actual, expected));
      return;
    }
    const double norm = ssm_test::relative_error(actual, expected),
                 largest = ssm_test::largest_error(actual, expected);
    CAPTURE(norm);
    if constexpr (sizeof(T) == 8) {
      CHECK(largest < 1e-6);
      keep(total_.in_double, largest / 1e-6, at);
    } else if constexpr (sizeof(T) == 4) {
      CHECK(norm < 1e-5);
      CHECK(largest < 1e-4);
      keep(total_.in_float, std::max(norm / 1e-5, largest / 1e-4), at);
    } else {
      REQUIRE(total_.rounding_errors.contains(file + name));
      const double bound = std::max(1e-5, 2 * total_.rounding_errors.at(file + name));
      CHECK(norm <= bound);
      keep(total_.in_bf16, norm / bound, at);
    }
  }

  /// Requires that nothing is left.
  void finish() const {
    for (const auto& name : open_)
      FAIL_CHECK(in_.file.path() << ", " << algorithm_ << ": " << name << " was not compared");
  }

 private:
  static void keep(worst_error& worst, double share, const std::string& at) {
    if (!(share <= worst.share)) worst = {share, at};
  }

  summary& total_;
  const inputs<T, B>& in_;
  std::string algorithm_;
  std::set<std::string> open_;
};

/// f(algorithm, name) for every algorithm of a product's mixer that its backend has; those that cut
/// time into pieces also with pieces so short that a sequence has several.
template <class T, class B, class E, class F>
void for_each_algorithm(summary& total, const inputs<T, B>& in, const E& e, F f) {
  using M = typename E::mixer_type;
  const index_t length = e.x.extent(1);
  M::algorithms::for_each([&](auto algorithm) {
    using Alg = decltype(algorithm);
    if constexpr (!std::is_same_v<B, ssm::cpu> && !ssm::detail::is_paired<M, Alg>()) {
      total.unpaired.insert(in.file.path().filename().string() + ", " +
                            std::string(algorithm.name));
    } else {
      f(algorithm, std::string(algorithm.name));
      if constexpr (requires { algorithm.size; }) {
        algorithm.size = std::max<index_t>(1, (length + 2) / 3);
        f(algorithm, std::string(algorithm.name) + " " + std::to_string(algorithm.size));
      }
    }
  });
}

/// A family's files on a backend: by double, float and, beyond the CPU, bf16, against the errors
/// that rounding alone has on the CPU. F::check(total, inputs) runs one file.
template <class F>
void run_on_cpu(summary& total, const ssm::safetensors_reader& file) {
  F::check(total, inputs<float>(file));
  F::check(total, inputs<double>(file));
}
template <class F, class B>
void run_on(summary& total, const ssm::safetensors_reader& file) {
  F::check(total, inputs<double>(file, rounding::to_bf16));
  F::check(total, inputs<double, B>(file));
  F::check(total, inputs<float, B>(file));
  F::check(total, inputs<ssm::bf16, B>(file));
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

struct family {
  std::string_view prefix;
  void (*run)(summary&, const ssm::safetensors_reader&);
};

/// Runs every file of FOLDER/ops.
/// @throws std::runtime_error  the folder is absent or empty, or a name belongs to no family.
inline summary run_folder(const std::filesystem::path& folder, std::span<const family> families) {
  const auto ops = folder / "ops";
  if (!std::filesystem::is_directory(ops)) {
    throw std::runtime_error(ops.string() + " is not a folder; set SSMLIB_GOLDENS");
  }
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(ops))
    files.push_back(entry.path());
  if (files.empty()) throw std::runtime_error(ops.string() + " holds no files");
  std::ranges::sort(files);
  summary total;
  for (const auto& path : files) {
    const std::string name = path.stem().string();
    const auto found = std::ranges::find_if(families, [&](const family& f) {
      return name == f.prefix || name.starts_with(std::string(f.prefix) + "_");
    });
    if (path.extension() != ".safetensors" || found == families.end()) {
      throw std::runtime_error(path.string() + " is of no operation that is known here");
    }
    ++total.files;
    const std::size_t before = total.comparisons;
    found->run(total, ssm::safetensors_reader(path));
    if (total.comparisons == before) throw std::runtime_error(path.string() + " was not compared");
  }
  return total;
}

}  // namespace golden
