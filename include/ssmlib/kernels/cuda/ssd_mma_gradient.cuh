#pragma once

#include <ssmlib/kernels/cuda/ssd_backward_rows.cuh>
#include <ssmlib/kernels/cuda/ssd_mma.cuh>

/// @file
/// The second launch of the backward pass on the sm_80 rung: the work of ssd_backward_lanes.cuh by
/// eight warps, four whose rows are the chunk's queries and four whose rows are its keys. All start
/// the copies of the next lane, and one in turn computes its decays and sums up the lane before.

namespace ssm::kernels::cuda::detail {

/// @tparam Stages  lanes in shared memory: 1 where a block has no room for 2
template <int N, int Stages>
struct ssd_mma_gradient_tile {
  static constexpr int threads = 256, key_bytes = N / 64 * 8192;
  static constexpr int x_at = 0, dy_at = 8192, h_at = 2 * 8192, e_at = h_at + key_bytes,
                       stage_bytes = e_at + key_bytes;
  static constexpr int q_at = Stages * stage_bytes, k_at = q_at + key_bytes;
  static constexpr int out_at = k_at + key_bytes, decays_at = out_at + 8192;
  static constexpr int sums_at = decays_at + 2 * static_cast<int>(sizeof(ssd_backward_decays));
  static constexpr int dots_at = sums_at + 2 * static_cast<int>(sizeof(ssd_lane_sums));
  static constexpr int bytes = dots_at + 2 * 8 * 4;
};

struct ssd_mma_gradient_arguments {
  ssd_arguments<bf16> p;
  ssd_operand<const bf16> dy;
  ssd_backward_cut cut;
  ssd_operand<bf16> dq, dk, dx;
};

/// What the warps share, and how they go from lane to lane.
template <int N, int Stages>
struct ssd_mma_lanes {
  using tile = ssd_mma_gradient_tile<N, Stages>;

  const ssd_mma_gradient_arguments& a;
  const ssd_gradient_place& place;
  unsigned char* shared;
  int index, warp, lane;  // of the eight warps, of the four with the same rows
  ssd_raw_step<bf16> loaded[2] = {};

  SSMLIB_DEVICE unsigned char* stage(int i) const {
    return shared + i % Stages * tile::stage_bytes;
  }
  SSMLIB_DEVICE std::uint32_t address(int at) const { return shared_address(shared + at); }
  SSMLIB_DEVICE ssd_backward_decays& decays(int i) const {
    return reinterpret_cast<ssd_backward_decays*>(shared + tile::decays_at)[i % 2];
  }
  SSMLIB_DEVICE ssd_lane_sums& sums(int i) const {
    return reinterpret_cast<ssd_lane_sums*>(shared + tile::sums_at)[i % 2];
  }
  SSMLIB_DEVICE float* dots(int i) const {
    return reinterpret_cast<float*>(shared + tile::dots_at) + i % 2 * 8;
  }
  SSMLIB_DEVICE ssd_steps<bf16> steps(int i) const {
    return {a.p, (place.first_lane + i) / a.cut.parts};
  }
  /// The warps with queries and those with keys come here from different places.
  SSMLIB_DEVICE static void meet() { named_barrier_sync(1, tile::threads); }

  SSMLIB_DEVICE void fetch(int i) const {
    if (i < place.lanes()) {
      const int v = place.first_lane + i, h = v / a.cut.parts, from = v % a.cut.parts * 64;
      unsigned char* to = stage(i);
      ssd_fetch_panels<1, 256>(to + tile::x_at, a.p.x.head(h) + place.token * a.p.x.token + from,
                               a.p.x.token, place.n, a.p.features - from);
      ssd_fetch_panels<1, 256>(to + tile::dy_at, a.dy.head(h) + place.token * a.dy.token + from,
                               a.dy.token, place.n, a.p.features - from);
      const auto* images = reinterpret_cast<const unsigned char*>(
          a.cut.template image<N>(place.begin, place.sequence, place.chunk, v));
#pragma unroll
      for (int e = 0; e < 2 * tile::key_bytes; e += 16 * tile::threads) {
        const int at = e + 16 * static_cast<int>(threadIdx.x);
        copy_async_16(to + tile::h_at + at, images + at);
      }
    }
    commit_copies();
  }
  /// Starts all copies of the first lane, and of q and k.
  SSMLIB_DEVICE void start() {
    const ssd_operand<const bf16>&q = a.p.q, &k = a.p.k;
    ssd_fetch_panels<N / 64, 256>(shared + tile::q_at,
                                  q.data + place.group * q.group + place.token * q.token, q.token,
                                  place.n, a.p.key_size);
    ssd_fetch_panels<N / 64, 256>(shared + tile::k_at,
                                  k.data + place.group * k.group + place.token * k.token, k.token,
                                  place.n, a.p.key_size);
    fetch(0);
    if (index == 0) load_steps(0), set_decays(0);
  }
  SSMLIB_DEVICE void load_steps(int i) {
    ssd_load_steps(loaded, steps(i), place.token, place.n, lane);
  }
  SSMLIB_DEVICE void set_decays(int i) const {
    decays(i).set(steps(i), loaded, place.n, a.p.alpha, lane);
  }
  [[nodiscard]] SSMLIB_DEVICE bool has_turn(int i) const {
    return i < place.lanes() && index == i % 8;
  }
  /// Waits for lane i, whose stage is returned; sums up the lane before.
  SSMLIB_DEVICE unsigned char* begin(int i) {
    wait_copies<0>();
    meet();
    if (Stages > 1) fetch(i + 1);
    if (i > 0 && index == (i + 1) % 8) finish(i - 1);
    if (has_turn(i + 1)) load_steps(i + 1);
    const unsigned char* here = stage(i);
    float dot = 0.0f;
#pragma unroll
    for (int e = 0; e < tile::key_bytes; e += 16 * tile::threads) {
      const int at = e + 16 * static_cast<int>(threadIdx.x);
      dot += ssd_image_dot(here + tile::h_at + at, here + tile::e_at + at);
    }
    dot = warp_sum(dot);
    if (lane == 0) dots(i)[index] = dot;
    return stage(i);
  }
  SSMLIB_DEVICE void end(int i) {
    if (has_turn(i + 1)) set_decays(i + 1);
    if (Stages == 1) meet(), fetch(i + 1);
  }
  /// A warp, after all have met.
  SSMLIB_DEVICE void finish(int i) const {
    float dot = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      dot += dots(i)[e];
    ssd_token_gradients(decays(i), sums(i), dot, a.cut, place, i, lane);
  }
  /// alpha times the scores of the rows of `left` with those of `right`.
  SSMLIB_DEVICE void score(float (&scores)[32], std::uint32_t left, std::uint32_t right, int first,
                           int last) const {
#pragma unroll
    for (int i = 0; i < 32; ++i)
      scores[i] = 0.0f;
    ssd_add_rows<N / 16>(
        scores, [&](int i, std::uint32_t(&r)[4]) { ssd_panel_left(r, left, 16 * warp, i, lane); },
        right, lane, first, last);
#pragma unroll
    for (int i = 0; i < 32; ++i)
      scores[i] *= a.p.alpha;
  }
};

/// The warps whose rows are queries.
template <int N, int Stages>
SSMLIB_DEVICE void ssd_mma_queries(ssd_mma_lanes<N, Stages>& m) {
  using tile = ssd_mma_gradient_tile<N, Stages>;
  const int warp = m.warp, lane = m.lane, row = 16 * warp + lane / 4, lanes = m.place.lanes();
  float scores[32], decayed[32], sum[N / 2];
#pragma unroll
  for (int i = 0; i < 32; ++i)
    decayed[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    sum[i] = 0.0f;
  for (int i = 0; i < lanes; ++i) {
    const unsigned char* here = m.begin(i);
    // q and k came with the first lane.
    if (i == 0) m.score(scores, m.address(tile::q_at), m.address(tile::k_at), 0, warp);
    const ssd_backward_decays& decays = m.decays(i);
    ssd_lane_sums& sums = m.sums(i);
    const std::uint32_t h = shared_address(here + tile::h_at);
    float product[32];
#pragma unroll
    for (int e = 0; e < 32; ++e)
      product[e] = 0.0f;
    const std::uint32_t dy_panel = shared_address(here + tile::dy_at);
    ssd_add_rows<4>(
        product,
        [&](int j, std::uint32_t(&r)[4]) { ssd_panel_left(r, dy_panel, 16 * warp, j, lane); },
        shared_address(here + tile::x_at), lane, 0, warp);
    ssd_add_decayed(decayed, product, scores, decays, sums, warp, lane);
#pragma unroll
    for (int e = 0; e < 32; ++e)
      product[e] = 0.0f;
    ssd_add_rows<N / 16>(
        product,
        [&](int j, std::uint32_t(&r)[4]) {
          ssd_panel_left(r, m.address(tile::q_at), 16 * warp, j, lane);
        },
        h, lane);
    const float upper = decays.start[row], lower = decays.start[row + 8];
    std::uint32_t dy[4][4];
    ssd_load_rows_of(dy, dy_panel, warp, lane);
    const float2 dots = ssd_row_dots(product, dy);
    if (lane % 4 == 0) sums.before[row] = upper * dots.x, sums.before[row + 8] = lower * dots.y;
    ssd_scale_rows(dy, upper, lower);
    ssd_add_columns<N>(sum, dy, h, lane);
    m.end(i);
  }
  m.meet();  // nobody reads the stages any more
  if (m.index == lanes % 8) m.finish(lanes - 1);
  std::uint32_t left[4][4];
  ssd_decayed_operand(left, decayed, m.a.p.alpha);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    store_matrix_x4(m.address(0) + swizzled(16 * warp + lane % 16, 2 * b + lane / 16), left[b][0],
                    left[b][1], left[b][2], left[b][3]);
  }
  m.meet();
  ssd_add_columns<N>(sum, left, m.address(tile::k_at), lane, 0, warp);
  ssd_store_rows<N>(sum, m.a.dq, m.a.cut.q, m.a.cut, m.place, m.a.p.key_size, warp, lane);
}

/// The warps whose rows are keys.
template <int N, int Stages>
SSMLIB_DEVICE void ssd_mma_keys(ssd_mma_lanes<N, Stages>& m) {
  using tile = ssd_mma_gradient_tile<N, Stages>;
  const int warp = m.warp, lane = m.lane, row = 16 * warp + lane / 4, lanes = m.place.lanes();
  const ssd_arguments<bf16>& p = m.a.p;
  float scores[32], sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    sum[i] = 0.0f;
  for (int i = 0; i < lanes; ++i) {
    const int v = m.place.first_lane + i, h = v / m.a.cut.parts, from = v % m.a.cut.parts * 64;
    const float d = p.d.data == nullptr ? 0.0f : *p.d.head(h);
    const unsigned char* here = m.begin(i);
    if (i == 0) m.score(scores, m.address(tile::k_at), m.address(tile::q_at), warp, 3);
    const ssd_backward_decays& decays = m.decays(i);
    const std::uint32_t e_at = shared_address(here + tile::e_at);
    float out[32];
#pragma unroll
    for (int e = 0; e < 32; ++e)
      out[e] = 0.0f;
    ssd_add_rows<N / 16>(
        out,
        [&](int j, std::uint32_t(&r)[4]) {
          ssd_panel_left(r, m.address(tile::k_at), 16 * warp, j, lane);
        },
        e_at, lane);
    const float upper = decays.end[row], lower = decays.end[row + 8];
    const float upper_weight = upper * decays.sum_and_weight[row].y;
    const float lower_weight = lower * decays.sum_and_weight[row + 8].y;
    std::uint32_t x[4][4];
    ssd_load_rows_of(x, shared_address(here + tile::x_at), warp, lane);
    const float2 dots = ssd_row_dots(out, x);
    ssd_lane_sums& sums = m.sums(i);
    if (lane % 4 == 0) sums.after[row] = upper * dots.x, sums.after[row + 8] = lower * dots.y;
    ssd_scale_rows(x, upper_weight, lower_weight);
    ssd_add_columns<N>(sum, x, e_at, lane);
#pragma unroll
    for (int e = 0; e < 32; ++e)
      out[e] *= e % 4 < 2 ? upper_weight : lower_weight;
    std::uint32_t mixed[4][4];
    ssd_mix_transposed(mixed, scores, decays, d, warp, lane);
    ssd_add_columns<64>(out, mixed, shared_address(here + tile::dy_at), lane, warp, 3);
    if (m.a.dx.data != nullptr) {
      ssd_write_rows(out, shared_address(m.shared + tile::out_at), m.shared + tile::out_at,
                     m.a.dx.data + m.place.token * m.a.dx.token + h * m.a.dx.group + from,
                     m.a.dx.token, m.place.n, p.features - from, warp, lane);
    }
    m.end(i);
  }
  m.meet();
  if (m.index == lanes % 8) m.finish(lanes - 1);
  m.meet();
  std::uint32_t left[4][4];
  ssd_load_transposed(left, m.address(0), warp, lane);
  ssd_add_columns<N>(sum, left, m.address(tile::q_at), lane, warp, 3);
  ssd_store_rows<N>(sum, m.a.dk, m.a.cut.k, m.a.cut, m.place, p.key_size, warp, lane);
}

template <int N, int Stages>
__global__ __launch_bounds__(256, 1) void ssd_mma_gradient_kernel(
    const __grid_constant__ ssd_mma_gradient_arguments a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const ssd_gradient_place place(a.p, a.cut, static_cast<int>(blockIdx.x));
  if (place.empty) return;
  const int index = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  ssd_mma_lanes<N, Stages> m{a,     place,     shared,
                             index, index % 4, static_cast<int>(threadIdx.x) % 32};
  m.start();
  if (index < 4) {
    ssd_mma_queries(m);
  } else {
    ssd_mma_keys(m);
  }
}

template <int N, int Stages>
void ssd_mma_launch_gradient(cudaStream_t stream, index_t blocks,
                             const ssd_mma_gradient_arguments& a) {
  using tile = ssd_mma_gradient_tile<N, Stages>;
  const auto kernel = ssd_mma_gradient_kernel<N, Stages>;
  SSMLIB_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile::bytes));
  kernel<<<ssd_blocks(blocks), tile::threads, tile::bytes, stream>>>(a);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
