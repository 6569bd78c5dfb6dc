#pragma once

/// @file
/// Losses: cross-entropy, distillation and preference. Each returns one element, recorded on the
/// pass's tape: fill its gradient with 1 and run the tape backward.

#include <ssmlib/train/cross_entropy.hpp>
#include <ssmlib/train/distillation_loss.hpp>
#include <ssmlib/train/preference_loss.hpp>
