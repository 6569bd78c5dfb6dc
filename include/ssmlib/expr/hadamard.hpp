#pragma once

#include <ssmlib/expr/gram.hpp>
#include <ssmlib/expr/mask.hpp>

#include <algorithm>
#include <concepts>
#include <utility>

namespace ssm {

namespace detail {
template <class L>
inline constexpr bool is_semiseparable_mask = false;
template <class T, class B>
inline constexpr bool is_semiseparable_mask<causal_mask<T, B>> = true;
template <class T, class B>
inline constexpr bool is_semiseparable_mask<decay_mask<T, B>> = true;
template <class T, class B>
inline constexpr bool is_semiseparable_mask<semiseparable_mask<T, B>> = true;

template <class L>
struct masked_gram_traits {
  using structure = structure::masked_low_rank;
  using algorithms = alg_list<alg::structured, alg::quadratic>;
};
template <class T, class B>
struct masked_gram_traits<window_mask<T, B>> {
  using structure = structure::masked_low_rank;
  using algorithms = alg_list<alg::quadratic>;
};
template <class L>
requires is_semiseparable_mask<L>
struct masked_gram_traits<L> {
  using structure = structure::semiseparable;
  using algorithms = alg_list<alg::chunked, alg::recurrent, alg::quadratic>;
};
}  // namespace detail

/// Structured masked attention, L o (phi(Q) phi(K)^T). With a semiseparable mask this is the
/// semiseparable matrix of linear attention (ones), retention (decay), and Mamba-2 and every other
/// scalar-gated linear recurrence (semiseparable).
/// @source Dao and Gu 2024, arXiv:2405.21060, section 4.
template <MatrixMixer L, Floating T, Backend B, FeatureMap Phi>
struct masked_gram {
  using value_type = T;
  using backend = B;
  using mask_type = L;
  using feature_map = Phi;
  using structure = typename detail::masked_gram_traits<L>::structure;
  using algorithms = typename detail::masked_gram_traits<L>::algorithms;

  L mask;
  gram<T, B, Phi> kernel;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return kernel.batch(); }
  [[nodiscard]] index_t length() const { return kernel.length(); }
  [[nodiscard]] index_t heads() const { return std::max(mask.heads(), kernel.heads()); }
  [[nodiscard]] index_t key_size() const { return kernel.key_size(); }
  [[nodiscard]] index_t state_features(index_t p) const { return p; }
  [[nodiscard]] causality causal() const { return causality_of(mask); }
  void check_length(index_t longest) const { detail::check_length(mask, longest); }

  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    L::operands(self.mask, f);
    gram<T, B, Phi>::operands(self.kernel, f);
  }
  [[nodiscard]] auto on_host() const {
    auto exact = mask.on_host();
    return masked_gram<decltype(exact), double, cpu, Phi>{std::move(exact), kernel.on_host(),
                                                          layout};
  }
  [[nodiscard]] tensor<double, 4> dense() const {
    tensor<double, 4> m = mask_dense();
    const auto factors = host_kernel();
    const sequence_layout sequences = layout_of(*this);
    for (index_t i = 0; i < sequences.sequences(); ++i) {
      const index_t begin = sequences.begin(i), end = sequences.end(i), base = layout ? 0 : begin;
      for (index_t h = 0; h < heads(); ++h) {
        for (index_t t = begin; t < end; ++t) {
          for (index_t s = begin; s < end; ++s) {
            double& entry = m(layout ? 0 : i, h, t - base, s - base);
            if (entry != 0) entry *= factors.entry(t, s, h, heads());
          }
        }
      }
    }
    return m;
  }

 private:
  [[nodiscard]] auto host_kernel() const {
    if constexpr (std::same_as<B, cpu>) {
      return kernel;
    } else {
      return kernel.on_host();
    }
  }
  [[nodiscard]] tensor<double, 4> mask_dense() const {
    if constexpr (DefinedMask<L>) {
      return detail::dense_columns(mask, layout_of(*this), static_cast<bool>(layout), batch(),
                                   length(), heads());
    } else {
      return mask.dense(layout_of(*this), static_cast<bool>(layout), batch(), length(), heads());
    }
  }
};

/// L o (Q K^T) for a mask node and a gram matrix.
///
/// @return structure::semiseparable for the masks causal, decay and semiseparable (chunked,
///         recurrent, quadratic), else structure::masked_low_rank (the mask's own product).
/// @throws shape_error  batch, length or head counts do not fit, or a sequence is longer than the
///                      mask goes.
/// @cost   O(1); nothing is evaluated.
template <MatrixMixer L, Floating T, Backend B, class Phi>
[[nodiscard]] masked_gram<L, T, B, Phi> hadamard(L mask, gram<T, B, Phi> kernel) {
  static_assert(std::same_as<typename L::backend, B>,
                "ssm: hadamard(mask, Q * transpose(K)) mixes two backends; copy one operand with "
                "to<backend>(...)");
  static_assert(std::same_as<typename L::value_type, accum_t<T>>,
                "ssm: hadamard(mask, Q * transpose(K)) mixes two element types; convert one with "
                "cast<T>(...); beside bf16 a mask is float");
  detail::check_time("hadamard(mask, Q * transpose(K))", mask.batch(), mask.length(),
                     kernel.batch(), kernel.length());
  detail::join_heads("hadamard(mask, Q * transpose(K))", mask.heads(), kernel.heads());
  sequence_layout layout = kernel.layout ? kernel.layout : mask.layout;
  detail::check_length(mask, layout ? layout.max_length() : kernel.length());
  return {std::move(mask), std::move(kernel), std::move(layout)};
}
template <Floating T, Backend B, class Phi>
[[nodiscard]] auto hadamard(causal_t, gram<T, B, Phi> kernel) {
  return hadamard(causal_mask<accum_t<T>, B>{}, std::move(kernel));
}

template <Floating T, Backend B, class Phi>
[[nodiscard]] auto hadamard(window_t w, gram<T, B, Phi> kernel) {
  return hadamard(window_mask<accum_t<T>, B>{w.size}, std::move(kernel));
}

namespace detail {
template <class L>
inline constexpr bool is_gram = false;
template <class T, class B, class Phi>
inline constexpr bool is_gram<gram<T, B, Phi>> = true;
}  // namespace detail

/// The mask comes first: refused with a sentence.
template <Floating T, Backend B, class Phi, class L>
requires(!detail::is_gram<L>) auto hadamard(gram<T, B, Phi> kernel, L mask)
    -> decltype(hadamard(std::move(mask), std::move(kernel))) {
  static_assert(!std::same_as<L, L>,
                "ssm: hadamard(Q * transpose(K), mask) has its operands in the other order; write "
                "hadamard(mask, Q * transpose(K))");
  return hadamard(std::move(mask), std::move(kernel));
}

/// A causal mixer divided by its row sums, as in normalised linear attention:
/// entry (t, s) is M[t, s] / sum_r M[t, r].
template <MatrixMixer M>
struct row_normalized {
  using value_type = typename M::value_type;
  using backend = typename M::backend;
  using structure = typename M::structure;
  using algorithms = typename M::algorithms;

  M inner;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return inner.batch(); }
  [[nodiscard]] index_t length() const { return inner.length(); }
  [[nodiscard]] index_t heads() const { return inner.heads(); }
  [[nodiscard]] causality causal() const { return causality_of(inner); }
  void check_length(index_t longest) const { detail::check_length(inner, longest); }
  [[nodiscard]] index_t key_size() const requires RecurrentMixer<M> { return inner.key_size(); }
  /// The row sum is one more feature, of the value 1: the last column of the state.
  [[nodiscard]] index_t state_features(index_t p) const requires RecurrentMixer<M> {
    return inner.state_features(p + 1);
  }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    M::operands(self.inner, f);
  }
  [[nodiscard]] auto on_host() const {
    auto exact = inner.on_host();
    return row_normalized<decltype(exact)>{std::move(exact), layout};
  }
  [[nodiscard]] tensor<double, 4> dense() const {
    M plain = inner;
    plain.layout = layout;
    tensor<double, 4> m = plain.dense();
    for (index_t b = 0; b < m.extent(0); ++b) {
      for (index_t h = 0; h < m.extent(1); ++h) {
        for (index_t t = 0; t < m.extent(2); ++t) {
          double sum = 0;
          for (index_t s = 0; s < m.extent(3); ++s)
            sum += m(b, h, t, s);
          for (index_t s = 0; s < m.extent(3); ++s)
            m(b, h, t, s) /= sum;
        }
      }
    }
    return m;
  }
};

/// @pre the row sums are not zero: positive feature maps (elu + 1, exponential) guarantee it.
template <MatrixMixer M>
[[nodiscard]] row_normalized<M> normalize_rows(M m) {
  sequence_layout layout = m.layout;
  return {std::move(m), std::move(layout)};
}

/// M + diag(D_h): a skip connection per head, part of the matrix (Mamba's D).
template <MatrixMixer M>
struct with_diagonal {
  using value_type = typename M::value_type;
  using backend = typename M::backend;
  using structure = typename M::structure;
  using algorithms = typename M::algorithms;

  M inner;
  tensor<accum_t<value_type>, 1, backend> d;  // (H)
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return inner.batch(); }
  [[nodiscard]] index_t length() const { return inner.length(); }
  [[nodiscard]] index_t heads() const { return std::max(inner.heads(), d.extent(0)); }
  [[nodiscard]] causality causal() const { return causality_of(inner); }
  void check_length(index_t longest) const { detail::check_length(inner, longest); }
  [[nodiscard]] index_t key_size() const requires RecurrentMixer<M> { return inner.key_size(); }
  [[nodiscard]] index_t state_features(index_t p) const requires RecurrentMixer<M> {
    return inner.state_features(p);
  }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    M::operands(self.inner, f);
    f("d", self.d, operand::parameter);
  }
  [[nodiscard]] auto on_host() const {
    auto exact = inner.on_host();
    return with_diagonal<decltype(exact)>{std::move(exact), detail::exact_on_host(d), layout};
  }
  [[nodiscard]] tensor<double, 4> dense() const {
    M plain = inner;
    plain.layout = layout;
    const tensor<double, 4> narrow = plain.dense();
    const tensor<double, 1> skip = detail::exact_on_host(d);
    const index_t n = narrow.extent(2);
    tensor<double, 4> m(narrow.extent(0), heads(), n, n);
    for (index_t b = 0; b < m.extent(0); ++b) {
      for (index_t h = 0; h < heads(); ++h) {
        const index_t from = group_of(h, heads(), narrow.extent(1));
        for (index_t t = 0; t < n; ++t) {
          for (index_t s = 0; s < n; ++s)
            m(b, h, t, s) = narrow(b, from, t, s);
          m(b, h, t, t) += skip(group_of(h, heads(), d.extent(0)));
        }
      }
    }
    return m;
  }
};

template <Floating T, Backend B>
struct diagonal_term {
  tensor<T, 1, B> d;
};
/// diag(D_h), to be added to a mixer. @param d  (H)
template <Floating T, Backend B>
[[nodiscard]] diagonal_term<T, B> diagonal(const tensor<T, 1, B>& d) {
  return {d};
}
/// @throws shape_error  the head counts do not fit.
template <MatrixMixer M>
[[nodiscard]] with_diagonal<M> operator+(
    M m, diagonal_term<accum_t<typename M::value_type>, typename M::backend> term) {
  detail::join_heads("mixer + diagonal(D)", m.heads(), term.d.extent(0));
  sequence_layout layout = m.layout;
  return {std::move(m), std::move(term.d), std::move(layout)};
}

}  // namespace ssm
