#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/embedding.hpp>
#include <ssmlib/kernels/cuda/rows.cuh>

#include <cub/device/device_radix_sort.cuh>

#include <bit>

/// @file
/// The gradient of the table: a warp owns 32 neighbours of the tokens sorted by id and some
/// columns. What an id has within one warp's tokens goes to the table; what is shared with the next
/// warps goes to parts, which the warp where the id begins adds up afterwards.

namespace ssm::kernels::cuda {

namespace detail {

template <class I>
__global__ void __launch_bounds__(row_threads)
    first_id_outside_kernel(const I* ids, index_t n, index_t limit, I ignored, bool ignores,
                            unsigned long long* position) {
  const index_t step = index_t{gridDim.x} * row_threads;
  for (index_t i = index_t{blockIdx.x} * row_threads + threadIdx.x; i < n; i += step) {
    const I id = ids[i];
    if ((id >= 0 && id < limit) || (ignores && id == ignored)) continue;
    atomicMin(position, static_cast<unsigned long long>(i));
    return;
  }
}

template <class T, class S>
struct embedding_rows {
  view<const S, 2> table;
  const std::int32_t* ids;
  view<T, 2> y;
  template <int Count>
  SSMLIB_DEVICE void run(index_t row, index_t column, int valid) const {
    const index_t id = ids[row];
    const bool inside = id >= 0 && id < table.extents[0];
    const S* from = table.data + (inside ? id : 0) * table.strides[0] + column;
    numbers<S, Count> words{};
    if (inside) words = load_numbers<Count>(from, valid, true);
    numbers<accum_t<T>, Count> x;
#pragma unroll
    for (int e = 0; e < Count; ++e)
      x.v[e] = inside ? static_cast<accum_t<T>>(widen(words.v[e])) : accum_t<T>(NAN);
    write_row<Count, T>(y, row, column, valid, x, false);
  }
};

// ---- the gradient -------------------------------------------------------------------------------

inline constexpr int embedding_piece = 32;  // tokens, one a lane

template <class T>
struct embedding_vjp_arguments {
  using R = accum_t<T>;
  const std::uint32_t *keys, *order;  // sorted ids and their tokens
  index_t tokens, pieces, column_chunks;
  view<const T, 2> dy;
  view<R, 2> d_table;
  R* parts;  // (pieces, 2, width): what begins before a piece, what goes on after it
};

/// Ids outside the table become one id after its last.
template <class I>
__global__ void __launch_bounds__(row_threads)
    embedding_keys_kernel(const I* ids, index_t tokens, index_t vocabulary, std::uint32_t* keys,
                          std::uint32_t* order) {
  const index_t t = index_t{blockIdx.x} * row_threads + threadIdx.x;
  if (t >= tokens) return;
  const index_t id = ids[t];
  keys[t] = static_cast<std::uint32_t>(id >= 0 && id < vocabulary ? id : vocabulary);
  order[t] = static_cast<std::uint32_t>(t);
}

/// The piece and the columns of a warp.
template <int Count, class T>
struct embedding_team {
  index_t piece, column;
  int valid;
  SSMLIB_DEVICE explicit embedding_team(const embedding_vjp_arguments<T>& o) {
    const index_t team = index_t{blockIdx.x} * (row_threads / 32) + threadIdx.x / 32;
    piece = quotient(team, o.column_chunks);
    column = ((team - piece * o.column_chunks) * 32 + threadIdx.x % 32) * Count;
    valid = static_cast<int>(max(index_t{0}, min(index_t{Count}, o.dy.extents[1] - column)));
  }
};

template <int Count, class T>
__global__ void __launch_bounds__(row_threads)
    embedding_vjp_kernel(const __grid_constant__ embedding_vjp_arguments<T> o) {
  using R = accum_t<T>;
  constexpr int ahead = 4;  // rows on their way
  const embedding_team<Count, T> team(o);
  if (team.piece >= o.pieces) return;
  const int lane = threadIdx.x % 32;
  const index_t begin = team.piece * embedding_piece;
  const int n = static_cast<int>(min(index_t{embedding_piece}, o.tokens - begin));
  const std::uint32_t key = lane < n ? o.keys[begin + lane] : 0;
  const std::uint32_t token = lane < n ? o.order[begin + lane] : 0;
  const std::uint32_t first = __shfl_sync(0xffffffffu, key, 0);
  const bool begins_before = begin > 0 && o.keys[begin - 1] == first;
  const bool goes_on =
      begin + n < o.tokens && o.keys[begin + n] == __shfl_sync(0xffffffffu, key, n - 1);
  const index_t width = o.dy.extents[1];
  numbers<R, Count> sum{};
  int run = 0;  // where the id of the sum begins
  const auto flush = [&](std::uint32_t id, int end) {
    if (id >= o.d_table.extents[0]) return;
    if (run == 0 && begins_before) {
      const view<R, 2> parts{o.parts, {}, {2 * width, 1}};
      write_row<Count, R>(parts, team.piece, team.column, team.valid, sum, false);
    } else if (end == n && goes_on) {
      const view<R, 2> parts{o.parts + width, {}, {2 * width, 1}};
      write_row<Count, R>(parts, team.piece, team.column, team.valid, sum, false);
    } else {
      write_row<Count, R>(o.d_table, id, team.column, team.valid, sum, true);
    }
  };
  std::uint32_t current = first;
  for (int p = 0; p < n; p += ahead) {
    numbers<T, Count> rows[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const index_t t = __shfl_sync(0xffffffffu, token, min(p + i, n - 1));
      const T* from = o.dy.data + t * o.dy.strides[0] + team.column;
      rows[i] = load_numbers<Count>(from, team.valid, true);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const std::uint32_t id = __shfl_sync(0xffffffffu, key, min(p + i, n - 1));
      if (p + i >= n) break;
      if (id != current) {
        flush(current, p + i);
        sum = {};
        run = p + i;
        current = id;
      }
#pragma unroll
      for (int e = 0; e < Count; ++e)
        sum.v[e] += widen(rows[i].v[e]);
    }
  }
  flush(current, n);
}

/// Adds up the parts of ids that begin in a piece and go on after it.
template <int Count, class T>
__global__ void __launch_bounds__(row_threads)
    embedding_parts_kernel(const __grid_constant__ embedding_vjp_arguments<T> o) {
  using R = accum_t<T>;
  const embedding_team<Count, T> team(o);
  if (team.piece + 1 >= o.pieces) return;
  const index_t begin = team.piece * embedding_piece;
  const std::uint32_t id = o.keys[begin + embedding_piece - 1];
  const auto continues = [&](index_t piece) {
    return piece < o.pieces && o.keys[piece * embedding_piece] == id;
  };
  if (id >= o.d_table.extents[0] || !continues(team.piece + 1)) return;
  if (begin > 0 && o.keys[begin] == id && o.keys[begin - 1] == id) return;  // begins before
  index_t last = team.piece + 1, step = 1;
  for (; continues(last + step); step *= 2)
    last += step;
  for (; step > 1;) {
    step /= 2;
    if (continues(last + step)) last += step;
  }
  const index_t width = o.dy.extents[1];
  const view<const R, 2> heads{o.parts, {}, {2 * width, 1}};
  const view<const R, 2> tails{o.parts + width, {}, {2 * width, 1}};
  auto sum = read_row<Count, R>(tails, team.piece, team.column, team.valid);
#pragma unroll 8
  for (index_t piece = team.piece + 1; piece <= last; ++piece) {
    const auto more = read_row<Count, R>(heads, piece, team.column, team.valid);
#pragma unroll
    for (int e = 0; e < Count; ++e)
      sum.v[e] += more.v[e];
  }
  write_row<Count, R>(o.d_table, id, team.column, team.valid, sum, true);
}

/// Where the workspace holds what.
struct embedding_workspace {
  std::size_t order, sorted_keys, sorted_order, parts, sort, sort_bytes, all;
  int bits;

  template <class R>
  [[nodiscard]] static embedding_workspace of(index_t tokens, index_t width, index_t vocabulary) {
    embedding_workspace w{};
    w.bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(vocabulary)));
    const std::size_t list = static_cast<std::size_t>(round_up(tokens * 4, 256));
    const index_t pieces = (tokens + embedding_piece - 1) / embedding_piece;
    w.order = list;
    w.sorted_keys = 2 * list;
    w.sorted_order = 3 * list;
    w.parts = 4 * list;
    w.sort = w.parts + static_cast<std::size_t>(
                           round_up(pieces * 2 * width * static_cast<index_t>(sizeof(R)), 256));
    const std::uint32_t* in = nullptr;
    std::uint32_t* out = nullptr;
    SSMLIB_CHECK_CUDA(cub::DeviceRadixSort::SortPairs(nullptr, w.sort_bytes, in, out, in, out,
                                                      static_cast<int>(tokens), 0, w.bits));
    w.all = w.sort + w.sort_bytes;
    return w;
  }
};

template <class T>
void check_embedding_vjp(index_t tokens, index_t vocabulary) {
  if (tokens <= 0x7fffffff && vocabulary <= 0x7fffffff) return;
  throw shape_error("ssm: embedding_vjp: " + std::to_string(tokens) + " tokens and " +
                    std::to_string(vocabulary) + " entries; wanted fewer than 2^31 of each");
}

}  // namespace detail

template <class I>
void first_id_outside(cudaStream_t stream, const I* ids, index_t n, index_t limit,
                      std::optional<I> ignored, std::int64_t* position) {
  // As an unsigned number -1 is beyond every position.
  SSMLIB_CHECK_CUDA(cudaMemsetAsync(position, 0xff, sizeof *position, stream));
  if (n == 0) return;
  const index_t blocks =
      std::min<index_t>(1056, (n + detail::row_threads - 1) / detail::row_threads);
  detail::first_id_outside_kernel<I>
      <<<static_cast<unsigned>(blocks), detail::row_threads, 0, stream>>>(
          ids, n, limit, ignored.value_or(I{}), ignored.has_value(),
          reinterpret_cast<unsigned long long*>(position));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T, class S>
void embedding(cudaStream_t stream, view<const S, 2> table, const std::int32_t* ids, view<T, 2> y) {
  if (table.extents[1] != y.extents[1]) {
    throw shape_error("ssm: embedding: the table is " + to_string(table.extents) + ", the result " +
                      to_string(y.extents) + "; wanted the same width");
  }
  constexpr int count = 16 / static_cast<int>(sizeof(T));
  detail::for_rows<count>("embedding", stream, y.extents[0], y.extents[1],
                          detail::all_aligned<count>(table, y),
                          detail::embedding_rows<T, S>{table, ids, y});
}

template <class T>
std::size_t embedding_vjp_workspace_bytes(const embedding_vjp_problem<T>& p, index_t vocabulary) {
  detail::check_embedding_vjp<T>(p.dy.extents[0], vocabulary);
  return detail::embedding_workspace::of<accum_t<T>>(p.dy.extents[0], p.dy.extents[1], vocabulary)
      .all;
}

template <class T>
void embedding_vjp(cudaStream_t stream, const embedding_vjp_problem<T>& p,
                   view<accum_t<T>, 2> d_table, bool add, void* workspace) {
  using R = accum_t<T>;
  const index_t tokens = p.dy.extents[0], width = p.dy.extents[1], vocabulary = d_table.extents[0];
  if (d_table.extents[1] != width) {
    throw shape_error("ssm: embedding_vjp: dy is " + to_string(p.dy.extents) + ", the table " +
                      to_string(d_table.extents) + "; wanted the same width");
  }
  detail::check_embedding_vjp<T>(tokens, vocabulary);
  if (!add && vocabulary * width > 0) {
    SSMLIB_CHECK_CUDA(cudaMemset2DAsync(
        d_table.data, static_cast<std::size_t>(d_table.strides[0]) * sizeof(R), 0,
        static_cast<std::size_t>(width) * sizeof(R), static_cast<std::size_t>(vocabulary), stream));
  }
  if (tokens * width == 0) return;
  auto w = detail::embedding_workspace::of<R>(tokens, width, vocabulary);
  auto* base = static_cast<unsigned char*>(workspace);
  const auto list = [&](std::size_t at) { return reinterpret_cast<std::uint32_t*>(base + at); };
  detail::embedding_keys_kernel<<<static_cast<unsigned>((tokens + detail::row_threads - 1) /
                                                        detail::row_threads),
                                  detail::row_threads, 0, stream>>>(p.ids, tokens, vocabulary,
                                                                    list(0), list(w.order));
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  const std::uint32_t *keys = list(0), *order = list(w.order);
  SSMLIB_CHECK_CUDA(cub::DeviceRadixSort::SortPairs(
      base + w.sort, w.sort_bytes, keys, list(w.sorted_keys), order, list(w.sorted_order),
      static_cast<int>(tokens), 0, w.bits, stream));
  const auto launch = [&]<int Count>() {
    detail::embedding_vjp_arguments<T> o{
        list(w.sorted_keys),
        list(w.sorted_order),
        tokens,
        (tokens + detail::embedding_piece - 1) / detail::embedding_piece,
        (width + 32 * Count - 1) / (32 * Count),
        p.dy,
        d_table,
        reinterpret_cast<R*>(base + w.parts)};
    const index_t teams = o.pieces * o.column_chunks, in_a_block = detail::row_threads / 32;
    const unsigned blocks =
        detail::row_blocks("embedding_vjp", (teams + in_a_block - 1) / in_a_block);
    detail::embedding_vjp_kernel<Count, T><<<blocks, detail::row_threads, 0, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
    detail::embedding_parts_kernel<Count, T><<<blocks, detail::row_threads, 0, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  constexpr int count = 16 / static_cast<int>(sizeof(T));
  if (width % count == 0 && detail::all_aligned<count>(p.dy, d_table)) {
    launch.template operator()<count>();
  } else {
    launch.template operator()<1>();
  }
}

SSMLIB_INSTANTIATE(cuda_embedding,
                   void first_id_outside<std::int32_t>(cudaStream_t, const std::int32_t*, index_t,
                                                       index_t, std::optional<std::int32_t>,
                                                       std::int64_t*));
#define SSMLIB_DETAIL_LIST(T, S)                                                          \
  SSMLIB_INSTANTIATE(cuda_embedding, void embedding<T, S>(cudaStream_t, view<const S, 2>, \
                                                          const std::int32_t*, view<T, 2>))
SSMLIB_DETAIL_LIST(bf16, bf16);
SSMLIB_DETAIL_LIST(bf16, float);
SSMLIB_DETAIL_LIST(float, float);
SSMLIB_DETAIL_LIST(float, bf16);
SSMLIB_DETAIL_LIST(double, double);
#undef SSMLIB_DETAIL_LIST

#define SSMLIB_DETAIL_LIST(T)                                                             \
  SSMLIB_INSTANTIATE(cuda_embedding, std::size_t embedding_vjp_workspace_bytes<T>(        \
                                         const embedding_vjp_problem<T>&, index_t));      \
  SSMLIB_INSTANTIATE(cuda_embedding,                                                      \
                     void embedding_vjp<T>(cudaStream_t, const embedding_vjp_problem<T>&, \
                                           view<accum_t<T>, 2>, bool, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
