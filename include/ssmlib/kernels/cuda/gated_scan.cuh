#pragma once

#include <ssmlib/kernels/cuda/gated_parts.cuh>
#include <ssmlib/kernels/cuda/launch.cuh>

/// @file
/// From chunk to chunk, and out of the states: the two kernels that gated linear attention and the
/// delta rule share, forward and backward. Per chunk, with diag(d) the chunk's whole decay:
///
///     scan:     X <- X + r A S,   S <- diag(d) S + B^T Z + w C^T X      (in this order)
///     product:  Y = A S + M V     with the states that the scan has left
///
/// A scan's blocks own 32 or 64 columns of S, which never leave the registers; the tiles of the
/// chunks stream through a ring of buffers.

namespace ssm::kernels::cuda::detail::gated {

template <class T>
struct scan_arguments {
  using R = accum_t<T>;
  common of;
  const T *reads, *writes;  // A, C: tiles (slot, head, key tile)
  R read_sign, write_sign;
  T* x;                // X: tiles (slot, head, feature tile)
  const T* outer;      // B: tiles (slot, head, key tile)
  view<const T, 3> z;  // Z: a caller's rows
  const R* decay;      // d: (slot, head, 64 key tiles)
  view<const R, 4> initial;
  view<R, 4> final;
  T* states;  // tiles (slot, head, key tile, feature tile): S before every chunk
  bool reverse, add;
};

template <class T>
inline constexpr int ring_depth = sizeof(T) == 8 ? 2 : 4;

template <class T>
std::size_t scan_shared(int width, int tiles, bool reads, bool outer) {
  const int slice = side * (width + 16 / static_cast<int>(sizeof(T)));
  return sizeof(T) * (ring_depth<T> * (tile_cells<T> + (outer ? slice : 0)) + (reads ? slice : 0) +
                      tiles * slice);
}

/// The tiles of a scan in the order of their use, `ring_depth` - 1 of them ahead.
template <class T, int Tiles, bool Reads, bool Outer, int Width>
struct tile_stream {
  static constexpr int slice_pitch = Width + 16 / static_cast<int>(sizeof(T));
  static constexpr int depth = ring_depth<T>;
  static constexpr int per_tile = (Reads ? 1 : 0) + (Outer ? 1 : 0);
  static constexpr int steps = Tiles * (per_tile + (Reads ? 1 : 0));
  const scan_arguments<T>& o;
  index_t head, begin, length, first_slot, chunks, column;
  T *ring, *rows;
  index_t next_chunk = 0;
  int next_step = 0, next_buffer = 0, buffer = 0;

  SSMLIB_DEVICE index_t place(index_t c) const { return o.reverse ? chunks - 1 - c : c; }
  SSMLIB_DEVICE index_t slot_head(index_t c) const {
    return (first_slot + place(c)) * o.of.heads + head;
  }
  SSMLIB_DEVICE void fetch() {
    if (next_chunk < chunks) {
      const index_t at = slot_head(next_chunk) * Tiles;
      const int rest = next_step - (Reads ? Tiles : 0);
      const T* from = o.reads;
      int tile = next_step;
      if (rest >= 0) {
        tile = rest / per_tile;
        from = Outer && rest % per_tile == 0 ? o.outer : o.writes;
      }
      load_tile(ring + next_buffer * tile_cells<T>, from + (at + tile) * cells);
      if (Outer && next_step == 0) {
        const index_t t = place(next_chunk) * side;
        const int n = static_cast<int>(min(index_t{side}, length - t));
        load_rows<Width, slice_pitch>(
            slice(next_chunk), head_rows<const T>(o.z, head, o.of.heads, begin + t, n, column));
      }
    }
    commit_copies();
    next_buffer = next_buffer + 1 == depth ? 0 : next_buffer + 1;
    if (++next_step == steps) next_step = 0, ++next_chunk;
  }
  SSMLIB_DEVICE T* slice(index_t c) const {
    return rows + static_cast<int>(c % depth) * side * slice_pitch;
  }
  /// The next tile, when all threads have it; the buffer of the one before is filled again.
  SSMLIB_DEVICE const T* next() {
    wait_copies<depth - 2>();
    __syncthreads();
    fetch();
    const T* tile = ring + buffer * tile_cells<T>;
    buffer = buffer + 1 == depth ? 0 : buffer + 1;
    return tile;
  }
};

template <class T, int Tiles, bool Reads, bool Outer, int Width>
__global__ void __launch_bounds__(threads, Width == side || (sizeof(T) == 2 && Tiles <= 2) ? 2 : 1)
    scan_kernel(const __grid_constant__ scan_arguments<T> o) {
  using R = accum_t<T>;
  using tiles = tile_stream<T, Tiles, Reads, Outer, Width>;
  constexpr int sp = tiles::slice_pitch, blocks = Width / 16;
  extern __shared__ __align__(16) unsigned char memory[];
  const index_t slices = side / Width * o.of.feature_tiles;
  const index_t column = index_t{blockIdx.x} % slices * Width;
  const index_t head = blockIdx.x / slices % o.of.heads, i = blockIdx.x / slices / o.of.heads;
  tiles stream{o,
               head,
               o.of.rows.begin(i),
               o.of.rows.length(i),
               o.of.rows.first_slot(i),
               0,
               column,
               reinterpret_cast<T*>(memory),
               nullptr};
  stream.chunks = (stream.length + side - 1) / side;
  stream.rows = stream.ring + stream.depth * tile_cells<T>;
  T* const held = stream.rows + (Outer ? stream.depth * side * sp : 0);
  T* const written = held + Tiles * side * sp;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * 16 + lane / 4, at = warp % 2 * (Width / 2) + lane % 4 * 2;
  R s[Tiles][blocks][4] = {};
  const auto each_cell = [&](auto f) {  // f(key, feature, value)
#pragma unroll
    for (int k = 0; k < Tiles; ++k)
#pragma unroll
      for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          f(k * side + row + e / 2 * 8, at + 8 * j + e % 2, s[k][j][e]);
  };
  if (o.initial.data != nullptr) {
    each_cell([&](int key, int feature, R& x) {
      const index_t p = column + feature;
      if (key < o.initial.extents[2] && p < o.initial.extents[3]) {
        x = o.initial.data[i * o.initial.strides[0] + head * o.initial.strides[1] +
                           key * o.initial.strides[2] + p * o.initial.strides[3]];
      }
    });
  }
  for (int k = 0; k + 1 < stream.depth; ++k)
    stream.fetch();
  for (index_t c = 0; c < stream.chunks; ++c) {
    const index_t slot_head = stream.slot_head(c);
    T* const x_tile =
        o.x + (slot_head * o.of.feature_tiles + column / side) * cells + column % side;
#pragma unroll
    for (int k = 0; k < Tiles; ++k)
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        T* to = held + (k * side + row) * sp + at + 8 * j;
        store_pair(to, s[k][j][0], s[k][j][1]);
        store_pair(to + 8 * sp, s[k][j][2], s[k][j][3]);
      }
    R x[blocks][4] = {}, sum[blocks][4] = {}, decay[Tiles][2];
    if constexpr (Reads) {
#pragma unroll
      for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          x[j][e] = widen(x_tile[(row + e / 2 * 8) * side + at + 8 * j + e % 2]);
    }
#pragma unroll
    for (int k = 0; k < Tiles; ++k)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        decay[k][e] = o.decay[slot_head * Tiles * side + k * side + row + 8 * e];
    __syncthreads();
    if (o.states != nullptr) {
      constexpr int vector = 16 / static_cast<int>(sizeof(T)), vectors = Width / vector;
      for (int v = threadIdx.x; v < Tiles * side * vectors; v += threads) {
        const int key = v / vectors, feature = v % vectors * vector;
        T* to = o.states +
                ((slot_head * Tiles + key / side) * o.of.feature_tiles + column / side) * cells +
                key % side * side + column % side + feature;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(held + key * sp + feature);
      }
    }
    if constexpr (Reads) {
#pragma unroll 1
      for (int k = 0; k < Tiles; ++k) {
        multiply<false, false, pitch<T>, sp>(sum, stream.next() + warp / 2 * 16 * pitch<T>,
                                             held + k * side * sp + warp % 2 * (Width / 2), 4);
      }
#pragma unroll
      for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int r = row + e / 2 * 8, f = at + 8 * j;
          const R first = x[j][e] + o.read_sign * sum[j][e],
                  second = x[j][e + 1] + o.read_sign * sum[j][e + 1];
          store_pair(x_tile + r * side + f, first, second);
          store_pair(written + r * sp + f, o.write_sign * first, o.write_sign * second);
        }
    }
#pragma unroll
    for (int k = 0; k < Tiles; ++k) {
#pragma unroll
      for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[k][j][e] *= decay[k][e / 2];
      if constexpr (Outer) {
        multiply<true, false, pitch<T>, sp>(s[k], stream.next() + warp / 2 * 16,
                                            stream.slice(c) + warp % 2 * (Width / 2), 4);
      }
      if constexpr (Reads) {
        multiply<true, false, pitch<T>, sp>(s[k], stream.next() + warp / 2 * 16,
                                            written + warp % 2 * (Width / 2), 4);
      }
    }
  }
  wait_copies<0>();
  if (o.final.data != nullptr) {
    each_cell([&](int key, int feature, R& x) {
      const index_t p = column + feature;
      if (key < o.final.extents[2] && p < o.final.extents[3]) {
        R& to = o.final.data[i * o.final.strides[0] + head * o.final.strides[1] +
                             key * o.final.strides[2] + p * o.final.strides[3]];
        to = o.add ? to + x : x;
      }
    });
  }
}

template <class T, bool Reads, bool Outer>
void launch_scan(cudaStream_t stream, const scan_arguments<T>& o) {
  const index_t tiles = o.of.rows.sequences * o.of.heads * o.of.feature_tiles;
  const auto go = [&](void (*kernel)(scan_arguments<T>), int width) {
    launch(stream, kernel, tiles * (side / width),
           scan_shared<T>(width, o.of.key_tiles, Reads, Outer), o);
  };
  if constexpr (sizeof(T) == 2 && Reads != Outer) {
    // Twice the columns a step, where that leaves enough blocks.
    if (o.of.key_tiles <= 2 && 2 * tiles >= 3 * multiprocessors()) {
      if (o.of.key_tiles == 1) return go(scan_kernel<T, 1, Reads, Outer, side>, side);
      return go(scan_kernel<T, 2, Reads, Outer, side>, side);
    }
  }
  constexpr int half = side / 2;
  if (o.of.key_tiles == 1) return go(scan_kernel<T, 1, Reads, Outer, half>, half);
  if (o.of.key_tiles == 2) return go(scan_kernel<T, 2, Reads, Outer, half>, half);
  go(scan_kernel<T, 4, Reads, Outer, half>, half);
}

template <class T>
struct product_arguments {
  common of;
  const T* a;        // tiles (slot, head, key tile), or null: M V alone
  const T* states;   // tiles (slot, head, key tile, feature tile)
  const T* m;        // tiles (slot, head)
  const T* v_tiles;  // tiles (slot, head, feature tile), or null: rows
  view<const T, 3> v;
  view<T, 3> y;  // a caller's rows, or absent: tiles
  T* y_tiles;
  bool add;
};

template <class T, bool Transposed>
__global__ void __launch_bounds__(threads, sizeof(T) == 2 ? 4 : sizeof(T) == 4 ? 3 : 1)
    product_kernel(const __grid_constant__ product_arguments<T> o) {
  using R = accum_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* const shared = reinterpret_cast<T*>(memory);
  const index_t part = index_t{blockIdx.x} % o.of.feature_tiles;
  const index_t slot_head = index_t{blockIdx.x} / o.of.feature_tiles;
  const index_t head = slot_head % o.of.heads;
  const chunk_rows chunk(o.of.rows, slot_head / o.of.heads);
  if (chunk.n == 0) return;
  const int tiles = o.a == nullptr ? 0 : o.of.key_tiles;
  const auto fetch = [&](int k) {
    T* to = shared + k % 2 * 2 * tile_cells<T>;
    if (k < tiles) {
      const index_t at = slot_head * tiles + k;
      load_tile(to, o.a + at * cells);
      load_tile(to + tile_cells<T>, o.states + (at * o.of.feature_tiles + part) * cells);
    } else if (k == tiles) {
      load_tile(to, o.m + slot_head * cells);
      if (o.v_tiles != nullptr) {
        load_tile(to + tile_cells<T>, o.v_tiles + (slot_head * o.of.feature_tiles + part) * cells);
      } else {
        load_rows(to + tile_cells<T>,
                  head_rows<const T>(o.v, head, o.of.heads, chunk.first, chunk.n, part * side));
      }
    }
    commit_copies();
  };
  share_sums<R> sums;
  fetch(0);
  for (int k = 0; k <= tiles; ++k) {
    fetch(k + 1);
    wait_copies<1>();
    __syncthreads();
    const T* a = shared + k % 2 * 2 * tile_cells<T>;
    if (Transposed && k == tiles) {
      multiply_tiles<true, false>(sums, a, a + tile_cells<T>);
    } else {
      multiply_tiles<false, false>(sums, a, a + tile_cells<T>);
    }
    __syncthreads();
  }
  if (o.y.data != nullptr) {
    const head_rows<T> y(o.y, head, o.of.heads, chunk.first, chunk.n, part * side);
    sums.pairs([&](int row, int column, R& p, R& q) { y.put_pair(row, column, p, q, o.add); });
  } else {
    T* y = o.y_tiles + (slot_head * o.of.feature_tiles + part) * cells;
    sums.pairs([&](int row, int column, R& p, R& q) { store_pair(y + row * side + column, p, q); });
  }
}

template <bool Transposed, class T>
void launch_product(cudaStream_t stream, const product_arguments<T>& o) {
  launch(stream, product_kernel<T, Transposed>, o.of.slots * o.of.heads * o.of.feature_tiles,
         4 * tile_cells<T> * sizeof(T), o);
}

}  // namespace ssm::kernels::cuda::detail::gated
