#pragma once

#include <ssmlib/expr/gram.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/tokens.hpp>
#include <ssmlib/tensor/cuda_elements.hpp>

#include <concepts>

namespace ssm::detail {

/// The maps that ssmlib's own CUDA kernels are compiled for.
template <class Phi>
inline constexpr bool is_library_feature_map = false;
template <>
inline constexpr bool is_library_feature_map<feature::elu_plus_one> = true;
template <>
inline constexpr bool is_library_feature_map<feature::relu> = true;
template <>
inline constexpr bool is_library_feature_map<feature::exponential> = true;

/// to = phi(from), element by element; `to` is dense.
template <class Phi, class T>
void map_features(cudaStream_t stream, view<const T, 4> from, T* to);
/// to += gradient * phi'(from); `gradient` is dense.
template <class Phi, class T>
void map_features_vjp(cudaStream_t stream, view<const T, 4> from, const T* gradient, view<T, 4> to);

template <class Phi>
constexpr void check_feature_map() {
#if !defined(__CUDACC__)
  static_assert(
      is_library_feature_map<Phi>,
      "ssm: a feature map of your own on the CUDA backend needs nvcc: compile this source "
      "file as CUDA, and mark value() and slope() with SSMLIB_HOST_DEVICE");
#endif
}

/// phi(t); t itself for the identity.
template <class Phi, Floating T>
[[nodiscard]] tensor<T, 4, cuda> mapped(const cuda::context& ctx, const tensor<T, 4, cuda>& t) {
  if constexpr (std::same_as<Phi, feature::identity>) {
    return t;
  } else {
    check_feature_map<Phi>();
    tensor<T, 4, cuda> to(t.extents());
    map_features<Phi, T>(ctx.stream(), t.const_view(), to.data());
    return to;
  }
}

/// Where a kernel writes the gradient of phi(t), which finish() carries on to that of t, added.
template <class Phi, Floating T>
class mapped_gradient {
 public:
  explicit mapped_gradient(const tensor<T, 4, cuda>& target) : target_(target) {
    if (target) own_ = tensor<T, 4, cuda>(target.extents());
  }
  /// (b, T, ...) -> (tokens, ...); absent where the target is.
  [[nodiscard]] view<T, 3> tokens() const {
    if (!own_) return {};
    return own_.template reshape<3>(merge_batch(own_.extents())).view();
  }
  void finish(const cuda::context& ctx, const tensor<T, 4, cuda>& t) const {
    if (!target_) return;
    check_feature_map<Phi>();
    map_features_vjp<Phi, T>(ctx.stream(), t.const_view(), own_.data(), target_.view());
  }

 private:
  tensor<T, 4, cuda> target_, own_;
};
template <Floating T>
class mapped_gradient<feature::identity, T> : public added_gradient<T, 4> {
 public:
  using added_gradient<T, 4>::added_gradient;
  void finish(const cuda::context&, const tensor<T, 4, cuda>&) const {
    added_gradient<T, 4>::finish();
  }
};

}  // namespace ssm::detail

#if defined(__CUDACC__)
#include <ssmlib/lower/cuda/feature_map.cuh>
#endif
