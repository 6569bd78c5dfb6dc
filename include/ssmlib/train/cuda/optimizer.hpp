#pragma once

#include <ssmlib/kernels/cuda/optimizer.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>
#include <ssmlib/train/gradient.hpp>

#include <cstddef>
#include <cstring>
#include <vector>

/// @file
/// The optimiser on CUDA: one launch for all parameters of a model.

namespace ssm {

namespace detail {

/// A list of tensors on the device, for kernels that work on all of them.
template <class Entry>
class device_table {
 public:
  device_table(const cuda::context& ctx, const std::vector<Entry>& tensors)
      : bytes_(ctx, size_of(tensors)) {
    const std::vector<index_t> first = kernels::cuda::first_pieces(tensors);
    if (first.back() == 0) return;
    const std::size_t tensor_bytes = tensors.size() * sizeof(Entry);
    std::vector<std::byte> both(size_of(tensors));
    std::memcpy(both.data(), tensors.data(), tensor_bytes);
    std::memcpy(both.data() + tensor_bytes, first.data(), both.size() - tensor_bytes);
    const cuda::scope scope(ctx);
    elements<cuda>::write(bytes_.data(), both.data(), both.size());
    auto* begin = static_cast<std::byte*>(bytes_.data());
    table_ = {reinterpret_cast<const Entry*>(begin),
              reinterpret_cast<const index_t*>(begin + tensor_bytes),
              static_cast<index_t>(tensors.size()), first.back()};
  }
  /// Without pieces where the tensors have no values.
  [[nodiscard]] const kernels::cuda::tensor_table<Entry>& get() const { return table_; }

 private:
  static_assert(alignof(Entry) == alignof(index_t));
  [[nodiscard]] static std::size_t size_of(const std::vector<Entry>& tensors) {
    return tensors.size() * (sizeof(Entry) + sizeof(index_t)) + sizeof(index_t);
  }

  cuda_workspace bytes_;
  kernels::cuda::tensor_table<Entry> table_{nullptr, nullptr, 0, 0};
};

}  // namespace detail

template <Real R>
void apply_adamw(const cuda::context& ctx, const kernels::adamw_step<R>& step,
                 const std::vector<adamw_values<R, cuda>>& list) {
  std::vector<kernels::cuda::adamw_tensor<R>> tensors;
  for (const adamw_values<R, cuda>& v : list) {
    tensors.push_back({v.gradient.data(), v.first.data(), v.second.data(), v.value.data(),
                       v.copy.data(), v.value.size(), v.decays});
  }
  const detail::device_table table(ctx, tensors);
  if (table.get().pieces == 0) return;
  const auto scale = detail::on_backend<cuda>(
      tensor<double, 1>::full({1}, static_cast<double>(step.gradient_scale)));
  kernels::cuda::adamw<R>(ctx.stream(), table.get(),
                          {step.beta1, step.beta2, step.rest1, step.rest2, step.keep, step.rate,
                           step.root_factor, step.epsilon},
                          scale.data());
}

template <Real R>
[[nodiscard]] double apply_sum_of_squares(const cuda::context& ctx,
                                          const std::vector<tensor<R, 1, cuda>>& list) {
  std::vector<kernels::cuda::adamw_tensor<R>> tensors;
  for (const tensor<R, 1, cuda>& t : list)
    tensors.push_back({t.data(), nullptr, nullptr, nullptr, nullptr, t.size(), false});
  const detail::device_table table(ctx, tensors);
  if (table.get().pieces == 0) return 0;
  const detail::cuda_workspace workspace(
      ctx, kernels::cuda::gradient_norm_workspace_bytes<R>(table.get()));
  const tensor<double, 1, cuda> sum(1);
  kernels::cuda::gradient_norm<R>(ctx.stream(), table.get(), {.sum_of_squares = sum.data()},
                                  workspace.data());
  return detail::on_host(sum)(0);
}

}  // namespace ssm
