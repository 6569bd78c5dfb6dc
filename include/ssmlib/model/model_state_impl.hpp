#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/model/model_state.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>

namespace ssm {

namespace detail {

SSMLIB_INLINE void throw_foreign_layer_state(bool holds_nothing) {
  throw value_error(holds_nothing
                        ? "ssm: advance: the layer's state holds nothing, as one that has been "
                          "moved from; make it with the layer's initial_state()"
                        : "ssm: advance: the layer's state was made by another kind of layer; make "
                          "it with the layer's own initial_state()");
}

/// "Mamba-2 ('M')", or "no layer" past the end of the pattern.
[[nodiscard]] SSMLIB_INLINE std::string layer_of_pattern(std::string_view pattern, std::size_t i) {
  if (i >= pattern.size()) return "no layer";
  const auto name = [](char letter) {
    switch (letter) {
      case '*':
        return "softmax attention";
      case 'M':
        return "Mamba-2";
      case 'm':
        return "Mamba-1";
      case 'D':
        return "discrete Mamba-2";
      case 'R':
        return "retention";
      case 'L':
        return "linear attention";
      case 'G':
        return "Gated DeltaNet";
      case 'P':
        return "parallel softmax attention";
      case 'p':
        return "parallel discrete Mamba-2";
      case '-':
        return "an MLP";
      default:
        return "a layer";
    }
  };
  std::string text = name(pattern[i]);
  text += " ('";
  text += pattern[i];
  return text += "')";
}

}  // namespace detail

SSMLIB_INLINE void model_state::check_model(std::string_view pattern,
                                            std::span<const any_state> wanted) const {
  std::string model = "\"";  // in steps: g++ 12 warns about its own operator+
  model += pattern;
  model += '"';
  if (layers_.empty() && !wanted.empty()) {
    throw value_error(
        "ssm: advance: the state has no layers, as one that has been moved from, the model " +
        model + " has " + std::to_string(wanted.size()) +
        "; make the state with the model's initial_state()");
  }
  const std::string_view mine = this->pattern();
  if (mine != pattern || layers_.size() != wanted.size()) {
    std::size_t i = 0;
    while (i < std::min(mine.size(), pattern.size()) && mine[i] == pattern[i])
      ++i;
    throw value_error("ssm: advance: the state is of a model \"" + std::string(mine) +
                      "\", this model is " + model + ": layer " + std::to_string(i) +
                      " of the state is " + detail::layer_of_pattern(mine, i) + ", of the model " +
                      detail::layer_of_pattern(pattern, i) +
                      "; make the state with the model's own initial_state()");
  }
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const bool same_type = layers_[i].same_type(wanted[i]);
    if (same_type && layers_[i].same_sizes(wanted[i])) continue;
    const std::string layer = "ssm: advance: layer " + std::to_string(i) + " of the model " +
                              model + ", " + detail::layer_of_pattern(pattern, i) +
                              ", and that of the state ";
    if (!same_type) {
      throw value_error(layer +
                        (layers_[i] ? "differ in element type or kind"
                                    : "differ: the state's has been moved from") +
                        "; make the state with the model's own initial_state()");
    }
    throw shape_error(layer +
                      "keep other heads, feature sizes, channels or windows; make the state with a "
                      "model of the same sizes");
  }
}

}  // namespace ssm
