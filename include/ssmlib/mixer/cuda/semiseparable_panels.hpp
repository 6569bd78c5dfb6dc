#pragma once

#include <ssmlib/lower/cuda/elements.hpp>
#include <ssmlib/lower/cuda/feature_map.hpp>
#include <ssmlib/lower/cuda/semiseparable.hpp>
#include <ssmlib/mixer/cuda/matrix_panels.hpp>

#include <concepts>
#include <cstdint>
#include <memory>

namespace ssm::detail {

/// Adds a gradient of products' operands, (tokens, H, N) in the type of sums, to that of a tensor
/// that has passed a feature map.
template <class Phi, Floating T>
void add_mapped_gradient(const cuda::context& ctx, const tensor<T, 4, cuda>& of,
                         const tensor<accum_t<T>, 3, cuda>& sum, const tensor<T, 4, cuda>& to) {
  if (!to) return;
  const tensor<T, 4, cuda> own = as_type<T>(ctx, sum.template reshape<4>(to.extents()));
  if constexpr (std::same_as<Phi, feature::identity>) {
    add_to(to, own);
  } else {
    map_features_vjp<Phi, T>(ctx.stream(), of.const_view(), own.data(), to.view());
  }
}

/// The semiseparable family on CUDA,
///
///     M[t, s] = alpha a[t, s] w_s phi(q_t) . phi(k_s)  for s <= t,   + D_h for s = t
///
/// The decay a[t, s] is the exponential of a difference of sums of logarithms in double. The
/// gradient of log_a at u is a sum of whole rows less one of whole columns, of the same terms in
/// double: what stands in both cancels to some 1e-16 of it.
/// @cost  per entry and product head 2 N flops, 4 N more for the gradient; memory O(tokens H).
template <MatrixMixer L, Floating T, FeatureMap Phi>
class cuda_semiseparable_panels final : public matrix_panels<T, cuda> {
 public:
  using real = accum_t<T>;
  using place = kernels::cuda::matrix_place;

  /// @param d  (Hd) or absent: the diagonal
  cuda_semiseparable_panels(const masked_gram<L, T, cuda, Phi>& m, const tensor<real, 1, cuda>& d,
                            const sequence_layout& layout, index_t heads, tape<T, cuda>* t,
                            const cuda::context& ctx)
      : layout_(layout),
        on_device_(ctx, layout),
        heads_(heads),
        mixer_(m),
        products_(input_tokens(mapped<Phi>(ctx, m.kernel.q)),
                  input_tokens(mapped<Phi>(ctx, m.kernel.k))),
        d_(d),
        mask_(ctx, m.mask),
        d_mixer_(m) {
    const auto wanted = [t](std::string_view, auto& operand_tensor, operand) {
      operand_tensor = t != nullptr ? t->gradient(operand_tensor)
                                    : std::remove_cvref_t<decltype(operand_tensor)>{};
    };
    masked_gram<L, T, cuda, Phi>::operands(d_mixer_, wanted);
    if (t != nullptr && d) d_gradient_ = t->gradient(d);
    sum_decays(ctx);
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return heads_; }
  [[nodiscard]] bool is_causal() const override { return true; }
  [[nodiscard]] bool has_cheap_rows() const override { return true; }
  [[nodiscard]] index_t product_heads() const override { return products_.heads(); }

  [[nodiscard]] cuda_matrix_tile<T> tile_at(const cuda::context& ctx,
                                            const place& at) const override {
    cuda_matrix_tile<T> t = products_.compute(ctx, at);
    t.tile.form = kernels::cuda::matrix_form::semiseparable;
    t.tile.heads = static_cast<int>(heads_);
    t.tile.alpha = static_cast<real>(mixer_.kernel.alpha);
    t.tile.decay = decay_.data();
    t.tile.resets = resets_.data();
    t.tile.decay_heads = static_cast<int>(mask_heads());
    t.tile.weight = weight();
    t.tile.diagonal = d_.data();
    t.tile.diagonal_heads = d_ ? static_cast<int>(d_.extent(0)) : 1;
    return t;
  }

  [[nodiscard]] bool wants_gradients() const override {
    bool any = static_cast<bool>(d_gradient_);
    masked_gram<L, T, cuda, Phi>::operands(
        d_mixer_, [&](std::string_view, const auto& g, operand) { any = any || g; });
    return any;
  }
  void begin_gradients(const cuda::context&) override {
    const auto zeros_as = [](const tensor<T, 3, cuda>& t) {
      return tensor<real, 3, cuda>::zeros(t.extents());
    };
    if (d_mixer_.kernel.q) dq_ = zeros_as(products_.queries());
    if (d_mixer_.kernel.k) dk_ = zeros_as(products_.keys());
    sums_ = tensor<double, 3, cuda>::zeros(index_t{4}, layout_.tokens(), heads_);
  }
  [[nodiscard]] kernels::cuda::matrix_sums sums() const override {
    const index_t n = layout_.tokens() * heads_;
    double* first = sums_.data();
    return {first, first + n, first + 2 * n, first + 3 * n};
  }
  void add_products_vjp(const cuda::context& ctx, const place& at,
                        const tensor<T, 1, cuda>& d) override {
    products_.add_vjp(ctx, at, d, dq_, dk_);
  }
  void finish_gradients(const cuda::context& ctx) override {
    add_mapped_gradient<Phi>(ctx, mixer_.kernel.q, dq_, d_mixer_.kernel.q);
    add_mapped_gradient<Phi>(ctx, mixer_.kernel.k, dk_, d_mixer_.kernel.k);
    const cuda_mask_gradients<L> mask(d_mixer_.mask);
    const added_gradient<real, 1> diagonal(d_gradient_);
    kernels::cuda::decay_gradients<real> g;
    g.heads = static_cast<int>(heads_);
    g.decay_heads = static_cast<int>(mask_heads());
    g.weight = weight();
    if constexpr (has_gamma) g.gamma = mask_.gamma.const_view();
    if constexpr (has_log_a) {
      g.d_log_a = by_token(mask.log_a.get());
      g.d_weight = by_token(mask.weight.get());
    }
    if constexpr (has_gamma) g.d_gamma = mask.gamma.get().view();
    g.d_diagonal = diagonal.get().view();
    kernels::cuda::finish_decay_gradients<real>(ctx.stream(), matrix_sequences_of(on_device_),
                                                layout_.tokens(), sums(), g);
    mask.finish(ctx);
    diagonal.finish();
    dq_ = dk_ = {};
    sums_ = {};
  }

 private:
  static constexpr bool has_log_a = std::same_as<L, semiseparable_mask<real, cuda>>;
  static constexpr bool has_gamma = std::same_as<L, decay_mask<real, cuda>>;

  [[nodiscard]] index_t mask_heads() const { return decay_ ? decay_.extent(1) : 1; }
  [[nodiscard]] view<const real, 2> weight() const {
    if constexpr (has_log_a) {
      return mask_.weight.const_view();
    } else {
      return {};
    }
  }
  [[nodiscard]] static view<real, 2> by_token(const tensor<real, 3, cuda>& t) {
    if (!t) return {};
    return t.template reshape<2>(merge_batch(t.extents())).view();
  }
  void sum_decays(const cuda::context& ctx) {
    const auto sequences = matrix_sequences_of(on_device_);
    if constexpr (has_log_a) {
      allocate_decays(mask_.log_a.extent(1));
      kernels::cuda::sum_log_decays<real>(ctx.stream(), sequences, mask_.log_a.const_view(),
                                          decay_.data(), resets_.data());
    } else if constexpr (has_gamma) {
      allocate_decays(mask_.gamma.extent(0));
      kernels::cuda::sum_constant_decays<real>(ctx.stream(), sequences, mask_.gamma.const_view(),
                                               decay_.data(), resets_.data());
    }
  }
  void allocate_decays(index_t mask_heads) {
    decay_ = tensor<double, 2, cuda>(layout_.tokens(), mask_heads);
    resets_ = tensor<std::int32_t, 2, cuda>(layout_.tokens(), mask_heads);
  }

  sequence_layout layout_;
  device_layout on_device_;
  index_t heads_;
  masked_gram<L, T, cuda, Phi> mixer_;
  query_key_products<T> products_;
  tensor<real, 1, cuda> d_, d_gradient_;
  cuda_mask<L> mask_;
  tensor<double, 2, cuda> decay_;  // (tokens, heads of the mask), or absent
  tensor<std::int32_t, 2, cuda> resets_;
  masked_gram<L, T, cuda, Phi> d_mixer_;  // the operands' gradients
  tensor<real, 3, cuda> dq_, dk_;         // of the mapped ones
  tensor<double, 3, cuda> sums_;          // (4, tokens, heads)
};

/// How a mixer on CUDA is read as a semiseparable matrix with a diagonal, if it is one.
template <class M>
struct cuda_semiseparable_parts {
  static constexpr bool exist = false;
};
template <class L, class T, class Phi>
requires is_semiseparable_mask<L>
struct cuda_semiseparable_parts<masked_gram<L, T, cuda, Phi>> {
  static constexpr bool exist = true;
  [[nodiscard]] static auto panels(const masked_gram<L, T, cuda, Phi>& m, tape<T, cuda>* t,
                                   const cuda::context& ctx) {
    return std::make_shared<cuda_semiseparable_panels<L, T, Phi>>(m, tensor<accum_t<T>, 1, cuda>{},
                                                                  layout_of(m), m.heads(), t, ctx);
  }
};
template <class L, class T, class Phi>
requires is_semiseparable_mask<L>
struct cuda_semiseparable_parts<with_diagonal<masked_gram<L, T, cuda, Phi>>> {
  static constexpr bool exist = true;
  [[nodiscard]] static auto panels(const with_diagonal<masked_gram<L, T, cuda, Phi>>& m,
                                   tape<T, cuda>* t, const cuda::context& ctx) {
    return std::make_shared<cuda_semiseparable_panels<L, T, Phi>>(m.inner, m.d, layout_of(m),
                                                                  m.heads(), t, ctx);
  }
};

}  // namespace ssm::detail
