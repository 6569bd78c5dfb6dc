#pragma once

#include <ssmlib/base/types.hpp>
#include <ssmlib/nn/conv1d.hpp>
#include <ssmlib/nn/discretize.hpp>
#include <ssmlib/nn/rope.hpp>

#include <optional>

/// @file
/// What the sequence mixers can be told. A mixer checks its options before it divides by any of
/// them, and throws a value_error of one sentence. same_function() compares two mixers of a type:
/// everything but how their parameters start.

namespace ssm {

struct attention_options {
  index_t width = 0;     ///< d, of the model
  index_t heads = 1;     ///< query heads
  index_t kv_heads = 0;  ///< key/value heads, a divisor of heads; 0: as many as heads
  index_t head_dim = 0;  ///< 0: width / heads
  index_t window = 0;    ///< sliding window in tokens, the token itself included; 0: none
  std::optional<double> scale = {};       ///< default head_dim^(-1/2)
  std::optional<rope_options> rope = {};  ///< rotary position embedding of q and k
  bool bias = false;                      ///< on the four projections
  double out_scale = 1.0;                 ///< of the initial output projection

  [[nodiscard]] bool same_function(const attention_options& other) const;
};

struct linear_attention_options {
  index_t width = 0;     ///< d, of the model
  index_t heads = 1;     ///< query heads
  index_t kv_heads = 0;  ///< key/value heads, a divisor of heads; 0: as many as heads
  index_t head_dim = 0;  ///< 0: width / heads
  double out_scale = 1.0;

  [[nodiscard]] bool same_function(const linear_attention_options& other) const;
};

struct retention_options {
  index_t width = 0;      ///< d, of the model
  index_t heads = 1;      ///< H
  index_t head_dim = 0;   ///< of queries and keys; 0: width / heads
  index_t value_dim = 0;  ///< of values; 0: head_dim
  double out_scale = 1.0;

  [[nodiscard]] bool same_function(const retention_options& other) const;
};

struct mamba1_options {
  index_t width = 0;       ///< d, of the model
  index_t inner = 0;       ///< D_in; 0: 2 d
  index_t state = 16;      ///< N
  index_t dt_rank = 0;     ///< R; 0: ceil(d / 16)
  index_t conv_width = 4;  ///< W
  conv1d_activation activation = conv1d_activation::silu;
  double dt_min = 1e-3, dt_max = 0.1, dt_floor = 1e-4;
  double out_scale = 1.0;

  [[nodiscard]] bool same_function(const mamba1_options& other) const;
};

struct mamba2_options {
  index_t width = 0;       ///< d, of the model
  index_t heads = 1;       ///< H
  index_t head_dim = 64;   ///< P; heads * head_dim is the inner width
  index_t state = 128;     ///< N
  index_t groups = 1;      ///< G, groups of B and C, a divisor of H
  index_t conv_width = 4;  ///< W
  conv1d_activation activation = conv1d_activation::silu;
  bool gated_norm = true;  ///< RMSNorm of the gated output, in groups of inner width / G
  bool norm_before_gate = false;
  double norm_epsilon = 1e-5;
  double dt_min = 1e-3, dt_max = 0.1, dt_floor = 1e-4;  ///< initial step sizes, log-uniform
  step_limits limits = {};                              ///< clamp of the step size
  double a_min = 1, a_max = 16;                         ///< initial -A, uniform
  double out_scale = 1.0;                               ///< of the initial output projection

  [[nodiscard]] bool same_function(const mamba2_options& other) const;
};

struct discrete_mamba2_options {
  index_t width = 0;      ///< d, of the model
  index_t heads = 1;      ///< H, of x and of the decay
  index_t qk_heads = 0;   ///< heads of B and C, a divisor of H; 0: as many as heads
  index_t head_dim = 64;  ///< P
  index_t state = 64;     ///< N
  index_t conv_width = 4;
  conv1d_activation activation = conv1d_activation::none;
  bool identity_init = false;  ///< conv passes its input, gate = 1: MOHAWK's start
  double out_scale = 1.0;      ///< of the initial output projection

  [[nodiscard]] bool same_function(const discrete_mamba2_options& other) const;
};

struct gated_delta_net_options {
  index_t width = 0;      ///< d, of the model
  index_t heads = 1;      ///< value heads
  index_t qk_heads = 0;   ///< query/key heads, a divisor of heads; 0: as many as heads
  index_t head_dim = 64;  ///< of queries and keys
  index_t value_dim = 0;  ///< of values; 0: head_dim
  index_t conv_width = 4;
  double norm_epsilon = 1e-6;
  double out_scale = 1.0;

  [[nodiscard]] bool same_function(const gated_delta_net_options& other) const;
};

namespace detail {

/// The options with their defaults filled in. @throws value_error  one of them is out of range.
[[nodiscard]] attention_options completed(attention_options o);
[[nodiscard]] linear_attention_options completed(linear_attention_options o);
[[nodiscard]] retention_options completed(retention_options o);
[[nodiscard]] mamba1_options completed(mamba1_options o);
[[nodiscard]] mamba2_options completed(mamba2_options o);
[[nodiscard]] discrete_mamba2_options completed(discrete_mamba2_options o);
[[nodiscard]] gated_delta_net_options completed(gated_delta_net_options o);

}  // namespace detail
}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/mixer/options_impl.hpp>
#endif
