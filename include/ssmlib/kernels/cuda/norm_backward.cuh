#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/norm_parts.cuh>

/// @file
/// A team walks the rows of its part with the sums for its columns of the weight in registers; the
/// teams of a block share a part where they are warps. Parts are added up by a second kernel.

namespace ssm::kernels::cuda {

namespace detail {

/// The first warp's sums become those of all warps of the block, in order.
template <class Share, int Items>
SSMLIB_DEVICE void norm_add_teams(const norm_team& team, index_t group, int mine,
                                  typename Share::values (&sums)[Items]) {
  constexpr int vector = Share::vector;
  __shared__ typename Share::R shared[(norm_teams - 1) * Items * 32 * vector];
  __syncthreads();
  for_share<Share, Items, true>(team, group, [&](int i) {
    if (mine == 0) return;
#pragma unroll
    for (int e = 0; e < vector; ++e)
      shared[((mine - 1) * Items + i) * 32 * vector + e * 32 + team.rank] = sums[i].v[e];
  });
  __syncthreads();
  if (mine != 0) return;
  for_share<Share, Items, true>(team, group, [&](int i) {
    for (int w = 0; w + 1 < norm_teams; ++w) {
#pragma unroll
      for (int e = 0; e < vector; ++e)
        sums[i].v[e] += shared[(w * Items + i) * 32 * vector + e * 32 + team.rank];
    }
  });
}

/// With n the normalised value and g its gradient: dv = scale (g - mean(g) - n mean(g n)), without
/// mean(g) for RMSNorm.
template <class T, norm_kind Kind, gate_order Order, int Items, bool Held>
__global__ void __launch_bounds__(norm_team_limit)
    norm_vjp_kernel(const __grid_constant__ norm_arguments<T> o) {
  using R = accum_t<T>;
  using share = norm_share<T, Items, Held>;
  using values = typename share::values;
  constexpr int vector = share::vector;
  const norm_team team(o.team);
  const bool together = Held && team.size == 32;
  const int teams = together ? norm_teams : 1, mine = together ? threadIdx.x / 32 : 0;
  const index_t owner = together ? index_t{blockIdx.x} : team.index;
  const index_t groups = o.width() / o.group, part = owner / groups;
  if (part >= o.part_count) return;
  const index_t group = owner % groups, offset = group * o.group;
  const auto each = [&](auto f) { for_share<share, Items, Held>(team, o.group, f); };
  const R* weight = o.weight + group * o.weight_step;
  R* parts = o.parts ? o.parts + part * o.width() + offset : nullptr;
  R* bias_parts = o.bias_parts ? o.bias_parts + part * o.width() + offset : nullptr;
  values d_weight[Held ? Items : 1], d_bias[Held ? Items : 1];
#pragma unroll
  for (int i = 0; i < (Held ? Items : 1); ++i)
    d_weight[i] = d_bias[i] = values{};
  if constexpr (!Held) {
    each([&](int i) {
      if (parts) parts[share::column(i, team)] = R(0);
      if (bias_parts) bias_parts[share::column(i, team)] = R(0);
    });
  }
  for (index_t row = part * teams + mine; row < o.rows(); row += o.part_count * teams) {
    share x, z, dy;
    x.load(o.x.data + row * o.x.strides[0] + offset, team, o.group);
    dy.load(o.dy.data + row * o.dy.strides[0] + offset, team, o.group);
    if constexpr (Order != gate_order::none) {
      z.load(o.gate.data + row * o.gate.strides[0] + offset, team, o.group);
    }
    R mean = R(0);
    if constexpr (Kind == norm_kind::layer) {
      R sum[1] = {};
      each([&](int i) {
        const values v = x.get(i, team);
#pragma unroll
        for (int e = 0; e < vector; ++e)
          sum[0] += v.v[e];
      });
      team.add_up(sum);
      mean = sum[0] / static_cast<R>(o.group);
    }
    R sums[3] = {};  // of v^2, g v, g
    each([&](int i) {
      const values in = x.get(i, team), d = dy.get(i, team), w = share::of(weight, i, team);
      values gate{};
      if constexpr (Order != gate_order::none) gate = z.get(i, team);
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        R v = in.v[e] - mean, g = d.v[e] * w.v[e];
        if constexpr (Order == gate_order::gate_first) v *= silu(gate.v[e]);
        if constexpr (Order == gate_order::norm_first) g *= silu(gate.v[e]);
        sums[0] = fma(v, v, sums[0]);
        sums[1] = fma(g, v, sums[1]);
        sums[2] += g;
      }
    });
    team.add_up(sums);
    const R n = static_cast<R>(o.group), scale = inverse_root(sums[0] / n + o.eps);
    const R mean_gn = sums[1] * scale / n;
    const R mean_g = Kind == norm_kind::layer ? sums[2] / n : R(0);
    each([&](int i) {
      const values in = x.get(i, team), d = dy.get(i, team), w = share::of(weight, i, team);
      values gate{}, dx, d_gate, dw;
      if constexpr (Order != gate_order::none) gate = z.get(i, team);
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        value_and_slope<R> s{R(1), R(0)};
        if constexpr (Order != gate_order::none) s = silu_and_slope(gate.v[e]);
        R v = in.v[e] - mean, g = d.v[e];
        if constexpr (Order == gate_order::gate_first) v *= s.value;
        const R normal = v * scale;
        if constexpr (Order == gate_order::norm_first) {
          d_gate.v[e] = g * normal * w.v[e] * s.slope;
          g *= s.value;
        }
        dw.v[e] = g * normal;
        const R dv = scale * (fma(g, w.v[e], -mean_g) - normal * mean_gn);
        dx.v[e] = dv * s.value;
        if constexpr (Order == gate_order::norm_first) dx.v[e] = dv;
        if constexpr (Order == gate_order::gate_first) d_gate.v[e] = dv * in.v[e] * s.slope;
        if constexpr (Held) {
          d_weight[i].v[e] += dw.v[e];
          if constexpr (Kind == norm_kind::layer) d_bias[i].v[e] += g;
        } else {
          if (parts) parts[share::column(i, team)] += dw.v[e];
          if (bias_parts) bias_parts[share::column(i, team)] += g;
        }
      }
      if (o.dx.data) {
        share::put(o.dx.data + row * o.dx.strides[0] + offset, i, team, dx, o.add);
      }
      if constexpr (Order != gate_order::none) {
        if (o.d_gate.data) {
          share::put(o.d_gate.data + row * o.d_gate.strides[0] + offset, i, team, d_gate, o.add);
        }
      }
    });
  }
  if constexpr (Held) {
    if (together) {
      norm_add_teams<share, Items>(team, o.group, mine, d_weight);
      if constexpr (Kind == norm_kind::layer) {
        norm_add_teams<share, Items>(team, o.group, mine, d_bias);
      }
      if (mine != 0) return;
    }
    each([&](int i) {
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        if (parts) parts[share::column(i, team) + e] = d_weight[i].v[e];
        if (bias_parts) bias_parts[share::column(i, team) + e] = d_bias[i].v[e];
      }
    });
  }
}

inline constexpr int norm_sum_warps = 32;

/// to[c] (+)= the sum over parts, and over groups where they share the weight. A block has many
/// rows of threads, so that many parts are on their way at once.
template <class R>
__global__ void norm_sum_kernel(const R* parts, index_t part_count, index_t width, index_t size,
                                R* to, bool add) {
  __shared__ R shared[norm_sum_warps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t c = index_t{blockIdx.x} * 32 + lane;
  R sum = R(0);
  if (c < size) {
    for (index_t g = c; g < width; g += size) {
#pragma unroll 4
      for (index_t k = warp; k < part_count; k += norm_sum_warps)
        sum += parts[k * width + g];
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= size) return;
#pragma unroll
  for (int w = 1; w < norm_sum_warps; ++w)
    sum += shared[w][lane];
  to[c] = add ? to[c] + sum : sum;
}

inline constexpr index_t norm_parts = 528;  // at most

[[nodiscard]] inline index_t norm_part_count(index_t rows, index_t groups) {
  return std::clamp<index_t>(4 * norm_parts / std::max<index_t>(groups, 1), 1,
                             std::max<index_t>(1, std::min(rows, norm_parts)));
}

template <norm_kind Kind, gate_order Order, class T>
void launch_norm_vjp(cudaStream_t stream, norm_arguments<T> o, accum_t<T>* d_weight,
                     accum_t<T>* d_bias, index_t weight_size, accum_t<T>* workspace) {
  const index_t groups = o.width() / o.group;
  if (o.width() == 0) return;
  with_norm_team(o, [&]<int Items, bool Held>() {
    const bool together = Held && o.team == 32;
    o.part_count = norm_part_count(o.rows(), groups);
    if (d_weight) o.parts = workspace;
    if (d_bias) o.bias_parts = workspace + o.part_count * o.width();
    const index_t parts = o.part_count * groups;
    const unsigned blocks = together ? static_cast<unsigned>(parts) : norm_blocks(parts, o.team);
    norm_vjp_kernel<T, Kind, Order, Items, Held><<<blocks, norm_threads(o.team), 0, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  });
  const auto add_up = [&](const accum_t<T>* parts, accum_t<T>* to) {
    if (to == nullptr) return;
    norm_sum_kernel<<<static_cast<unsigned>((weight_size + 31) / 32), 32 * norm_sum_warps, 0,
                      stream>>>(parts, o.part_count, o.width(), weight_size, to, o.add);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  add_up(o.parts, d_weight);
  add_up(o.bias_parts, d_bias);
}

}  // namespace detail

template <class T>
std::size_t rms_norm_vjp_workspace_bytes(const rms_norm_problem<T>& p) {
  const index_t width = p.x.extents[1];
  return static_cast<std::size_t>(detail::norm_part_count(p.x.extents[0], width / p.group) *
                                  width) *
         sizeof(accum_t<T>);
}

template <class T>
void rms_norm_vjp(cudaStream_t stream, gate_order order, const rms_norm_problem<T>& p,
                  view<const T, 2> dy, const rms_norm_gradients<T>& d, void* workspace) {
  using detail::norm_kind;
  auto o = detail::norm_arguments_of(order, p);
  o.dy = dy;
  o.dx = d.x;
  o.d_gate = d.gate;
  o.add = d.add;
  detail::check_norm("rms_norm_vjp", o, dy.extents);
  const index_t size = p.weight_step == 0 ? p.group : p.x.extents[1];
  auto* parts = static_cast<accum_t<T>*>(workspace);
  switch (order) {
    case gate_order::none:
      return detail::launch_norm_vjp<norm_kind::rms, gate_order::none>(stream, o, d.weight, nullptr,
                                                                       size, parts);
    case gate_order::norm_first:
      return detail::launch_norm_vjp<norm_kind::rms, gate_order::norm_first>(stream, o, d.weight,
                                                                             nullptr, size, parts);
    case gate_order::gate_first:
      return detail::launch_norm_vjp<norm_kind::rms, gate_order::gate_first>(stream, o, d.weight,
                                                                             nullptr, size, parts);
  }
}

template <class T>
std::size_t layer_norm_vjp_workspace_bytes(const layer_norm_problem<T>& p) {
  return static_cast<std::size_t>(2 * detail::norm_part_count(p.x.extents[0], 1) * p.x.extents[1]) *
         sizeof(accum_t<T>);
}

template <class T>
void layer_norm_vjp(cudaStream_t stream, const layer_norm_problem<T>& p, view<const T, 2> dy,
                    const layer_norm_gradients<T>& d, void* workspace) {
  auto o = detail::norm_arguments_of(p);
  o.dy = dy;
  o.dx = d.x;
  o.add = d.add;
  detail::check_norm("layer_norm_vjp", o, dy.extents);
  detail::launch_norm_vjp<detail::norm_kind::layer, gate_order::none>(
      stream, o, d.weight, d.bias, p.x.extents[1], static_cast<accum_t<T>*>(workspace));
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_norm,                                                                    \
                     std::size_t rms_norm_vjp_workspace_bytes<T>(const rms_norm_problem<T>&));     \
  SSMLIB_INSTANTIATE(cuda_norm,                                                                    \
                     void rms_norm_vjp<T>(cudaStream_t, gate_order, const rms_norm_problem<T>&,    \
                                          view<const T, 2>, const rms_norm_gradients<T>&, void*)); \
  SSMLIB_INSTANTIATE(cuda_norm,                                                                    \
                     std::size_t layer_norm_vjp_workspace_bytes<T>(const layer_norm_problem<T>&)); \
  SSMLIB_INSTANTIATE(                                                                              \
      cuda_norm, void layer_norm_vjp<T>(cudaStream_t, const layer_norm_problem<T>&,                \
                                        view<const T, 2>, const layer_norm_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
