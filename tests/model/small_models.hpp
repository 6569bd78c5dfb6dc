#pragma once

#include <ssmlib/model/language_model.hpp>
#include <ssmlib/tensor/random.hpp>

#include <cmath>
#include <limits>
#include <string>

namespace ssm_test {

/// A small model of the given pattern; head and state sizes that no vector width divides.
inline ssm::model_config small_config(const std::string& pattern) {
  ssm::model_config c;
  c.vocabulary = 19;
  c.width = 24;
  c.pattern = pattern;
  c.mlp_hidden = 20;
  c.embedding_deviation = 0.5;
  c.attention = {.heads = 4, .kv_heads = 2, .rope = ssm::rope_options{}};
  c.mamba2 = {.heads = 4, .head_dim = 6, .state = 5, .groups = 2};
  c.discrete_mamba2 = {.heads = 4, .qk_heads = 2, .head_dim = 6, .state = 5};
  c.mamba1 = {.inner = 20, .state = 3};
  c.retention = {.heads = 3, .value_dim = 5};
  c.linear_attention = {.heads = 4, .kv_heads = 2};
  c.gated_delta_net = {.heads = 4, .qk_heads = 2, .head_dim = 6, .value_dim = 5};
  return c;
}

inline ssm::tensor<std::int32_t, 2> random_ids(ssm::index_t b, ssm::index_t n, std::uint64_t seed) {
  ssm::tensor<std::int32_t, 2> ids(b, n);
  ssm::philox random(seed);
  for (ssm::index_t i = 0; i < ids.size(); ++i) {
    ids.data()[i] = static_cast<std::int32_t>(random.below(19));
  }
  return ids;
}

template <class T>
double largest_difference(const ssm::tensor<T, 3>& a, const ssm::tensor<T, 3>& b) {
  if (a.extents() != b.extents()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  a.zip_with(b, [&](const T& x, const T& y) {
    const double d = std::abs(static_cast<double>(x) - static_cast<double>(y));
    if (!(d <= worst)) worst = d;  // keeps NaN
  });
  return worst;
}

}  // namespace ssm_test
