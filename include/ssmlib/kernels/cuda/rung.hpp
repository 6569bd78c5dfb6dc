#pragma once

/// @file
/// The ladder of kernels: what a launch may use, from the architecture that a context allows.

namespace ssm::kernels::cuda {

/// Kernels by the instructions that they need. A launch takes the highest rung that its problem's
/// `most`, the problem's types, sizes and strides, and the card have.
enum class rung {
  general,  ///< no matrix instructions: any element type, size and stride
  sm_80,    ///< mma.sync and cp.async: compute capability 8.0 and later
  sm_90a,   ///< wgmma and the tensor copy engine: compute capability 9.0 alone
};

/// The highest rung of a compute capability, as 90.
[[nodiscard]] constexpr rung rung_of(int arch) {
  return arch / 10 == 9 ? rung::sm_90a : arch >= 80 ? rung::sm_80 : rung::general;
}

}  // namespace ssm::kernels::cuda
