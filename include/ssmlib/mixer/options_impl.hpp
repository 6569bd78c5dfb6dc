#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/mixer/options.hpp>

#include <cmath>
#include <string>

namespace ssm {

namespace detail {

/// Throws one sentence about the options of one mixer.
class option_checks {
 public:
  explicit option_checks(const char* mixer) : mixer_(mixer) {}

  void at_least(index_t least, const char* name, index_t value, const char* advice) const {
    if (value >= least) return;
    fail(std::string(name) + " is " + std::to_string(value) + "; wanted at least " +
         std::to_string(least) + ", " + advice);
  }
  void divides(const char* part, index_t n, const char* whole, index_t of,
               const char* advice) const {
    if (of % n == 0) return;
    fail(std::string(part) + " is " + std::to_string(n) + ", " + whole + " is " +
         std::to_string(of) + "; wanted " + part + " to divide " + whole + ", " + advice);
  }
  void positive_range(const char* low_name, double low, const char* high_name, double high) const {
    if (low > 0 && low <= high && std::isfinite(high)) return;
    fail(std::string(low_name) + " is " + std::to_string(low) + ", " + high_name + " is " +
         std::to_string(high) + "; wanted 0 < " + low_name + " <= " + high_name + ", both finite");
  }
  void not_negative(const char* name, double value) const {
    if (value >= 0 && std::isfinite(value)) return;
    fail(std::string(name) + " is " + std::to_string(value) + "; wanted a finite number >= 0");
  }

  void width_and_heads(index_t width, index_t heads) const {
    at_least(1, "width", width, "give the width of the model");
    at_least(1, "heads", heads, "give the number of heads");
  }
  /// The default of head_dim.
  [[nodiscard]] index_t head_dim(index_t head_dim, index_t width, index_t heads) const {
    at_least(0, "head_dim", head_dim, "0 is width / heads");
    if (head_dim == 0) divides("heads", heads, "width", width, "or set head_dim");
    return head_dim == 0 ? width / heads : head_dim;
  }
  /// The default of a smaller head count.
  [[nodiscard]] index_t shared_heads(const char* name, index_t n, index_t heads) const {
    at_least(0, name, n, "0 is as many as heads");
    if (n == 0) return heads;
    divides(name, n, "heads", heads, "change one of them");
    return n;
  }
  void conv_width(index_t width) const {
    at_least(1, "conv_width", width, "1 looks at no earlier token");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw value_error("ssm: " + std::string(mixer_) + ": " + what);
  }
  const char* mixer_;
};

SSMLIB_INLINE attention_options completed(attention_options o) {
  const option_checks check("attention");
  check.width_and_heads(o.width, o.heads);
  o.kv_heads = check.shared_heads("kv_heads", o.kv_heads, o.heads);
  o.head_dim = check.head_dim(o.head_dim, o.width, o.heads);
  check.at_least(0, "window", o.window, "0 is no window");
  if (o.scale && !std::isfinite(*o.scale)) {
    throw value_error("ssm: attention: scale is " + std::to_string(*o.scale) +
                      "; wanted a finite number, leave it unset for head_dim^(-1/2)");
  }
  return o;
}
SSMLIB_INLINE linear_attention_options completed(linear_attention_options o) {
  const option_checks check("linear_attention");
  check.width_and_heads(o.width, o.heads);
  o.kv_heads = check.shared_heads("kv_heads", o.kv_heads, o.heads);
  o.head_dim = check.head_dim(o.head_dim, o.width, o.heads);
  return o;
}
SSMLIB_INLINE retention_options completed(retention_options o) {
  const option_checks check("retention");
  check.width_and_heads(o.width, o.heads);
  o.head_dim = check.head_dim(o.head_dim, o.width, o.heads);
  check.at_least(0, "value_dim", o.value_dim, "0 is head_dim");
  if (o.value_dim == 0) o.value_dim = o.head_dim;
  return o;
}
SSMLIB_INLINE mamba1_options completed(mamba1_options o) {
  const option_checks check("mamba1");
  check.at_least(1, "width", o.width, "give the width of the model");
  check.at_least(0, "inner", o.inner, "0 is 2 width");
  check.at_least(1, "state", o.state, "give the size of a channel's state");
  check.at_least(0, "dt_rank", o.dt_rank, "0 is width / 16");
  check.conv_width(o.conv_width);
  check.positive_range("dt_min", o.dt_min, "dt_max", o.dt_max);
  check.not_negative("dt_floor", o.dt_floor);
  if (o.inner == 0) o.inner = 2 * o.width;
  if (o.dt_rank == 0) o.dt_rank = (o.width + 15) / 16;
  return o;
}
SSMLIB_INLINE mamba2_options completed(mamba2_options o) {
  const option_checks check("mamba2");
  check.width_and_heads(o.width, o.heads);
  check.at_least(1, "head_dim", o.head_dim, "give the features of a head");
  check.at_least(1, "state", o.state, "give the size of a feature's state");
  check.at_least(1, "groups", o.groups, "1 shares B and C among all heads");
  check.divides("groups", o.groups, "heads", o.heads, "change one of them");
  check.conv_width(o.conv_width);
  check.not_negative("norm_epsilon", o.norm_epsilon);
  check.positive_range("dt_min", o.dt_min, "dt_max", o.dt_max);
  check.not_negative("dt_floor", o.dt_floor);
  check.positive_range("a_min", o.a_min, "a_max", o.a_max);
  if (!(o.limits.low <= o.limits.high)) {
    throw value_error("ssm: mamba2: limits are " + std::to_string(o.limits.low) + " and " +
                      std::to_string(o.limits.high) + "; wanted low <= high");
  }
  return o;
}
SSMLIB_INLINE discrete_mamba2_options completed(discrete_mamba2_options o) {
  const option_checks check("discrete_mamba2");
  check.width_and_heads(o.width, o.heads);
  o.qk_heads = check.shared_heads("qk_heads", o.qk_heads, o.heads);
  check.at_least(1, "head_dim", o.head_dim, "give the features of a head");
  check.at_least(1, "state", o.state, "give the size of a feature's state");
  check.conv_width(o.conv_width);
  return o;
}
SSMLIB_INLINE gated_delta_net_options completed(gated_delta_net_options o) {
  const option_checks check("gated_delta_net");
  check.width_and_heads(o.width, o.heads);
  o.qk_heads = check.shared_heads("qk_heads", o.qk_heads, o.heads);
  check.at_least(1, "head_dim", o.head_dim, "give the features of a query or key");
  check.at_least(0, "value_dim", o.value_dim, "0 is head_dim");
  check.conv_width(o.conv_width);
  check.not_negative("norm_epsilon", o.norm_epsilon);
  if (o.value_dim == 0) o.value_dim = o.head_dim;
  return o;
}

}  // namespace detail

SSMLIB_INLINE bool attention_options::same_function(const attention_options& other) const {
  return width == other.width && heads == other.heads && kv_heads == other.kv_heads &&
         head_dim == other.head_dim && window == other.window && scale == other.scale &&
         rope == other.rope && bias == other.bias;
}
SSMLIB_INLINE bool linear_attention_options::same_function(
    const linear_attention_options& other) const {
  return width == other.width && heads == other.heads && kv_heads == other.kv_heads &&
         head_dim == other.head_dim;
}
SSMLIB_INLINE bool retention_options::same_function(const retention_options& other) const {
  return width == other.width && heads == other.heads && head_dim == other.head_dim &&
         value_dim == other.value_dim;
}
SSMLIB_INLINE bool mamba1_options::same_function(const mamba1_options& other) const {
  return width == other.width && inner == other.inner && state == other.state &&
         dt_rank == other.dt_rank && conv_width == other.conv_width &&
         activation == other.activation;
}
SSMLIB_INLINE bool mamba2_options::same_function(const mamba2_options& other) const {
  return width == other.width && heads == other.heads && head_dim == other.head_dim &&
         state == other.state && groups == other.groups && conv_width == other.conv_width &&
         activation == other.activation && gated_norm == other.gated_norm &&
         norm_before_gate == other.norm_before_gate && norm_epsilon == other.norm_epsilon &&
         limits == other.limits;
}
SSMLIB_INLINE bool discrete_mamba2_options::same_function(
    const discrete_mamba2_options& other) const {
  return width == other.width && heads == other.heads && qk_heads == other.qk_heads &&
         head_dim == other.head_dim && state == other.state && conv_width == other.conv_width &&
         activation == other.activation;
}
SSMLIB_INLINE bool gated_delta_net_options::same_function(
    const gated_delta_net_options& other) const {
  return width == other.width && heads == other.heads && qk_heads == other.qk_heads &&
         head_dim == other.head_dim && value_dim == other.value_dim &&
         conv_width == other.conv_width && norm_epsilon == other.norm_epsilon;
}

}  // namespace ssm
