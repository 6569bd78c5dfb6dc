#pragma once

#include <ssmlib/kernels/cuda/ssd_backward_rows.cuh>

/// @file
/// The gradients of one chunk of 64 tokens of one group of keys: two warpgroups go through the
/// group's lanes, one with the chunk's queries as its rows, one with its keys. With e_ij the decay
/// from token j to token i, zero for j > i, scores_ij = alpha q_i . k_j and g_ij = dy_i . x_j:
///
///     dq_i = start_i S dy_i + sum_j (w_j e_ij g_ij) k_j          S: the state before the chunk
///     dk_j = w_j end_j E x_j + sum_i (w_j e_ij g_ij) q_i         E: the gradient of that after it
///     dx_j = w_j (end_j E^T k_j + sum_i e_ij scores_ij dy_i) + d dy_j
///
/// A third warpgroup fetches, and sums up the gradients of decays and weights.

namespace ssm::kernels::cuda::detail {

/// The warpgroup whose rows are queries.
template <int N>
SSMLIB_DEVICE void ssd_query_gradients(const ssd_gradient_context<N>& m,
                                       const ssd_operand<bf16>& dq) {
  using tile = ssd_gradient_tile<N>;
  const int warp = m.warp, lane = m.lane, row = 16 * warp + lane / 4;
  float scores[32], decayed[32], sum[N / 2];
#pragma unroll
  for (int i = 0; i < 32; ++i)
    decayed[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    sum[i] = 0.0f;
  m.score(scores, tile::q_at, tile::k_at);
  const std::uint64_t q_rows = panel_descriptor(m.address(tile::q_at));
  for (int i = 0; i < m.place.lanes(); ++i) {
    m.stages.wait_full(i);
    unsigned char* here = m.stage(i);
    m.clear_tail(here + tile::x_at, 2);
    const ssd_backward_decays& decays = m.decays(i);
    ssd_lane_sums& sums = m.sums(i);
    const std::uint64_t x_rows = panel_descriptor(shared_address(here + tile::x_at));
    const std::uint64_t dy_rows = panel_descriptor(shared_address(here + tile::dy_at));
    const std::uint64_t h_rows = panel_descriptor(shared_address(here + tile::h_at));
    const std::uint64_t h_columns =
        panel_descriptor(shared_address(here + tile::h_at), tile::panel_bytes);
    float before[32], g[32];
    std::uint32_t dy[4][4];
    products_begin();
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      warpgroup_product<64>::template run<false>(before, advance(q_rows, tile::key_at(j)),
                                                 advance(h_rows, tile::key_at(j)), j > 0);
    }
    products_commit();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      warpgroup_product<64>::template run<false>(g, advance(dy_rows, 32 * j),
                                                 advance(x_rows, 32 * j), j > 0);
    }
    products_commit();
    ssd_load_rows_of(dy, shared_address(here + tile::dy_at), warp, lane);
    const float upper = decays.start[row], lower = decays.start[row + 8];
    products_wait<1>();
    pin(before);
    const float2 dots = ssd_row_dots(before, dy);
    if (lane % 4 == 0) sums.before[row] = upper * dots.x, sums.before[row + 8] = lower * dots.y;
    ssd_scale_rows(dy, upper, lower);
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      warpgroup_product<N>::template run<true>(sum, dy[j], advance(h_columns, 2048 * j), 1);
    products_commit();
    products_wait<1>();
    pin(g);
    ssd_add_decayed(decayed, g, scores, decays, sums, warp, lane);
    products_wait<0>();
    pin(sum);
    m.finish(i);
  }
  std::uint32_t left[4][4];
  ssd_decayed_operand(left, decayed, m.p.alpha);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    store_matrix_x4(m.address(tile::mixed_at) + swizzled(16 * warp + lane % 16, 2 * b + lane / 16),
                    left[b][0], left[b][1], left[b][2], left[b][3]);
  }
  named_barrier_sync(2, 256);
  const std::uint64_t k_columns = panel_descriptor(m.address(tile::k_at), tile::panel_bytes);
  products_begin();
#pragma unroll
  for (int j = 0; j < 4; ++j)
    warpgroup_product<N>::template run<true>(sum, left[j], advance(k_columns, 2048 * j), 1);
  products_commit();
  products_wait<0>();
  pin(sum);
  ssd_store_rows<N>(sum, dq, m.cut.q, m.cut, m.place, m.p.key_size, warp, lane);
}

/// The warpgroup whose rows are keys.
template <int N>
SSMLIB_DEVICE void ssd_key_gradients(const ssd_gradient_context<N>& m, const ssd_operand<bf16>& dk,
                                     const ssd_operand<bf16>& dx) {
  using tile = ssd_gradient_tile<N>;
  const int warp = m.warp, lane = m.lane, row = 16 * warp + lane / 4;
  float scores[32], sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    sum[i] = 0.0f;
  m.score(scores, tile::k_at, tile::q_at);
  const std::uint64_t k_rows = panel_descriptor(m.address(tile::k_at));
  for (int i = 0; i < m.place.lanes(); ++i) {
    const int v = m.place.first_lane + i, h = v / m.cut.parts, from = v % m.cut.parts * 64;
    const float d = m.p.d.data == nullptr ? 0.0f : *m.p.d.head(h);
    m.stages.wait_full(i);
    unsigned char* here = m.stage(i);
    m.clear_tail(here + tile::x_at, 2);
    const ssd_backward_decays& decays = m.decays(i);
    ssd_lane_sums& sums = m.sums(i);
    const std::uint64_t dy_columns = panel_descriptor(shared_address(here + tile::dy_at));
    const std::uint64_t e_rows = panel_descriptor(shared_address(here + tile::e_at));
    const std::uint64_t e_columns =
        panel_descriptor(shared_address(here + tile::e_at), tile::panel_bytes);
    float out[32];
    std::uint32_t x[4][4], weighted[4][4], mixed[4][4];
    products_begin();
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      warpgroup_product<64>::template run<false>(out, advance(k_rows, tile::key_at(j)),
                                                 advance(e_rows, tile::key_at(j)), j > 0);
    }
    products_commit();
    const float upper = decays.end[row], lower = decays.end[row + 8];
    const float upper_weight = upper * decays.sum_and_weight[row].y;
    const float lower_weight = lower * decays.sum_and_weight[row + 8].y;
    ssd_load_rows_of(x, shared_address(here + tile::x_at), warp, lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        weighted[j][e] = x[j][e];
    }
    ssd_scale_rows(weighted, upper_weight, lower_weight);
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      warpgroup_product<N>::template run<true>(sum, weighted[j], advance(e_columns, 2048 * j), 1);
    products_commit();
    ssd_mix_transposed(mixed, scores, decays, d, warp, lane);
    products_wait<1>();
    pin(out);
    const float2 dots = ssd_row_dots(out, x);
    if (lane % 4 == 0) sums.after[row] = upper * dots.x, sums.after[row + 8] = lower * dots.y;
#pragma unroll
    for (int e = 0; e < 32; ++e)
      out[e] *= e % 4 < 2 ? upper_weight : lower_weight;
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      warpgroup_product<64>::template run<true>(out, mixed[j], advance(dy_columns, 2048 * j), 1);
    products_commit();
    products_wait<0>();
    pin(sum);
    pin(out);
    m.finish(i);
    if (dx.data == nullptr) continue;
    ssd_write_rows(out, m.address(tile::out_at), m.shared + tile::out_at,
                   dx.data + m.place.token * dx.token + h * dx.group + from, dx.token, m.place.n,
                   m.p.features - from, warp, lane);
  }
  named_barrier_sync(2, 256);
  std::uint32_t left[4][4];
  ssd_load_transposed(left, m.address(tile::mixed_at), warp, lane);
  const std::uint64_t q_columns = panel_descriptor(m.address(tile::q_at), tile::panel_bytes);
  products_begin();
#pragma unroll
  for (int j = 0; j < 4; ++j)
    warpgroup_product<N>::template run<true>(sum, left[j], advance(q_columns, 2048 * j), 1);
  products_commit();
  products_wait<0>();
  pin(sum);
  ssd_store_rows<N>(sum, dk, m.cut.k, m.cut, m.place, m.p.key_size, warp, lane);
}

/// A warp: the products of a lane's state and its gradient, and then the gradients of its tokens.
template <int N>
SSMLIB_DEVICE void ssd_finish_lane(const ssd_gradient_context<N>& m, int i) {
  using tile = ssd_gradient_tile<N>;
  m.stages.wait_full(i);
  const unsigned char* here = m.stage(i);
  float kappa = 0.0f;
#pragma unroll 2
  for (int e = m.lane * 16; e < tile::key_bytes; e += 512)
    kappa += ssd_image_dot(here + tile::h_at + e, here + tile::e_at + e);
  kappa = warp_sum(kappa);
  barrier_wait(m.summed(i), (i / tile::stages) & 1);
  ssd_token_gradients(m.decays(i), m.sums(i), kappa, m.cut, m.place, i, m.lane);
  barrier_arrive_warp(m.stages.free(i));
}

/// The warpgroup that fetches: warp 0 decays, warp 1 copies, warps 2 and 3 finish every other lane.
template <int N>
SSMLIB_DEVICE void ssd_fetch_lanes(const ssd_gradient_context<N>& m,
                                   const ssd_backward_maps& maps) {
  using tile = ssd_gradient_tile<N>;
  const ssd_gradient_place& place = m.place;
  if (m.warp == 0) {
    for (int i = 0; i < place.lanes(); ++i) {
      const ssd_steps<bf16> steps(m.p, (place.first_lane + i) / m.cut.parts);
      ssd_raw_step<bf16> loaded[2] = {};
      ssd_load_steps(loaded, steps, place.token, place.n, m.lane);
      m.stages.wait_free(i);
      m.decays(i).set(steps, loaded, place.n, m.p.alpha, m.lane);
      barrier_arrive_warp(m.stages.full(i));
    }
  } else if (m.warp == 1) {
    if (m.lane != 0) return;
    const int t = static_cast<int>(place.token);
    barrier_arrive_expect(m.once(), 2 * tile::key_bytes);
#pragma unroll
    for (int j = 0; j < N / 64; ++j) {
      const int at = j * tile::panel_bytes;
      load_box(m.shared + tile::q_at + at, &maps.q, m.once(), 64 * j, place.group, t, 0);
      load_box(m.shared + tile::k_at + at, &maps.k, m.once(), 64 * j, place.group, t, 0);
    }
    for (int i = 0; i < place.lanes(); ++i) {
      const int v = place.first_lane + i, h = v / m.cut.parts, from = v % m.cut.parts * 64;
      m.stages.wait_free(i);
      unsigned char* to = m.stage(i);
      barrier_arrive_expect(m.stages.full(i), tile::stage_bytes);
      load_box(to + tile::x_at, &maps.x, m.stages.full(i), from, h, t, 0);
      load_box(to + tile::dy_at, &maps.dy, m.stages.full(i), from, h, t, 0);
      load_bulk(to + tile::h_at,
                m.cut.template image<N>(place.begin, place.sequence, place.chunk, v),
                2 * tile::key_bytes, m.stages.full(i));
    }
  } else {
    for (int i = m.warp - 2; i < place.lanes(); i += 2)
      ssd_finish_lane<N>(m, i);
  }
}

template <int N>
__global__ __launch_bounds__(384, 1) void ssd_gradient_kernel(
    const ssd_arguments<bf16> p, const __grid_constant__ ssd_backward_maps maps,
    const ssd_backward_cut cut, const ssd_operand<bf16> dq, const ssd_operand<bf16> dk,
    const ssd_operand<bf16> dx) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using tile = ssd_gradient_tile<N>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const ssd_gradient_place place(p, cut, static_cast<int>(blockIdx.x));
  if (place.empty) return;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) % 128 / 32, 0);
  const ssd_gradient_context<N> m{p,
                                  cut,
                                  place,
                                  shared,
                                  {reinterpret_cast<std::uint64_t*>(shared + tile::barriers_at)},
                                  warp,
                                  static_cast<int>(threadIdx.x) % 32};
  if (threadIdx.x == 0) {
    m.stages.start(1, 1);
    for (int i = 0; i < tile::stages; ++i)
      barrier_init(m.summed(i), 8 * arrivals_a_warp);
    barrier_init(m.once(), 1);
    barrier_init_done();
  }
  __syncthreads();
  if (group == 2) {
    give_registers<tile::fetch_registers>();
    ssd_fetch_lanes<N>(m, maps);
  } else {
    take_registers<tile::registers>();
    barrier_wait(m.once(), 0);
    m.clear_tail(shared + tile::q_at, 2 * tile::key_bytes / tile::panel_bytes);
    if (group == 0) {
      ssd_query_gradients<N>(m, dq);
    } else {
      ssd_key_gradients<N>(m, dk, dx);
    }
  }
#else
  __trap();
#endif
}

}  // namespace ssm::kernels::cuda::detail
