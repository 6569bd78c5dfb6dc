#pragma once

#include <ssmlib/tensor/random.hpp>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace ssm {

/// What a parameter is, which decides whether AdamW decays it: matrices and filters do; norms,
/// biases, and the decay parameters of state-space models (A_log, dt_bias, D) never.
enum class parameter_kind { matrix, filter, norm, bias, decay };

/// One trainable tensor of a layer, flat. `value` shares the layer's elements.
template <Floating T, Backend B = cpu>
struct parameter {
  std::string name;  ///< dotted path, as in PyTorch: "layers.0.mixer.in_proj.weight"
  tensor<accum_t<T>, 1, B> value;
  std::vector<index_t> extents;
  parameter_kind kind;

  [[nodiscard]] bool decays() const {
    return kind == parameter_kind::matrix || kind == parameter_kind::filter;
  }
};

/// A layer lists its parameters with
///
///   template <class Self, class F>
///   static void parameters(Self& self, F&& f);   // f(name, tensor, kind), absent tensors skipped
///
/// and nested layers with visit(f, "norm", self.norm).
template <class Layer, class F>
void visit(F&& f, std::string_view prefix, Layer& layer) {
  std::remove_cvref_t<Layer>::parameters(
      layer, [&](std::string_view name, auto& tensor, parameter_kind kind) {
        f(std::string(prefix) + "." + std::string(name), tensor, kind);
      });
}

/// Every parameter of a layer, in order. @throws shape_error  a parameter is not dense.
template <Floating T, Backend B = cpu, class Layer>
[[nodiscard]] std::vector<parameter<T, B>> parameters_of(const Layer& layer,
                                                         std::string_view prefix = "") {
  std::vector<parameter<T, B>> list;
  Layer::parameters(layer, [&](std::string_view name, auto& t, parameter_kind kind) {
    if (!t) return;
    const std::string path =
        prefix.empty() ? std::string(name) : std::string(prefix) + "." + std::string(name);
    list.push_back({path, t.reshape(t.size()), {t.extents().begin(), t.extents().end()}, kind});
  });
  return list;
}

/// A copy of a layer that shares no parameter with it.
template <class Layer>
[[nodiscard]] Layer with_own_parameters(const Layer& layer) {
  Layer copy = layer;
  Layer::parameters(copy, [](std::string_view, auto& t, parameter_kind) {
    if (t) t = t.clone();
  });
  return copy;
}

/// The number of trainable values.
template <Floating T, Backend B>
[[nodiscard]] index_t parameter_count(const std::vector<parameter<T, B>>& list) {
  index_t n = 0;
  for (const auto& p : list)
    n += p.value.size();
  return n;
}

namespace init {

/// U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolution weights.
template <Real T, int R>
[[nodiscard]] tensor<T, R> fan_in_uniform(const shape<R>& extents, index_t fan_in,
                                          std::uint64_t seed) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
  return uniform<T, R>(extents, -bound, bound, seed);
}

}  // namespace init
}  // namespace ssm
