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

struct statistics_parameters {
  attention_operand<const bf16> y, dy;
  const float* log_sum;
  index_t log_sum_head;
  attention_layout layout;
  backward_statistics to;
};

SSMLIB_DEVICE float dot_bf16(const uint4& a, const uint4& b, float sum) {
  const std::uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(x[i] << 16), __uint_as_float(y[i] << 16), sum);
    sum = fmaf(__uint_as_float(x[i] & 0xffff0000u), __uint_as_float(y[i] & 0xffff0000u), sum);
  }
  return sum;
}

/// Half a warp takes 8 rows of one head, its neighbour those of the next: what is read together
/// lies together.
static __global__ __launch_bounds__(256) void attention_statistics_kernel(
    const __grid_constant__ statistics_parameters p) {
  constexpr int rows = 8;
  const attention_layout& layout = p.layout;
  const int lane = threadIdx.x % 16;
  const index_t tiles =
      (layout.max_length + statistics_tile - 1) / statistics_tile * (statistics_tile / rows);
  const index_t count = layout.sequences * tiles * layout.heads, step = index_t{gridDim.x} * 16;
  for (index_t first = blockIdx.x * index_t{16}; first < count; first += step) {
    const index_t n = min(first + threadIdx.x / 16, count - 1);  // whole warps stay together
    const index_t rest = n / layout.heads, sequence = rest / tiles;
    const int head = static_cast<int>(n - rest * layout.heads);
    const attention_span span = layout.span(sequence);
    const int row0 = static_cast<int>(rest - sequence * tiles) * rows;
    float sums[rows] = {};
    for (int c = 8 * lane; c < p.y.size; c += 128) {
      uint4 a[rows], b[rows];
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        const bool there = row0 + i < span.queries;
        const index_t token = span.query_begin + row0 + i;
        a[i] = b[i] = make_uint4(0, 0, 0, 0);
        if (there) a[i] = *reinterpret_cast<const uint4*>(p.y.row(token, head) + c);
        if (there) b[i] = *reinterpret_cast<const uint4*>(p.dy.row(token, head) + c);
      }
#pragma unroll
      for (int i = 0; i < rows; ++i)
        sums[i] = dot_bf16(a[i], b[i], sums[i]);
    }
    float mine = 0.0f;  // lane i keeps row i's
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int s = 8; s > 0; s /= 2)
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], s);
      mine = lane == i ? sums[i] : mine;
    }
    const int row = row0 + lane, room = (span.queries + statistics_tile - 1) / statistics_tile;
    if (lane >= rows || row0 >= room * statistics_tile) continue;
    const float l =
        row < span.queries ? p.log_sum[head * p.log_sum_head + span.query_begin + row] : -INFINITY;
    const index_t place = p.to.place(sequence, span.query_begin, head) + row;
    // A weight is 2^(logit - this): 0 in rows without keys.
    p.to.log_sum[place] = l == -INFINITY ? INFINITY : l * 1.4426950408889634f;
    p.to.delta[place] = mine;
  }
}

inline void prepare_statistics(cudaStream_t stream, const attention_problem<bf16>& problem,
                               view<const bf16, 3> y, view<const float, 2> log_sum,
                               view<const bf16, 3> dy, const backward_statistics& to) {
  const statistics_parameters p{attention_operand<const bf16>(y),
                                attention_operand<const bf16>(dy),
                                log_sum.data,
                                log_sum.strides[0],
                                attention_layout(problem),
                                to};
  const index_t tiles = (p.layout.max_length + statistics_tile - 1) / statistics_tile;
  const index_t blocks = p.layout.sequences * tiles * p.layout.heads;
  if (blocks == 0) return;
  attention_statistics_kernel<<<static_cast<unsigned>(std::min<index_t>(blocks, 1 << 20)), 256, 0,
                                stream>>>(p);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
