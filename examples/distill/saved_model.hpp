#pragma once

#include "evaluate.hpp"
#include <ssmlib/io.hpp>
#include <ssmlib/io/parameters.hpp>
#include <ssmlib/ssmlib.hpp>

#include <nlohmann/json.hpp>

#include <filesystem>
#include <initializer_list>
#include <string>
#include <utility>

namespace demo {

namespace detail {

/// f(JSON pointer, member) for everything that a model's shapes and function depend on. What only
/// initial values depend on is left out.
template <class Config, class F>
void for_each_field(Config& c, F&& f) {
  f("/vocabulary", c.vocabulary);
  f("/width", c.width);
  f("/pattern", c.pattern);
  f("/mlp_hidden", c.mlp_hidden);
  f("/norm_epsilon", c.norm_epsilon);
  f("/tie_embeddings", c.tie_embeddings);
  f("/head_bias", c.head_bias);
  f("/attention/heads", c.attention.heads);
  f("/attention/kv_heads", c.attention.kv_heads);
  f("/attention/head_dim", c.attention.head_dim);
  f("/attention/window", c.attention.window);
  f("/attention/bias", c.attention.bias);
  f("/attention/rope/fraction", c.attention.rope->fraction);
  f("/attention/rope/base", c.attention.rope->base);
  f("/attention/rope/interleaved", c.attention.rope->interleaved);
  f("/mamba2/heads", c.mamba2.heads);
  f("/mamba2/head_dim", c.mamba2.head_dim);
  f("/mamba2/state", c.mamba2.state);
  f("/mamba2/groups", c.mamba2.groups);
  f("/mamba2/conv_width", c.mamba2.conv_width);
  f("/mamba2/gated_norm", c.mamba2.gated_norm);
  f("/mamba2/norm_before_gate", c.mamba2.norm_before_gate);
  f("/mamba2/norm_epsilon", c.mamba2.norm_epsilon);
  f("/discrete_mamba2/heads", c.discrete_mamba2.heads);
  f("/discrete_mamba2/qk_heads", c.discrete_mamba2.qk_heads);
  f("/discrete_mamba2/head_dim", c.discrete_mamba2.head_dim);
  f("/discrete_mamba2/state", c.discrete_mamba2.state);
  f("/discrete_mamba2/conv_width", c.discrete_mamba2.conv_width);
  f("/mamba1/inner", c.mamba1.inner);
  f("/mamba1/state", c.mamba1.state);
  f("/mamba1/dt_rank", c.mamba1.dt_rank);
  f("/mamba1/conv_width", c.mamba1.conv_width);
  f("/retention/heads", c.retention.heads);
  f("/retention/head_dim", c.retention.head_dim);
  f("/retention/value_dim", c.retention.value_dim);
  f("/linear_attention/heads", c.linear_attention.heads);
  f("/linear_attention/kv_heads", c.linear_attention.kv_heads);
  f("/linear_attention/head_dim", c.linear_attention.head_dim);
  f("/gated_delta_net/heads", c.gated_delta_net.heads);
  f("/gated_delta_net/qk_heads", c.gated_delta_net.qk_heads);
  f("/gated_delta_net/head_dim", c.gated_delta_net.head_dim);
  f("/gated_delta_net/value_dim", c.gated_delta_net.value_dim);
  f("/gated_delta_net/conv_width", c.gated_delta_net.conv_width);
  f("/gated_delta_net/norm_epsilon", c.gated_delta_net.norm_epsilon);
}

}  // namespace detail

/// All that rebuilds a model of the demo but its parameters, by the names of ssm::model_config. Its
/// kinds of MLP and norm are the library's: SwiGLU and RMSNorm. @pre attention has RoPE
[[nodiscard]] inline nlohmann::json to_json(const ssm::model_config& config) {
  nlohmann::json j = {{"mlp", "swiglu"}, {"norm", "rms"}};
  detail::for_each_field(config, [&](const char* name, const auto& member) {
    j[nlohmann::json::json_pointer(name)] = member;
  });
  return j;
}

/// @throws nlohmann::json::exception  a member is missing or of another type.
[[nodiscard]] inline ssm::model_config config_from_json(const nlohmann::json& j) {
  ssm::model_config config;
  config.attention.rope = ssm::rope_options{};
  detail::for_each_field(config, [&](const char* name, auto& member) {
    j.at(nlohmann::json::json_pointer(name)).get_to(member);
  });
  return config;
}

/// Saves a model of the demo as one safetensors file, its configuration as JSON in the metadata
/// "config". @throws io_error  the file cannot be written.
template <class T, class B>
void save_model(const std::filesystem::path& path, const ssm::language_model<T, B>& m) {
  ssm::save_parameters(path, m.parameters(), {{"config", to_json(m.config()).dump()}});
}

/// The model that save_model saved, on the CPU, wherever it was trained.
/// @throws io_error  the file cannot be read, or is not a model of the demo.
[[nodiscard]] inline model load_model(const std::filesystem::path& path) {
  const auto metadata = ssm::safetensors_reader(path).metadata();
  const auto config = metadata.find("config");
  if (config == metadata.end()) {
    throw ssm::io_error("demo: loading the model '" + path.string() +
                        "': its metadata has no \"config\"; it was not saved by this program");
  }
  try {
    const model m(config_from_json(nlohmann::json::parse(config->second)), 0);
    (void)ssm::load_parameters(path, m.parameters());
    return m;
  } catch (const nlohmann::json::exception& e) {
    throw ssm::io_error("demo: loading the model '" + path.string() +
                        "': its configuration cannot be read (" + e.what() + ")");
  }
}

}  // namespace demo
