#pragma once

#include "harness.hpp"

namespace bench {

// Each adds its mixers by all their algorithms, in its own translation unit.
void sweep_attention(session& s);
void sweep_linear(session& s);
void sweep_ssd(session& s);
void sweep_selective(session& s);
void sweep_gated(session& s);
void sweep_toeplitz(session& s);

/// The algorithms that alg::automatic chooses between, around the lengths where it changes.
void add_crossovers(session& s);

/// The shape that all mixers of the sweep have in common: the width of a small model.
inline constexpr index_t sweep_heads = 8, sweep_state = 64, sweep_features = 64;

}  // namespace bench
