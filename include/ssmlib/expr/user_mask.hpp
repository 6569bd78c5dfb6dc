#pragma once

#include <ssmlib/expr/hadamard.hpp>

#include <concepts>
#include <utility>

namespace ssm {

namespace detail {
/// Where a mask of a user's own multiplies: U::backend, without one the CPU.
template <class U>
struct mask_backend {
  using type = cpu;
};
template <class U>
requires Backend<typename U::backend>
struct mask_backend<U> {
  using type = typename U::backend;
};
template <class U>
using mask_backend_t = typename mask_backend<U>::type;
template <class U>
using mask_tensor = tensor<typename U::value_type, 4, mask_backend_t<U>>;
}  // namespace detail

/// A mask of your own that only knows how to multiply: a struct with
///
///   value_type                       float or double
///   multiply(z, layout)              L z along time, for each sequence, head and feature by
///   itself;
///                                    z and the result are (b, T, H, features), and `layout` cuts
///                                    the b * T tokens into sequences
///
/// and, where it has them,
///
///   backend                          where its tensors are, z and the result; without it the CPU
///   causal()                         a causality; without it advance() looks into dense()
///   multiply_transposed(z, layout)   L^T z likewise; without it gradients go through T x T storage
///   heads()                          default 1; head h of z's H uses the mask's head
///                                    h * heads() / H
///   operands(self, f)                static; its tensors, as a mixer has them
///   multiply_vjp(z, dy, layout, g)   adds the gradients of sum(dy * multiply(z)) with respect to
///                                    its tensors to those of g, a mask of the same type
template <class U>
concept MultiplyMask =
    !MatrixMixer<U> && Real<typename U::value_type> &&
    requires(const U& u, const detail::mask_tensor<U>& z, const sequence_layout& layout) {
  { u.multiply(z, layout) } -> std::same_as<detail::mask_tensor<U>>;
};

/// A mask of your own as a node, so that hadamard(mask, Q * transpose(K)) * V takes time and memory
/// as its multiply() does. Its dense() is the product with the identity.
template <MultiplyMask U>
struct user_mask {
  using value_type = typename U::value_type;
  using backend = detail::mask_backend_t<U>;
  using structure = structure::dense;
  using algorithms = alg_list<alg::structured, alg::quadratic>;

  U mask;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return layout ? 1 : 0; }
  [[nodiscard]] index_t length() const { return layout ? layout.tokens() : 0; }
  [[nodiscard]] index_t heads() const {
    if constexpr (requires {
                    { mask.heads() } -> std::convertible_to<index_t>;
                  }) {
      return mask.heads();
    } else {
      return 1;
    }
  }
  [[nodiscard]] causality causal() const {
    if constexpr (requires {
                    { mask.causal() } -> std::same_as<causality>;
                  }) {
      return mask.causal();
    } else {
      return causality::unknown;
    }
  }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    if constexpr (requires { U::operands(self.mask, f); }) U::operands(self.mask, f);
  }

  /// The products with the unit vectors of each sequence, all at once.
  [[nodiscard]] tensor<double, 4> dense(const sequence_layout& sequences, bool packed,
                                        index_t batch, index_t length, index_t heads) const {
    const index_t n = packed ? sequences.tokens() : length, width = sequences.max_length();
    auto out = tensor<double, 4>::zeros(packed ? 1 : batch, heads, n, n);
    if (width == 0) return out;
    const index_t rows = length == 0 ? 1 : batch, time = length == 0 ? n : length;
    auto unit = tensor<value_type, 4>::zeros(rows, time, heads, width);
    const auto for_each_entry = [&](auto f) {
      for (index_t i = 0; i < sequences.sequences(); ++i) {
        for (index_t t = sequences.begin(i); t < sequences.end(i); ++t) {
          for (index_t h = 0; h < heads; ++h)
            f(i, t, h);
        }
      }
    };
    for_each_entry([&](index_t i, index_t t, index_t h) {
      unit(t / time, t % time, h, t - sequences.begin(i)) = value_type(1);
    });
    const tensor<value_type, 4> product =
        detail::on_host(mask.multiply(detail::on_backend<backend>(unit), sequences));
    for_each_entry([&](index_t i, index_t t, index_t h) {
      const index_t begin = sequences.begin(i), base = packed ? 0 : begin;
      for (index_t s = begin; s < sequences.end(i); ++s) {
        out(packed ? 0 : i, h, t - base, s - base) =
            static_cast<double>(product(t / time, t % time, h, s - begin));
      }
    });
    return out;
  }
  [[nodiscard]] tensor<double, 4> dense() const {
    return dense(layout_of(*this), static_cast<bool>(layout), batch(), length(), heads());
  }
};

/// Your mask as a mixer of its own: mask_node(mask) * X.
template <MultiplyMask U>
[[nodiscard]] user_mask<U> mask_node(U mask) {
  return {std::move(mask), {}};
}

/// L o (Q K^T) for a mask of your own. @return structure::masked_low_rank: structured, quadratic.
template <MultiplyMask U, Floating T, Backend B, class Phi>
[[nodiscard]] masked_gram<user_mask<U>, T, B, Phi> hadamard(U mask, gram<T, B, Phi> kernel) {
  return hadamard(mask_node(std::move(mask)), std::move(kernel));
}

}  // namespace ssm
