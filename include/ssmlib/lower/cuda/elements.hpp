#pragma once

#include <ssmlib/kernels/cuda/elementwise.hpp>
#include <ssmlib/lower/streams.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

namespace ssm {

/// to = from in another element type, rounded to nearest, by one kernel. @pre the same shape
template <Floating To, Floating From, int R>
void apply_cast(const cuda::context& ctx, const tensor<From, R, cuda>& from,
                const tensor<To, R, cuda>& to) {
  detail::stream_walk<2> walk{detail::aligned_extents(from.extents()),
                              {detail::aligned_strides(from), detail::aligned_strides(to)}};
  walk.merge();
  kernels::cuda::elementwise_problem<kernels::cuda::form::leaf<From>, To> p;
  p.in.extents = walk.extents;
  p.in.data[0] = from.data();
  p.in.strides[0] = walk.strides[0];
  p.y = to.data();
  p.y_strides = walk.strides[1];
  kernels::cuda::elementwise_forward(ctx.stream(), p);
}

namespace detail {

/// The tensor itself if it holds T, else a dense copy converted to T by one kernel, rounded to
/// nearest. Absent stays absent.
template <Floating T, Floating From, int R>
[[nodiscard]] tensor<T, R, cuda> as_type(const cuda::context& ctx,
                                         const tensor<From, R, cuda>& from) {
  if constexpr (std::same_as<T, From>) {
    return from;
  } else {
    if (!from) return {};
    const cuda::scope scope(ctx);
    const tensor<T, R, cuda> out(from.extents());
    apply_cast(ctx, from, out);
    return out;
  }
}

}  // namespace detail
}  // namespace ssm
