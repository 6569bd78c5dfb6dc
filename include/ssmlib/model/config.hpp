#pragma once

#include <ssmlib/mixer/attention.hpp>
#include <ssmlib/mixer/gated_delta_net.hpp>
#include <ssmlib/mixer/linear_attention.hpp>
#include <ssmlib/mixer/mamba1.hpp>
#include <ssmlib/mixer/mamba2.hpp>

#include <string>
#include <string_view>

namespace ssm {

enum class norm_kind { rms, layer };
enum class mlp_kind { swiglu, gelu };

/// A language model: an embedding, one layer for every letter of the pattern, a final norm, a head.
///
///   *  softmax attention         M  Mamba-2              -  MLP
///   m  Mamba-1                   D  discrete Mamba-2     R  retention
///   L  linear attention          G  Gated DeltaNet
///   P  attention || MLP          p  discrete Mamba-2 || MLP   (Phi's parallel blocks)
///
/// Each letter is one pre-norm residual layer, so that a Llama block is "*-" and NVIDIA's
/// Mamba-2-Hybrid starts "M-M-M--M-M*-". Widths of the options below are filled in from `width`.
/// Other letters can be layers of your own, see own_layer.
struct model_config {
  index_t vocabulary = 256;
  index_t width = 0;
  std::string pattern;

  attention_options attention = {};
  mamba2_options mamba2 = {};
  discrete_mamba2_options discrete_mamba2 = {};
  mamba1_options mamba1 = {};
  retention_options retention = {};
  linear_attention_options linear_attention = {};
  gated_delta_net_options gated_delta_net = {};

  mlp_kind mlp = mlp_kind::swiglu;
  index_t mlp_hidden = 0;  ///< 0: 4 width (gelu), 8/3 width to a multiple of 16 (swiglu)
  norm_kind norm = norm_kind::rms;
  double norm_epsilon = 1e-5;
  bool tie_embeddings = true;  ///< the head is the embedding
  bool head_bias = false;
  double embedding_deviation = 0.02;

  [[nodiscard]] index_t mlp_width() const {
    if (mlp_hidden > 0) return mlp_hidden;
    return mlp == mlp_kind::gelu ? 4 * width : (8 * width / 3 + 15) / 16 * 16;
  }
};

/// Every letter that a pattern may have.
inline constexpr std::string_view layer_letters = "*M-mDRLGPp";

/// @param own  letters of layers that the caller makes, see own_layer
/// @throws value_error  an empty pattern, or a letter that is neither one of layer_letters nor own.
void check_pattern(std::string_view pattern, std::string_view own = {});

/// @throws value_error  a pattern or a number that makes no model; mixers check their own options.
void check_config(const model_config& config, std::string_view own = {});

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/model/config_impl.hpp>
#endif
