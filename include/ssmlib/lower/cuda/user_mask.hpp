#pragma once

#include <ssmlib/expr/user_mask.hpp>
#include <ssmlib/kernels/cuda/channels.hpp>
#include <ssmlib/lower/cuda/gram.hpp>

#include <algorithm>
#include <concepts>
#include <string_view>
#include <utility>

namespace ssm {

/// @file
/// A user's own mask whose tensors are on the device, by itself and over a gram matrix, through its
/// multiply(): L o (Q K^T) V is the sum over n of q_n o L (k_n o v_p), some channels (n, p) at a
/// time. The channels are of the mask's type, float beside bf16. What multiply() does on the device
/// is the user's: expressions of this library, or kernels on the context's stream.

namespace detail {

template <class U>
concept CudaMask = MultiplyMask<U> && std::same_as<mask_backend_t<U>, cuda>;

/// L z and L^T z, checked; L^T from T x T storage, made on the host, where the mask has no
/// transposed product.
template <CudaMask U>
class cuda_mask_products {
 public:
  using V = typename U::value_type;
  cuda_mask_products(const cuda::context& ctx, const user_mask<U>& m, sequence_layout layout,
                     bool packed, index_t batch, index_t length)
      : ctx_(ctx),
        mask_(m),
        layout_(std::move(layout)),
        packed_(packed),
        batch_(batch),
        length_(length) {}

  [[nodiscard]] tensor<V, 4, cuda> product(const tensor<V, 4, cuda>& z) const {
    return checked(z, mask_.mask.multiply(z, layout_));
  }
  [[nodiscard]] tensor<V, 4, cuda> transposed_product(const tensor<V, 4, cuda>& z) {
    if constexpr (requires { mask_.mask.multiply_transposed(z, layout_); }) {
      return checked(z, mask_.mask.multiply_transposed(z, layout_));
    } else {
      if (!dense_) dense_ = mask_.dense(layout_, packed_, batch_, length_, mask_.heads());
      const tensor<V, 4, cuda> out(z.extents());
      multiply_by_dense(ctx_, dense_, true, layout_, packed_, z, out);
      return out;
    }
  }
  /// Adds the gradients of the mask's own tensors. @throws value_error  the mask cannot.
  void add_gradients(const tensor<V, 4, cuda>& z, const tensor<V, 4, cuda>& dy,
                     user_mask<U>& gradients) const {
    bool wanted = false;
    user_mask<U>::operands(gradients, [&](std::string_view, auto& t, operand) {
      wanted = wanted || static_cast<bool>(t);
    });
    if (!wanted) return;
    if constexpr (requires { mask_.mask.multiply_vjp(z, dy, layout_, gradients.mask); }) {
      mask_.mask.multiply_vjp(z, dy, layout_, gradients.mask);
    } else {
      throw value_error(
          "ssm: the mask has tensors but no multiply_vjp(z, dy, layout, gradients); add it, or do "
          "not ask for their gradients");
    }
  }

 private:
  static tensor<V, 4, cuda> checked(const tensor<V, 4, cuda>& z, tensor<V, 4, cuda> result) {
    if (result.extents() != z.extents()) {
      throw shape_error("ssm: the mask's multiply() of " + to_string<4>(z.extents()) + " gave " +
                        to_string<4>(result.extents()) + "; wanted the same shape");
    }
    return result;
  }

  const cuda::context& ctx_;
  const user_mask<U>& mask_;
  sequence_layout layout_;
  bool packed_;
  index_t batch_, length_;
  tensor<double, 4> dense_;
};

template <class M, CudaMask U, Floating T>
[[nodiscard]] cuda_mask_products<U> cuda_products_of(const cuda::context& ctx, const M& m,
                                                     const user_mask<U>& mask,
                                                     const tensor<T, 4, cuda>& x) {
  return {ctx, mask, layout_with(m, x), static_cast<bool>(m.layout), x.extent(0), x.extent(1)};
}

/// X with the result's heads, in one copy.
template <Floating T>
[[nodiscard]] tensor<T, 4, cuda> with_heads(const tensor<T, 4, cuda>& x, index_t heads) {
  if (x.extent(2) == heads) return x;
  const tensor<T, 4, cuda> wide(x.extent(0), x.extent(1), heads, x.extent(3));
  const tensor<T, 3, cuda> rows = input_tokens(x);
  const shape<4> n{rows.extent(0), rows.extent(1), heads / rows.extent(1), rows.extent(2)};
  if (wide.size() > 0) {
    elements<cuda>::copy(wide.data(), {n, dense_strides(n)}, rows.data(),
                         {n, {rows.strides()[0], rows.strides()[1], 0, rows.strides()[2]}},
                         sizeof(T));
  }
  return wide;
}

/// f(first, count) for blocks of key features whose channels take about 64 MiB.
template <class F>
void for_each_cuda_block(index_t features, index_t bytes_a_feature, F f) {
  const index_t step =
      std::clamp<index_t>((index_t{64} << 20) / std::max<index_t>(1, bytes_a_feature), 1,
                          std::max<index_t>(1, features));
  for (index_t n = 0; n < features; n += step)
    f(n, std::min(step, features - n));
}

/// Channels (b, T, heads, count * width), of T's sums.
template <Floating T>
[[nodiscard]] tensor<accum_t<T>, 4, cuda> outer_channels(const cuda::context& ctx,
                                                         const kernels::cuda::channel_problem<T>& p,
                                                         index_t heads) {
  const tensor<accum_t<T>, 4, cuda> z(p.v.extents[0], p.v.extents[1], heads,
                                      p.count * p.v.extents[3]);
  kernels::cuda::outer_channels<T>(ctx.stream(), p, z.view());
  return z;
}

/// to += the sums, through the slope of a feature map at `at`.
template <class Phi, Floating T>
void add_mapped_sums(const cuda::context& ctx, const tensor<T, 4, cuda>& to,
                     const tensor<accum_t<T>, 4, cuda>& sums, const tensor<T, 4, cuda>& at) {
  if (!to) return;
  const tensor<T, 4, cuda> rounded = as_type<T>(ctx, sums);
  if constexpr (std::same_as<Phi, feature::identity>) {
    add_to(to, rounded);
  } else {
    check_feature_map<Phi>();
    map_features_vjp<Phi, T>(ctx.stream(), at.const_view(), rounded.data(), to.view());
  }
}

}  // namespace detail

// ---- L X ----------------------------------------------------------------------------------------

template <detail::CudaMask U>
void apply_mixer(const cuda::context& ctx, alg::structured, const user_mask<U>& m,
                 const tensor<typename U::value_type, 4, cuda>& x,
                 const tensor<typename U::value_type, 4, cuda>& y,
                 const carry<typename U::value_type, cuda>& c) {
  detail::refuse_carry(c);
  if (y.size() == 0) return;
  y.copy_from(detail::cuda_products_of(ctx, m, m, x).product(detail::with_heads(x, y.extent(2))));
}
template <detail::CudaMask U>
void apply_mixer_vjp(const cuda::context& ctx, alg::structured, const user_mask<U>& m,
                     const tensor<typename U::value_type, 4, cuda>& x,
                     const tensor<typename U::value_type, 4, cuda>& dy, user_mask<U>& dm,
                     const tensor<typename U::value_type, 4, cuda>& dx,
                     const carry_gradient<typename U::value_type, cuda>& c) {
  using V = typename U::value_type;
  detail::refuse_carry<V, cuda>({c.initial, c.d_final, {}, 0, nullptr});
  auto products = detail::cuda_products_of(ctx, m, m, x);
  const index_t heads = dy.extent(2);
  if (dx) {
    const tensor<V, 4, cuda> wide = products.transposed_product(dy);
    for (index_t h = 0; h < heads; ++h) {
      const index_t to = group_of(h, heads, dx.extent(2));
      detail::add_to(dx.slice(2, to, to + 1), wide.slice(2, h, h + 1));
    }
  }
  products.add_gradients(detail::with_heads(x, heads), dy, dm);
}

// ---- (L o Q K^T) V ------------------------------------------------------------------------------

/// @cost  products of the mask with N P channels, some 64 MiB of them at a time
template <detail::CudaMask U, Floating T, FeatureMap Phi>
void apply_mixer(const cuda::context& ctx, alg::structured,
                 const masked_gram<user_mask<U>, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                 const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  using A = accum_t<T>;
  detail::refuse_carry(c);
  if (y.size() == 0) return;
  const auto products = detail::cuda_products_of(ctx, m, m.mask, x);
  const tensor<T, 4, cuda> q = detail::mapped<Phi>(ctx, m.kernel.q);
  const tensor<T, 4, cuda> k = detail::mapped<Phi>(ctx, m.kernel.k);
  const index_t heads = y.extent(2), a_feature = y.size() * static_cast<index_t>(sizeof(A));
  const auto sums = tensor<A, 4, cuda>::zeros(y.extents());
  detail::for_each_cuda_block(q.extent(3), a_feature, [&](index_t first, index_t count) {
    const auto z =
        detail::outer_channels<T>(ctx, {k.const_view(), x.const_view(), first, count, A(1)}, heads);
    kernels::cuda::add_channels_to_v<T>(
        ctx.stream(),
        {q.const_view(), x.const_view(), first, count, static_cast<A>(m.kernel.alpha)},
        products.product(z).const_view(), sums.view());
  });
  y.copy_from(detail::as_type<T>(ctx, sums));
}
template <detail::CudaMask U, Floating T, FeatureMap Phi>
void apply_mixer_vjp(const cuda::context& ctx, alg::structured,
                     const masked_gram<user_mask<U>, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, masked_gram<user_mask<U>, T, cuda, Phi>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  using A = accum_t<T>;
  using problem = kernels::cuda::channel_problem<T>;
  detail::refuse_carry<T, cuda>({c.initial, c.d_final, {}, 0, nullptr});
  auto products = detail::cuda_products_of(ctx, m, m.mask, x);
  const tensor<T, 4, cuda> q = detail::mapped<Phi>(ctx, m.kernel.q);
  const tensor<T, 4, cuda> k = detail::mapped<Phi>(ctx, m.kernel.k);
  const index_t heads = dy.extent(2), a_feature = dy.size() * static_cast<index_t>(sizeof(A));
  const A alpha = static_cast<A>(m.kernel.alpha);
  const auto dq = detail::sums_like(dm.kernel.q), dk = detail::sums_like(dm.kernel.k),
             d_x = detail::sums_like(dx);
  detail::for_each_cuda_block(q.extent(3), a_feature, [&](index_t first, index_t count) {
    const problem kx{k.const_view(), x.const_view(), first, count, A(1)};
    const problem qy{q.const_view(), dy.const_view(), first, count, alpha};
    const auto z = detail::outer_channels(ctx, kx, heads);
    const auto dz = detail::outer_channels(ctx, qy, heads);
    if (dq) {
      kernels::cuda::add_channels_to_u<T>(ctx.stream(), qy, products.product(z).const_view(),
                                          dq.view());
    }
    products.add_gradients(z, dz, dm.mask);
    if (!dk && !d_x) return;
    const auto back = products.transposed_product(dz);
    if (dk) kernels::cuda::add_channels_to_u<T>(ctx.stream(), kx, back.const_view(), dk.view());
    if (d_x) kernels::cuda::add_channels_to_v<T>(ctx.stream(), kx, back.const_view(), d_x.view());
  });
  detail::add_mapped_sums<Phi>(ctx, dm.kernel.q, dq, m.kernel.q);
  detail::add_mapped_sums<Phi>(ctx, dm.kernel.k, dk, m.kernel.k);
  if (dx) detail::add_to(dx, detail::as_type<T>(ctx, d_x));
}

// ---- the reference ------------------------------------------------------------------------------

/// dense(), which is the product with the identity, made on the device, taken to the host and back.
template <detail::CudaMask U>
void apply_mixer(const cuda::context& ctx, alg::quadratic, const user_mask<U>& m,
                 const tensor<typename U::value_type, 4, cuda>& x,
                 const tensor<typename U::value_type, 4, cuda>& y,
                 const carry<typename U::value_type, cuda>& c) {
  detail::refuse_carry(c);
  const sequence_layout layout = detail::layout_with(m, x);
  const bool packed = static_cast<bool>(m.layout);
  detail::multiply_by_dense(ctx, m.dense(layout, packed, x.extent(0), x.extent(1), m.heads()),
                            false, layout, packed, x, y);
}
template <detail::CudaMask U, Floating T, FeatureMap Phi>
void apply_mixer(const cuda::context& ctx, alg::quadratic,
                 const masked_gram<user_mask<U>, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                 const tensor<T, 4, cuda>& y, const carry<T, cuda>& c) {
  detail::refuse_carry(c);
  detail::multiply_by_dense(ctx, m.dense(), false, layout_of(m), static_cast<bool>(m.layout), x, y);
}
/// The gradients are those of alg::structured.
template <detail::CudaMask U>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic, const user_mask<U>& m,
                     const tensor<typename U::value_type, 4, cuda>& x,
                     const tensor<typename U::value_type, 4, cuda>& dy, user_mask<U>& dm,
                     const tensor<typename U::value_type, 4, cuda>& dx,
                     const carry_gradient<typename U::value_type, cuda>& c) {
  apply_mixer_vjp(ctx, alg::structured{}, m, x, dy, dm, dx, c);
}
template <detail::CudaMask U, Floating T, FeatureMap Phi>
void apply_mixer_vjp(const cuda::context& ctx, alg::quadratic,
                     const masked_gram<user_mask<U>, T, cuda, Phi>& m, const tensor<T, 4, cuda>& x,
                     const tensor<T, 4, cuda>& dy, masked_gram<user_mask<U>, T, cuda, Phi>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  apply_mixer_vjp(ctx, alg::structured{}, m, x, dy, dm, dx, c);
}

}  // namespace ssm
