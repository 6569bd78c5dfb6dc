#pragma once

#include <ssmlib/distill/hidden_state_alignment.hpp>
#include <ssmlib/kernels/cuda/matrix_distance.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

/// @file
/// Hidden-state alignment on CUDA. Nothing waits for the device.

namespace ssm {

template <Floating T>
void apply_state_distances(const cuda::context& ctx, const tensor<T, 2, cuda>& student,
                           const tensor<T, 2, cuda>& teacher,
                           const tensor<double, 1, cuda>& distances) {
  kernels::cuda::state_distances<T>(ctx.stream(), {student.const_view(), teacher.const_view()},
                                    distances.data());
}
template <Floating T>
void apply_state_distances_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& student,
                               const tensor<T, 2, cuda>& teacher,
                               const tensor<double, 1, cuda>& distances,
                               const tensor<accum_t<T>, 1, cuda>& d_loss,
                               const tensor<T, 2, cuda>& d_student,
                               const tensor<T, 2, cuda>& d_teacher) {
  kernels::cuda::state_distances_vjp<T>(
      ctx.stream(), {student.const_view(), teacher.const_view()}, distances.data(), d_loss.data(),
      static_cast<double>(student.extent(0)), d_student.view(), d_teacher.view());
}

}  // namespace ssm
