#pragma once

/// @file
/// The whole library but files: layers 0 to 10. Files and JSON are <ssmlib/io.hpp>.

#include <ssmlib/base/config.hpp>
#include <ssmlib/decode/generate.hpp>
#include <ssmlib/decode/speculate.hpp>
#include <ssmlib/distill/mohawk.hpp>
#include <ssmlib/grad/operations.hpp>
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/gated_linear.hpp>
#include <ssmlib/lower/gram.hpp>
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/lower/state.hpp>
#include <ssmlib/lower/toeplitz.hpp>
#include <ssmlib/lower/user_mask.hpp>
#include <ssmlib/mixer/verify.hpp>
#include <ssmlib/model/language_model.hpp>
#include <ssmlib/train/losses.hpp>
#include <ssmlib/train/model_losses.hpp>
#include <ssmlib/train/next_token.hpp>
#include <ssmlib/train/trainer.hpp>
