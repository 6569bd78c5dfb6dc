#pragma once

#include <ssmlib/expr/user_mask.hpp>
#include <ssmlib/lower/gram.hpp>

#include <algorithm>
#include <string_view>
#include <utility>

namespace ssm {

/// @file
/// A user's own mask by itself and over a gram matrix, through its multiply(): L o (Q K^T) V is the
/// sum over n of q_n o L (k_n o v_p), some channels (n, p) at a time.

namespace detail {

/// L z and L^T z, checked; L^T from T x T storage where the mask has no transposed product.
template <class U>
class mask_products {
 public:
  using T = typename U::value_type;
  mask_products(const cpu::context& ctx, const user_mask<U>& m, sequence_layout layout, bool packed,
                index_t batch, index_t length)
      : ctx_(ctx),
        mask_(m),
        layout_(std::move(layout)),
        packed_(packed),
        batch_(batch),
        length_(length) {}

  [[nodiscard]] const sequence_layout& layout() const { return layout_; }
  [[nodiscard]] tensor<T, 4> product(const tensor<T, 4>& z) const {
    return checked(z, mask_.mask.multiply(z, layout_));
  }
  [[nodiscard]] tensor<T, 4> transposed_product(const tensor<T, 4>& z) {
    if constexpr (requires { mask_.mask.multiply_transposed(z, layout_); }) {
      return checked(z, mask_.mask.multiply_transposed(z, layout_));
    } else {
      return dense_transposed_product(z);
    }
  }
  /// Adds the gradients of the mask's own tensors. @throws value_error  the mask cannot.
  void add_gradients(const tensor<T, 4>& z, const tensor<T, 4>& dy, user_mask<U>& gradients) const {
    if (!wanted(gradients)) return;
    if constexpr (requires { mask_.mask.multiply_vjp(z, dy, layout_, gradients.mask); }) {
      mask_.mask.multiply_vjp(z, dy, layout_, gradients.mask);
    } else {
      throw value_error(
          "ssm: the mask has tensors but no multiply_vjp(z, dy, layout, gradients); add it, or use "
          "alg::quadratic, or do not ask for their gradients");
    }
  }
  [[nodiscard]] static bool wanted(user_mask<U>& gradients) {
    bool any = false;
    user_mask<U>::operands(
        gradients, [&](std::string_view, auto& t, operand) { any = any || static_cast<bool>(t); });
    return any;
  }

 private:
  static tensor<T, 4> checked(const tensor<T, 4>& z, tensor<T, 4> result) {
    if (result.extents() != z.extents()) {
      throw shape_error("ssm: the mask's multiply() of " + to_string<4>(z.extents()) + " gave " +
                        to_string<4>(result.extents()) + "; wanted the same shape");
    }
    return result;
  }
  tensor<T, 4> dense_transposed_product(const tensor<T, 4>& z) {
    if (!dense_) {
      dense_ = cast<T>(mask_.dense(layout_, packed_, batch_, length_, mask_.heads()));
    }
    const auto out = tensor<T, 4>::zeros(z.extents());
    for (index_t i = 0; i < layout_.sequences(); ++i) {
      const index_t begin = layout_.begin(i), n = layout_.length(i), time = z.extent(1);
      if (n == 0) continue;
      const index_t b = begin / time, row = packed_ ? begin : 0;
      ctx_.parallel_for(z.extent(2), [&](index_t h) {
        const index_t g = group_of(h, z.extent(2), dense_.extent(1));
        const view<const T, 2> matrix{
            &dense_(packed_ ? 0 : i, g, row, row), {n, n}, {index_t{1}, dense_.strides()[2]}};
        kernels::gemm<T>(T(1), matrix, rows_of(z, b, h, begin % time, begin % time + n), T(0),
                         rows_of(out, b, h, begin % time, begin % time + n));
      });
    }
    return out;
  }

  const cpu::context& ctx_;
  const user_mask<U>& mask_;
  sequence_layout layout_;
  bool packed_;
  index_t batch_, length_;
  tensor<T, 4> dense_;
};

/// f(b, t) for all tokens, in parallel.
template <Real T, class F>
void for_each_token(const cpu::context& ctx, const tensor<T, 4>& like, F f) {
  const index_t length = like.extent(1);
  ctx.parallel_ranges(like.extent(0) * length, 64, 16, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i)
      f(i / length, i % length);
  });
}

/// Some channels (n, p) of outer products u_n v_p per token and head.
template <Real T>
struct channel_block {
  const tensor<T, 4>&u, &v;
  index_t heads, first, count;  ///< of the features n

  /// z[.., j P + p] = scale u[.., first + j] v[.., p].
  [[nodiscard]] tensor<T, 4> outer(const cpu::context& ctx, T scale) const {
    const index_t width = v.extent(3);
    tensor<T, 4> z(u.extent(0), u.extent(1), heads, count * width);
    for_each_token(ctx, z, [&](index_t b, index_t t) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t hu = group_of(h, heads, u.extent(2)), hv = group_of(h, heads, v.extent(2));
        for (index_t j = 0; j < count; ++j) {
          const T factor = scale * u(b, t, hu, first + j);
          for (index_t p = 0; p < width; ++p)
            z(b, t, h, j * width + p) = factor * v(b, t, hv, p);
        }
      }
    });
    return z;
  }
  /// to[.., first + j] += scale * the sum over p of z[.., j P + p] v[.., p].
  void add_to_u(const cpu::context& ctx, T scale, const tensor<T, 4>& z,
                const tensor<T, 4>& to) const {
    const index_t width = v.extent(3);
    for_each_token(ctx, z, [&](index_t b, index_t t) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t hu = group_of(h, heads, to.extent(2)), hv = group_of(h, heads, v.extent(2));
        for (index_t j = 0; j < count; ++j) {
          T sum = T(0);
          for (index_t p = 0; p < width; ++p)
            sum += z(b, t, h, j * width + p) * v(b, t, hv, p);
          to(b, t, hu, first + j) += scale * sum;
        }
      }
    });
  }
  /// to[.., p] += scale * the sum over j of u[.., first + j] z[.., j P + p].
  void add_to_v(const cpu::context& ctx, T scale, const tensor<T, 4>& z,
                const tensor<T, 4>& to) const {
    const index_t width = v.extent(3);
    for_each_token(ctx, z, [&](index_t b, index_t t) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t hu = group_of(h, heads, u.extent(2)), hv = group_of(h, heads, to.extent(2));
        for (index_t j = 0; j < count; ++j) {
          const T factor = scale * u(b, t, hu, first + j);
          for (index_t p = 0; p < width; ++p)
            to(b, t, hv, p) += factor * z(b, t, h, j * width + p);
        }
      }
    });
  }
};

/// f(first, count) for blocks of key features with about 64 channels each.
template <class F>
void for_each_channel_block(index_t features, index_t width, F f) {
  const index_t step = std::max<index_t>(1, 64 / std::max<index_t>(1, width));
  for (index_t n = 0; n < features; n += step)
    f(n, std::min(step, features - n));
}

/// X with the result's heads.
template <Real T>
[[nodiscard]] tensor<T, 4> with_heads(const cpu::context& ctx, const tensor<T, 4>& x,
                                      index_t heads) {
  if (x.extent(2) == heads) return x;
  tensor<T, 4> wide(x.extent(0), x.extent(1), heads, x.extent(3));
  for_each_token(ctx, wide, [&](index_t b, index_t t) {
    for (index_t h = 0; h < heads; ++h) {
      const index_t from = group_of(h, heads, x.extent(2));
      for (index_t p = 0; p < x.extent(3); ++p)
        wide(b, t, h, p) = x(b, t, from, p);
    }
  });
  return wide;
}

template <class M, class U>
[[nodiscard]] mask_products<U> products_of(const cpu::context& ctx, const M& m,
                                           const user_mask<U>& mask,
                                           const tensor<typename U::value_type, 4>& x) {
  return {ctx, mask, layout_with(m, x), static_cast<bool>(m.layout), x.extent(0), x.extent(1)};
}

}  // namespace detail

// ---- L X ----------------------------------------------------------------------------------------

template <MultiplyMask U>
void apply_mixer(const cpu::context& ctx, alg::structured, const user_mask<U>& m,
                 const tensor<typename U::value_type, 4>& x,
                 const tensor<typename U::value_type, 4>& y,
                 const carry<typename U::value_type>& c) {
  detail::refuse_carry(c);
  y.copy_from(detail::products_of(ctx, m, m, x).product(detail::with_heads(ctx, x, y.extent(2))));
}
template <MultiplyMask U>
void apply_mixer_vjp(const cpu::context& ctx, alg::structured, const user_mask<U>& m,
                     const tensor<typename U::value_type, 4>& x,
                     const tensor<typename U::value_type, 4>& dy, user_mask<U>& dm,
                     const tensor<typename U::value_type, 4>& dx,
                     const carry_gradient<typename U::value_type>& c) {
  using T = typename U::value_type;
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  auto products = detail::products_of(ctx, m, m, x);
  const index_t heads = dy.extent(2);
  if (dx) {
    const tensor<T, 4> wide = products.transposed_product(dy);
    for (index_t h = 0; h < heads; ++h) {
      const index_t to = group_of(h, heads, dx.extent(2));
      detail::add_to(dx.slice(2, to, to + 1), wide.slice(2, h, h + 1));
    }
  }
  products.add_gradients(detail::with_heads(ctx, x, heads), dy, dm);
}

// ---- (L o Q K^T) V ------------------------------------------------------------------------------

/// @cost N P / 64 products of the mask with 64 channels, and O(64 T) memory a head.
template <MultiplyMask U, Real T, Backend B, FeatureMap Phi>
void apply_mixer(const cpu::context& ctx, alg::structured,
                 const masked_gram<user_mask<U>, T, B, Phi>& m, const tensor<T, 4>& x,
                 const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_carry(c);
  const auto products = detail::products_of(ctx, m, m.mask, x);
  const tensor<T, 4> q = detail::mapped<Phi>(ctx, m.kernel.q);
  const tensor<T, 4> k = detail::mapped<Phi>(ctx, m.kernel.k);
  const index_t heads = y.extent(2);
  y.fill(T(0));
  detail::for_each_channel_block(q.extent(3), x.extent(3), [&](index_t first, index_t count) {
    const detail::channel_block<T> kx{k, x, heads, first, count}, qy{q, y, heads, first, count};
    qy.add_to_v(ctx, static_cast<T>(m.kernel.alpha), products.product(kx.outer(ctx, T(1))), y);
  });
}
template <MultiplyMask U, Real T, Backend B, FeatureMap Phi>
void apply_mixer_vjp(const cpu::context& ctx, alg::structured,
                     const masked_gram<user_mask<U>, T, B, Phi>& m, const tensor<T, 4>& x,
                     const tensor<T, 4>& dy, masked_gram<user_mask<U>, T, B, Phi>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::refuse_carry<T>({c.initial, c.d_final, {}, 0, nullptr});
  auto products = detail::products_of(ctx, m, m.mask, x);
  const tensor<T, 4> q = detail::mapped<Phi>(ctx, m.kernel.q);
  const tensor<T, 4> k = detail::mapped<Phi>(ctx, m.kernel.k);
  const index_t heads = dy.extent(2);
  const T alpha = static_cast<T>(m.kernel.alpha);
  const auto zeros = [](const tensor<T, 4>& like) {
    return like ? tensor<T, 4>::zeros(like.extents()) : tensor<T, 4>();
  };
  const tensor<T, 4> dq = zeros(dm.kernel.q), dk = zeros(dm.kernel.k);
  detail::for_each_channel_block(q.extent(3), x.extent(3), [&](index_t first, index_t count) {
    const detail::channel_block<T> kx{k, x, heads, first, count}, qy{q, dy, heads, first, count};
    const tensor<T, 4> z = kx.outer(ctx, T(1)), dz = qy.outer(ctx, alpha);
    if (dq) qy.add_to_u(ctx, alpha, products.product(z), dq);
    products.add_gradients(z, dz, dm.mask);
    if (!dk && !dx) return;
    const tensor<T, 4> back = products.transposed_product(dz);
    if (dk) kx.add_to_u(ctx, T(1), back, dk);
    if (dx) kx.add_to_v(ctx, T(1), back, dx);
  });
  const auto carry_on = [](const tensor<T, 4>& to, const tensor<T, 4>& from,
                           const tensor<T, 4>& at) {
    if (!to) return;
    from.zip_with(at, [](T& g, const T& value) { g *= Phi::slope(value); });
    detail::add_to(to, from);
  };
  carry_on(dm.kernel.q, dq, m.kernel.q);
  carry_on(dm.kernel.k, dk, m.kernel.k);
}

}  // namespace ssm
