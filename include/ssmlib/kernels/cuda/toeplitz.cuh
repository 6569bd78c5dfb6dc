#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/quadratic.cuh>
#include <ssmlib/kernels/cuda/toeplitz_chunks.cuh>

#include <string>

/// @file
/// The launch functions of toeplitz.hpp.

namespace ssm::kernels::cuda {

namespace detail {

template <class T>
[[nodiscard]] quadratic_problem<T> quadratic_problem_of(const toeplitz_problem<T>& p) {
  return {p.q, p.k, p.x, p.alpha, p.heads, p.offsets, p.sequences, p.max_length};
}
template <class T>
[[nodiscard]] quadratic_mask<T> quadratic_mask_of(const toeplitz_problem<T>& p) {
  quadratic_mask<T> mask;
  mask.kind = quadratic_mask_kind::toeplitz;
  mask.kernel = p.kernel;
  return mask;
}

/// Pairs of tokens cost the direct way, tokens the transforms; measured on an H100: equal at about
/// 370 tokens for 64 features, and at 32,000 over a gram matrix with N = P = 64.
template <class T>
[[nodiscard]] bool toeplitz_wants_transforms(const toeplitz_problem<T>& p) {
  if (p.path != toeplitz_path::automatic) return p.path == toeplitz_path::transforms;
  double tokens = 0, pairs = 0;
  if (p.host_offsets == nullptr) {
    tokens = static_cast<double>(p.sequences) * static_cast<double>(p.max_length);
    pairs = static_cast<double>(p.x.extents[0]) * static_cast<double>(p.max_length);
  } else {
    for (index_t i = 0; i < p.sequences; ++i) {
      const auto length = static_cast<double>(p.host_offsets[i + 1] - p.host_offsets[i]);
      tokens += length;
      pairs += length * length;
    }
  }
  const auto n = static_cast<double>(p.q.extents[2]),
             features = static_cast<double>(p.x.extents[2]);
  if (p.q) return pairs * (n + features) >= 1000 * tokens * n * features;
  return pairs >= 64 * tokens && pairs * (106 + features) >= 1000 * tokens * features;
}

template <class T>
void check_toeplitz(const char* name, const toeplitz_problem<T>& p) {
  check_quadratic(name, quadratic_problem_of(p));
  check_mask(name, quadratic_problem_of(p), quadratic_mask_of(p));
}

template <class T>
void toeplitz_forward_jobs(toeplitz_transforms<T>& run, const toeplitz_problem<T>& p,
                           view<T, 3> y) {
  run.product({run.operand(p.x), run.operand(p.k), run.operand(p.q), y, false, false});
}

template <class T>
void toeplitz_backward_jobs(toeplitz_transforms<T>& run, const toeplitz_problem<T>& p,
                            view<const T, 3> dy, const toeplitz_gradients<T>& g) {
  const auto x = run.operand(p.x), q = run.operand(p.q), k = run.operand(p.k),
             out = run.operand(dy);
  if (g.x) run.product({out, q, k, g.x, true, g.add});
  if (g.q) run.product({k, x, out, g.q, false, g.add});
  if (g.k) run.product({q, out, x, g.k, true, g.add});
  if (g.kernel) run.kernel_gradient(out, g.kernel, g.add);
}

}  // namespace detail

template <class T>
std::size_t toeplitz_product_workspace_bytes(const toeplitz_problem<T>& p,
                                             toeplitz_plans<accum_t<T>>& plans) {
  using namespace detail;
  check_toeplitz("toeplitz_product_workspace_bytes", p);
  if (!toeplitz_wants_transforms(p)) {
    return masked_quadratic_workspace_bytes(quadratic_problem_of(p), quadratic_mask_of(p));
  }
  toeplitz_transforms<T> run(nullptr, p, plans, nullptr);
  const index_t tokens = p.x.extents[0], features = p.x.extents[2];
  const view<T, 3> y{nullptr, {tokens, p.heads, features}, {p.heads * features, features, 1}};
  toeplitz_forward_jobs(run, p, y);
  return run.bytes();
}

template <class T>
void toeplitz_product(cudaStream_t stream, const toeplitz_problem<T>& p, view<T, 3> y,
                      toeplitz_plans<accum_t<T>>& plans, void* workspace) {
  using namespace detail;
  const char* name = "toeplitz_product";
  check_toeplitz(name, p);
  check_quadratic_operand(name, "y", y, p.x.extents[0], p.heads, p.x.extents[2]);
  if (y.extents[1] != p.heads) {
    quadratic_shape_error(
        name, "y is " + to_string<3>(y.extents) + "; wanted " + std::to_string(p.heads) + " heads");
  }
  if (!toeplitz_wants_transforms(p)) {
    return masked_quadratic(stream, quadratic_problem_of(p), quadratic_mask_of(p), y, workspace);
  }
  if (y.size() == 0) return;
  toeplitz_transforms<T> run(stream, p, plans, workspace);
  toeplitz_forward_jobs(run, p, y);
}

namespace detail {

template <class T>
[[nodiscard]] quadratic_gradients<T> quadratic_gradients_of(const toeplitz_gradients<T>& g) {
  quadratic_gradients<T> d;
  d.q = g.q;
  d.k = g.k;
  d.x = g.x;
  d.kernel = g.kernel;
  d.add = g.add;
  return d;
}

template <class T>
void check_toeplitz_gradients(const char* name, const toeplitz_problem<T>& p,
                              const toeplitz_gradients<T>& g) {
  const index_t tokens = p.x.extents[0], n = p.q.extents[2];
  if (g.x) check_quadratic_operand(name, "dx", g.x, tokens, p.heads, p.x.extents[2]);
  if (g.q) check_quadratic_operand(name, "dq", g.q, tokens, p.heads, n);
  if (g.k) check_quadratic_operand(name, "dk", g.k, tokens, p.heads, n);
  if (g.kernel && g.kernel.extents != p.kernel.extents) {
    quadratic_shape_error(name, "the kernel is " + to_string<2>(p.kernel.extents) +
                                    " and its gradient " + to_string<2>(g.kernel.extents) +
                                    "; wanted equal sizes");
  }
}

}  // namespace detail

template <class T>
std::size_t toeplitz_product_vjp_workspace_bytes(const toeplitz_problem<T>& p,
                                                 const toeplitz_gradients<T>& g,
                                                 toeplitz_plans<accum_t<T>>& plans) {
  using namespace detail;
  const char* name = "toeplitz_product_vjp_workspace_bytes";
  check_toeplitz(name, p);
  check_toeplitz_gradients(name, p, g);
  if (!toeplitz_wants_transforms(p)) {
    return masked_quadratic_vjp_workspace_bytes(quadratic_problem_of(p), quadratic_mask_of(p),
                                                quadratic_gradients_of(g));
  }
  toeplitz_transforms<T> run(nullptr, p, plans, nullptr);
  // Only the sizes of dy are read.
  const index_t tokens = p.x.extents[0], features = p.x.extents[2];
  const view<const T, 3> dy{
      p.x.data, {tokens, p.heads, features}, {p.heads * features, features, 1}};
  toeplitz_backward_jobs(run, p, dy, g);
  return run.bytes();
}

template <class T>
void toeplitz_product_vjp(cudaStream_t stream, const toeplitz_problem<T>& p, view<const T, 3> dy,
                          const toeplitz_gradients<T>& g, toeplitz_plans<accum_t<T>>& plans,
                          void* workspace) {
  using namespace detail;
  const char* name = "toeplitz_product_vjp";
  check_toeplitz(name, p);
  check_toeplitz_gradients(name, p, g);
  check_quadratic_operand(name, "dy", dy, p.x.extents[0], p.heads, p.x.extents[2]);
  if (!toeplitz_wants_transforms(p)) {
    return masked_quadratic_vjp(stream, quadratic_problem_of(p), quadratic_mask_of(p), dy,
                                quadratic_gradients_of(g), workspace);
  }
  toeplitz_transforms<T> run(stream, p, plans, workspace);
  toeplitz_backward_jobs(run, p, dy, g);
}

SSMLIB_INSTANTIATE(cuda_toeplitz, class toeplitz_plans<float>);
SSMLIB_INSTANTIATE(cuda_toeplitz, class toeplitz_plans<double>);
#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_toeplitz, std::size_t toeplitz_product_workspace_bytes<T>(               \
                                        const toeplitz_problem<T>&, toeplitz_plans<accum_t<T>>&)); \
  SSMLIB_INSTANTIATE(cuda_toeplitz,                                                                \
                     void toeplitz_product<T>(cudaStream_t, const toeplitz_problem<T>&,            \
                                              view<T, 3>, toeplitz_plans<accum_t<T>>&, void*));    \
  SSMLIB_INSTANTIATE(cuda_toeplitz, std::size_t toeplitz_product_vjp_workspace_bytes<T>(           \
                                        const toeplitz_problem<T>&, const toeplitz_gradients<T>&,  \
                                        toeplitz_plans<accum_t<T>>&));                             \
  SSMLIB_INSTANTIATE(cuda_toeplitz,                                                                \
                     void toeplitz_product_vjp<T>(cudaStream_t, const toeplitz_problem<T>&,        \
                                                  view<const T, 3>, const toeplitz_gradients<T>&,  \
                                                  toeplitz_plans<accum_t<T>>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
