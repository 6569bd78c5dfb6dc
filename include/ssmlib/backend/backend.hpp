#pragma once

#include <concepts>
#include <string_view>
#include <type_traits>

namespace ssm {

/// Where a tensor lives and which kernels work on it: an empty tag that is part of the tensor's
/// type. Run-time state (threads; or stream, pool and handles) is its `context`, passed to eval.
///
/// New tensors belong to the context that is current on the calling thread, where a backend has
/// such a thing: `typename B::scope s(ctx)` makes one current, B::current() is what a scope takes
/// to restore it later.
template <class B>
concept Backend = std::is_empty_v<B> && requires {
  { B::name } -> std::convertible_to<std::string_view>;
  typename B::context;
  typename B::scope;
  requires std::constructible_from<typename B::scope, const typename B::context&>;
  requires std::constructible_from<typename B::scope, decltype(B::current())>;
};

/// The process-wide context that `eval(expr)` uses when none is passed. One per backend.
template <Backend B>
[[nodiscard]] typename B::context& default_context();

namespace detail {
/// The context that is current, or the default one where a backend has no such thing.
template <Backend B>
[[nodiscard]] decltype(auto) current_context() {
  if constexpr (std::same_as<decltype(B::current()), typename B::context>) {
    return B::current();
  } else {
    return (default_context<B>());
  }
}
}  // namespace detail

}  // namespace ssm
