#pragma once

#include "golden_run.hpp"
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/toeplitz.hpp>

namespace golden {

using namespace ssm;

/// @param mask_name  of the mask's own operand, "" where it has none
/// @param make       (q, k, the mask's operand) -> mixer
template <int R, class T, class B, class Make>
void run_masked(summary& total, const inputs<T, B>& in, const std::string& mask_name, Make make) {
  const auto q = values<4>(in, "in.q");
  const auto k = values<4>(in, "in.k");
  const auto v = values<4>(in, "in.v");
  tensor<accum_t<T>, R, B> mask;
  if (!mask_name.empty()) mask = parameter<R>(in, "in." + mask_name);
  const auto product = make(q, k, mask) * v;
  for_each_algorithm(total, in, product, [&](auto algorithm, const std::string& name) {
    run<T, B> r(total, in, name);
    tape<T, B> tape;
    for (const auto& t : {q, k, v})
      tape.watch(t);
    if (mask) tape.watch(mask);
    const auto y = eval(product.with(algorithm), &tape);
    tape.gradient(y).copy_from(values<4>(in, "cotangent.y"));
    tape.backward();
    r.compare("out.y", y);
    r.compare("grad.q", tape.gradient(q));
    r.compare("grad.k", tape.gradient(k));
    r.compare("grad.v", tape.gradient(v));
    if (mask) r.compare("grad." + mask_name, tape.gradient(mask));
    r.finish();
  });
}

struct linear_attention_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    if constexpr (std::is_same_v<T, double> && std::is_same_v<B, cpu>) {
      if (in.how == rounding::to_bf16) return check_rounded(total, in);
    }
    run_masked<1>(total, in, "", [](const auto& q, const auto& k, const auto&) {
      return normalize_rows(
          hadamard(causal, with_features(feature::elu_plus_one{}, q * transpose(k))));
    });
  }

 private:
  // What bf16 stores on the way: the features, which are near 1, and the sums above and below the
  // division. Gradients of q and k cancel, and so these roundings show.
  template <class T, class B>
  static void check_rounded(summary& total, const inputs<T, B>& in) {
    const auto q = values<4>(in, "in.q");
    const auto k = values<4>(in, "in.k");
    const auto v = values<4>(in, "in.v");
    run<T, B> r(total, in, "rounded on the way");
    tape<T, B> tape;
    for (const auto& t : {q, k, v})
      tape.watch(t);
    const auto features = [&](const tensor<T, 4, B>& t) {
      return stored(in, eval_as<T>(elu(t) + 1.0, &tape));
    };
    const auto mixer = hadamard(causal, features(q) * transpose(features(k)));
    const auto ones = tensor<T, 4, B>::full({v.extent(0), v.extent(1), v.extent(2), 1}, 1);
    const auto above = stored(in, eval(mixer * v, &tape));
    const auto below = stored(in, eval(mixer * ones, &tape));
    const auto y = eval_as<T>(above / below, &tape);
    tape.gradient(y).copy_from(values<4>(in, "cotangent.y"));
    tape.backward();
    r.compare("out.y", y);
    r.compare("grad.q", tape.gradient(q));
    r.compare("grad.k", tape.gradient(k));
    r.compare("grad.v", tape.gradient(v));
    r.finish();
  }
};
struct retention_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    run_masked<1>(total, in, "gamma", [](const auto& q, const auto& k, const auto& gamma) {
      return hadamard(decay(gamma), q * transpose(k));
    });
  }
};
struct toeplitz_attention_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    run_masked<2>(total, in, "kernel", [](const auto& q, const auto& k, const auto& kernel) {
      return hadamard(toeplitz(kernel), q * transpose(k));
    });
  }
};

}  // namespace golden
