#pragma once

#include <ssmlib/kernels/cuda/attention_parts.cuh>

/// @file
/// What the backward of attention needs of every query row, laid out so that tiles of rows are
/// aligned: the log of the sum of powers of 2, and dy . y.

namespace ssm::kernels::cuda::detail {

inline constexpr int statistics_tile = 128;

/// Rows of one head, each sequence beginning at a multiple of statistics_tile: a sequence needs at
/// most one tile more than its share of all tokens.
template <class T>
[[nodiscard]] index_t statistics_rows(const attention_problem<T>& p) {
  return (p.q.extents[0] / statistics_tile + p.sequences) * statistics_tile;
}

struct backward_statistics {
  float *log_sum, *delta;  // (heads, rows); rows beyond a sequence's end: +infinity and 0
  index_t rows;

  backward_statistics(const attention_problem<bf16>& p, void* workspace)
      : log_sum(static_cast<float*>(workspace)),
        delta(log_sum + p.heads * statistics_rows(p)),
        rows(statistics_rows(p)) {}
  /// Where the rows of a sequence's head begin.
  SSMLIB_DEVICE index_t place(index_t sequence, index_t query_begin, int head) const {
    return head * rows + (query_begin / statistics_tile + sequence) * statistics_tile;
  }
};

/// Half a warp a row, heads first, so that neighbours in memory are read together.
static __global__ __launch_bounds__(256) void attention_statistics_kernel(
    const __grid_constant__ attention_operand<const bf16> y,
    const __grid_constant__ attention_operand<const bf16> dy, const float* log_sum,
    index_t log_sum_head, const __grid_constant__ attention_layout layout, int tiles,
    const __grid_constant__ backward_statistics to) {
  const int lane = threadIdx.x % 16, first = threadIdx.x / 16;
  const index_t count = layout.sequences * tiles * layout.heads;
  for (index_t n = blockIdx.x; n < count; n += gridDim.x) {
    const int head = static_cast<int>(n % layout.heads);
    const index_t rest = n / layout.heads, sequence = rest / tiles;
    const attention_span span = layout.span(sequence);
    const int row0 = static_cast<int>(rest - sequence * tiles) * statistics_tile;
    if (row0 >= span.queries) continue;
    const index_t place = to.place(sequence, span.query_begin, head);
#pragma unroll 2
    for (int row = row0 + first; row < row0 + statistics_tile; row += 16) {
      const bool there = row < span.queries;
      const index_t token = span.query_begin + row;
      float sum = 0.0f;
      for (int c = 8 * lane; there && c < y.size; c += 128) {
        bf16 a[8], b[8];
        *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(y.row(token, head) + c);
        *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(dy.row(token, head) + c);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          sum = fmaf(widen(a[i]), widen(b[i]), sum);
      }
#pragma unroll
      for (int step = 8; step > 0; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane != 0) continue;
      const float l = there ? log_sum[head * log_sum_head + token] : -INFINITY;
      // A weight is 2^(logit - this): 0 in rows without keys.
      to.log_sum[place + row] = l == -INFINITY ? INFINITY : l * 1.4426950408889634f;
      to.delta[place + row] = sum;
    }
  }
}

inline void prepare_statistics(cudaStream_t stream, const attention_problem<bf16>& problem,
                               view<const bf16, 3> y, view<const float, 2> log_sum,
                               view<const bf16, 3> dy, const backward_statistics& to) {
  const attention_layout layout(problem);
  const int tiles = (layout.max_length + statistics_tile - 1) / statistics_tile;
  const index_t blocks = layout.sequences * tiles * layout.heads;
  if (blocks == 0) return;
  attention_statistics_kernel<<<static_cast<unsigned>(std::min<index_t>(blocks, 1 << 20)), 256, 0,
                                stream>>>(attention_operand<const bf16>(y),
                                          attention_operand<const bf16>(dy), log_sum.data,
                                          log_sum.strides[0], layout, tiles, to);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
