#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/attention_decode_fast.cuh>

#include <algorithm>
#include <numeric>
#include <string>

/// @file
/// Launches of attention_decode, and the kernel for any type and size.

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int decode_general_threads = 128;
inline constexpr int decode_general_keys = 32;      // at a time, one for each lane
inline constexpr int decode_general_columns = 256;  // of the values, of a block

template <class R>
[[nodiscard]] constexpr std::size_t decode_general_bytes(int rows, index_t key_size) {
  const index_t step = key_size + 1;
  return static_cast<std::size_t>((rows + decode_general_keys) * step +
                                  rows * (decode_general_keys + 1)) *
         sizeof(R);
}

/// Rows of one segment, 32 keys at a time: a lane has a key's logits, then a thread has columns of
/// the values.
template <class T, int Rows>
__global__ void __launch_bounds__(decode_general_threads)
    decode_general_kernel(const decode_arguments<T> o) {
  using R = accum_t<T>;
  constexpr int threads = decode_general_threads, tile = decode_general_keys, warps = threads / 32;
  constexpr int rows_a_warp = Rows / warps, columns = decode_general_columns / threads;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ T *key_rows[tile], *value_rows[tile];
  wait_for_kernel_ahead();
  let_next_kernel_start();
  const decode_place<T> at(o, Rows);
  if (at.idle) return;
  const int D = o.key_size, step = D + 1, tid = static_cast<int>(threadIdx.x);
  const int lane = tid % 32, warp = tid / 32, row0 = at.row_tile * Rows;
  const int column0 = at.column_tile * decode_general_columns + tid;
  R* queries = reinterpret_cast<R*>(shared);  // (Rows x step)
  R* keys = queries + Rows * step;            // (tile x step)
  R* weights = keys + tile * step;            // (Rows x tile)
  R* shrink = weights + Rows * tile;          // (Rows)
  for (int i = tid; i < Rows * D; i += threads) {
    const int r = i / D, d = i % D;
    const index_t token = at.token_of_row(row0 + r);
    queries[r * step + d] =
        token < at.new_tokens
            ? R(widen(o.q.row(at.first_token + token, at.head_of_row(row0 + r), o.heads)[d]))
            : R(0);
  }
  constexpr R none = -std::numeric_limits<R>::infinity();
  R most[rows_a_warp], sum[rows_a_warp], out[Rows][columns];
#pragma unroll
  for (int r = 0; r < rows_a_warp; ++r) {
    most[r] = none;
    sum[r] = R(0);
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r)
#pragma unroll
    for (int c = 0; c < columns; ++c)
      out[r][c] = R(0);
  for (index_t p0 = at.begin / tile * tile; p0 < at.stop; p0 += tile) {
    __syncthreads();  // the last tile has been read
    if (tid < tile) {
      const index_t p = p0 + tid;
      // New tokens are read where they came from; null: not seen by any row.
      const index_t t = at.first_token + (p - at.position);
      const bool fresh = p >= at.position, seen = p >= at.seen && p < at.end;
      const auto place = [&](const decode_operand<const T>& own, const decode_cache<T>& cache) {
        return fresh ? const_cast<T*>(own.row(t, at.head(), o.heads))
                     : at.cached(cache, own.heads, p);
      };
      key_rows[tid] = seen ? place(o.k, o.keys) : nullptr;
      value_rows[tid] = seen ? place(o.v, o.values) : nullptr;
    }
    __syncthreads();
    for (int i = tid; i < tile * D; i += threads) {
      const int r = i / D, d = i % D;
      keys[r * step + d] = key_rows[r] ? R(widen(key_rows[r][d])) : R(0);
    }
    if (p0 + tile > at.position) {
      for (int r = 0; r < tile; ++r) {
        const index_t p = p0 + r;
        if (p < at.position || p >= at.end) continue;
        if (at.stores(o.k.heads)) {
          T* to = at.cached(o.keys, o.k.heads, p);
          for (int d = tid; d < D; d += threads)
            to[d] = key_rows[r][d];
        }
        if (at.stores(o.v.heads)) {
          T* to = at.cached(o.values, o.v.heads, p);
          for (int d = tid; d < o.features; d += threads)
            to[d] = value_rows[r][d];
        }
      }
    }
    __syncthreads();
    R logit[rows_a_warp] = {};
    for (int d = 0; d < D; ++d) {
      const R k = keys[lane * step + d];
#pragma unroll
      for (int r = 0; r < rows_a_warp; ++r)
        logit[r] = fma(queries[(warp + warps * r) * step + d], k, logit[r]);
    }
#pragma unroll
    for (int r = 0; r < rows_a_warp; ++r) {
      const int row = warp + warps * r;
      const index_t token = at.token_of_row(row0 + row), high = at.position + token, p = p0 + lane;
      const bool seen = token < at.new_tokens && p <= high && p > high - o.window && p >= at.seen;
      const R x = seen ? rounded_product(logit[r], o.scale) : none;
      const R now = max(most[r], warp_max(x)), reference = now == none ? R(0) : now;
      const R weight = power_of_two(x - reference), factor = power_of_two(most[r] - reference);
      most[r] = now;
      sum[r] = fma(sum[r], factor, weight);
      weights[row * tile + lane] = weight;
      if (lane == 0) shrink[row] = factor;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int column = column0 + c * threads;
      if (column >= o.features) continue;
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        out[r][c] *= shrink[r];
#pragma unroll 8
      for (int j = 0; j < tile; ++j) {
        const T* from = value_rows[j];
        const R v = from ? R(widen(from[column])) : R(0);
#pragma unroll
        for (int r = 0; r < Rows; ++r)
          out[r][c] = fma(weights[r * tile + j], v, out[r][c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < rows_a_warp; ++r) {
    const int row = row0 + warp + warps * r;
    const R total = warp_sum(sum[r]);
    if (lane == 0 && at.token_of_row(row) < at.new_tokens && at.column_tile == 0) {
      o.largest[at.result(row)] = most[r];
      o.sum[at.result(row)] = total;
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    if (at.token_of_row(row0 + r) >= at.new_tokens) continue;
    R* to = o.out + at.result(row0 + r) * o.features;
#pragma unroll
    for (int c = 0; c < columns; ++c)
      if (column0 + c * threads < o.features) to[column0 + c * threads] = out[r][c];
  }
}

template <class T>
[[nodiscard]] index_t decode_slots(const attention_decode_problem<T>& p) {
  const index_t rows = p.cache.keys.extent(1), most = p.max_keys > 0 ? p.max_keys : rows;
  const index_t all = decode_segments::of(std::max<index_t>(1, most) - 1) + 1;
  if (p.window == 0) return all;
  const index_t reach = (p.window + p.max_length) / 256 + 2;
  return p.max_keys > 0 ? std::min(all, reach) : reach;
}

template <class T>
void check_decode(const attention_decode_problem<T>& p, const view<T, 3>& y) {
  const auto &keys = p.cache.keys, &values = p.cache.values;
  const index_t tokens = p.q.extent(0), rows = keys.extent(1);
  const index_t D = p.q.extent(2), P = p.v.extent(2);
  const auto heads = [&](const view<const T, 3>& v, index_t size) {
    return v.extent(0) == tokens && v.extent(1) >= 1 && p.heads % v.extent(1) == 0 &&
           v.extent(2) == size && (v.stride(2) == 1 || size == 1);
  };
  const auto cached = [&](const view<T, 4>& v, const view<const T, 3>& fresh) {
    return v.extents == shape<4>{p.sequences, rows, fresh.extent(1), fresh.extent(2)} &&
           (v.stride(3) == 1 || fresh.extent(2) == 1);
  };
  const bool fits = p.heads >= 1 && D >= 1 && P >= 1 && heads(p.q, D) && heads(p.k, D) &&
                    heads(p.v, P) && cached(keys, p.k) && cached(values, p.v) &&
                    y.extents == shape<3>{tokens, p.heads, P} && (y.stride(2) == 1 || P == 1) &&
                    (p.offsets != nullptr || tokens == p.sequences * p.max_length);
  if (!fits) {
    throw shape_error("ssm: attention_decode: q is " + to_string(p.q.extents) + ", k " +
                      to_string(p.k.extents) + ", v " + to_string(p.v.extents) + ", y " +
                      to_string(y.extents) + " and the cache " + to_string(keys.extents) + " and " +
                      to_string(values.extents) + " for " + std::to_string(p.heads) + " heads of " +
                      std::to_string(p.sequences) +
                      " sequences; wanted (tokens x heads x size) with heads that divide those of "
                      "y, (sequences x rows x heads x size), and unit inner strides");
  }
  const index_t needed = p.window > 0 ? p.window - 1 + p.max_length : p.max_keys;
  if (p.window < 0 || rows < std::max<index_t>(needed, 1) || p.position == nullptr ||
      rows > std::numeric_limits<int>::max() / 2) {
    throw value_error("ssm: attention_decode: a cache of " + std::to_string(rows) +
                      " rows for window " + std::to_string(p.window) + ", " +
                      std::to_string(p.max_length) + " new tokens and at most " +
                      std::to_string(p.max_keys) + " in all; wanted positions and at least " +
                      std::to_string(needed) + " rows");
  }
}

template <class T>
[[nodiscard]] decode_arguments<T> decode_arguments_of(const attention_decode_problem<T>& p,
                                                      const view<T, 3>& y, void* workspace) {
  using R = accum_t<T>;
  decode_arguments<T> o;
  o.q = decode_operand<const T>(p.q);
  o.k = decode_operand<const T>(p.k);
  o.v = decode_operand<const T>(p.v);
  o.y = decode_operand<T>(y);
  o.keys = decode_cache<T>(p.cache.keys);
  o.values = decode_cache<T>(p.cache.values);
  o.heads = static_cast<int>(p.heads);
  o.run = static_cast<int>(std::gcd(p.heads / p.k.extent(1), p.heads / p.v.extent(1)));
  o.runs = o.heads / o.run;
  o.key_size = static_cast<int>(p.q.extent(2));
  o.features = static_cast<int>(p.v.extent(2));
  o.rows = static_cast<int>(p.cache.keys.extent(1));
  o.position = p.position;
  o.offsets = p.offsets;
  o.sequences = p.sequences;
  o.max_length = p.max_length;
  o.window = p.window > 0 ? p.window : index_t{1} << 60;
  o.slots = decode_slots(p);
  o.row_tiles = o.column_tiles = 1;
  o.scale = static_cast<R>(p.scale * log2_of_e);
  const index_t results = p.q.extent(0) * p.heads * o.slots;
  o.out = static_cast<R*>(workspace);
  o.largest = o.out + results * o.features;
  o.sum = o.largest + results;
  return o;
}

/// Whether rows of the cache can be copied 16 bytes at a time.
template <class T>
[[nodiscard]] bool decode_cache_aligned(const view<T, 4>& v) {
  bool aligned = reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
  for (int d = 0; d < 3; ++d)
    aligned = aligned && v.stride(d) * static_cast<index_t>(sizeof(T)) % 16 == 0;
  return aligned;
}

template <class T>
void launch_decode(cudaStream_t stream, decode_arguments<T>& o, void (*kernel)(decode_arguments<T>),
                   int tile_rows, int threads, std::size_t shared) {
  o.row_tiles = static_cast<int>((o.max_length * o.run + tile_rows - 1) / tile_rows);
  const index_t blocks = o.slots * o.sequences * o.runs * o.row_tiles * o.column_tiles;
  if (blocks > std::numeric_limits<int>::max()) {
    throw shape_error("ssm: attention_decode: " + std::to_string(blocks) +
                      " blocks are more than a grid takes; cut the batch");
  }
  launch_overlapped(stream, kernel, blocks, threads, shared, 1, o);
}

/// @return  whether head size D has fitted
template <int D>
[[nodiscard]] bool launch_decode_fast(cudaStream_t stream, decode_arguments<bf16>& o) {
  if (o.key_size != D || o.features != D) return false;
  const index_t rows = o.max_length * o.run;
  const auto launch = [&](auto tiles) {
    constexpr int Tiles = decltype(tiles)::value;
    using layout = decode_layout<D, Tiles>;
    launch_decode(stream, o, decode_kernel<D, Tiles>, 16 * Tiles, layout::threads, layout::bytes);
    return true;
  };
  if (rows <= 16) return launch(std::integral_constant<int, 1>{});
  if constexpr (D <= 128) {
    if (rows > 32) return launch(std::integral_constant<int, 4>{});
  }
  return launch(std::integral_constant<int, 2>{});
}

template <class T>
void launch_decode_general(cudaStream_t stream, decode_arguments<T>& o) {
  using R = accum_t<T>;
  const bool few = o.max_length * o.run <= 4;
  const int rows = few ? 4 : 16;
  const std::size_t shared = decode_general_bytes<R>(rows, o.key_size);
  if (shared > 220 * 1024) {
    throw shape_error("ssm: attention_decode: key size " + std::to_string(o.key_size) +
                      " does not fit the shared memory of a block");
  }
  o.column_tiles = (o.features + decode_general_columns - 1) / decode_general_columns;
  launch_decode<T>(stream, o, few ? decode_general_kernel<T, 4> : decode_general_kernel<T, 16>,
                   rows, decode_general_threads, shared);
}

}  // namespace detail

template <class T>
std::size_t attention_decode_workspace_bytes(const attention_decode_problem<T>& p) {
  const index_t results = p.q.extent(0) * p.heads * detail::decode_slots(p);
  return static_cast<std::size_t>(results * (p.v.extent(2) + 2)) * sizeof(accum_t<T>);
}

template <class T>
void attention_decode(cudaStream_t stream, const attention_decode_problem<T>& p, view<T, 3> y,
                      void* workspace) {
  using R = accum_t<T>;
  detail::check_decode(p, y);
  if (p.sequences == 0 || p.max_length == 0) return;
  detail::decode_arguments<T> o = detail::decode_arguments_of(p, y, workspace);
  bool launched = false;
  if constexpr (std::is_same_v<T, bf16>) {
    using namespace detail;
    launched = decode_cache_aligned(p.cache.keys) && decode_cache_aligned(p.cache.values) &&
               (launch_decode_fast<128>(stream, o) || launch_decode_fast<64>(stream, o) ||
                launch_decode_fast<96>(stream, o) || launch_decode_fast<256>(stream, o) ||
                launch_decode_fast<32>(stream, o) || launch_decode_fast<192>(stream, o));
  }
  if (!launched) detail::launch_decode_general(stream, o);
  const index_t blocks = p.sequences * p.max_length * p.heads;
  const std::size_t shared = static_cast<std::size_t>(o.slots) * sizeof(R);
  if (blocks > std::numeric_limits<int>::max() || shared > 200 * 1024) {
    throw shape_error("ssm: attention_decode: " + std::to_string(blocks) + " rows of " +
                      std::to_string(o.slots) + " segments are more than a grid takes");
  }
  launch_overlapped(stream, detail::decode_merge_kernel<T>, blocks, detail::decode_merge_threads,
                    shared, 1, o);
}

#define SSMLIB_DETAIL_LIST(T)                                                                   \
  SSMLIB_INSTANTIATE(cuda_attention_decode, std::size_t attention_decode_workspace_bytes<T>(    \
                                                const attention_decode_problem<T>&));           \
  SSMLIB_INSTANTIATE(cuda_attention_decode,                                                     \
                     void attention_decode<T>(cudaStream_t, const attention_decode_problem<T>&, \
                                              view<T, 3>, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
