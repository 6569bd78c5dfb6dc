#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/rows.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace ssm::kernels {

/// y[t, :] = table[ids[t], :].
/// @throws value_error  an id outside [0, rows of the table).
template <Real T>
void embedding(const cpu::context& ctx, view<const T, 2> table, const std::int32_t* ids,
               view<T, 2> y) {
  const index_t rows = y.extent(0), width = y.extent(1);
  for (index_t t = 0; t < rows; ++t) {
    if (ids[t] < 0 || ids[t] >= table.extent(0)) {
      throw value_error("ssm: embedding: token " + std::to_string(t) + " has id " +
                        std::to_string(ids[t]) + ", the vocabulary has " +
                        std::to_string(table.extent(0)) + " entries; wanted 0 <= id < that");
    }
  }
  for_each_piece(ctx, rows, row_pieces(rows, width), [&](index_t, index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      std::copy_n(table.data + ids[t] * table.stride(0), width, y.data + t * y.stride(0));
    }
  });
}

/// d_table[ids[t], :] += dy[t, :]. A task owns columns and takes the tokens in order, so equal ids
/// are summed in one order.
template <Real T>
void embedding_vjp(const cpu::context& ctx, const std::int32_t* ids, view<const T, 2> dy,
                   view<T, 2> d_table) {
  const index_t rows = dy.extent(0), width = dy.extent(1);
  ctx.parallel_ranges(width, row_pieces(width, rows), 64, [&](index_t begin, index_t end) {
    for (index_t t = 0; t < rows; ++t) {
      axpy(end - begin, T(1), dy.data + t * dy.stride(0) + begin,
           d_table.data + ids[t] * d_table.stride(0) + begin);
    }
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                \
  SSMLIB_INSTANTIATE(layers, void embedding<T>(const cpu::context&, view<const T, 2>,        \
                                               const std::int32_t*, view<T, 2>));            \
  SSMLIB_INSTANTIATE(layers, void embedding_vjp<T>(const cpu::context&, const std::int32_t*, \
                                                   view<const T, 2>, view<T, 2>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
