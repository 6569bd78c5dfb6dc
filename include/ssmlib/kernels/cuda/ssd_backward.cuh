#pragma once

#include <ssmlib/kernels/cuda/ssd_backward_lanes.cuh>
#include <ssmlib/kernels/cuda/ssd_mma_boundary.cuh>
#include <ssmlib/kernels/cuda/ssd_mma_gradient.cuh>

namespace ssm::kernels::cuda {

namespace detail {

/// What the launches of the backward pass do for one problem: a function of its sizes and of the
/// card.
struct ssd_backward_plan {
  rung kernels = rung::general;
  int keys = 128;
  index_t lanes = 0, parts = 1, groups = 1, splits = 1, chunks = 0, slots = 0, tokens = 0;

  template <class T>
  [[nodiscard]] static ssd_backward_plan of(const ssd_problem<T>& p) {
    ssd_backward_plan r;
    if constexpr (std::is_same_v<T, bf16>) {
      const ssd_plan forward = ssd_plan::of(p);
      if (p.q.extent(1) == p.k.extent(1) && p.x.extent(1) == p.heads) r.kernels = forward.kernels;
      if (r.kernels == rung::general || p.heads == 0 || p.sequences == 0) return r;
      r.keys = forward.keys, r.lanes = forward.lanes, r.parts = forward.parts;
      r.groups = p.q.extent(1);
      r.tokens = p.q.extent(0);
      r.chunks = std::max<index_t>(1, (p.max_length + 63) / 64);
      r.slots = r.tokens / 64 + p.sequences + 1;
      const index_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
      // Waves of blocks, each with about two lanes' time to start and end.
      const index_t shared = r.lanes / r.groups;
      index_t best = 0;
      for (index_t n = 1; n <= std::min<index_t>(shared, 16); ++n) {
        const index_t blocks = p.sequences * r.chunks * r.groups * n;
        const index_t time = (blocks + processors - 1) / processors * ((shared + n - 1) / n + 2);
        if (n == 1 || time < best) best = time, r.splits = n;
      }
    }
    return r;
  }

  [[nodiscard]] index_t image_bytes() const { return slots * lanes * 2 * 64 * keys * 2; }
  /// Floats of the gradient of q or k, of all splits.
  [[nodiscard]] index_t partial_size(index_t key_size) const {
    return splits == 1 ? 0 : splits * tokens * groups * key_size;
  }
  template <class T>
  [[nodiscard]] index_t workspace_bytes(const ssd_problem<T>& p) const {
    return image_bytes() + 4 * (2 * partial_size(p.key_size()) + 3 * tokens * lanes +
                                ssd_parameter_sums_size<float>(p.heads));
  }
};

/// The two launches of the sm_90a rung.
template <int N>
void ssd_backward_tiles(cudaStream_t stream, const ssd_problem<bf16>& p,
                        const ssd_backward_cut& cut, index_t blocks, const view<const bf16, 3>& dy,
                        const ssd_states<bf16>& states, const ssd_gradients<bf16>& g) {
  const ssd_arguments<bf16> arguments(p);
  const ssd_backward_maps maps(p, dy);
  using walk = ssd_boundary_tile<N>;
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(ssd_boundary_kernel<N>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, walk::bytes));
  ssd_boundary_kernel<N>
      <<<ssd_blocks(p.sequences * 2 * cut.lanes), walk::threads, walk::bytes, stream>>>(
          arguments, maps, cut, ssd_state_operand<const float>(states.initial),
          ssd_state_operand<const float>(g.d_final), ssd_state_operand<float>(g.d_initial));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  using tile = ssd_gradient_tile<N>;
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(ssd_gradient_kernel<N>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, tile::bytes));
  ssd_gradient_kernel<N><<<ssd_blocks(blocks), tile::threads, tile::bytes, stream>>>(
      arguments, maps, cut, ssd_operand<bf16>(g.q, p.heads), ssd_operand<bf16>(g.k, p.heads),
      ssd_operand<bf16>(g.x, p.heads));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

/// The same of the sm_80 rung.
template <int N>
void ssd_backward_mma(cudaStream_t stream, const ssd_problem<bf16>& p, const ssd_backward_cut& cut,
                      index_t blocks, const view<const bf16, 3>& dy, const ssd_states<bf16>& states,
                      const ssd_gradients<bf16>& g) {
  const ssd_mma_gradient_arguments a{ssd_arguments<bf16>(p),
                                     ssd_operand<const bf16>(dy, p.heads),
                                     cut,
                                     ssd_operand<bf16>(g.q, p.heads),
                                     ssd_operand<bf16>(g.k, p.heads),
                                     ssd_operand<bf16>(g.x, p.heads)};
  using walk = ssd_mma_boundary_tile<N>;
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(ssd_mma_boundary_kernel<N>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, walk::bytes));
  ssd_mma_boundary_kernel<N>
      <<<ssd_blocks(p.sequences * 2 * cut.lanes), walk::threads, walk::bytes, stream>>>(
          a.p, a.dy, cut, ssd_state_operand<const float>(states.initial),
          ssd_state_operand<const float>(g.d_final), ssd_state_operand<float>(g.d_initial));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (ssd_mma_gradient_tile<N, 2>::bytes <= shared_bytes_of_block()) {
    ssd_mma_launch_gradient<N, 2>(stream, blocks, a);
  } else {
    ssd_mma_launch_gradient<N, 1>(stream, blocks, a);
  }
}

inline void ssd_backward_on_tensor_cores(cudaStream_t stream, const ssd_problem<bf16>& p,
                                         const ssd_backward_plan& plan,
                                         const view<const bf16, 3>& dy,
                                         const ssd_states<bf16>& states,
                                         const ssd_gradients<bf16>& g, void* workspace) {
  const ssd_arguments<bf16> arguments(p);
  ssd_backward_cut cut{};
  cut.lanes = static_cast<int>(plan.lanes), cut.parts = static_cast<int>(plan.parts);
  cut.groups = static_cast<int>(plan.groups), cut.splits = static_cast<int>(plan.splits);
  cut.chunks = static_cast<int>(plan.chunks), cut.tokens = plan.tokens;
  cut.images = static_cast<bf16*>(workspace);
  auto* at = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.image_bytes());
  const auto take = [&](index_t n) { return at += n, at - n; };
  const index_t rows = plan.tokens * plan.lanes;
  cut.q = take(plan.partial_size(p.key_size()));
  cut.k = take(plan.partial_size(p.key_size()));
  cut.sums.log_a = take(rows), cut.sums.weight = take(rows), cut.sums.skip = take(rows);
  cut.sums.lanes = cut.lanes, cut.sums.parts = cut.parts;
  const index_t blocks = p.sequences * plan.chunks * plan.groups * plan.splits;
  const auto run = [&](auto launch) { launch(stream, p, cut, blocks, dy, states, g); };
  if (plan.kernels == rung::sm_90a) {
    plan.keys == 64 ? run(ssd_backward_tiles<64>) : run(ssd_backward_tiles<128>);
  } else {
    plan.keys == 64 ? run(ssd_backward_mma<64>) : run(ssd_backward_mma<128>);
  }
  const auto sum = [&](const float* from, const view<bf16, 3>& to) {
    if (!to || plan.splits == 1) return;
    ssd_sum_heads_kernel<bf16>
        <<<ssd_blocks(std::clamp<index_t>((to.size() + 255) / 256, 1, 8192)), 256, 0, stream>>>(
            arguments, from, cut.splits, plan.tokens, cut.groups, arguments.key_size,
            ssd_operand<bf16>(to, plan.groups));
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  sum(cut.q, g.q), sum(cut.k, g.k);
  ssd_finish_gradients(stream, p, cut.sums, at, g);
}

}  // namespace detail

template <class T>
std::size_t ssd_backward_workspace_bytes(const ssd_problem<T>& p) {
  const detail::ssd_backward_plan plan = detail::ssd_backward_plan::of(p);
  if (plan.kernels != rung::general) return static_cast<std::size_t>(plan.workspace_bytes(p));
  return static_cast<std::size_t>(detail::ssd_backward_general_size(p)) * sizeof(accum_t<T>);
}

template <class T>
void ssd_backward(cudaStream_t stream, const ssd_problem<T>& p, view<const T, 3> dy,
                  const ssd_states<T>& states, const ssd_gradients<T>& g, void* workspace) {
  detail::ssd_check(p);
  detail::ssd_check_gradients(p, dy, g);
  detail::ssd_check_state(p, "the initial state", states.initial);
  if (p.sequences == 0 || p.heads == 0) return;
  if constexpr (std::is_same_v<T, bf16>) {
    const detail::ssd_backward_plan plan = detail::ssd_backward_plan::of(p);
    if (plan.kernels != rung::general) {
      const auto fits = [](const view<bf16, 3>& v) {
        return !v || detail::ssd_aligned(view<const bf16, 3>(v));
      };
      if (!detail::ssd_aligned(dy) || !fits(g.q) || !fits(g.k) || !fits(g.x)) {
        detail::ssd_fail(
            "the rows of dy and of the gradients of q, k and x must begin at multiples of 16 bytes "
            "where those of the operands do");
      }
      return detail::ssd_backward_on_tensor_cores(stream, p, plan, dy, states, g, workspace);
    }
  }
  detail::ssd_backward_general(stream, p, dy, states, g, workspace);
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(cuda_ssd_backward,                                                          \
                     std::size_t ssd_backward_workspace_bytes<T>(const ssd_problem<T>&));        \
  SSMLIB_INSTANTIATE(cuda_ssd_backward,                                                          \
                     void ssd_backward<T>(cudaStream_t, const ssd_problem<T>&, view<const T, 3>, \
                                          const ssd_states<T>&, const ssd_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
