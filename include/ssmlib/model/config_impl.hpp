#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/model/config.hpp>

#include <cmath>
#include <string>
#include <string_view>

namespace ssm {

SSMLIB_INLINE void check_pattern(std::string_view pattern, std::string_view own) {
  const std::string letters = std::string(layer_letters) + std::string(own);
  for (std::size_t i = 0; i < own.size(); ++i) {
    if (letters.find(own[i]) != layer_letters.size() + i) {
      throw value_error("ssm: the letter '" + std::string(1, own[i]) +
                        "' of an own layer is taken; wanted one that is not of \"" +
                        letters.substr(0, layer_letters.size() + i) + "\"");
    }
  }
  if (pattern.empty()) {
    throw value_error("ssm: the layer pattern is empty; wanted letters of \"" + letters +
                      "\", such as \"M-M-M*-\"");
  }
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (letters.find(pattern[i]) == std::string::npos) {
      throw value_error("ssm: the layer pattern \"" + std::string(pattern) + "\" has '" +
                        std::string(1, pattern[i]) + "' at place " + std::to_string(i) +
                        "; wanted letters of \"" + letters + "\"");
    }
  }
}

SSMLIB_INLINE void check_config(const model_config& config, std::string_view own) {
  check_pattern(config.pattern, own);
  if (config.width < 1 || config.vocabulary < 1) {
    throw value_error("ssm: a model of width " + std::to_string(config.width) + " and vocabulary " +
                      std::to_string(config.vocabulary) + ": wanted at least 1 of each");
  }
  if (config.mlp_hidden < 0) {
    throw value_error("ssm: a model with mlp_hidden " + std::to_string(config.mlp_hidden) +
                      ": wanted at least 0, 0 is a multiple of the width");
  }
  if (!(config.norm_epsilon >= 0 && std::isfinite(config.norm_epsilon))) {
    throw value_error("ssm: a model with norm_epsilon " + std::to_string(config.norm_epsilon) +
                      ": wanted a finite number >= 0");
  }
}

}  // namespace ssm
