#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/norm_parts.cuh>

namespace ssm::kernels::cuda {

namespace detail {

template <class T, norm_kind Kind, gate_order Order, int Items, bool Held>
__global__ void __launch_bounds__(norm_team_limit)
    norm_kernel(const __grid_constant__ norm_arguments<T> o) {
  using R = accum_t<T>;
  using share = norm_share<T, Items, Held>;
  using values = typename share::values;
  const norm_team team(o.team);
  const index_t groups = o.width() / o.group, row = team.index / groups;
  if (row >= o.rows()) return;  // a whole team
  const index_t group = team.index % groups, offset = group * o.group;
  const auto each = [&](auto f) { for_share<share, Items, Held>(team, o.group, f); };
  share x, z;
  x.load(o.x.data + row * o.x.strides[0] + offset, team, o.group);
  if constexpr (Order != gate_order::none) {
    z.load(o.gate.data + row * o.gate.strides[0] + offset, team, o.group);
  }
  const auto value = [&](int i) {
    values v = x.get(i, team);
    if constexpr (Order == gate_order::gate_first) {
      const values gate = z.get(i, team);
#pragma unroll
      for (int e = 0; e < share::vector; ++e)
        v.v[e] *= silu(gate.v[e]);
    }
    return v;
  };
  R mean = R(0), sum[1] = {};
  if constexpr (Kind == norm_kind::layer) {
    each([&](int i) {
      const values v = value(i);
#pragma unroll
      for (int e = 0; e < share::vector; ++e)
        sum[0] += v.v[e];
    });
    team.add_up(sum);
    mean = sum[0] / static_cast<R>(o.group);
    sum[0] = R(0);
  }
  each([&](int i) {
    const values v = value(i);
#pragma unroll
    for (int e = 0; e < share::vector; ++e)
      sum[0] = fma(v.v[e] - mean, v.v[e] - mean, sum[0]);
  });
  team.add_up(sum);
  const R scale = inverse_root(sum[0] / static_cast<R>(o.group) + o.eps);
  T* y = o.y.data + row * o.y.strides[0] + offset;
  each([&](int i) {
    values v = value(i);
    const values w = share::of(o.weight + group * o.weight_step, i, team);
    values b{}, gate{};
    if (Kind == norm_kind::layer && o.bias) b = share::of(o.bias, i, team);
    if constexpr (Order == gate_order::norm_first) gate = z.get(i, team);
#pragma unroll
    for (int e = 0; e < share::vector; ++e) {
      v.v[e] = fma((v.v[e] - mean) * scale, w.v[e], b.v[e]);
      if constexpr (Order == gate_order::norm_first) v.v[e] *= silu(gate.v[e]);
    }
    share::put(y, i, team, v, false);
  });
}

template <norm_kind Kind, gate_order Order, class T>
void launch_norm(cudaStream_t stream, norm_arguments<T> o) {
  if (o.rows() * o.width() == 0) return;
  with_norm_team(o, [&]<int Items, bool Held>() {
    const index_t teams = o.rows() * (o.width() / o.group);
    norm_kernel<T, Kind, Order, Items, Held>
        <<<norm_blocks(teams, o.team), norm_threads(o.team), 0, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  });
}

}  // namespace detail

template <class T>
void rms_norm(cudaStream_t stream, gate_order order, const rms_norm_problem<T>& p, view<T, 2> y) {
  using detail::norm_kind;
  auto o = detail::norm_arguments_of(order, p);
  o.y = y;
  detail::check_norm("rms_norm", o, y.extents);
  switch (order) {
    case gate_order::none:
      return detail::launch_norm<norm_kind::rms, gate_order::none>(stream, o);
    case gate_order::norm_first:
      return detail::launch_norm<norm_kind::rms, gate_order::norm_first>(stream, o);
    case gate_order::gate_first:
      return detail::launch_norm<norm_kind::rms, gate_order::gate_first>(stream, o);
  }
}

template <class T>
void layer_norm(cudaStream_t stream, const layer_norm_problem<T>& p, view<T, 2> y) {
  auto o = detail::norm_arguments_of(p);
  o.y = y;
  detail::check_norm("layer_norm", o, y.extents);
  detail::launch_norm<detail::norm_kind::layer, gate_order::none>(stream, o);
}

#define SSMLIB_DETAIL_LIST(T)                                                              \
  SSMLIB_INSTANTIATE(cuda_norm, void rms_norm<T>(cudaStream_t, gate_order,                 \
                                                 const rms_norm_problem<T>&, view<T, 2>)); \
  SSMLIB_INSTANTIATE(cuda_norm,                                                            \
                     void layer_norm<T>(cudaStream_t, const layer_norm_problem<T>&, view<T, 2>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
