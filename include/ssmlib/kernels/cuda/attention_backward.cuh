#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/attention_backward_keys.cuh>
#include <ssmlib/kernels/cuda/attention_backward_queries.cuh>
#include <ssmlib/kernels/cuda/attention_general.cuh>
#include <ssmlib/kernels/cuda/attention_mma_backward.cuh>

/// @file
/// Softmax attention, backward: one pass for dq, which sums over keys, and one for dk and dv, which
/// sums over queries and the heads that share a key head. Both recompute the weights from the row
/// statistics. So every sum has one owner and one order.

namespace ssm::kernels::cuda {

namespace detail {

template <int D>
void launch_backward(cudaStream_t stream, const attention_problem<bf16>& problem,
                     view<const bf16, 3> dy, view<bf16, 3> dq, view<bf16, 3> dk, view<bf16, 3> dv,
                     const backward_statistics& statistics) {
  if (dq) {
    launch_backward_queries<backward_queries_tile<D>>(stream, problem, dy, dq, statistics);
  }
  if (dk || dv)
    launch_backward_keys<backward_keys_tile<D>>(stream, problem, dy, dk, dv, statistics);
}

inline void hopper_backward(cudaStream_t stream, const attention_problem<bf16>& problem,
                            view<const bf16, 3> dy, view<bf16, 3> dq, view<bf16, 3> dk,
                            view<bf16, 3> dv, const backward_statistics& statistics) {
  const index_t size = std::max(problem.q.extents[2], problem.v.extents[2]);
  if (size <= 64) return launch_backward<64>(stream, problem, dy, dq, dk, dv, statistics);
  if (size <= 96) return launch_backward<96>(stream, problem, dy, dq, dk, dv, statistics);
  launch_backward<128>(stream, problem, dy, dq, dk, dv, statistics);
}

/// The rung whose kernels attention_backward takes. The tensor cores' make dk and dv in one pass,
/// and dq without a sum over heads.
template <class T>
[[nodiscard]] rung backward_rung(const attention_problem<T>& p, view<const T, 3> y,
                                 view<const T, 3> dy, view<T, 3> dq, view<T, 3> dk, view<T, 3> dv) {
  const bool fits = tensor_cores_take(p, 128) && p.q.extents[1] == p.heads &&
                    p.k.extents[1] == p.v.extents[1] && rows_aligned(y) && rows_aligned(dy) &&
                    (!dq || rows_aligned(dq)) && (!dk || rows_aligned(dk)) &&
                    (!dv || rows_aligned(dv));
  return fits ? usable_rung(p.most) : rung::general;
}

template <class T>
void check_backward(const attention_problem<T>& p, view<const T, 3> y,
                    view<const attention_stat<T>, 2> log_sum, view<const T, 3> dy, view<T, 3> dq,
                    view<T, 3> dk, view<T, 3> dv) {
  check_problem(p);
  const index_t tokens = p.q.extents[0];
  check_operand("y", y, tokens, p.heads, p.v.extents[2]);
  check_operand("dy", dy, tokens, p.heads, p.v.extents[2]);
  const auto same = [](const auto& gradient, const auto& x) {
    return !gradient || (gradient.extents == x.extents && gradient.strides[2] == 1);
  };
  if (y.extents[1] == p.heads && dy.extents[1] == p.heads && log_sum.extents[0] == p.heads &&
      log_sum.extents[1] == tokens && log_sum.strides[1] == 1 && same(dq, p.q) && same(dk, p.k) &&
      same(dv, p.v)) {
    return;
  }
  throw shape_error("ssm: attention backward on cuda: y is " + to_string(y.extents) + ", dy " +
                    to_string(dy.extents) + ", log_sum " + to_string(log_sum.extents) +
                    ", wanted " + std::to_string(p.heads) + " heads of " + std::to_string(tokens) +
                    " tokens, and gradients of their operands' shapes with innermost stride 1");
}

}  // namespace detail

template <class T>
std::size_t attention_backward_workspace_bytes(const attention_problem<T>& problem) {
  const auto rows = static_cast<std::size_t>(detail::statistics_rows(problem));
  return 2 * sizeof(attention_stat<T>) * static_cast<std::size_t>(problem.heads) * rows;
}

template <class T>
void attention_backward(cudaStream_t stream, const attention_problem<T>& problem,
                        view<const T, 3> y, view<const attention_stat<T>, 2> log_sum,
                        view<const T, 3> dy, view<T, 3> dq, view<T, 3> dk, view<T, 3> dv,
                        void* workspace) {
  using namespace detail;
  check_backward(problem, y, log_sum, dy, dq, dk, dv);
  if (problem.sequences == 0) return;
  if constexpr (std::is_same_v<T, bf16>) {
    const rung kernels = backward_rung(problem, y, dy, dq, dk, dv);
    if (kernels != rung::general) {
      const backward_statistics statistics(problem, workspace);
      prepare_statistics(stream, problem, y, log_sum, dy, statistics);
      return kernels == rung::sm_90a ? hopper_backward(stream, problem, dy, dq, dk, dv, statistics)
                                     : mma_backward(stream, problem, dy, dq, dk, dv, statistics);
    }
  }
  general_backward(stream, problem, y, log_sum, dy, dq, dk, dv,
                   static_cast<attention_stat<T>*>(workspace));
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(cuda_attention, std::size_t attention_backward_workspace_bytes<T>(          \
                                         const attention_problem<T>&));                          \
  SSMLIB_INSTANTIATE(                                                                            \
      cuda_attention,                                                                            \
      void attention_backward<T>(cudaStream_t, const attention_problem<T>&, view<const T, 3>,    \
                                 view<const attention_stat<T>, 2>, view<const T, 3>, view<T, 3>, \
                                 view<T, 3>, view<T, 3>, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
