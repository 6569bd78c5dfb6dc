#pragma once

#include "harness.hpp"

namespace bench {

/// This machine's own limits, measured among the cases that are compared with them.
struct ceilings {
  double gemm_1 = 0, gemm_n = 0;  ///< our product of 1024^3, flops/s on 1 and on all threads
  double blas_1 = 0, blas_n = 0;  ///< OpenBLAS likewise; 0 without it
  double exps = 0;                ///< vector exp of an array in the cache, all threads
  double copy = 0;                ///< bytes/s read and written by a copy, all threads

  /// The faster of the two products.
  [[nodiscard]] double flops_n() const { return std::max(gemm_n, blas_n); }
  [[nodiscard]] double of(unit u) const {
    return u == unit::flops ? flops_n() : u == unit::exps ? exps : u == unit::bytes ? copy : 0;
  }
};

void add_ceilings(session& s);
[[nodiscard]] ceilings measured_ceilings(const session& s);

}  // namespace bench
