#pragma once

#include <ssmlib/kernels/cuda/attention_parts.cuh>
#include <ssmlib/kernels/cuda/hopper.cuh>

#include <algorithm>

/// @file
/// What the wgmma kernels of attention share: operands as boxes, products over panels, masks, and
/// rows on their way out.

namespace ssm::kernels::cuda::detail {

/// An operand of packed or rectangular sequences for the copy engine.
struct attention_boxes {
  CUtensorMap map;

  attention_boxes(view<const bf16, 3> x, bool packed, index_t sequences, index_t length, int rows) {
    // Strides of dimensions of one element are never used, and may be anything.
    const index_t token = x.extents[0] > 1 ? x.strides[0] : 8;
    const index_t head = x.extents[1] > 1 ? x.strides[1] : 8;
    const index_t tokens = std::max<index_t>(1, packed ? x.extents[0] : length);
    map = box_map(x.data, {x.extents[2], x.extents[1], tokens, packed ? 1 : sequences},
                  {head, token, packed ? 8 : tokens * token}, rows);
  }
};

/// Rows of one head from a token on: `begin` counts from the start of all tokens if packed.
struct box_position {
  int head, token, sequence;
};
SSMLIB_DEVICE box_position position_of(bool packed, const attention_tile& work, int head,
                                       index_t begin) {
  return packed ? box_position{head, static_cast<int>(begin), 0}
                : box_position{head, 0, static_cast<int>(work.sequence)};
}
template <int Panels, int PanelBytes>
SSMLIB_DEVICE void load_panels(unsigned char* to, const CUtensorMap* map, std::uint64_t* barrier,
                               const box_position& at, int row) {
#pragma unroll
  for (int i = 0; i < Panels; ++i)
    load_box(to + i * PanelBytes, map, barrier, 64 * i, at.head, at.token + row, at.sequence);
}

/// A place in a ring of stages with the parity of its barriers.
template <int Stages>
struct ring {
  int stage = 0;
  std::uint32_t parity = 0;
  SSMLIB_DEVICE void next() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// s (64 x N) = a (64 x D) b (N x D)^T, operands in panels of shared memory.
template <int N, int D, int PanelA, int PanelB>
SSMLIB_DEVICE void multiply_rows(float (&s)[N / 2], std::uint64_t a, std::uint64_t b) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    warpgroup_product<N>::template run<false>(s, advance(a, i / 4 * PanelA + i % 4 * 32),
                                              advance(b, i / 4 * PanelB + i % 4 * 32), i > 0);
  }
}
/// o (64 x D) += w (64 x N, in registers) b (N x D, in panels).
template <int N, int D>
SSMLIB_DEVICE void accumulate_rows(float (&o)[D / 2], const std::uint32_t (&w)[N / 4],
                                   std::uint64_t b) {
#pragma unroll
  for (int i = 0; i < N / 16; ++i)
    warpgroup_product<D>::template run<true>(o, w + 4 * i, advance(b, i * 2048), 1);
}

/// The result of one product as the bf16 left operand of the next.
template <int N>
SSMLIB_DEVICE void to_operand(const float (&s)[2 * N], std::uint32_t (&w)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    w[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

SSMLIB_DEVICE float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Zeros the rows [first, Rows) of a tile in panels, by the 128 threads of a warpgroup. Other
/// warpgroups that share the tile may do the same at the same time.
template <int Panels, int Rows>
SSMLIB_DEVICE void clear_rows(unsigned char* tile, int first, int thread, int named_barrier) {
  const int count = (Rows - first) * 8;  // 16-byte pieces a panel
  for (int i = thread; i < count * Panels; i += 128) {
    const int panel = i / count, piece = i - panel * count;
    *reinterpret_cast<uint4*>(tile + panel * Rows * 128 + first * 128 + piece * 16) =
        make_uint4(0, 0, 0, 0);
  }
  fence_shared_for_engines();
  named_barrier_sync(named_barrier, 128);
}

/// Columns [low, high) of a row are kept.
struct kept_columns {
  int low, high;
};
/// Which keys of a tile, counted from `key0`, the query at `position` sees.
SSMLIB_DEVICE kept_columns kept_keys(const attention_layout& layout, const attention_span& span,
                                     int position, int key0) {
  if (!layout.causal) return {0, span.keys - key0};
  return {position - layout.window + 1 - key0, min(span.keys, position + 1) - key0};
}
/// Which queries of a tile, counted from `query0`, see the key.
SSMLIB_DEVICE kept_columns kept_queries(const attention_layout& layout, const attention_span& span,
                                        int key, int query0) {
  const int end = span.queries - query0;
  if (!layout.causal) return {0, end};
  const int first = key - span.shift() - query0;
  return {first, min(end, first + layout.window)};
}
/// Writes `value` to the elements of a product's rows that are not kept.
template <int N>
SSMLIB_DEVICE void mask_rows(float (&s)[N / 2], const kept_columns (&kept)[2], float value) {
  const int t = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int low = kept[r].low - t, high = kept[r].high - t;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + e;
        float& x = s[4 * j + 2 * r + e];
        x = column >= low && column < high ? x : value;
      }
    }
  }
}

/// The key tiles [first, end) of one piece of work; none: its rows see no key.
template <class Tile>
struct query_range {
  attention_span span;
  int row0, first, end;

  SSMLIB_DEVICE query_range(const attention_layout& layout, const attention_tile& work) {
    span = layout.span(work.sequence);
    row0 = work.tile * Tile::rows;
    int low = 0, high = 0;
    if (row0 < span.queries) layout.keys_of(span, row0, row0 + Tile::rows, low, high);
    first = low / Tile::keys;
    end = max(first, (high + Tile::keys - 1) / Tile::keys);
    if (high <= low) end = first;
  }
};

/// The query tiles [first, end) of one piece of work, for each of its heads.
template <class Tile>
struct key_range {
  attention_span span;
  int key0, first, end;

  SSMLIB_DEVICE key_range(const attention_layout& layout, const attention_tile& work) {
    span = layout.span(work.sequence);
    key0 = work.tile * Tile::keys;
    int low = 0, high = 0;
    if (key0 < span.keys) layout.queries_of(span, key0, key0 + Tile::keys, low, high);
    first = low / Tile::queries;
    end = high <= low ? first : (high + Tile::queries - 1) / Tile::queries;
  }
};

/// What a thread keeps of its two rows.
struct row_sums {
  float largest[2], sum[2];  // of raw logits; of this thread's columns
};

/// Logits become weights; `factor` is what earlier sums of the rows must be multiplied by.
template <int N>
SSMLIB_DEVICE void online_softmax(float (&s)[N / 2], row_sums& rows, float unit,
                                  float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float high = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < N / 8; ++j)
      high = fmaxf(high, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    high = fmaxf(high, rows.largest[r]);
    const float shift = high == -INFINITY ? 0.0f : high * unit;
    factor[r] = power_of_2(fmaf(rows.largest[r], unit, -shift));
    rows.largest[r] = high;
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * r + e];
        x = power_of_2(fmaf(x, unit, -shift));
        sum[e] += x;
      }
    }
    rows.sum[r] = fmaf(rows.sum[r], factor[r], sum[0] + sum[1]);
  }
}

/// Lane t of each group of 4 gives u[i] to lane i and gets u[t] of lane i in place i.
SSMLIB_DEVICE void transpose_in_quad(std::uint32_t (&u)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? u[i] : u[i + 1], 1);
    u[i] = odd ? got : u[i];
    u[i + 1] = odd ? u[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? u[i] : u[i + 2], 2);
    u[i] = upper ? got : u[i];
    u[i + 2] = upper ? u[i + 2] : got;
  }
}
/// Writes a warpgroup's product as bf16, row r of a thread's two times factor[r], in 16-byte
/// pieces; rows and columns outside are left out.
template <int D>
SSMLIB_DEVICE void store_product(const float (&o)[D / 2], const float (&factor)[2],
                                 bf16* const (&rows)[2], int columns) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      std::uint32_t u[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * r;
        u[i] = pack_bf16(o[at] * factor[r], o[at + 1] * factor[r]);
      }
      transpose_in_quad(u);
      const int column = 32 * j + 8 * t;
      if (rows[r] != nullptr && column < columns)
        *reinterpret_cast<uint4*>(rows[r] + column) = make_uint4(u[0], u[1], u[2], u[3]);
    }
  }
}

/// How the head of one operand follows from the head of another with more or as many heads.
SSMLIB_DEVICE int head_of(int h, int heads, int groups) {
  return h / (heads / groups);
}

template <class Kernel>
void allow_shared_bytes(Kernel kernel, int bytes) {
  SSMLIB_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

/// Blocks of a persistent kernel that fills a multiprocessor with one: no more than tiles.
template <class Kernel>
[[nodiscard]] unsigned persistent_blocks(Kernel kernel, int shared_bytes, index_t tiles) {
  allow_shared_bytes(kernel, shared_bytes);
  int device = 0, processors = 0;
  SSMLIB_CHECK_CUDA(cudaGetDevice(&device));
  SSMLIB_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<unsigned>(std::min<index_t>(processors, tiles));
}

}  // namespace ssm::kernels::cuda::detail
