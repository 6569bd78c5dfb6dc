#include "golden_run.hpp"
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/toeplitz.hpp>

namespace golden {

namespace {

using namespace ssm;

/// @param mask_name  of the mask's own operand, "" where it has none
/// @param make       (q, k, the mask's operand) -> mixer
template <class T, int R, class Make>
void run_masked(summary& total, const safetensors_reader& file, const std::string& mask_name,
                Make make) {
  const auto q = file.load<T, 4>("in.q"), k = file.load<T, 4>("in.k"), v = file.load<T, 4>("in.v");
  tensor<T, R> mask;
  if (!mask_name.empty()) mask = file.load<T, R>("in." + mask_name);
  const auto product = make(q, k, mask) * v;
  for_each_algorithm(product, [&](auto algorithm, const std::string& name) {
    run<T> r(total, file, name);
    tape<T> tape;
    for (const auto& t : {q, k, v})
      tape.watch(t);
    if (mask) tape.watch(mask);
    const auto y = eval(product.with(algorithm), &tape);
    tape.gradient(y).copy_from(file.load<T, 4>("cotangent.y"));
    tape.backward();
    r.compare("out.y", y);
    r.compare("grad.q", tape.gradient(q));
    r.compare("grad.k", tape.gradient(k));
    r.compare("grad.v", tape.gradient(v));
    if (mask) r.compare("grad." + mask_name, tape.gradient(mask));
    r.finish();
  });
}

template <class T>
void run_linear_attention_as(summary& total, const safetensors_reader& file) {
  run_masked<T, 1>(total, file, "", [](const auto& q, const auto& k, const auto&) {
    return normalize_rows(
        hadamard(causal, with_features(feature::elu_plus_one{}, q * transpose(k))));
  });
}
template <class T>
void run_retention_as(summary& total, const safetensors_reader& file) {
  run_masked<T, 1>(total, file, "gamma", [](const auto& q, const auto& k, const auto& gamma) {
    return hadamard(decay(gamma), q * transpose(k));
  });
}
template <class T>
void run_toeplitz_attention_as(summary& total, const safetensors_reader& file) {
  run_masked<T, 2>(total, file, "kernel", [](const auto& q, const auto& k, const auto& kernel) {
    return hadamard(toeplitz(kernel), q * transpose(k));
  });
}

}  // namespace

void run_linear_attention(summary& total, const safetensors_reader& file) {
  run_linear_attention_as<float>(total, file);
  run_linear_attention_as<double>(total, file);
}
void run_retention(summary& total, const safetensors_reader& file) {
  run_retention_as<float>(total, file);
  run_retention_as<double>(total, file);
}
void run_toeplitz_attention(summary& total, const safetensors_reader& file) {
  run_toeplitz_attention_as<float>(total, file);
  run_toeplitz_attention_as<double>(total, file);
}

}  // namespace golden
