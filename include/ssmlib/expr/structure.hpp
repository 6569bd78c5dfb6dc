#pragma once

/// @file
/// What a T x T matrix is, as a type. A mixer carries one of these; it documents which products
/// are cheap and lets generic code ask (`std::same_as<typename M::structure, ...>`).

namespace ssm::structure {

struct dense {};              ///< nothing is known
struct diagonal {};           ///< T numbers
struct low_rank {};           ///< Q K^T, rank = feature size
struct causal_ones {};        ///< 1 on and below the diagonal
struct banded {};             ///< 1 on the diagonal and the w - 1 places before it
struct toeplitz {};           ///< a function of t - s
struct one_semiseparable {};  ///< exp(sum of log decays between s and t), t >= s
struct semiseparable {};      ///< 1-semiseparable mask o low rank; rank-N blocks below the diagonal
struct masked_low_rank {};    ///< any other mask o low rank: as fast as the mask multiplies
struct softmax_dense {};      ///< rows sum to one, no low-rank form
struct delta_rule {};         ///< products of Householder-like transitions, still rank N per block

}  // namespace ssm::structure
