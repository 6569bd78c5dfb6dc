#pragma once

#include <ssmlib/kernels/cuda/ssd_backward_tile.cuh>

/// @file
/// What the warpgroups of ssd_gradient_kernel share: where they work, rows as operands of products,
/// the decayed products of a chunk.

namespace ssm::kernels::cuda::detail {

/// What the warpgroups leave of one lane for the sums over its tokens. z_ij = e_ij g_ij scores_ij.
struct ssd_lane_sums {
  float row[64];        // sum over j < i of w_j z_ij
  float column[4][64];  // sums over i > j of z_ij, over 16 rows each
  float diagonal[64];   // z_jj
  float skip[64];       // dy_j . x_j
  float before[64];     // start_i dy_i . (S^T q_i)
  float after[64];      // end_j x_j . (E^T k_j)
};

template <int N>
struct ssd_gradient_tile {
  static constexpr int threads = 384, stages = 2, panel_bytes = 64 * 128;
  static constexpr int registers = 232, fetch_registers = 40;
  static constexpr int key_bytes = N / 64 * panel_bytes;
  static constexpr int x_at = 0, dy_at = panel_bytes, h_at = 2 * panel_bytes,
                       e_at = h_at + key_bytes, stage_bytes = e_at + key_bytes;
  static constexpr int q_at = stages * stage_bytes, k_at = q_at + key_bytes;
  static constexpr int mixed_at = k_at + key_bytes, out_at = mixed_at + panel_bytes;
  static constexpr int decays_at = out_at + panel_bytes;
  static constexpr int sums_at = decays_at + stages * static_cast<int>(sizeof(ssd_backward_decays));
  static constexpr int barriers_at = sums_at + stages * static_cast<int>(sizeof(ssd_lane_sums));
  static constexpr int bytes = barriers_at + (3 * stages + 1) * 8;

  SSMLIB_DEVICE static constexpr int key_at(int i) { return i / 4 * panel_bytes + i % 4 * 32; }
};

/// What one block works on.
struct ssd_gradient_place {
  int sequence, chunk, group, split, first_lane, end_lane, n;
  index_t begin, token;  // of the sequence and of the chunk
  bool empty;

  SSMLIB_DEVICE ssd_gradient_place(const ssd_arguments<bf16>& p, const ssd_backward_cut& cut,
                                   int block) {
    split = block % cut.splits;
    group = block / cut.splits % cut.groups;
    chunk = block / cut.splits / cut.groups % cut.chunks;
    sequence = block / cut.splits / cut.groups / cut.chunks;
    begin = p.begin(sequence), token = begin + 64 * chunk;
    const index_t left = p.end(sequence) - token;
    empty = left <= 0;
    n = static_cast<int>(min(index_t{64}, left));
    const int lanes = cut.lanes / cut.groups;
    first_lane = group * lanes + lanes * split / cut.splits;
    end_lane = group * lanes + lanes * (split + 1) / cut.splits;
  }
  [[nodiscard]] SSMLIB_DEVICE int lanes() const { return end_lane - first_lane; }
};

/// Rows of a panel as the left operand of four products.
SSMLIB_DEVICE void ssd_load_rows_of(std::uint32_t (&r)[4][4], std::uint32_t panel, int warp,
                                    int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    load_matrix_x4(r[i], panel + swizzled(16 * warp + lane % 16, 2 * i + lane / 16));
}
/// Rows g and g + 8 of a left operand times a factor each.
SSMLIB_DEVICE void ssd_scale_rows(std::uint32_t (&r)[4][4], float upper, float lower) {
  const std::uint32_t u = pack_bf16(upper, upper), l = pack_bf16(lower, lower);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    r[i][0] = multiply_pairs(r[i][0], u), r[i][1] = multiply_pairs(r[i][1], l);
    r[i][2] = multiply_pairs(r[i][2], u), r[i][3] = multiply_pairs(r[i][3], l);
  }
}
/// Sums of a product's rows g and g + 8 times those of a left operand, the same in the four lanes
/// of a row.
SSMLIB_DEVICE float2 ssd_row_dots(const float (&d)[32], const std::uint32_t (&a)[4][4]) {
  float2 sum{0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t u = a[i / 2][i % 2 * 2], l = a[i / 2][i % 2 * 2 + 1];
    sum.x += d[4 * i] * __uint_as_float(u << 16) + d[4 * i + 1] * __uint_as_float(u & 0xffff0000u);
    sum.y +=
        d[4 * i + 2] * __uint_as_float(l << 16) + d[4 * i + 3] * __uint_as_float(l & 0xffff0000u);
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
  }
  return sum;
}

/// Writes rows of a product (64 x N) as bf16 or, of a split, as float.
template <int N>
SSMLIB_DEVICE void ssd_store_rows(const float (&d)[N / 2], const ssd_operand<bf16>& to,
                                  float* partial, const ssd_backward_cut& cut,
                                  const ssd_gradient_place& place, int columns, int warp,
                                  int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    if (row >= place.n) continue;
    const index_t t = place.token + row;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int c = 8 * j + 2 * (lane % 4);
      const float a = d[4 * j + 2 * half], b = d[4 * j + 2 * half + 1];
      if (c >= columns) continue;
      if (cut.splits > 1) {
        const index_t at = (place.split * cut.tokens + t) * cut.groups + place.group;
        *reinterpret_cast<float2*>(partial + at * columns + c) = {a, b};
      } else if (to.data != nullptr) {
        *reinterpret_cast<std::uint32_t*>(to.data + t * to.token + place.group * to.group + c) =
            pack_bf16(a, b);
      }
    }
  }
}

/// The sums of decayed products as the bf16 left operand of four products.
SSMLIB_DEVICE void ssd_decayed_operand(std::uint32_t (&left)[4][4], const float (&decayed)[32],
                                       float alpha) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    left[b / 2][b % 2 * 2] = pack_bf16(alpha * decayed[4 * b], alpha * decayed[4 * b + 1]);
    left[b / 2][b % 2 * 2 + 1] = pack_bf16(alpha * decayed[4 * b + 2], alpha * decayed[4 * b + 3]);
  }
}

/// A warp writes its 16 rows of a product (64 x 64) by way of a panel, of which it uses its own
/// rows: in whole pieces of 16 bytes, up to row n and column `columns`.
SSMLIB_DEVICE void ssd_write_rows(const float (&out)[32], std::uint32_t panel,
                                  const unsigned char* staged, bf16* to, index_t step, int n,
                                  int columns, int warp, int lane) {
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    store_matrix_x4(
        panel + swizzled(16 * warp + lane % 16, 2 * b + lane / 16),
        pack_bf16(out[8 * b], out[8 * b + 1]), pack_bf16(out[8 * b + 2], out[8 * b + 3]),
        pack_bf16(out[8 * b + 4], out[8 * b + 5]), pack_bf16(out[8 * b + 6], out[8 * b + 7]));
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = 16 * warp + 4 * e + lane / 8, column = lane % 8 * 8;
    const uint4 values = *reinterpret_cast<const uint4*>(staged + swizzled(row, lane % 8));
    if (row < n && column < columns) *reinterpret_cast<uint4*>(to + row * step + column) = values;
  }
  __syncwarp();
}

/// Keeps one half of 2 Half numbers, plus those of the lane `step` across; that one keeps the
/// other.
template <int Half>
SSMLIB_DEVICE void ssd_fold(float (&v)[16], int lane, int step) {
  const bool upper = (lane & step) != 0;
#pragma unroll
  for (int c = 0; c < Half; ++c) {
    const float give = upper ? v[c] : v[c + Half], keep = upper ? v[c + Half] : v[c];
    v[c] = keep + __shfl_xor_sync(0xffffffffu, give, step);
  }
}

/// decayed += w e g, masked; leaves the sums of z for one lane.
SSMLIB_DEVICE void ssd_add_decayed(float (&decayed)[32], const float (&g)[32],
                                   const float (&scores)[32], const ssd_backward_decays& decays,
                                   ssd_lane_sums& sums, int warp, int lane) {
  const int i = 16 * warp + lane / 4, t = lane % 4;
  const float lambda[2] = {decays.sum_and_weight[i].x, decays.sum_and_weight[i + 8].x};
  float row[2] = {0.0f, 0.0f}, column[16];
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    column[2 * b] = column[2 * b + 1] = 0.0f;
    if (b > 2 * warp + 1) continue;
    const float4 w = reinterpret_cast<const float4*>(decays.sum_and_weight)[4 * b + t];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = 4 * b + e, below = i + e / 2 * 8 - (8 * b + 2 * t + e % 2);
      const float decay = power_of_two(lambda[e / 2] - (e % 2 == 0 ? w.x : w.z));
      const float weight = e % 2 == 0 ? w.y : w.w;
      float gd = decay * g[at];
      if (b >= 2 * warp && below < 0) gd = 0.0f;
      float z = gd * scores[at];
      decayed[at] += weight * gd;
      if (b >= 2 * warp && below == 0) {
        sums.diagonal[i + e / 2 * 8] = z;
        sums.skip[i + e / 2 * 8] = g[at];
        z = 0.0f;
      }
      row[e / 2] += weight * z;
      column[2 * b + e % 2] += z;
    }
  }
  ssd_fold<8>(column, lane, 16);
  ssd_fold<4>(column, lane, 8);
  ssd_fold<2>(column, lane, 4);
  const int block = (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
  *reinterpret_cast<float2*>(&sums.column[warp][8 * block + 2 * t]) = {column[0], column[1]};
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    row[0] += __shfl_xor_sync(0xffffffffu, row[0], step);
    row[1] += __shfl_xor_sync(0xffffffffu, row[1], step);
  }
  if (t == 0) sums.row[i] = row[0], sums.row[i + 8] = row[1];
}

/// The transposed chunk's matrix, rows j and columns i, as a left operand: e_ij w_j scores_ij, plus
/// d on the diagonal.
SSMLIB_DEVICE void ssd_mix_transposed(std::uint32_t (&mixed)[4][4], const float (&scores)[32],
                                      const ssd_backward_decays& decays, float d, int warp,
                                      int lane) {
  const int j = 16 * warp + lane / 4, t = lane % 4;
  const float2 upper = decays.sum_and_weight[j], lower = decays.sum_and_weight[j + 8];
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    mixed[b / 2][b % 2 * 2] = mixed[b / 2][b % 2 * 2 + 1] = 0u;
    if (b < 2 * warp) continue;
    const float4 w = reinterpret_cast<const float4*>(decays.sum_and_weight)[4 * b + t];
    float m[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 own = e < 2 ? upper : lower;
      const int below = 8 * b + 2 * t + e % 2 - (j + e / 2 * 8);
      m[e] = scores[4 * b + e] * (power_of_two((e % 2 == 0 ? w.x : w.z) - own.x) * own.y);
      if (b <= 2 * warp + 1) m[e] = below < 0 ? 0.0f : below == 0 ? m[e] + d : m[e];
    }
    mixed[b / 2][b % 2 * 2] = pack_bf16(m[0], m[1]);
    mixed[b / 2][b % 2 * 2 + 1] = pack_bf16(m[2], m[3]);
  }
}

/// The product of 16 bytes of the images of a state and of its gradient.
SSMLIB_DEVICE float ssd_image_dot(const unsigned char* state, const unsigned char* gradient) {
  const uint4 a = *reinterpret_cast<const uint4*>(state);
  const uint4 b = *reinterpret_cast<const uint4*>(gradient);
  const auto dot = [](std::uint32_t u, std::uint32_t v) {
    return __uint_as_float(u << 16) * __uint_as_float(v << 16) +
           __uint_as_float(u & 0xffff0000u) * __uint_as_float(v & 0xffff0000u);
  };
  return (dot(a.x, b.x) + dot(a.y, b.y)) + (dot(a.z, b.z) + dot(a.w, b.w));
}

/// A warp: the gradients of the decays and weights of a lane's tokens, the i-th lane of the block,
/// from what the computing warps leave; `dot` is the product of the state and its gradient.
SSMLIB_DEVICE void ssd_token_gradients(const ssd_backward_decays& decays, const ssd_lane_sums& sums,
                                       float dot, const ssd_backward_cut& cut,
                                       const ssd_gradient_place& place, int i, int lane) {
  const float kappa = decays.total * dot;
  float change[2], weight[2], after[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int t = 2 * lane + e;
    const float w = decays.sum_and_weight[t].y;
    const float column =
        (sums.column[0][t] + sums.column[1][t]) + (sums.column[2][t] + sums.column[3][t]);
    weight[e] = column + sums.diagonal[t] + sums.after[t];
    after[e] = w * sums.after[t];
    // Sums over the pairs on both sides of token t: those of rows from t on, less those of columns
    // from t on. Both are sums of the same numbers without the diagonal.
    change[e] = sums.row[t] - w * column + sums.before[t];
  }
  float behind = change[0] + change[1], ahead = after[0] + after[1];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float right = __shfl_down_sync(0xffffffffu, behind, step);
    const float left = __shfl_up_sync(0xffffffffu, ahead, step);
    if (lane + step < 32) behind += right;
    if (lane >= step) ahead += left;
  }
  float left = __shfl_up_sync(0xffffffffu, ahead, 1),
        right = __shfl_down_sync(0xffffffffu, behind, 1);
  if (lane == 0) left = 0.0f;
  if (lane == 31) right = 0.0f;
  const float log_a[2] = {behind + left + kappa, change[1] + right + left + after[0] + kappa};
  const ssd_token_sums<float>& to = cut.sums;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int t = 2 * lane + e;
    if (t >= place.n) continue;
    const index_t at = (place.token + t) * cut.lanes + place.first_lane + i;
    to.log_a[at] = log_a[e];
    to.weight[at] = weight[e];
    to.skip[at] = sums.skip[t];
  }
}

/// What both computing warpgroups need.
template <int N>
struct ssd_gradient_context {
  using tile = ssd_gradient_tile<N>;

  const ssd_arguments<bf16>& p;
  const ssd_backward_cut& cut;
  const ssd_gradient_place& place;
  unsigned char* shared;
  ssd_stages<tile::stages> stages;
  int warp, lane;

  SSMLIB_DEVICE std::uint64_t* summed(int i) const {
    return stages.at + 2 * tile::stages + i % tile::stages;
  }
  SSMLIB_DEVICE std::uint64_t* once() const { return stages.at + 3 * tile::stages; }
  SSMLIB_DEVICE unsigned char* stage(int i) const {
    return shared + i % tile::stages * tile::stage_bytes;
  }
  SSMLIB_DEVICE ssd_backward_decays& decays(int i) const {
    return reinterpret_cast<ssd_backward_decays*>(shared + tile::decays_at)[i % tile::stages];
  }
  SSMLIB_DEVICE ssd_lane_sums& sums(int i) const {
    return reinterpret_cast<ssd_lane_sums*>(shared + tile::sums_at)[i % tile::stages];
  }
  SSMLIB_DEVICE std::uint32_t address(int at) const { return shared_address(shared + at); }

  /// Rows past the sequence's end are cleared by both warpgroups together.
  SSMLIB_DEVICE void clear_tail(unsigned char* panel, int panels) const {
    if (place.n == 64) return;
    ssd_clear_rows(panel, panels, place.n, threadIdx.x % 128);
    fence_shared_for_engines();
    named_barrier_sync(1, 256);
  }
  /// a b^T over keys, times alpha: a product of rows of two tiles of keys.
  SSMLIB_DEVICE void score(float (&scores)[32], int a, int b) const {
    const std::uint64_t left = panel_descriptor(address(a)), right = panel_descriptor(address(b));
    products_begin();
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      warpgroup_product<64>::template run<false>(scores, advance(left, tile::key_at(i)),
                                                 advance(right, tile::key_at(i)), i > 0);
    }
    products_commit();
    products_wait<0>();
    pin(scores);
#pragma unroll
    for (int i = 0; i < 32; ++i)
      scores[i] *= p.alpha;
  }
  SSMLIB_DEVICE void finish(int i) const {
    barrier_arrive_warp(summed(i));
  }
};

}  // namespace ssm::kernels::cuda::detail
