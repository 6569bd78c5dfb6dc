#pragma once

#include <ssmlib/kernels/cuda/toeplitz.hpp>
#include <ssmlib/lower/cuda/gram.hpp>

#include <concepts>
#include <memory>
#include <string_view>

namespace ssm {

/// @file
/// Toeplitz masks on CUDA through Fourier transforms (alg::structured), by themselves and over a
/// gram matrix; alg::quadratic, in tiles, is in lower/cuda/gram.hpp. A transform mixes all tokens
/// of a sequence, so its rounding error is relative to the largest values of a column, and outputs
/// before a changed token agree to rounding, not to the bit.
///
/// The context keeps the plans of the transforms. A graph can capture a product whose plans exist,
/// that is, after one product of the same sizes.

namespace detail {

/// The plans that a context keeps, for both types of transform.
struct toeplitz_plan_cache {
  kernels::cuda::toeplitz_plans<float> in_float;
  kernels::cuda::toeplitz_plans<double> in_double;
};
template <Real R>
[[nodiscard]] kernels::cuda::toeplitz_plans<R>& toeplitz_plans_of(const cuda::context& ctx) {
  std::shared_ptr<void>& kept = ctx.transforms();
  if (!kept) kept = std::make_shared<toeplitz_plan_cache>();
  auto& cache = *static_cast<toeplitz_plan_cache*>(kept.get());
  if constexpr (std::same_as<R, double>) {
    return cache.in_double;
  } else {
    return cache.in_float;
  }
}

/// The kernels' problem with what its views point to.
template <Floating T, class V>
struct cuda_toeplitz {
  cuda_toeplitz(const cuda::context& ctx, const toeplitz_mask<V, cuda>& m,
                const sequence_layout& sequences, const tensor<T, 4, cuda>& x4, index_t heads)
      : host_layout(sequences),
        tokens(ctx, host_layout, x4, heads),
        kernel(as_type<accum_t<V>>(ctx, m.kernel)) {
    m.check_length(host_layout.max_length());
  }
  [[nodiscard]] kernels::cuda::toeplitz_problem<T> problem() const {
    kernels::cuda::toeplitz_problem<T> p;
    p.kernel = kernel.const_view();
    p.x = tokens.p.x;
    p.q = tokens.p.q;
    p.k = tokens.p.k;
    p.alpha = tokens.p.alpha;
    p.heads = tokens.p.heads;
    p.offsets = tokens.p.offsets;
    p.sequences = tokens.p.sequences;
    p.max_length = tokens.p.max_length;
    // Transforms of each sequence's own size need plans for each; they pay where padding every
    // sequence to the longest would at least double the work.
    if (2 * tokens.layout.tokens < p.sequences * p.max_length) {
      p.host_offsets = host_layout.offsets();
    }
    p.path = kernels::cuda::toeplitz_path::transforms;
    return p;
  }

  sequence_layout host_layout;
  cuda_tokens<T> tokens;
  tensor<accum_t<V>, 2, cuda> kernel;
};

template <Floating T, class V>
void run_cuda_toeplitz(const cuda::context& ctx, const cuda_toeplitz<T, V>& call,
                       const tensor<T, 4, cuda>& y) {
  auto& plans = toeplitz_plans_of<accum_t<T>>(ctx);
  const kernels::cuda::toeplitz_problem<T> p = call.problem();
  const result_tokens<T, cuda> out(y);
  const cuda_workspace workspace(ctx, kernels::cuda::toeplitz_product_workspace_bytes<T>(p, plans));
  kernels::cuda::toeplitz_product<T>(ctx.stream(), p, out.get().view(), plans, workspace.data());
  out.finish();
}
/// @param g  set for q and k, if there are any
template <Floating T, class V>
void run_cuda_toeplitz_vjp(const cuda::context& ctx, const cuda_toeplitz<T, V>& call,
                           const tensor<T, 4, cuda>& dy, kernels::cuda::toeplitz_gradients<T>& g,
                           const toeplitz_mask<V, cuda>& d_mask, const tensor<T, 4, cuda>& dx) {
  auto& plans = toeplitz_plans_of<accum_t<T>>(ctx);
  const kernels::cuda::toeplitz_problem<T> p = call.problem();
  const mask_gradient<V, 2> kernel(d_mask.kernel);
  const added_gradient<T, 4> x(dx);
  g.kernel = kernel.get().view();
  g.x = x.tokens();
  const tensor<T, 3, cuda> d_out = input_tokens(dy);
  const cuda_workspace workspace(
      ctx, kernels::cuda::toeplitz_product_vjp_workspace_bytes<T>(p, g, plans));
  kernels::cuda::toeplitz_product_vjp<T>(ctx.stream(), p, d_out.const_view(), g, plans,
                                         workspace.data());
  kernel.finish(ctx);
  x.finish();
}

}  // namespace detail

// ---- L X ----------------------------------------------------------------------------------------

/// @cost  O(T log T) a column of X; some 100 MB of working memory, and the plans.
template <Floating T>
void apply_mixer(const cuda::context& ctx, alg::structured, const toeplitz_mask<T, cuda>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::refuse_carry(c);
  if (y.size() == 0) return;
  const sequence_layout layout = detail::layout_with(m, x);
  detail::run_cuda_toeplitz(ctx, detail::cuda_toeplitz<T, T>(ctx, m, layout, x, y.extent(2)), y);
}
template <Floating T>
void apply_mixer_vjp(const cuda::context& ctx, alg::structured, const toeplitz_mask<T, cuda>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     toeplitz_mask<T, cuda>& dm, const tensor<T, 4, cuda>& dx,
                     const carry_gradient<T, cuda>& c) {
  detail::refuse_carry<T, cuda>({c.initial, c.d_final, {}, 0, nullptr});
  const sequence_layout layout = detail::layout_with(m, x);
  const detail::cuda_toeplitz<T, T> call(ctx, m, layout, x, dy.extent(2));
  kernels::cuda::toeplitz_gradients<T> g;
  detail::run_cuda_toeplitz_vjp(ctx, call, dy, g, dm, dx);
}

/// Measured equal on an H100 at about 370 tokens for 64 features.
template <Floating T>
[[nodiscard]] std::string_view choose_algorithm(const toeplitz_mask<T, cuda>&, index_t length,
                                                index_t width) {
  const bool transforms = length >= 64 && length * (106 + width) >= 1000 * width;
  return transforms ? alg::structured::name : alg::quadratic::name;
}

// ---- (L o Q K^T) V ------------------------------------------------------------------------------

/// @cost  O(N P T log T) a head; some 100 MB of working memory, and the plans.
template <Floating T, FeatureMap Phi>
void apply_mixer(const cuda::context& ctx, alg::structured,
                 const masked_gram<toeplitz_mask<accum_t<T>, cuda>, T, cuda, Phi>& m,
                 const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& y,
                 const carry<T, cuda>& c) {
  detail::refuse_carry(c);
  if (y.size() == 0) return;
  detail::cuda_toeplitz<T, accum_t<T>> call(ctx, m.mask, layout_of(m), x, y.extent(2));
  call.tokens.set_gram(ctx, m.kernel);
  detail::run_cuda_toeplitz(ctx, call, y);
}
template <Floating T, FeatureMap Phi>
void apply_mixer_vjp(const cuda::context& ctx, alg::structured,
                     const masked_gram<toeplitz_mask<accum_t<T>, cuda>, T, cuda, Phi>& m,
                     const tensor<T, 4, cuda>& x, const tensor<T, 4, cuda>& dy,
                     masked_gram<toeplitz_mask<accum_t<T>, cuda>, T, cuda, Phi>& dm,
                     const tensor<T, 4, cuda>& dx, const carry_gradient<T, cuda>& c) {
  detail::refuse_carry<T, cuda>({c.initial, c.d_final, {}, 0, nullptr});
  detail::cuda_toeplitz<T, accum_t<T>> call(ctx, m.mask, layout_of(m), x, dy.extent(2));
  call.tokens.set_gram(ctx, m.kernel);
  const detail::mapped_gradient<Phi, T> dq(dm.kernel.q), dk(dm.kernel.k);
  kernels::cuda::toeplitz_gradients<T> g;
  g.q = dq.tokens();
  g.k = dk.tokens();
  detail::run_cuda_toeplitz_vjp(ctx, call, dy, g, dm.mask, dx);
  dq.finish(ctx, m.kernel.q);
  dk.finish(ctx, m.kernel.k);
}

/// Transforms cost N P columns, tiles T (N + P): measured equal on an H100 at T = 32,000 for
/// N = P = 64.
template <Floating T, FeatureMap Phi>
[[nodiscard]] std::string_view choose_algorithm(
    const masked_gram<toeplitz_mask<accum_t<T>, cuda>, T, cuda, Phi>& m, index_t length,
    index_t width) {
  const index_t n = m.key_size();
  return length * (n + width) >= 1000 * n * width ? alg::structured::name : alg::quadratic::name;
}

}  // namespace ssm
