#pragma once

#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/attention_decode.hpp>
#include <ssmlib/kernels/cuda/launch.cuh>

#include <limits>

/// @file
/// What the kernels of attention_decode share: segments of positions, where tokens lie, and the
/// kernel that adds the segments' results.

namespace ssm::kernels::cuda::detail {

/// Segments get longer with the position: short contexts still make enough blocks, and long ones
/// few results to be added.
struct decode_segments {
  [[nodiscard]] __host__ __device__ static index_t of(index_t position) {
    if (position < 4096) return position / 256;
    if (position < 32768) return 16 + (position - 4096) / 512;
    return 72 + (position - 32768) / 1024;
  }
  [[nodiscard]] __host__ __device__ static index_t begin(index_t segment) {
    if (segment < 16) return segment * 256;
    if (segment < 72) return 4096 + (segment - 16) * 512;
    return 32768 + (segment - 72) * 1024;
  }
};

/// The rounded product, never part of a fused one: a compiler that fuses it into what follows in
/// one kernel and not in the other would change the bits.
SSMLIB_DEVICE float rounded_product(float a, float b) {
  return __fmul_rn(a, b);
}
SSMLIB_DEVICE double rounded_product(double a, double b) {
  return __dmul_rn(a, b);
}

template <class T>
struct decode_operand {
  T* data = nullptr;
  index_t token = 0, head = 0;
  int heads = 0;

  decode_operand() = default;
  explicit decode_operand(const view<T, 3>& v)
      : data(v.data), token(v.stride(0)), head(v.stride(1)), heads(static_cast<int>(v.extent(1))) {}
  SSMLIB_DEVICE T* row(index_t t, int h, int all) const {
    return data + t * token + static_cast<index_t>(h) * heads / all * head;
  }
};

template <class T>
struct decode_cache {
  T* data = nullptr;
  index_t sequence = 0, row = 0, head = 0;

  decode_cache() = default;
  explicit decode_cache(const view<T, 4>& v)
      : data(v.data), sequence(v.stride(0)), row(v.stride(1)), head(v.stride(2)) {}
};

template <class T>
struct decode_arguments {
  using real = accum_t<T>;

  decode_operand<const T> q, k, v;
  decode_operand<T> y;
  decode_cache<T> keys, values;
  int heads, run, runs;  // heads that share keys and values are a run
  int key_size, features, rows;
  const index_t *position, *offsets;
  index_t sequences, max_length, window;  // window: a value above every position means none
  index_t slots;                          // segments that a call may meet
  int row_tiles, column_tiles;
  real scale;                 // with log2(e)
  real *largest, *sum, *out;  // (tokens, heads, slots), (.., P)

  [[nodiscard]] SSMLIB_DEVICE index_t begin(index_t s) const {
    return offsets ? offsets[s] : s * max_length;
  }
  [[nodiscard]] SSMLIB_DEVICE index_t count(index_t s) const {
    return offsets ? offsets[s + 1] - offsets[s] : max_length;
  }
  /// The first position that a token sees.
  [[nodiscard]] SSMLIB_DEVICE index_t first_seen(index_t at) const {
    return max(index_t{0}, at - window + 1);
  }
};

/// What a block works on: one run of heads and one segment of one sequence.
template <class T>
struct decode_place {
  const decode_arguments<T>& a;
  index_t sequence, slot, segment, first_token, new_tokens, position;
  index_t seen, end;    // positions that some new token sees
  index_t begin, stop;  // those of the segment
  int run, row_tile, column_tile;
  bool idle;

  SSMLIB_DEVICE decode_place(const decode_arguments<T>& o, int tile_rows) : a(o) {
    unsigned b = blockIdx.x;
    const auto take = [&b](unsigned n) {
      const unsigned r = b % n;
      b /= n;
      return r;
    };
    column_tile = static_cast<int>(take(static_cast<unsigned>(o.column_tiles)));
    row_tile = static_cast<int>(take(static_cast<unsigned>(o.row_tiles)));
    run = static_cast<int>(take(static_cast<unsigned>(o.runs)));
    sequence = take(static_cast<unsigned>(o.sequences));
    slot = o.slots - 1 - b;  // the longest segments first
    first_token = o.begin(sequence);
    new_tokens = o.count(sequence);
    position = o.position[sequence];
    seen = o.first_seen(position);
    end = position + new_tokens;
    segment = decode_segments::of(seen) + slot;
    begin = max(seen, decode_segments::begin(segment));
    stop = min(end, decode_segments::begin(segment + 1));
    idle = begin >= stop || row_tile * tile_rows >= new_tokens * o.run;
  }
  [[nodiscard]] SSMLIB_DEVICE int head() const { return run * a.run; }
  [[nodiscard]] SSMLIB_DEVICE int head_of_row(int row) const { return head() + row % a.run; }
  [[nodiscard]] SSMLIB_DEVICE index_t token_of_row(int row) const { return row / a.run; }
  [[nodiscard]] SSMLIB_DEVICE int group(int heads) const {
    return static_cast<int>(static_cast<index_t>(head()) * heads / a.heads);
  }
  /// Whether this block stores the new tokens of its segment for an operand of so many heads.
  [[nodiscard]] SSMLIB_DEVICE bool stores(int heads) const {
    return row_tile == 0 && column_tile == 0 &&
           (run == 0 || static_cast<index_t>(head() - a.run) * heads / a.heads != group(heads));
  }
  [[nodiscard]] SSMLIB_DEVICE T* cached(const decode_cache<T>& c, int heads, index_t p) const {
    return c.data + sequence * c.sequence + p % a.rows * c.row + group(heads) * c.head;
  }
  /// Which of the segments' results a row of this block is.
  [[nodiscard]] SSMLIB_DEVICE index_t result(int row) const {
    return ((first_token + token_of_row(row)) * a.heads + head_of_row(row)) * a.slots + slot;
  }
};

// --------------------------------------------------------------------- the sum over the segments

inline constexpr int decode_sums = 8;  // segment s belongs to sum s mod 8
inline constexpr int decode_merge_threads = 32 * decode_sums;
inline constexpr int decode_merge_columns = 128;

/// One head of one token: every warp has one sum, which are then added by pairs.
template <class T>
__global__ void __launch_bounds__(decode_merge_threads)
    decode_merge_kernel(const decode_arguments<T> o) {
  using R = accum_t<T>;
  extern __shared__ __align__(128) unsigned char shared[];
  R* weight = reinterpret_cast<R*>(shared);  // (slots)
  __shared__ R sums[decode_sums][decode_merge_columns];
  __shared__ R totals[decode_sums], most[decode_sums];
  wait_for_kernel_ahead();
  let_next_kernel_start();
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  unsigned block = blockIdx.x;
  const int h = static_cast<int>(block % static_cast<unsigned>(o.heads));
  block /= static_cast<unsigned>(o.heads);
  const index_t local = block % static_cast<unsigned>(o.max_length);
  const index_t s = block / static_cast<unsigned>(o.max_length);
  if (local >= o.count(s)) return;
  const index_t token = o.begin(s) + local, at = o.position[s] + local;
  const index_t base = decode_segments::of(o.first_seen(o.position[s]));
  const index_t first = decode_segments::of(o.first_seen(at)), last = decode_segments::of(at);
  const index_t from = (token * o.heads + h) * o.slots - base;  // of segment 0
  const int count = static_cast<int>(last - first + 1);
  R m = -std::numeric_limits<R>::infinity();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += decode_merge_threads) {
    weight[i] = o.largest[from + first + i];
    m = max(m, weight[i]);
  }
  m = warp_max(m);
  if (lane == 0) most[warp] = m;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < decode_sums; ++i)
    m = max(m, most[i]);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += decode_merge_threads)
    weight[i] = power_of_two(weight[i] - m);
  __syncthreads();
  // Segments of this warp: first + i with (first + i) mod 8 = warp.
  const int own = static_cast<int>((warp - first % decode_sums + decode_sums) % decode_sums);
  R total = R(0);
  for (int i = own; i < count; i += decode_sums)
    total = fma(weight[i], o.sum[from + first + i], total);
  if (lane == 0) totals[warp] = total;
  constexpr int items = decode_merge_columns / 32;
  for (int c0 = 0; c0 < o.features; c0 += decode_merge_columns) {
    R acc[items] = {};
#pragma unroll 4
    for (int i = own; i < count; i += decode_sums) {
      const R* row = o.out + (from + first + i) * o.features + c0;
#pragma unroll
      for (int j = 0; j < items; ++j) {
        const int c = lane + 32 * j;
        if (c0 + c < o.features) acc[j] = fma(weight[i], row[c], acc[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < items; ++j)
      sums[warp][lane + 32 * j] = acc[j];
    __syncthreads();
    const int c = static_cast<int>(threadIdx.x);
    if (c < decode_merge_columns && c0 + c < o.features) {
      const auto tree = [](auto get) {
        return ((get(0) + get(1)) + (get(2) + get(3))) + ((get(4) + get(5)) + (get(6) + get(7)));
      };
      const R value = tree([&](int i) { return sums[i][c]; });
      const R norm = tree([&](int i) { return totals[i]; });
      o.y.data[token * o.y.token + h * o.y.head + c0 + c] = narrow<T>(value / norm);
    }
    __syncthreads();
  }
}

}  // namespace ssm::kernels::cuda::detail
