#pragma once

#include <ssmlib/kernels/cuda/embedding.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/nn/embedding.hpp>

#include <cstdint>
#include <string>

namespace ssm {

/// Ids on the device: rows of NaN for those outside the table. @pre they lie densely
template <Floating T>
void apply_embedding(const cuda::context& ctx, const tensor<accum_t<T>, 2, cuda>& table,
                     const tensor<std::int32_t, 2, cuda>& ids, const tensor<T, 2, cuda>& y) {
  if (y.size() == 0) return;
  kernels::cuda::embedding<T, accum_t<T>>(ctx.stream(), table.const_view(), ids.data(), y.view());
}

/// The ids are on the host: they are checked there, without waiting for the device.
template <Floating T>
void apply_embedding(const cuda::context& ctx, const tensor<accum_t<T>, 2, cuda>& table,
                     const tensor<std::int32_t, 2>& ids, const tensor<T, 2, cuda>& y) {
  for (index_t t = 0; t < ids.size(); ++t) {
    if (ids.data()[t] < 0 || ids.data()[t] >= table.extent(0)) {
      throw value_error("ssm: embedding: token " + std::to_string(t) + " has id " +
                        std::to_string(ids.data()[t]) + ", the vocabulary has " +
                        std::to_string(table.extent(0)) + " entries; wanted 0 <= id < that");
    }
  }
  if (y.size() == 0) return;
  apply_embedding(ctx, table, detail::on_backend<cuda>(ids), y);
}

template <Floating T>
void apply_embedding_vjp(const cuda::context& ctx, const tensor<std::int32_t, 2>& ids,
                         const tensor<T, 2, cuda>& dy, const tensor<accum_t<T>, 2, cuda>& d_table) {
  if (dy.size() == 0 || !d_table) return;
  const auto there = detail::on_backend<cuda>(ids);
  const kernels::cuda::embedding_vjp_problem<T> problem{there.data(), dy.const_view()};
  const detail::cuda_workspace workspace(
      ctx, kernels::cuda::embedding_vjp_workspace_bytes<T>(problem, d_table.extent(0)));
  const bool add = !detail::overwrites(d_table);
  kernels::cuda::embedding_vjp<T>(ctx.stream(), problem, d_table.view(), add, workspace.data());
}

}  // namespace ssm
