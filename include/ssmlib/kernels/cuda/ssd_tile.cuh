#pragma once

#include <ssmlib/kernels/cuda/hopper.cuh>
#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/ssd_plan.cuh>

/// @file
/// What the kernels of the tensor cores share for scalar-gated recurrences: tiles in shared memory
/// and how they get there, the decays of a chunk of 64 tokens, operands in registers.

namespace ssm::kernels::cuda::detail {

/// Where the 16 bytes `column` of a row of a panel (128 bytes a row) lie.
SSMLIB_DEVICE int swizzled(int row, int column) {
  return row * 128 + ((column ^ (row & 7)) << 4);
}

/// The products of two pairs of bf16, each rounded once.
SSMLIB_DEVICE std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t r;
#if __CUDA_ARCH__ >= 900
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));  // plus -0
#endif
  return r;
}
SSMLIB_DEVICE float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// The decays of one chunk of one lane. Lambda is the sum of log2 decays up to a token; a decay
/// below 2^-256 counts as that, which is zero in float.
struct __align__(16) ssd_chunk_decays {
  float lambda[64];
  float shifted[64];      // Lambda - log2 |alpha * weight|; infinite past the end
  float sign[64];         // of alpha * weight
  float start[64];        // alpha * 2^Lambda
  std::uint32_t end[32];  // weight * 2^(total - Lambda), pairs of bf16
  float total;            // 2^total
  int has_negative;       // whether any sign is
  float padding[2];

  /// A warp; lane l has loaded tokens 2 l and 2 l + 1, of which `n` are left in the sequence.
  SSMLIB_DEVICE void set(const ssd_steps<bf16>& steps, const ssd_raw_step<bf16>(&loaded)[2], int n,
                         float alpha, int lane) {
    float log_a[2], w[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      log_a[i] = w[i] = 0.0f;
      if (2 * lane + i < n) {
        const ssd_step<float> s = steps.compute(loaded[i]);
        const float l = s.log_a * 1.4426950408889634f;
        log_a[i] = l < -256.0f ? -256.0f : l;
        w[i] = s.weight;
      }
    }
    float sum = log_a[0] + log_a[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += below;
    }
    const float all = __shfl_sync(0xffffffffu, sum, 31);
    float before = __shfl_up_sync(0xffffffffu, sum, 1);
    if (lane == 0) before = 0.0f;
    const float first = before + log_a[0];
    const float2 weight{alpha * w[0], alpha * w[1]};
    reinterpret_cast<float2*>(lambda)[lane] = {first, sum};
    reinterpret_cast<float2*>(shifted)[lane] = {first - __log2f(fabsf(weight.x)),
                                                sum - __log2f(fabsf(weight.y))};
    reinterpret_cast<float2*>(sign)[lane] = {copysignf(1.0f, weight.x), copysignf(1.0f, weight.y)};
    const bool any = __any_sync(0xffffffffu, weight.x < 0.0f || weight.y < 0.0f);
    if (lane == 0) has_negative = any;
    reinterpret_cast<float2*>(start)[lane] = {alpha * power_of_two(first),
                                              alpha * power_of_two(sum)};
    end[lane] = pack_bf16(w[0] * power_of_two(all - first), w[1] * power_of_two(all - sum));
    if (lane == 0) total = power_of_two(all);
  }
};

/// A block: warpgroups that compute, each for a lane, and one that fetches what they read. Shared
/// memory: stages of a chunk's k, x and decays of each warpgroup, and q; of each warpgroup, the
/// mixed scores and the outputs; barriers.
template <int N, int Groups, bool States>
struct ssd_tile {
  static constexpr int keys = N, groups = Groups, threads = 128 * (Groups + 1), chunk = 64;
  static constexpr bool states = States;
  static constexpr int blocks = Groups == 1 ? 2 : 1;  // of a multiprocessor
  static constexpr int registers = Groups == 1 ? 216 : 232, fetch_registers = 40;
  static constexpr int panel_bytes = 64 * 128, key_bytes = N / 64 * panel_bytes;
  static constexpr int stages = Groups == 2 ? 3 : 2;
  static constexpr int k_at = 0, x_at = key_bytes, q_at = x_at + Groups * panel_bytes;
  static constexpr int stage_bytes = States ? q_at : q_at + key_bytes;
  static constexpr int mixed_at = stages * stage_bytes;
  static constexpr int out_at = mixed_at + (States ? 0 : Groups * panel_bytes);
  static constexpr int decays_at = out_at + (States ? 0 : Groups * panel_bytes);
  static constexpr int barriers_at =
      decays_at + Groups * stages * static_cast<int>(sizeof(ssd_chunk_decays));
  static constexpr int bytes = barriers_at + 2 * stages * 8;

  /// Where the i-th 16 keys of a row begin.
  SSMLIB_DEVICE static constexpr int key_at(int i) { return i / 4 * panel_bytes + i % 4 * 32; }
  /// The 8 tokens that q's rows 8 i, 8 i + 1... hold: warp w has those that are w-th from both ends
  /// of the chunk, so that warps have equally many scores under the diagonal.
  SSMLIB_DEVICE static constexpr int tokens_of(int i) { return i % 2 == 0 ? i / 2 : 7 - i / 2; }
  SSMLIB_DEVICE static constexpr int rows_of(int i) { return i < 4 ? 2 * i : 15 - 2 * i; }
};

/// The maps by which the copy engine reads k, q and x.
struct ssd_maps {
  CUtensorMap k, q, x;

  explicit ssd_maps(const ssd_problem<bf16>& p)
      : k(map(p.k, 64)), q(map(p.q, 8)), x(map(p.x, 64)) {}

  /// In boxes of `rows` tokens.
  static CUtensorMap map(const view<const bf16, 3>& v, int rows) {
    const index_t whole = v.extent(0) * v.stride(0);
    return box_map(v.data, {v.extent(2), v.extent(1), v.extent(0), 1},
                   {v.extent(1) == 1 ? v.stride(0) : v.stride(1), v.stride(0), whole}, rows);
  }
};

/// Chunks on their way to shared memory. A stage is full when the copies and the decays of all
/// lanes are there, and free when every computing warp has said so.
template <class Tile>
class ssd_pipeline {
 public:
  /// The block is to synchronise before anything else.
  SSMLIB_DEVICE explicit ssd_pipeline(unsigned char* shared)
      : shared_(shared), full_(reinterpret_cast<std::uint64_t*>(shared + Tile::barriers_at)) {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < Tile::stages; ++i) {
      barrier_init(full_ + i, 1 + arrivals_a_warp * Tile::groups);
      barrier_init(full_ + Tile::stages + i, 4 * arrivals_a_warp * Tile::groups);
    }
    barrier_init_done();
  }

  /// One thread: starts the copies of all chunks of the lanes v, v + 1.
  SSMLIB_DEVICE void copy(const ssd_maps& maps, const ssd_arguments<bf16>& p, int t, int chunks,
                          int v, int parts) const {
    const int gk = v / parts / p.k.heads_a_group, gq = v / parts / p.q.heads_a_group;
    for (int c = 0; c < chunks; ++c, t += Tile::chunk) {
      wait_free(c);
      unsigned char* to = stage(c);
      std::uint64_t* full = full_ + c % Tile::stages;
      barrier_arrive_expect(full, Tile::stage_bytes);
#pragma unroll
      for (int i = 0; i < Tile::keys / 64; ++i) {
        load_box(to + Tile::k_at + i * Tile::panel_bytes, &maps.k, full, 64 * i, gk, t, 0);
        if constexpr (!Tile::states) {
#pragma unroll
          for (int r = 0; r < 8; ++r) {
            load_box(to + Tile::q_at + i * Tile::panel_bytes + 1024 * r, &maps.q, full, 64 * i, gq,
                     t + 8 * Tile::tokens_of(r), 0);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::groups; ++i) {
        load_box(to + Tile::x_at + i * Tile::panel_bytes, &maps.x, full, (v + i) % parts * 64,
                 (v + i) / parts / p.x.heads_a_group, t, 0);
      }
    }
  }
  /// One warp: computes the decays of all chunks of the lane of one group.
  SSMLIB_DEVICE void decay(const ssd_steps<bf16>& steps, index_t first, int tokens, int group,
                           float alpha, int lane) const {
    ssd_raw_step<bf16> loaded[2] = {};
    const auto load = [&](int from) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (from + 2 * lane + i < tokens) loaded[i] = steps.load(first + from + 2 * lane + i);
      }
    };
    load(0);
    for (int c = 0, from = 0; from < tokens; ++c, from += Tile::chunk) {
      const ssd_raw_step<bf16> now[2] = {loaded[0], loaded[1]};
      load(from + Tile::chunk);
      wait_free(c);
      decays(c, group)->set(steps, now, tokens - from, alpha, lane);
      barrier_arrive_warp(full_ + c % Tile::stages);
    }
  }
  /// Waits for chunk c, whose stage is returned.
  SSMLIB_DEVICE unsigned char* wait(int c) const {
    barrier_wait(full_ + c % Tile::stages, (c / Tile::stages) & 1);
    return stage(c);
  }
  /// Says that this warp is done with chunk c.
  SSMLIB_DEVICE void release(int c) const {
    barrier_arrive_warp(full_ + Tile::stages + c % Tile::stages);
  }
  SSMLIB_DEVICE ssd_chunk_decays* decays(int c, int group) const {
    return reinterpret_cast<ssd_chunk_decays*>(shared_ + Tile::decays_at) +
           (c % Tile::stages * Tile::groups + group);
  }

 private:
  SSMLIB_DEVICE unsigned char* stage(int c) const {
    return shared_ + c % Tile::stages * Tile::stage_bytes;
  }
  SSMLIB_DEVICE void wait_free(int c) const {
    if (c < Tile::stages) return;
    barrier_wait(full_ + Tile::stages + c % Tile::stages, (c / Tile::stages - 1) & 1);
  }

  unsigned char* shared_;
  std::uint64_t* full_;
};

/// Clears rows [n, 64) of panels at `panel`: what follows a sequence must not enter its sums.
SSMLIB_DEVICE void ssd_clear_rows(unsigned char* panel, int panels, int n, int tid) {
  for (int i = tid; i < panels * (64 - n) * 8; i += 128) {
    const int row = n + i / 8 % (64 - n), which = i / 8 / (64 - n);
    *reinterpret_cast<uint4*>(panel + which * 8192 + row * 128 + i % 8 * 16) = uint4{0, 0, 0, 0};
  }
}

/// The transposed state (64 x N) of a lane before its part of the sequence, as the registers of a
/// product lie.
template <int N>
SSMLIB_DEVICE void ssd_start_state(float (&state)[N / 2], const ssd_arguments<bf16>& p,
                                   const ssd_cut& cut,
                                   const ssd_state_operand<const float>& initial, int s, int slot,
                                   int v, int tid, bool states, bool whole) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    state[i] = 0.0f;
  if (slot == 0) {
    if (initial.data == nullptr) return;
    // Another block may overwrite the initial state by its final one: the first pass copies it.
    float* copy = whole ? nullptr : cut.state_of<N>(s, 0, v) + tid;
    if (copy != nullptr && !states) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        state[i] = copy[128 * i];
      return;
    }
    const int h = v / cut.parts;
    const int row = v % cut.parts * 64 + tid / 32 * 16 + tid % 32 / 4;
    const float* from = initial.at(s, h);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int n = i / 4 * 8 + tid % 4 * 2 + i % 2, f = row + i / 2 % 2 * 8;
      if (n < p.key_size && f < p.features) state[i] = from[n * initial.row + f];
      if (copy != nullptr) copy[128 * i] = state[i];
    }
    return;
  }
  if (states) return;
  for (int k = cut.folded ? 1 : slot; k <= slot; ++k) {
    const float* from = cut.state_of<N>(s, k, v) + tid;
    const float decay = k > 1 && cut.folded ? *cut.decay_of(s, k - 1, v) : 0.0f;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      state[i] = decay * state[i] + from[128 * i];
  }
}

template <int N>
SSMLIB_DEVICE void ssd_store_state(const float (&state)[N / 2], float* to, index_t step, int from,
                                   const ssd_arguments<bf16>& p, int warp, int lane) {
  const int row = from + warp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int n = i / 4 * 8 + lane % 4 * 2 + i % 2, f = row + i / 2 % 2 * 8;
    if (n < p.key_size && f < p.features) to[n * step + f] = state[i];
  }
}

/// mixed = scores, decayed, weighted and masked, plus d on the diagonal, as bf16 into a panel, up
/// to the diagonal's blocks of 16 x 16. The scores' rows are in the order of ssd_tile::tokens_of,
/// those of mixed are the chunk's tokens.
SSMLIB_DEVICE void ssd_mix(const float (&scores)[32], const ssd_chunk_decays& decays, float d,
                           int warp, int lane, std::uint32_t panel) {
  const int t = lane % 4;
  const bool has_negative = decays.has_negative != 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int block = half == 0 ? warp : 7 - warp, i = 8 * block + lane / 4;
    const float sum = decays.lambda[i];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (b > block / 2) continue;
      float m[4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int pair = 4 * (2 * b + e) + t, at = 4 * (2 * b + e) + 2 * half;
        const float2 from = reinterpret_cast<const float2*>(decays.shifted)[pair];
        m[2 * e] = scores[at] * power_of_two(sum - from.x);
        m[2 * e + 1] = scores[at + 1] * power_of_two(sum - from.y);
        if (has_negative) {
          const float2 sign = reinterpret_cast<const float2*>(decays.sign)[pair];
          m[2 * e] *= sign.x, m[2 * e + 1] *= sign.y;
        }
      }
      if (b == block / 2) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = 16 * b + 8 * (e / 2) + 2 * t + e % 2;
          m[e] = column > i ? 0.0f : column == i ? m[e] + d : m[e];
        }
      }
      store_matrix_x2(panel + swizzled(8 * block + lane % 8, 2 * b + lane / 8 % 2),
                      pack_bf16(m[0], m[1]), pack_bf16(m[2], m[3]));
    }
  }
}

/// out += (left (64 x 64) mixed^T), where mixed lies in a panel and is zero above its diagonal, and
/// out's columns are in the order of Tile::tokens_of.
template <class Tile>
SSMLIB_DEVICE void ssd_multiply_mixed(float (&out)[32], const std::uint32_t (&left)[4][4],
                                      std::uint32_t panel, int lane) {
  const int row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float(&upper)[4] = reinterpret_cast<float(&)[4]>(out[4 * Tile::rows_of(2 * i)]);
    float(&lower)[4] = reinterpret_cast<float(&)[4]>(out[4 * Tile::rows_of(2 * i + 1)]);
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      std::uint32_t r[4];
      load_matrix_x4(r, panel + swizzled(16 * i + row, 2 * j + column));
      multiply_add_16x8x16(upper, left[j], r[0], r[1]);
      multiply_add_16x8x16(lower, left[j], r[2], r[3]);
    }
  }
}

/// A panel's transpose (64 columns x 64 rows) as the left operand of four products.
SSMLIB_DEVICE void ssd_load_transposed(std::uint32_t (&r)[4][4], std::uint32_t panel, int warp,
                                       int lane) {
  const int row = lane % 8 + lane / 16 * 8, column = 2 * warp + lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    load_matrix_x4_transposed(r[i], panel + swizzled(16 * i + row, column));
}

/// to = from with its token columns scaled by their weight and decay to the chunk's end.
SSMLIB_DEVICE void ssd_weigh(std::uint32_t (&to)[4][4], const std::uint32_t (&from)[4][4],
                             const ssd_chunk_decays& decays, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t near = decays.end[8 * i + lane % 4], far = decays.end[8 * i + 4 + lane % 4];
    to[i][0] = multiply_pairs(from[i][0], near), to[i][1] = multiply_pairs(from[i][1], near);
    to[i][2] = multiply_pairs(from[i][2], far), to[i][3] = multiply_pairs(from[i][3], far);
  }
}

/// The transpose of a product's (64 x 64) registers, as bf16 into a panel. Columns in the order of
/// ssd_tile::tokens_of become rows in that of the tokens.
SSMLIB_DEVICE void ssd_stage_transposed(const float (&r)[32], std::uint32_t panel, int warp,
                                        int lane) {
  const int column = 2 * warp + lane / 8 % 2;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int row = 8 * (lane < 16 ? b : 7 - b) + lane % 8;
    store_matrix_x4_transposed(panel + swizzled(row, column), pack_bf16(r[8 * b], r[8 * b + 1]),
                               pack_bf16(r[8 * b + 2], r[8 * b + 3]),
                               pack_bf16(r[8 * b + 4], r[8 * b + 5]),
                               pack_bf16(r[8 * b + 6], r[8 * b + 7]));
  }
}

}  // namespace ssm::kernels::cuda::detail
