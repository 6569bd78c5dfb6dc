#pragma once

#include <ssmlib/backend/cuda.hpp>
#include <ssmlib/tensor/tensor.hpp>

namespace ssm::detail {

template <>
struct elements<cuda> {
  static void copy(void* to, const strided_axes& to_axes, const void* from,
                   const strided_axes& from_axes, std::size_t element_bytes);
  static void fill(void* to, const strided_axes& axes, const void* value,
                   std::size_t element_bytes);
};

}  // namespace ssm::detail

#if defined(__CUDACC__) && !defined(SSMLIB_COMPILED)
#include <ssmlib/tensor/cuda_elements.cuh>
#endif
