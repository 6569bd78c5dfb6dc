#pragma once

#include <ssmlib/kernels/cuda/attention_decode_parts.cuh>
#include <ssmlib/kernels/cuda/mma.cuh>

/// @file
/// bf16 decoding on the tensor cores. A block has four streams: stream i takes chunks i, i + 4, ...
/// of 16 keys of its segment through its own ring of copies, and waits for no other stream. A
/// stream is one warp for every 16 rows, a row being a query head of a token. At the end of the
/// segment the streams' results are added, 2 to 0, 3 to 1, then 1 to 0.

namespace ssm::kernels::cuda::detail {

inline constexpr int decode_streams = 4;
inline constexpr int decode_chunk = 16;
inline constexpr int decode_stages = 3;

/// Sizes for head size D and Tiles times 16 rows, in elements of bf16 where not said otherwise.
template <int D, int Tiles>
struct decode_layout {
  static constexpr int step = D + 8;  // of rows: neighbours meet different banks
  static constexpr int stage = 2 * decode_chunk * step;
  static constexpr int queries = 16 * Tiles * step;
  static constexpr int threads = 32 * Tiles * decode_streams;
  static constexpr std::size_t bytes =
      2 * (std::size_t{queries} + decode_streams * decode_stages * stage);
  static constexpr int sums = D / 2 + 4;  // numbers of a thread: values, largest, sum
  static_assert(std::size_t{2} * sums * 32 * Tiles * 4 <= bytes);
};

template <int D, int Tiles>
class decode_stream {
 public:
  using layout = decode_layout<D, Tiles>;
  static constexpr bool held = Tiles == 1 && D <= 128;  // queries in registers

  SSMLIB_DEVICE decode_stream(const decode_place<bf16>& at, bf16* shared)
      : at_(at), queries_(shared) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    lane_ = static_cast<int>(threadIdx.x % 32);
    stream_ = warp / Tiles;
    tile_ = warp % Tiles;
    stages_ = shared + layout::queries + stream_ * decode_stages * layout::stage;
    const index_t begin = decode_segments::begin(at.segment);
    // Chunks before the first visible key are left out: they would change nothing.
    const int skipped = static_cast<int>((at.begin - begin) / decode_chunk);
    const int chunks = static_cast<int>((at.stop - begin + decode_chunk - 1) / decode_chunk);
    int first = skipped / decode_streams * decode_streams + stream_;
    if (first < skipped) first += decode_streams;
    count_ = first < chunks ? (chunks - first + decode_streams - 1) / decode_streams : 0;
    first_ = begin + index_t{first} * decode_chunk;
    ring_ = static_cast<int>(first_ % at.a.rows);
    keys_ =
        at.a.keys.data + at.sequence * at.a.keys.sequence + at.group(at.a.k.heads) * at.a.keys.head;
    values_ = at.a.values.data + at.sequence * at.a.values.sequence +
              at.group(at.a.v.heads) * at.a.values.head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = at.row_tile * 16 * Tiles + tile_ * 16 + lane_ / 4 + 8 * i;
      const index_t token = at.token_of_row(row);
      // Positions that the row sees, (low, high], counted from the first chunk.
      const index_t high = at.position + token;
      const bool exists = token < at.new_tokens;
      high_[i] = exists ? static_cast<int>(clamp(high - first_)) : -1;
      low_[i] = exists ? static_cast<int>(clamp(high - at.a.window - first_)) : 0;
      most_[i] = -std::numeric_limits<float>::infinity();
      sum_[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out_[i][j] = 0.0f;
  }

  SSMLIB_DEVICE void run() {
#pragma unroll
    for (int i = 0; i + 1 < decode_stages; ++i) {
      if (i < count_) load(i);
      commit_copies();
    }
    load_queries();
    __syncthreads();
    if constexpr (held) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d)
        query(d, q_[d]);
    }
    for (int i = 0; i < count_; ++i) {
      wait_copies<decode_stages - 2>();
      meet();
      if (i + decode_stages - 1 < count_) load(i + decode_stages - 1);
      commit_copies();
      take(i);
    }
    wait_copies<0>();
  }

  /// Adds the streams and writes the segment's result.
  SSMLIB_DEVICE void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum_[i] += __shfl_xor_sync(0xffffffffu, sum_[i], 1);
      sum_[i] += __shfl_xor_sync(0xffffffffu, sum_[i], 2);
    }
    float* space = reinterpret_cast<float*>(queries_);
    __syncthreads();
    if (stream_ >= 2) put(space, stream_ - 2);
    __syncthreads();
    if (stream_ < 2) add(space, stream_);
    __syncthreads();
    if (stream_ == 1) put(space, 0);
    __syncthreads();
    if (stream_ != 0) return;
    add(space, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = at_.row_tile * 16 * Tiles + tile_ * 16 + lane_ / 4 + 8 * i;
      if (at_.token_of_row(row) >= at_.new_tokens) continue;
      const index_t result = at_.result(row);
      if (lane_ % 4 == 0) {
        at_.a.largest[result] = most_[i];
        at_.a.sum[result] = sum_[i];
      }
      float* to = at_.a.out + result * D + lane_ % 4 * 2;
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
        *reinterpret_cast<float2*>(to + 8 * c) = make_float2(out_[c][2 * i], out_[c][2 * i + 1]);
    }
  }

 private:
  [[nodiscard]] SSMLIB_DEVICE static index_t clamp(index_t x) {
    return max(index_t{-1} << 20, min(x, index_t{1} << 20));
  }
  /// All warps of the stream.
  SSMLIB_DEVICE void meet() const {
    if constexpr (Tiles == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(stream_ + 1), "n"(32 * Tiles) : "memory");
    }
  }

  SSMLIB_DEVICE void load_queries() const {
    const int rows = 16 * Tiles;
    for (int i = static_cast<int>(threadIdx.x); i < rows * D; i += layout::threads) {
      const int r = i / D, d = i % D, row = at_.row_tile * rows + r;
      const index_t token = at_.token_of_row(row);
      bf16 value{};
      if (token < at_.new_tokens) {
        value = at_.a.q.row(at_.first_token + token, at_.head_of_row(row), at_.a.heads)[d];
      }
      queries_[r * layout::step + d] = value;
    }
  }
  SSMLIB_DEVICE void query(int d, std::uint32_t (&q)[4]) const {
    const int row = tile_ * 16 + lane_ % 16, column = 16 * d + lane_ / 16 * 8;
    load_matrix_x4(q, shared_address(queries_ + row * layout::step + column));
  }

  /// Asks for chunk i of this stream.
  SSMLIB_DEVICE void load(int i) const {
    constexpr int pieces = D / 8, threads = 32 * Tiles;
    bf16* to = stages_ + i % decode_stages * layout::stage;
    const index_t p0 = first_ + index_t{i} * (decode_chunk * decode_streams);
    const int offset = ring_ + i * (decode_chunk * decode_streams);
    const bool plain = p0 >= at_.seen && p0 + decode_chunk <= at_.position;
#pragma unroll 4
    for (int j = tile_ * 32 + lane_; j < decode_chunk * pieces; j += threads) {
      const int r = j / pieces, c = j % pieces * 8;
      bf16 *k = to + r * layout::step + c, *v = k + decode_chunk * layout::step;
      int row = offset + r;
      if (row >= at_.a.rows) row %= at_.a.rows;
      bf16 *old_k = keys_ + row * at_.a.keys.row + c, *old_v = values_ + row * at_.a.values.row + c;
      const index_t p = p0 + r;
      if (plain || p < at_.position) {
        const bool valid = plain || p >= at_.seen;
        copy_async_16(k, old_k, valid);
        copy_async_16(v, old_v, valid);
      } else {
        load_new(p, c, k, v, old_k, old_v);
      }
    }
  }
  /// A new token's share of eight features: from the operands, and to the cache.
  SSMLIB_DEVICE void load_new(index_t p, int c, bf16* k, bf16* v, bf16* old_k, bf16* old_v) const {
    const bool exists = p < at_.end;
    const index_t t = at_.first_token + (p - at_.position);
    const bf16* new_k = at_.a.k.row(t, at_.head(), at_.a.heads) + c;
    const bf16* new_v = at_.a.v.row(t, at_.head(), at_.a.heads) + c;
    const bool store_k = exists && at_.stores(at_.a.k.heads);
    const bool store_v = exists && at_.stores(at_.a.v.heads);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      k[e] = exists ? new_k[e] : bf16{};
      v[e] = exists ? new_v[e] : bf16{};
      if (store_k) old_k[e] = k[e];
      if (store_v) old_v[e] = v[e];
    }
  }

  SSMLIB_DEVICE void take(int i) {
    const bf16* keys = stages_ + i % decode_stages * layout::stage;
    const bf16* values = keys + decode_chunk * layout::step;
    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      std::uint32_t k[4], q[4];
      const int key = lane_ % 8 + lane_ / 16 * 8, column = 16 * d + lane_ / 8 % 2 * 8;
      load_matrix_x4(k, shared_address(keys + key * layout::step + column));
      if constexpr (held) {
        multiply_add_16x8x16(s[0], q_[d], k[0], k[1]);
        multiply_add_16x8x16(s[1], q_[d], k[2], k[3]);
      } else {
        query(d, q);
        multiply_add_16x8x16(s[0], q, k[0], k[1]);
        multiply_add_16x8x16(s[1], q, k[2], k[3]);
      }
    }
    const int base = i * (decode_chunk * decode_streams) + lane_ % 4 * 2;
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = most_[r];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = base + 8 * n + e;
          float& x = s[n][2 * r + e];
          x = key > low_[r] && key <= high_[r] ? rounded_product(x, at_.a.scale)
                                               : -std::numeric_limits<float>::infinity();
          most = fmaxf(most, x);
        }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float reference = most == -std::numeric_limits<float>::infinity() ? 0.0f : most;
      shrink[r] = power_of_two(most_[r] - reference);
      most_[r] = most;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * r + e];
          x = power_of_two(x - reference);
          sum += x;
        }
      sum_[r] = fmaf(sum_[r], shrink[r], sum);
    }
    // Multiplying by 1 changes nothing.
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          out_[c][j] *= shrink[j / 2];
    }
    const std::uint32_t p[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]),
                                pack_bf16(s[1][0], s[1][1]), pack_bf16(s[1][2], s[1][3])};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      std::uint32_t v[4];
      const int key = lane_ % 16, column = 16 * c + lane_ / 16 * 8;
      load_matrix_x4_transposed(v, shared_address(values + key * layout::step + column));
      multiply_add_16x8x16(out_[2 * c], p, v[0], v[1]);
      multiply_add_16x8x16(out_[2 * c + 1], p, v[2], v[3]);
    }
  }

  SSMLIB_DEVICE float* slot(float* space, int of) const {
    return space + of * layout::sums * 32 * Tiles + tile_ * 32 + lane_;
  }
  SSMLIB_DEVICE void put(float* space, int of) const {
    float* to = slot(space, of);
#pragma unroll
    for (int i = 0; i < D / 2; ++i)
      to[i * 32 * Tiles] = out_[i / 4][i % 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[(D / 2 + i) * 32 * Tiles] = most_[i];
      to[(D / 2 + 2 + i) * 32 * Tiles] = sum_[i];
    }
  }
  SSMLIB_DEVICE void add(float* space, int of) {
    const float* from = slot(space, of);
    float mine[2], other[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float their_most = from[(D / 2 + i) * 32 * Tiles];
      const float most = fmaxf(most_[i], their_most);
      const float reference = most == -std::numeric_limits<float>::infinity() ? 0.0f : most;
      mine[i] = power_of_two(most_[i] - reference);
      other[i] = power_of_two(their_most - reference);
      most_[i] = most;
      sum_[i] = fmaf(other[i], from[(D / 2 + 2 + i) * 32 * Tiles], mine[i] * sum_[i]);
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      float& x = out_[i / 4][i % 4];
      x = fmaf(other[i % 4 / 2], from[i * 32 * Tiles], mine[i % 4 / 2] * x);
    }
  }

  const decode_place<bf16>& at_;
  bf16 *queries_, *stages_, *keys_, *values_;
  index_t first_;  // position of the first chunk
  int lane_, stream_, tile_, count_, ring_;
  int low_[2], high_[2];
  float most_[2], sum_[2], out_[D / 8][4];
  std::uint32_t q_[held ? D / 16 : 1][4];
};

template <int D, int Tiles>
__global__ void __launch_bounds__(decode_layout<D, Tiles>::threads)
    decode_kernel(const decode_arguments<bf16> o) {
  extern __shared__ __align__(128) unsigned char shared[];
  wait_for_kernel_ahead();
  let_next_kernel_start();
  const decode_place<bf16> at(o, 16 * Tiles);
  if (at.idle) return;
  decode_stream<D, Tiles> stream(at, reinterpret_cast<bf16*>(shared));
  stream.run();
  stream.finish();
}

}  // namespace ssm::kernels::cuda::detail
