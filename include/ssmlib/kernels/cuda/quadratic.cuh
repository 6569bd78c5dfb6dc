#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/quadratic_gram.cuh>
#include <ssmlib/kernels/cuda/quadratic_kernels.cuh>

#include <algorithm>
#include <string>

/// @file
/// The launch functions of quadratic.hpp.

namespace ssm::kernels::cuda {

namespace detail {

[[noreturn]] inline void quadratic_shape_error(const char* name, const std::string& what) {
  throw shape_error("ssm: " + std::string(name) + ": " + what);
}

/// Heads of an operand or of a gradient must divide the problem's.
inline void check_head_groups(const char* name, const char* operand, index_t groups,
                              index_t heads) {
  if (groups >= 1 && heads % groups == 0) return;
  quadratic_shape_error(name, std::string(operand) + " has " + std::to_string(groups) +
                                  " heads for " + std::to_string(heads) + "; wanted a divisor");
}

template <class T>
void check_quadratic_operand(const char* name, const char* operand, view<T, 3> v, index_t tokens,
                             index_t heads, index_t size) {
  if (v.data == nullptr && v.size() != 0) {
    quadratic_shape_error(name,
                          std::string(operand) + " has no data; wanted " + to_string<3>(v.extents));
  }
  if (v.extents[0] != tokens || v.extents[2] != size) {
    quadratic_shape_error(name, std::string(operand) + " is " + to_string<3>(v.extents) +
                                    "; wanted " + std::to_string(tokens) + " tokens and " +
                                    std::to_string(size) + " features");
  }
  if (v.strides[2] != 1 && v.extents[2] > 1) {
    quadratic_shape_error(name, std::string(operand) + " has an inner stride of " +
                                    std::to_string(v.strides[2]) + "; wanted 1");
  }
  check_head_groups(name, operand, v.extents[1], heads);
}

template <class T>
void check_quadratic(const char* name, const quadratic_problem<T>& p) {
  const index_t tokens = p.x.extents[0], n = p.q.extents[2];
  check_quadratic_operand(name, "x", p.x, tokens, p.heads, p.x.extents[2]);
  if (p.q || p.k || n > 0) {
    check_quadratic_operand(name, "q", p.q, tokens, p.heads, n);
    check_quadratic_operand(name, "k", p.k, tokens, p.heads, n);
  }
  if (p.max_length < 0 || p.max_length > (index_t{1} << 30) || p.sequences < 0 ||
      (p.offsets == nullptr && p.sequences * p.max_length != tokens)) {
    quadratic_shape_error(name, std::to_string(p.sequences) + " sequences of " +
                                    std::to_string(p.max_length) + " tokens do not fit " +
                                    std::to_string(tokens) + " tokens");
  }
}

template <class T>
void check_mask(const char* name, const quadratic_problem<T>& p, const quadratic_mask<T>& mask) {
  using kind = quadratic_mask_kind;
  const index_t tokens = p.x.extents[0];
  if (mask.kind == kind::window && mask.window < 1) {
    throw value_error("ssm: " + std::string(name) + ": the window is " +
                      std::to_string(mask.window) + "; wanted at least 1, the token itself");
  }
  if (mask.kind == kind::decay) {
    check_head_groups(name, "gamma", mask.gamma.extents[0], p.heads);
  }
  if (mask.kind == kind::semiseparable) {
    check_head_groups(name, "log_a", mask.log_a.extents[1], p.heads);
    if (mask.weight) check_head_groups(name, "weight", mask.weight.extents[1], p.heads);
    if (mask.log_a.extents[0] != tokens || (mask.weight && mask.weight.extents[0] != tokens)) {
      quadratic_shape_error(name, "log_a is " + to_string<2>(mask.log_a.extents) +
                                      " and the weight " + to_string<2>(mask.weight.extents) +
                                      "; wanted " + std::to_string(tokens) + " tokens");
    }
  }
  if (mask.kind == kind::toeplitz) {
    check_head_groups(name, "the kernel", mask.kernel.extents[0], p.heads);
    if (mask.kernel.extents[1] < p.max_length) {
      quadratic_shape_error(name, "the kernel has " + std::to_string(mask.kernel.extents[1]) +
                                      " distances for sequences of " +
                                      std::to_string(p.max_length) + "; wanted as many");
    }
  }
  if (mask.kind == kind::none && !p.q) {
    throw value_error("ssm: " + std::string(name) +
                      ": there is neither a mask nor q and k; give one of them");
  }
}

/// Takes pieces of a workspace, each aligned to 256 bytes; without memory it only counts.
class workspace_pieces {
 public:
  explicit workspace_pieces(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class U>
  U* take(index_t n) {
    auto* piece = memory_ == nullptr ? nullptr : reinterpret_cast<U*>(memory_ + used_);
    used_ += (static_cast<std::size_t>(n) * sizeof(U) + 255) / 256 * 256;
    return piece;
  }
  [[nodiscard]] std::size_t bytes() const { return used_; }

 private:
  unsigned char* memory_;
  std::size_t used_ = 0;
};

/// The working memory of masked products: running sums of log_a, parts of the mask's gradient.
template <class T>
struct quadratic_workspace {
  double* log_sums = nullptr;
  accum_t<T>*sums = nullptr, *weight_sums = nullptr;
  index_t parts = 0, n = 0;  // sums are (heads, parts, n)
  std::size_t bytes = 0;

  quadratic_workspace(const quadratic_problem<T>& p, const quadratic_mask<T>& mask,
                      const quadratic_gradients<T>& g, void* memory) {
    using kind = quadratic_mask_kind;
    workspace_pieces pieces(memory);
    const bool decays = mask.kind == kind::semiseparable;
    if (decays) log_sums = pieces.take<double>(mask.log_a.extents[1] * p.x.extents[0]);
    if ((decays && (g.log_a || g.weight)) || (mask.kind == kind::toeplitz && g.kernel) ||
        (mask.kind == kind::decay && g.gamma)) {
      constexpr index_t rows = quadratic_tile<accum_t<T>>::rows, numbers = index_t{1} << 26;
      n = decays ? p.x.extents[0] : mask.kind == kind::toeplitz ? p.max_length : 1;
      const index_t heads = std::max<index_t>(p.heads, 1);
      parts = std::min({std::max<index_t>(1, 1056 / heads),
                        p.sequences * ((p.max_length + rows - 1) / rows),
                        numbers / (heads * std::max<index_t>(n, 1))});
      parts = std::max<index_t>(parts, 1);
      sums = pieces.take<accum_t<T>>(p.heads * parts * n);
      if (decays && g.weight) weight_sums = pieces.take<accum_t<T>>(p.heads * parts * n);
    }
    bytes = pieces.bytes();
  }
};

template <class T>
[[nodiscard]] quadratic_parameters<T> quadratic_parameters_of(const quadratic_problem<T>& p,
                                                              const quadratic_mask<T>& mask,
                                                              view<const T, 3> dy,
                                                              const double* log_sums) {
  const packed_sequences sequences{p.offsets, p.sequences, p.max_length};
  using kind = quadratic_mask_kind;
  mask_operand<T> m{mask.kind,
                    static_cast<int>(std::min(mask.window, index_t{1} << 30)),
                    mask.gamma.data,
                    mask.gamma.strides[0],
                    log_sums,
                    p.x.extents[0],
                    mask.weight,
                    mask.kernel.data,
                    mask.kernel.strides[0],
                    mask.kernel.strides[1],
                    mask.kind == kind::decay           ? mask.gamma.extents[0]
                    : mask.kind == kind::semiseparable ? mask.log_a.extents[1]
                    : mask.kind == kind::toeplitz      ? mask.kernel.extents[0]
                                                       : 1,
                    mask.weight ? mask.weight.extents[1] : 1,
                    p.heads};
  return {{p.q, p.heads},
          {p.k, p.heads},
          {p.x, p.heads},
          {dy, p.heads},
          {},
          p.alpha,
          p.heads,
          sequences,
          m};
}

template <class T>
void launch_log_sums(cudaStream_t stream, const quadratic_problem<T>& p,
                     const quadratic_mask<T>& mask, double* sums) {
  if (mask.kind != quadratic_mask_kind::semiseparable || p.sequences * p.max_length == 0) return;
  const index_t groups = mask.log_a.extents[1];
  log_sums_kernel<<<blocks_for(p.sequences * groups), 256, 0, stream>>>(
      mask.log_a, groups, packed_sequences{p.offsets, p.sequences, p.max_length}, p.x.extents[0],
      sums);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <quadratic_result Result, class T>
void launch_quadratic(cudaStream_t stream, const char* name, quadratic_parameters<T> p,
                      view<T, 3> out, index_t tokens, index_t features, bool add) {
  using tiles = quadratic_tile<accum_t<T>>;
  check_quadratic_operand(name, "a result", out, tokens, p.heads, features);
  p.out = {out, p.heads};
  p.add = add;
  p.tiles = (p.sequences.max_length + tiles::rows - 1) / tiles::rows;
  p.chunks = (features + tiles::columns - 1) / tiles::columns;
  const index_t blocks = p.tiles * p.chunks * p.sequences.count * out.extents[1];
  if (blocks == 0) return;
  quadratic_kernel<T, Result><<<blocks_for(blocks), 256, 0, stream>>>(p);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void launch_mask_gradients(cudaStream_t stream, const char* name, const quadratic_parameters<T>& p,
                           const quadratic_gradients<T>& g, const quadratic_workspace<T>& work,
                           index_t distances) {
  using A = accum_t<T>;
  const index_t all = p.heads * work.parts;
  const std::size_t bytes = static_cast<std::size_t>(all * work.n) * sizeof(A);
  if (bytes > 0) {
    SSMLIB_CHECK_CUDA(cudaMemsetAsync(work.sums, 0, bytes, stream));
    if (work.weight_sums) SSMLIB_CHECK_CUDA(cudaMemsetAsync(work.weight_sums, 0, bytes, stream));
    mask_gradient_kernel<T>
        <<<blocks_for(all), 256, 0, stream>>>({p, work.parts, work.n, work.sums, work.weight_sums});
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
  const auto add_up = [&](const A* sums, A* to, index_t groups, index_t group_step, index_t step,
                          index_t wanted) {
    check_head_groups(name, "a gradient of the mask", groups, p.heads);
    if (groups * wanted == 0) return;
    add_parts_kernel<<<blocks_for((groups * wanted + 255) / 256), 256, 0, stream>>>(
        sums, p.heads, work.parts, work.n, to, groups, group_step, step, wanted, g.add);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  const auto add_up_tokens = [&](const A* sums, view<A, 2> to) {
    if (to.extents[0] != work.n) {
      quadratic_shape_error(name, "a gradient of the mask is " + to_string<2>(to.extents) +
                                      "; wanted " + std::to_string(work.n) + " tokens");
    }
    add_up(sums, to.data, to.extents[1], to.strides[1], to.strides[0], work.n);
  };
  using kind = quadratic_mask_kind;
  if (p.mask.kind == kind::decay) {
    add_up(work.sums, g.gamma.data, g.gamma.extents[0], g.gamma.strides[0], 0, 1);
  } else if (p.mask.kind == kind::toeplitz) {
    if (g.kernel.extents[1] != distances) {
      quadratic_shape_error(name, "the kernel's gradient is " + to_string<2>(g.kernel.extents) +
                                      "; wanted " + std::to_string(distances) + " distances");
    }
    add_up(work.sums, g.kernel.data, g.kernel.extents[0], g.kernel.strides[0], g.kernel.strides[1],
           distances);
  } else {
    if (g.log_a) add_up_tokens(work.sums, g.log_a);
    if (g.weight) add_up_tokens(work.weight_sums, g.weight);
  }
}

}  // namespace detail

template <class T>
std::size_t masked_quadratic_workspace_bytes(const quadratic_problem<T>& p,
                                             const quadratic_mask<T>& mask) {
  return detail::quadratic_workspace<T>(p, mask, {}, nullptr).bytes;
}

template <class T>
void masked_quadratic(cudaStream_t stream, const quadratic_problem<T>& p,
                      const quadratic_mask<T>& mask, view<T, 3> y, void* workspace) {
  using namespace detail;
  const char* name = "masked_quadratic";
  check_quadratic(name, p);
  check_mask(name, p, mask);
  const quadratic_workspace<T> work(p, mask, {}, workspace);
  launch_log_sums(stream, p, mask, work.log_sums);
  launch_quadratic<quadratic_result::y>(stream, name,
                                        quadratic_parameters_of(p, mask, {}, work.log_sums), y,
                                        p.x.extents[0], p.x.extents[2], false);
}

template <class T>
std::size_t masked_quadratic_vjp_workspace_bytes(const quadratic_problem<T>& p,
                                                 const quadratic_mask<T>& mask,
                                                 const quadratic_gradients<T>& g) {
  return detail::quadratic_workspace<T>(p, mask, g, nullptr).bytes;
}

template <class T>
void masked_quadratic_vjp(cudaStream_t stream, const quadratic_problem<T>& p,
                          const quadratic_mask<T>& mask, view<const T, 3> dy,
                          const quadratic_gradients<T>& g, void* workspace) {
  using namespace detail;
  const char* name = "masked_quadratic_vjp";
  const index_t tokens = p.x.extents[0], n = p.q.extents[2], features = p.x.extents[2];
  check_quadratic(name, p);
  check_mask(name, p, mask);
  check_quadratic_operand(name, "dy", dy, tokens, p.heads, features);
  const quadratic_workspace<T> work(p, mask, g, workspace);
  launch_log_sums(stream, p, mask, work.log_sums);
  const quadratic_parameters<T> o = quadratic_parameters_of(p, mask, dy, work.log_sums);
  if (g.q) launch_quadratic<quadratic_result::dq>(stream, name, o, g.q, tokens, n, g.add);
  if (g.k) launch_quadratic<quadratic_result::dk>(stream, name, o, g.k, tokens, n, g.add);
  if (g.x) launch_quadratic<quadratic_result::dx>(stream, name, o, g.x, tokens, features, g.add);
  if (work.parts > 0) launch_mask_gradients(stream, name, o, g, work, mask.kernel.extents[1]);
}

template <class T>
std::size_t gram_associative_workspace_bytes(const quadratic_problem<T>& p) {
  return static_cast<std::size_t>(p.sequences * p.heads * detail::gram_splits(p) * p.q.extents[2] *
                                  p.x.extents[2]) *
         sizeof(accum_t<T>);
}

template <class T>
void gram_associative(cudaStream_t stream, const quadratic_problem<T>& p, view<T, 3> y,
                      void* workspace) {
  using namespace detail;
  check_quadratic("gram_associative", p);
  check_quadratic_operand("gram_associative", "y", y, p.x.extents[0], p.heads, p.x.extents[2]);
  launch_gram<T>(stream, p, p.x, p.k, p.q, y, false, static_cast<accum_t<T>*>(workspace));
}

template <class T>
void gram_associative_vjp(cudaStream_t stream, const quadratic_problem<T>& p, view<const T, 3> dy,
                          const quadratic_gradients<T>& g, void* workspace) {
  using namespace detail;
  const char* name = "gram_associative_vjp";
  const index_t tokens = p.x.extents[0], n = p.q.extents[2], features = p.x.extents[2];
  auto* sums = static_cast<accum_t<T>*>(workspace);
  check_quadratic(name, p);
  check_quadratic_operand(name, "dy", dy, tokens, p.heads, features);
  if (g.q) check_quadratic_operand(name, "dq", g.q, tokens, p.heads, n);
  if (g.k) check_quadratic_operand(name, "dk", g.k, tokens, p.heads, n);
  if (g.x) check_quadratic_operand(name, "dx", g.x, tokens, p.heads, features);
  if (g.q) launch_gram<T>(stream, p, p.k, p.x, dy, g.q, g.add, sums);
  if (g.k) launch_gram<T>(stream, p, p.q, dy, p.x, g.k, g.add, sums);
  if (g.x) launch_gram<T>(stream, p, dy, p.q, p.k, g.x, g.add, sums);
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(cuda_quadratic, std::size_t masked_quadratic_workspace_bytes<T>(             \
                                         const quadratic_problem<T>&, const quadratic_mask<T>&)); \
  SSMLIB_INSTANTIATE(cuda_quadratic,                                                              \
                     void masked_quadratic<T>(cudaStream_t, const quadratic_problem<T>&,          \
                                              const quadratic_mask<T>&, view<T, 3>, void*));      \
  SSMLIB_INSTANTIATE(cuda_quadratic, std::size_t masked_quadratic_vjp_workspace_bytes<T>(         \
                                         const quadratic_problem<T>&, const quadratic_mask<T>&,   \
                                         const quadratic_gradients<T>&));                         \
  SSMLIB_INSTANTIATE(cuda_quadratic,                                                              \
                     void masked_quadratic_vjp<T>(cudaStream_t, const quadratic_problem<T>&,      \
                                                  const quadratic_mask<T>&, view<const T, 3>,     \
                                                  const quadratic_gradients<T>&, void*));         \
  SSMLIB_INSTANTIATE(cuda_quadratic, std::size_t gram_associative_workspace_bytes<T>(             \
                                         const quadratic_problem<T>&));                           \
  SSMLIB_INSTANTIATE(                                                                             \
      cuda_quadratic,                                                                             \
      void gram_associative<T>(cudaStream_t, const quadratic_problem<T>&, view<T, 3>, void*));    \
  SSMLIB_INSTANTIATE(cuda_quadratic, void gram_associative_vjp<T>(                                \
                                         cudaStream_t, const quadratic_problem<T>&,               \
                                         view<const T, 3>, const quadratic_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
