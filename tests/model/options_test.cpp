#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/model/language_model.hpp>

#include <limits>
#include <string>

using namespace ssm;
using ssm_test::small_config;

namespace {

/// What the construction of a model with a changed config says.
template <class F>
std::string complaint(const std::string& pattern, F change) {
  model_config c = small_config(pattern);
  change(c);
  try {
    const language_model<float> m(c, 1);
  } catch (const value_error& e) {
    return e.what();
  }
  return "nothing";
}

}  // namespace

TEST_CASE("model/options: a head count below 1 is one sentence", "[model][options][error]") {
  CHECK(complaint("*", [](auto& c) { c.attention.heads = 0; }) ==
        "ssm: attention: heads is 0; wanted at least 1, give the number of heads");
  CHECK(complaint("P", [](auto& c) { c.attention.heads = -2; }) ==
        "ssm: attention: heads is -2; wanted at least 1, give the number of heads");
  CHECK(complaint("R", [](auto& c) { c.retention.heads = 0; }) ==
        "ssm: retention: heads is 0; wanted at least 1, give the number of heads");
  CHECK(complaint("L", [](auto& c) { c.linear_attention.heads = 0; }) ==
        "ssm: linear_attention: heads is 0; wanted at least 1, give the number of heads");
  CHECK(complaint("M", [](auto& c) { c.mamba2.heads = 0; }) ==
        "ssm: mamba2: heads is 0; wanted at least 1, give the number of heads");
  CHECK(complaint("D", [](auto& c) { c.discrete_mamba2.heads = 0; }) ==
        "ssm: discrete_mamba2: heads is 0; wanted at least 1, give the number of heads");
  CHECK(complaint("G", [](auto& c) { c.gated_delta_net.heads = 0; }) ==
        "ssm: gated_delta_net: heads is 0; wanted at least 1, give the number of heads");
}

TEST_CASE("model/options: heads that do not divide the width are refused where head_dim is unset",
          "[model][options][error]") {
  const auto thirty = [](auto& c) {
    c.width = 30;
    c.retention.heads = 4;
  };
  CHECK(complaint("*", thirty) ==
        "ssm: attention: heads is 4, width is 30; wanted heads to divide width, or set head_dim");
  CHECK(complaint("L", thirty) ==
        "ssm: linear_attention: heads is 4, width is 30; wanted heads to divide width, or set "
        "head_dim");
  CHECK(complaint("R", thirty) ==
        "ssm: retention: heads is 4, width is 30; wanted heads to divide width, or set head_dim");
  CHECK(complaint("*", [&](auto& c) {
          thirty(c);
          c.attention.head_dim = 8;
        }) == "nothing");
}

TEST_CASE("model/options: shared heads and groups divide the heads", "[model][options][error]") {
  CHECK(complaint("*", [](auto& c) { c.attention.kv_heads = 3; }) ==
        "ssm: attention: kv_heads is 3, heads is 4; wanted kv_heads to divide heads, change one of "
        "them");
  // More key heads than query heads would need a larger output projection.
  CHECK(complaint("*", [](auto& c) { c.attention.kv_heads = 8; }) ==
        "ssm: attention: kv_heads is 8, heads is 4; wanted kv_heads to divide heads, change one of "
        "them");
  CHECK(complaint("L", [](auto& c) { c.linear_attention.kv_heads = 8; }) ==
        "ssm: linear_attention: kv_heads is 8, heads is 4; wanted kv_heads to divide heads, change "
        "one of them");
  CHECK(complaint("M", [](auto& c) { c.mamba2.groups = 0; }) ==
        "ssm: mamba2: groups is 0; wanted at least 1, 1 shares B and C among all heads");
  CHECK(complaint("M", [](auto& c) { c.mamba2.groups = 8; }) ==
        "ssm: mamba2: groups is 8, heads is 4; wanted groups to divide heads, change one of them");
  CHECK(complaint("D", [](auto& c) { c.discrete_mamba2.qk_heads = 8; }) ==
        "ssm: discrete_mamba2: qk_heads is 8, heads is 4; wanted qk_heads to divide heads, change "
        "one of them");
  CHECK(complaint("G", [](auto& c) { c.gated_delta_net.qk_heads = -1; }) ==
        "ssm: gated_delta_net: qk_heads is -1; wanted at least 0, 0 is as many as heads");
}

TEST_CASE("model/options: sizes below their least are refused when the mixer is made",
          "[model][options][error]") {
  CHECK(complaint("*", [](auto& c) { c.attention.window = -1; }) ==
        "ssm: attention: window is -1; wanted at least 0, 0 is no window");
  CHECK(complaint("*", [](auto& c) { c.attention.head_dim = -1; }) ==
        "ssm: attention: head_dim is -1; wanted at least 0, 0 is width / heads");
  CHECK(complaint("R", [](auto& c) { c.retention.value_dim = -1; }) ==
        "ssm: retention: value_dim is -1; wanted at least 0, 0 is head_dim");
  CHECK(complaint("M", [](auto& c) { c.mamba2.state = 0; }) ==
        "ssm: mamba2: state is 0; wanted at least 1, give the size of a feature's state");
  CHECK(complaint("M", [](auto& c) { c.mamba2.head_dim = 0; }) ==
        "ssm: mamba2: head_dim is 0; wanted at least 1, give the features of a head");
  CHECK(complaint("D", [](auto& c) { c.discrete_mamba2.state = 0; }) ==
        "ssm: discrete_mamba2: state is 0; wanted at least 1, give the size of a feature's state");
  CHECK(complaint("m", [](auto& c) { c.mamba1.state = 0; }) ==
        "ssm: mamba1: state is 0; wanted at least 1, give the size of a channel's state");
  CHECK(complaint("m", [](auto& c) { c.mamba1.inner = -1; }) ==
        "ssm: mamba1: inner is -1; wanted at least 0, 0 is 2 width");
  CHECK(complaint("m", [](auto& c) { c.mamba1.dt_rank = -1; }) ==
        "ssm: mamba1: dt_rank is -1; wanted at least 0, 0 is width / 16");
  CHECK(complaint("G", [](auto& c) { c.gated_delta_net.head_dim = 0; }) ==
        "ssm: gated_delta_net: head_dim is 0; wanted at least 1, give the features of a query or "
        "key");
  CHECK(complaint("G", [](auto& c) { c.gated_delta_net.value_dim = -3; }) ==
        "ssm: gated_delta_net: value_dim is -3; wanted at least 0, 0 is head_dim");
}

TEST_CASE("model/options: a convolution of no width is refused when the mixer is made",
          "[model][options][error]") {
  const auto none = [](auto& c) {
    c.mamba1.conv_width = c.mamba2.conv_width = 0;
    c.discrete_mamba2.conv_width = c.gated_delta_net.conv_width = 0;
  };
  const std::string wanted = ": conv_width is 0; wanted at least 1, 1 looks at no earlier token";
  CHECK(complaint("m", none) == "ssm: mamba1" + wanted);
  CHECK(complaint("M", none) == "ssm: mamba2" + wanted);
  CHECK(complaint("D", none) == "ssm: discrete_mamba2" + wanted);
  CHECK(complaint("G", none) == "ssm: gated_delta_net" + wanted);
}

TEST_CASE("model/options: numbers that make no start and no norm are refused",
          "[model][options][error]") {
  using ssm_test::contains;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THAT(complaint("*", [&](auto& c) { c.attention.scale = nan; }),
             contains("attention: scale is nan"));
  CHECK_THAT(complaint("M", [](auto& c) { c.mamba2.dt_min = 0; }),
             contains("mamba2: dt_min is 0.000000, dt_max is 0.100000; wanted 0 < dt_min"));
  CHECK_THAT(complaint("m", [](auto& c) { c.mamba1.dt_max = 1e-4; }), contains("mamba1: dt_min"));
  CHECK_THAT(complaint("M", [](auto& c) { c.mamba2.a_min = -1; }), contains("mamba2: a_min"));
  CHECK_THAT(complaint("M",
                       [](auto& c) {
                         c.mamba2.limits.low = 2;
                         c.mamba2.limits.high = 1;
                       }),
             contains("mamba2: limits are 2.000000 and 1.000000"));
  CHECK_THAT(complaint("G", [&](auto& c) { c.gated_delta_net.norm_epsilon = nan; }),
             contains("gated_delta_net: norm_epsilon is nan"));
  CHECK_THAT(complaint("M", [](auto& c) { c.norm_epsilon = -1; }), contains("norm_epsilon -1"));
  CHECK_THAT(complaint("-", [](auto& c) { c.mlp_hidden = -4; }), contains("mlp_hidden -4"));
  CHECK_THAT(complaint("M", [](auto& c) { c.width = 0; }), contains("width 0"));
}
