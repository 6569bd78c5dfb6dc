#pragma once

#include <ssmlib/kernels/cpu/embedding.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/nn/checks.hpp>
#include <ssmlib/nn/parameter.hpp>
#include <ssmlib/nn/pass.hpp>

#include <cstdint>

namespace ssm {

template <Real T>
void apply_embedding(const cpu::context& ctx, const tensor<T, 2>& table,
                     const tensor<std::int32_t, 2>& ids, const tensor<T, 2>& y) {
  kernels::embedding(ctx, table.const_view(), ids.data(), y.view());
}
template <Real T>
void apply_embedding_vjp(const cpu::context& ctx, const tensor<std::int32_t, 2>& ids,
                         const tensor<T, 2>& dy, const tensor<T, 2>& d_table) {
  kernels::embedding_vjp(ctx, ids.data(), dy.const_view(), d_table.view());
}

namespace op {

/// Row ids[i, t] of the table for every token.
///
/// @param ids    (b, T)
/// @param table  (vocabulary, d)
/// @return       (b, T, d)
/// @throws value_error  an id outside the vocabulary; names both.
template <Floating T, Backend B>
[[nodiscard]] tensor<T, 3, B> embedding(const pass<T, B>& p, const tensor<std::int32_t, 2>& ids,
                                        const tensor<accum_t<T>, 2, B>& table) {
  detail::check_parameter("embedding", "the table", table, table.extents());
  const tensor<std::int32_t, 2> dense = ids.contiguous();
  const typename B::scope scope(p.ctx);
  tensor<T, 3, B> y(ids.extent(0), ids.extent(1), table.extent(1));
  apply_embedding(p.ctx, table, dense, detail::input_tokens(y));
  if (p.tape == nullptr || !p.tape->wants(table)) return y;
  p.tape->record(y, [dense, table, y, &ctx = p.ctx, t = p.tape] {
    if (const auto d_table = t->gradient(table)) {
      apply_embedding_vjp(ctx, dense, detail::input_tokens(t->gradient(y)), d_table);
    }
  });
  return y;
}

}  // namespace op

/// A table of vectors, one for every token of the vocabulary.
template <Floating T, Backend B = cpu>
struct embedding {
  tensor<accum_t<T>, 2, B> weight;  ///< (vocabulary, d)

  /// Independent normal elements. @param deviation  1 is PyTorch's; language models use about 0.02
  [[nodiscard]] static embedding make(index_t vocabulary, index_t features, std::uint64_t seed,
                                      double deviation = 1.0) {
    return {detail::on_backend<B>(normal<accum_t<T>, 2>({vocabulary, features}, deviation, seed))};
  }

  [[nodiscard]] tensor<T, 3, B> operator()(const pass<T, B>& p,
                                           const tensor<std::int32_t, 2>& ids) const {
    return op::embedding(p, ids, weight);
  }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("weight", self.weight, parameter_kind::matrix);
  }
};

}  // namespace ssm
