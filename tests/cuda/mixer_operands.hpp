#pragma once

// The same mixers with the same numbers on the CPU in double and on the device in any type.

#include <ssmlib/lower/cuda/delta_rule.hpp>
#include <ssmlib/lower/cuda/gated_linear.hpp>
#include <ssmlib/lower/cuda/kv_state.hpp>
#include <ssmlib/lower/cuda/recurrence.hpp>
#include <ssmlib/lower/cuda/wrappers.hpp>
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/gated_linear.hpp>
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/tensor/random.hpp>
#include <ssmlib/tensor/transfer.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace ssm_test {

using ssm::index_t;

struct mixer_sizes {
  index_t batch = 3, length = 90;
  index_t heads = 4, query_heads = 4, key_heads = 2, mask_heads = 4;
  index_t keys = 24, features = 40;
  std::uint64_t seed = 0;
};

template <ssm::Floating T, ssm::Backend B>
struct mixer_operands {
  using value_type = T;
  using real = ssm::accum_t<T>;
  ssm::tensor<T, 4, B> q, k, x;                 // (b, T, their heads, keys or features)
  ssm::tensor<real, 3, B> log_a, weight, beta;  // (b, T, mask heads)
  ssm::tensor<real, 4, B> log_gate;             // (b, T, mask heads, keys)
  ssm::tensor<real, 1, B> gamma, d;             // (mask heads)
  ssm::tensor<T, 3, B> delta;                   // (b, T, mask heads)
  ssm::tensor<real, 2, B> a;                    // (mask heads, keys)
  ssm::tensor<real, 2, B> kernel;               // (mask heads, tokens of the batch)
  // For masks by themselves, whose type is that of x.
  ssm::tensor<T, 3, B> own_log_a, own_weight;
  ssm::tensor<T, 2, B> own_kernel;
  ssm::tensor<T, 1, B> own_gamma;

  /// f(member of one, member of the other) for all.
  template <class Other, class F>
  void zip(Other& o, F f) {
    f(q, o.q), f(k, o.k), f(x, o.x), f(log_a, o.log_a), f(weight, o.weight), f(beta, o.beta);
    f(log_gate, o.log_gate), f(gamma, o.gamma), f(d, o.d), f(delta, o.delta), f(a, o.a);
    f(kernel, o.kernel), f(own_kernel, o.own_kernel), f(own_log_a, o.own_log_a);
    f(own_weight, o.own_weight), f(own_gamma, o.own_gamma);
  }
};

/// Keys are short enough for the delta rule.
inline mixer_operands<double, ssm::cpu> random_operands(const mixer_sizes& s) {
  using ssm::uniform;
  const index_t b = s.batch, n = s.length, m = s.mask_heads;
  const double size = 1.7 / std::sqrt(static_cast<double>(s.keys));
  mixer_operands<double, ssm::cpu> o;
  o.q = uniform<double, 4>({b, n, s.query_heads, s.keys}, -1, 1, s.seed + 1);
  o.k = uniform<double, 4>({b, n, s.key_heads, s.keys}, -size, size, s.seed + 2);
  o.x = uniform<double, 4>({b, n, s.heads, s.features}, -1, 1, s.seed + 3);
  o.log_a = uniform<double, 3>({b, n, m}, -0.4, 0, s.seed + 4);
  o.weight = uniform<double, 3>({b, n, m}, 0.1, 1, s.seed + 5);
  o.beta = uniform<double, 3>({b, n, m}, 0.1, 1, s.seed + 6);
  o.log_gate = uniform<double, 4>({b, n, m, s.keys}, -0.4, 0, s.seed + 7);
  o.gamma = uniform<double, 1>({m}, 0.8, 1, s.seed + 8);
  o.d = uniform<double, 1>({m}, -1, 1, s.seed + 9);
  o.delta = uniform<double, 3>({b, n, m}, 0.01, 0.3, s.seed + 10);
  o.a = uniform<double, 2>({m, s.keys}, -2, -0.1, s.seed + 11);
  o.kernel = uniform<double, 2>({m, b * n}, -1, 1, s.seed + 12);
  o.own_log_a = uniform<double, 3>({b, n, m}, -0.4, 0, s.seed + 13);
  o.own_weight = uniform<double, 3>({b, n, m}, 0.1, 1, s.seed + 14);
  o.own_kernel = uniform<double, 2>({m, b * n}, -1, 1, s.seed + 15);
  o.own_gamma = uniform<double, 1>({m}, 0.8, 1, s.seed + 16);
  return o;
}

/// What T (float for decays beside bf16) holds of the operands, on the CPU in double.
template <ssm::Floating T>
mixer_operands<double, ssm::cpu> rounded(mixer_operands<double, ssm::cpu> o) {
  mixer_operands<T, ssm::cpu> types;
  o.zip(types, [](auto& exact, auto& type) {
    using To = typename std::remove_cvref_t<decltype(type)>::value_type;
    exact = ssm::cast<double>(ssm::cast<To>(exact));
  });
  return o;
}
template <ssm::Floating T>
mixer_operands<T, ssm::cuda> on_device(mixer_operands<double, ssm::cpu> o) {
  mixer_operands<T, ssm::cuda> there;
  o.zip(there, [](auto& exact, auto& target) {
    using To = typename std::remove_cvref_t<decltype(target)>::value_type;
    target = ssm::to<ssm::cuda>(ssm::cast<To>(exact));
  });
  return there;
}

using numbers = std::vector<double>;

template <ssm::Element T, int R, ssm::Backend B>
numbers numbers_of(const ssm::tensor<T, R, B>& t) {
  const auto exact = ssm::cast<double>(ssm::detail::on_host(t)).contiguous();
  return {exact.data(), exact.data() + exact.size()};
}

/// |got - want| / |want|; infinite where anything is NaN or the sizes differ.
inline double relative_error(const numbers& got, const numbers& want) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size() && got.size() == want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  if (got.size() != want.size() || std::isnan(error))
    return std::numeric_limits<double>::infinity();
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

inline constexpr auto causal_attention = [](const auto& o) {
  return ssm::softmax(o.q * transpose(o.k) * 0.7 + ssm::causal) * o.x;
};
inline constexpr auto window_attention = [](const auto& o) {
  return ssm::softmax(o.q * transpose(o.k) * 0.7 + ssm::window(9)) * o.x;
};
inline constexpr auto normalized_attention = [](const auto& o) {
  return normalize_rows(hadamard(ssm::causal, with_features(ssm::feature::elu_plus_one{},
                                                            o.q * transpose(o.k) * 0.5))) *
         o.x;
};
inline constexpr auto retention = [](const auto& o) {
  return hadamard(ssm::decay(o.gamma), o.q * transpose(o.k) * 0.5) * o.x;
};
inline constexpr auto mamba2 = [](const auto& o) {
  return (hadamard(ssm::semiseparable(o.log_a, o.weight), o.q * transpose(o.k) * 0.5) +
          ssm::diagonal(o.d)) *
         o.x;
};
inline constexpr auto mamba1 = [](const auto& o) {
  const auto c = o.q.slice(2, 0, 1), b = o.k.slice(2, 0, 1), x = o.x.slice(3, 0, 2);
  return (ssm::selective(o.delta, o.a, c, b) + ssm::diagonal(o.d)) * x;
};
inline constexpr auto gated_attention = [](const auto& o) {
  return ssm::gated(o.log_gate, o.q * transpose(o.k) * 0.5) * o.x;
};
inline constexpr auto delta_attention = [](const auto& o) {
  return ssm::delta_rule(o.log_a, o.beta, o.q * transpose(o.k) * 0.5) * o.x;
};

/// f(name, make, sizes) for every kind of state: odd sizes, and those that have kernels of their
/// own.
template <class F>
void for_each_mixer(F f) {
  const mixer_sizes odd;
  const mixer_sizes usual{
      .heads = 2, .query_heads = 8, .key_heads = 2, .mask_heads = 8, .keys = 64, .features = 64};
  for (const mixer_sizes& s : {odd, usual}) {
    f("causal softmax", causal_attention, s);
    f("window softmax", window_attention, s);
    f("normalised linear attention", normalized_attention, s);
    f("retention", retention, s);
    f("mamba2 with a diagonal", mamba2, s);
    f("mamba1 with a diagonal", mamba1, s);
    f("gated linear attention", gated_attention, s);
    f("the gated delta rule", delta_attention, s);
  }
}

}  // namespace ssm_test
