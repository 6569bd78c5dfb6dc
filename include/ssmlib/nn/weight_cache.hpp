#pragma once

#include <ssmlib/tensor/tensor.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

namespace ssm {

/// Copies of parameters in the element type of the passes that read them, each made when it is
/// first asked for: what bf16 products read instead of the float parameters, converted once and not
/// in every call. Float and double models read their parameters themselves and keep nothing here.
///
///     weight_cache<bf16, cuda> weights;
///     const pass<bf16, cuda> p{.ctx = ctx, .weights = &weights};
///
/// A copy is not aware of what happens to the parameter: whoever gives a pass a cache clears it
/// after changing parameters. train() and the decoding functions have their own, and clear it
/// where foreign code may have changed something. AdamW writes to the copies what it writes to the
/// parameters.
///
/// One context and one thread at a time, as for tensors. It outlives the backward pass of what was
/// recorded with it.
/// @cost memory: the parameters that were asked for, in T.
template <Floating T, Backend B = cpu>
class weight_cache {
 public:
  using parameter_type = accum_t<T>;

  weight_cache() = default;
  weight_cache(const weight_cache&) = delete;
  weight_cache& operator=(const weight_cache&) = delete;

  /// The parameter, or a part of one, in T, rounded to nearest; for float and double itself.
  template <int R>
  [[nodiscard]] tensor<T, R, B> get(const typename B::context& ctx,
                                    const tensor<parameter_type, R, B>& parameter);

  /// The copy of a whole, dense parameter, for whoever is about to write the same new values to
  /// both; absent if there is none. Copies of parts of it are dropped.
  [[nodiscard]] tensor<T, 1, B> copy_to_update(const tensor<parameter_type, 1, B>& parameter);

  /// Drops all copies.
  void clear() { entries_.clear(); }
  /// The number of copies, and their size.
  [[nodiscard]] index_t size() const { return static_cast<index_t>(entries_.size()); }
  [[nodiscard]] std::size_t bytes() const {
    std::size_t sum = 0;
    for (const auto& [key, e] : entries_)
      sum += e.copy.storage().bytes();
    return sum;
  }

 private:
  /// Elements in memory, by address.
  struct place {
    std::uintptr_t data;
    shape<4> extents, strides;

    friend auto operator<=>(const place&, const place&) = default;
    [[nodiscard]] bool is_dense() const {
      return detail::strided_axes{extents, strides}.are_dense();
    }
    [[nodiscard]] std::uintptr_t end() const {
      index_t last = 0;
      for (std::size_t d = 0; d < 4; ++d)
        last += (extents[d] - 1) * strides[d];
      return data + static_cast<std::uintptr_t>(last + 1) * sizeof(parameter_type);
    }
  };
  template <int R>
  [[nodiscard]] static place place_of(const tensor<parameter_type, R, B>& t) {
    const detail::strided_axes axes = t.axes();
    return {reinterpret_cast<std::uintptr_t>(t.data()), axes.extents, axes.strides};
  }
  struct entry {
    buffer<B> parameter;  // keeps its address from being reused
    tensor<T, 1, B> copy;
  };

  std::map<place, entry> entries_;
};

namespace detail {
/// A dense copy in another type; through apply_cast(ctx, from, to) of the backend.
template <Floating To, Floating From, int R, Backend B>
[[nodiscard]] tensor<To, R, B> converted(const typename B::context& ctx,
                                         const tensor<From, R, B>& from) {
  if (!from) return {};
  const typename B::scope scope(ctx);
  tensor<To, R, B> to(from.extents());
  apply_cast(ctx, from, to);
  return to;
}
}  // namespace detail

template <Floating T, Backend B>
template <int R>
tensor<T, R, B> weight_cache<T, B>::get(const typename B::context& ctx,
                                        const tensor<parameter_type, R, B>& parameter) {
  if constexpr (std::same_as<T, parameter_type>) {
    return parameter;
  } else {
    if (parameter.size() == 0) return detail::converted<T>(ctx, parameter);
    const place key = place_of(parameter);
    auto found = entries_.find(key);
    if (found == entries_.end()) {
      tensor<T, R, B> copy = detail::converted<T>(ctx, parameter);
      found = entries_.emplace(key, entry{parameter.storage(), copy.reshape(copy.size())}).first;
    }
    return found->second.copy.template reshape<R>(parameter.extents());
  }
}

template <Floating T, Backend B>
tensor<T, 1, B> weight_cache<T, B>::copy_to_update(const tensor<parameter_type, 1, B>& parameter) {
  tensor<T, 1, B> copy;
  if (parameter.size() == 0) return copy;
  const place mine = place_of(parameter);
  std::erase_if(entries_, [&](const auto& item) {
    const auto& [at, e] = item;
    if (at.data == mine.data && e.copy.size() == parameter.size() && at.is_dense() && !copy) {
      copy = e.copy;
      return false;
    }
    return at.data < mine.end() && mine.data < at.end();
  });
  return copy;
}

}  // namespace ssm
