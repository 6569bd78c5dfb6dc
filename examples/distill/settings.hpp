#pragma once

#include <ssmlib/model/config.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace demo {

/// What the run does, as the command line says it. The defaults are made for 8 minutes on 2 cores;
/// cuda_settings() are those of --device cuda.
struct settings {
  std::string device = "cpu";     ///< or "cuda"
  std::vector<std::string> text;  ///< files; none: the installed C++ headers
  std::filesystem::path out = "demo-out";
  bool resume = false;

  std::size_t max_bytes = 1'200'000;
  std::string teacher = "*-*-*-*-";
  std::string student = "M-M-M-M-";
  std::string hybrid = "M-M-*-M-";
  std::string draft = "M-";
  ssm::index_t width = 128;
  ssm::index_t heads = 4;
  ssm::index_t sequence_length = 256;
  ssm::index_t tokens_per_step = 4096;
  double budget = 1.0;        ///< multiplies the steps of every stage
  double stage3_rate = 2e-3;  ///< learning rate, in every variant
  std::uint64_t seed = 1;
  int threads = 0;               ///< 0: all
  double steps_at_budget_1 = 1;  ///< multiplies the steps too

  [[nodiscard]] ssm::index_t steps(ssm::index_t at_budget_1) const {
    return std::max<ssm::index_t>(
        2, static_cast<ssm::index_t>(static_cast<double>(at_budget_1) * steps_at_budget_1 * budget +
                                     0.5));
  }
};

/// The defaults on a GPU: 20 times the tokens, in models of about 4 times the parameters, on all
/// the text that there is.
[[nodiscard]] inline settings cuda_settings() {
  settings s;
  s.device = "cuda";
  s.max_bytes = 24'000'000;
  s.width = 256;
  s.tokens_per_step = 16384;
  s.steps_at_budget_1 = 5;
  return s;
}

/// A model of the demo, by its layer pattern. Students differ from the teacher in mixers only and
/// have about as many parameters: two groups of B and C make up for the gate.
[[nodiscard]] inline ssm::model_config config_of(const settings& s, const std::string& pattern) {
  ssm::model_config c;
  c.vocabulary = 256;
  c.width = s.width;
  c.pattern = pattern;
  c.mlp_hidden = 3 * s.width;
  c.attention = {.heads = s.heads, .rope = ssm::rope_options{}};
  c.mamba2 = {.heads = s.heads,
              .head_dim = s.width / s.heads,
              .state = s.width / s.heads,
              .groups = std::max<ssm::index_t>(1, s.heads / 2)};
  c.discrete_mamba2 = {.heads = s.heads,
                       .qk_heads = std::max<ssm::index_t>(1, s.heads / 2),
                       .head_dim = s.width / s.heads,
                       .state = s.width / s.heads,
                       .identity_init = true};
  c.mamba1 = {.inner = s.width};
  c.retention = {.heads = s.heads};
  c.linear_attention = {.heads = s.heads};
  c.gated_delta_net = {.heads = s.heads, .head_dim = s.width / s.heads};
  return c;
}

}  // namespace demo
