#pragma once

#include <ssmlib/kernels/cpu/embedding.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/parameter.hpp>
#include <ssmlib/nn/pass.hpp>

#include <cstdint>

namespace ssm {

namespace op {

/// Row ids[i, t] of the table for every token.
///
/// @param ids    (b, T)
/// @param table  (vocabulary, d)
/// @return       (b, T, d)
/// @throws value_error  an id outside the vocabulary; names both.
template <Real T>
[[nodiscard]] tensor<T, 3> embedding(const pass<T>& p, const tensor<std::int32_t, 2>& ids,
                                     const tensor<T, 2>& table) {
  detail::check_parameter<T, 2>("embedding", "the table", table, table.extents());
  const tensor<std::int32_t, 2> dense = ids.contiguous();
  tensor<T, 3> y(ids.extent(0), ids.extent(1), table.extent(1));
  kernels::embedding(p.ctx, table.const_view(), dense.data(), detail::input_tokens(y).view());
  if (p.tape == nullptr || !p.tape->wants(table)) return y;
  p.tape->record(y, [dense, table, y, &ctx = p.ctx, t = p.tape] {
    const tensor<T, 2> d_table = t->gradient(table);
    if (!d_table) return;
    kernels::embedding_vjp(ctx, dense.data(), detail::input_tokens(t->gradient(y)).const_view(),
                           d_table.view());
  });
  return y;
}

}  // namespace op

/// A table of vectors, one for every token of the vocabulary.
template <Real T>
struct embedding {
  tensor<T, 2> weight;  ///< (vocabulary, d)

  /// Independent normal elements. @param deviation  1 is PyTorch's; language models use about 0.02
  [[nodiscard]] static embedding make(index_t vocabulary, index_t features, std::uint64_t seed,
                                      double deviation = 1.0) {
    return {normal<T, 2>({vocabulary, features}, deviation, seed)};
  }

  [[nodiscard]] tensor<T, 3> operator()(const pass<T>& p,
                                        const tensor<std::int32_t, 2>& ids) const {
    return op::embedding(p, ids, weight);
  }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::matrix);
  }
};

}  // namespace ssm
