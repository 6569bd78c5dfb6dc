#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/norm.hpp>

#include <algorithm>
#include <string>

/// @file
/// A team of one or more warps owns a group of features of a row and keeps it in registers between
/// the statistics and the result. Backward, a team walks the rows of its part with the sums for its
/// columns of the weight in registers; parts are added up by a second kernel. Rows that are too
/// wide for the registers or not aligned take the same path with memory in their place.

namespace ssm::kernels::cuda {

namespace detail {

enum class norm_kind { rms, layer };

inline constexpr int norm_items = 4;         // vectors of a thread, at most
inline constexpr int norm_team_limit = 384;  // threads, for the registers

template <class T>
struct norm_arguments {
  using real = accum_t<T>;
  view<const T, 2> x, gate;
  const T *weight, *bias;
  index_t group, weight_step;
  real eps;
  view<T, 2> y{};         // forward
  view<const T, 2> dy{};  // backward
  view<T, 2> dx{}, d_gate{};
  real *parts = nullptr, *bias_parts = nullptr;  // (part_count, width)
  index_t part_count = 0;
  int team = 32;  // threads
  bool add = false;

  [[nodiscard]] __host__ __device__ index_t rows() const { return x.extents[0]; }
  [[nodiscard]] __host__ __device__ index_t width() const { return x.extents[1]; }
};

/// The threads of a team, and sums over them in a fixed order.
struct norm_team {
  int size, rank;
  index_t index;  // among all teams

  SSMLIB_DEVICE explicit norm_team(int threads)
      : size(threads),
        rank(static_cast<int>(threadIdx.x) % threads),
        index(index_t{blockIdx.x} * (blockDim.x / threads) + threadIdx.x / threads) {}

  template <int Count, class R>
  SSMLIB_DEVICE void add_up(R (&x)[Count]) const {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      x[i] = warp_sum(x[i]);
    if (size == 32) return;
    __shared__ R shared[32][Count];  // then the team is the block
    __syncthreads();
    if (rank % 32 == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i)
        shared[rank / 32][i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      x[i] = shared[0][i];
      for (int w = 1; w < size / 32; ++w)
        x[i] += shared[w][i];
    }
  }
};

SSMLIB_DEVICE float inverse_root(float x) {
  return rsqrtf(x);
}
SSMLIB_DEVICE double inverse_root(double x) {
  return 1.0 / sqrt(x);
}

/// A thread's share of one group of one row: Items vectors, in registers if Held.
template <class T, int Items, bool Held>
class norm_share {
 public:
  using R = accum_t<T>;
  static constexpr int vector = Held ? 16 / static_cast<int>(sizeof(T)) : 1;
  using values = numbers<R, vector>;

  /// Null reads as zeros.
  SSMLIB_DEVICE void load(const T* row, const norm_team& team, index_t group) {
    row_ = row;
    if constexpr (Held) {
#pragma unroll
      for (int i = 0; i < Items; ++i) {
        raw_[i] = {};
        const index_t c = column(i, team);
        if (row != nullptr && c < group) raw_[i] = *reinterpret_cast<const uint4*>(row + c);
      }
    }
  }
  SSMLIB_DEVICE static index_t column(int i, const norm_team& team) {
    return (index_t{i} * team.size + team.rank) * vector;
  }
  SSMLIB_DEVICE values get(int i, const norm_team& team) const {
    values v{};
    if constexpr (Held) {
      numbers<T, vector> words;
      memcpy(&words, &raw_[i], sizeof words);
#pragma unroll
      for (int e = 0; e < vector; ++e)
        v.v[e] = widen(words.v[e]);
    } else {
      if (row_ != nullptr) v.v[0] = widen(row_[column(i, team)]);
    }
    return v;
  }
  SSMLIB_DEVICE static values of(const T* row, int i, const norm_team& team) {
    values v{};
    const T* p = row + column(i, team);
    if constexpr (Held) {
      const auto words = *reinterpret_cast<const numbers<T, vector>*>(p);
#pragma unroll
      for (int e = 0; e < vector; ++e)
        v.v[e] = widen(words.v[e]);
    } else {
      v.v[0] = widen(*p);
    }
    return v;
  }
  SSMLIB_DEVICE static void put(T* row, int i, const norm_team& team, values v, bool add) {
    T* p = row + column(i, team);
    numbers<T, vector> out;
    if (add) {
      const values old = of(row, i, team);
#pragma unroll
      for (int e = 0; e < vector; ++e)
        v.v[e] += old.v[e];
    }
#pragma unroll
    for (int e = 0; e < vector; ++e)
      out.v[e] = narrow<T>(v.v[e]);
    *reinterpret_cast<numbers<T, vector>*>(p) = out;
  }

 private:
  const T* row_;
  uint4 raw_[Held ? Items : 1];
};

/// f(i) for the vectors of a thread that exist; unrolled where they are held.
template <class Share, int Items, bool Held, class F>
SSMLIB_DEVICE void for_share(const norm_team& team, index_t group, F f) {
  if constexpr (Held) {
#pragma unroll
    for (int i = 0; i < Items; ++i)
      if (Share::column(i, team) < group) f(i);
  } else {
    for (int i = 0; Share::column(i, team) < group; ++i)
      f(i);
  }
}

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
  const index_t groups = o.width() / o.group, part = team.index / groups;
  if (part >= o.part_count) return;
  const index_t group = team.index % groups, offset = group * o.group;
  const auto each = [&](auto f) { for_share<share, Items, Held>(team, o.group, f); };
  const T* weight = o.weight + group * o.weight_step;
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
  for (index_t row = part; row < o.rows(); row += o.part_count) {
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
    each([&](int i) {
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        if (parts) parts[share::column(i, team) + e] = d_weight[i].v[e];
        if (bias_parts) bias_parts[share::column(i, team) + e] = d_bias[i].v[e];
      }
    });
  }
}

/// to[c] (+)= the sum over parts, and over groups where they share the weight. A block has eight
/// rows of threads, so that eight parts are on their way at once.
template <class R>
__global__ void norm_sum_kernel(const R* parts, index_t part_count, index_t width, index_t size,
                                R* to, bool add) {
  __shared__ R shared[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t c = index_t{blockIdx.x} * 32 + lane;
  R sum = R(0);
  if (c < size) {
    for (index_t k = warp; k < part_count; k += 8)
      for (index_t g = c; g < width; g += size)
        sum += parts[k * width + g];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= size) return;
#pragma unroll
  for (int w = 1; w < 8; ++w)
    sum += shared[w][lane];
  to[c] = add ? to[c] + sum : sum;
}

inline constexpr index_t norm_parts = 528;  // teams that walk rows, at most

template <class T>
[[nodiscard]] index_t norm_part_count(index_t rows, index_t groups) {
  return std::clamp<index_t>(4 * norm_parts / std::max<index_t>(groups, 1), 1,
                             std::max<index_t>(1, std::min(rows, norm_parts)));
}

template <class T>
void check_norm(const char* name, const norm_arguments<T>& o, const shape<2>& rows) {
  const auto fail = [&](const std::string& what) {
    throw shape_error("ssm: " + std::string(name) + ": " + what);
  };
  if (rows != o.x.extents || (o.gate.data && o.gate.extents != o.x.extents)) {
    fail("x is " + to_string<2>(o.x.extents) + ", the gate " + to_string<2>(o.gate.extents) +
         " and the result " + to_string<2>(rows) + "; wanted equal sizes");
  }
  if (o.group < 1 || o.width() % o.group != 0) {
    fail("groups of " + std::to_string(o.group) + " features do not divide " +
         std::to_string(o.width()) + "; wanted a divisor");
  }
  if (o.rows() * (o.width() / o.group) > index_t{0x7fffffff} * 4) {
    fail(std::to_string(o.rows()) + " rows; wanted fewer: split them");
  }
}

/// f.operator()<Items, Held>() with the team that fits.
template <class T, class F>
void with_norm_team(norm_arguments<T>& o, F f) {
  constexpr index_t vector = 16 / sizeof(T);
  const auto aligned = [](const auto& v) {
    return v.data == nullptr || rows_are_aligned(v.data, v.strides[0], static_cast<int>(vector));
  };
  const auto aligned_row = [](const T* p) {
    return rows_are_aligned(p, 0, static_cast<int>(vector));
  };
  const bool held = o.group % vector == 0 && o.weight_step % vector == 0 && aligned(o.x) &&
                    aligned(o.gate) && aligned(o.y) && aligned(o.dy) && aligned(o.dx) &&
                    aligned(o.d_gate) && aligned_row(o.weight) && aligned_row(o.bias) &&
                    o.group <= vector * norm_items * norm_team_limit;
  if (!held) {
    o.team = o.group <= 256 ? 32 : 256;
    return f.template operator()<1, false>();
  }
  const index_t vectors = o.group / vector;
  if (vectors <= 32) {
    o.team = 32;
    return f.template operator()<1, true>();
  }
  o.team = static_cast<int>(round_up((vectors + norm_items - 1) / norm_items, 32));
  f.template operator()<norm_items, true>();
}

[[nodiscard]] inline unsigned norm_blocks(index_t teams, int team) {
  const index_t a_block = team == 32 ? 4 : 1;
  return static_cast<unsigned>((teams + a_block - 1) / a_block);
}
[[nodiscard]] inline unsigned norm_threads(int team) {
  return static_cast<unsigned>(team == 32 ? 128 : team);
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

template <norm_kind Kind, gate_order Order, class T>
void launch_norm_vjp(cudaStream_t stream, norm_arguments<T> o, accum_t<T>* d_weight,
                     accum_t<T>* d_bias, index_t weight_size, accum_t<T>* workspace) {
  const index_t groups = o.width() / o.group;
  o.part_count = norm_part_count<T>(o.rows(), groups);
  if (d_weight) o.parts = workspace;
  if (d_bias) o.bias_parts = workspace + o.part_count * o.width();
  if (o.width() == 0) return;
  with_norm_team(o, [&]<int Items, bool Held>() {
    norm_vjp_kernel<T, Kind, Order, Items, Held>
        <<<norm_blocks(o.part_count * groups, o.team), norm_threads(o.team), 0, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  });
  const auto add_up = [&](const accum_t<T>* parts, accum_t<T>* to) {
    if (to == nullptr) return;
    norm_sum_kernel<<<static_cast<unsigned>((weight_size + 31) / 32), 256, 0, stream>>>(
        parts, o.part_count, o.width(), weight_size, to, o.add);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  add_up(o.parts, d_weight);
  add_up(o.bias_parts, d_bias);
}

template <class T>
[[nodiscard]] norm_arguments<T> norm_arguments_of(gate_order order, const rms_norm_problem<T>& p) {
  return {p.x,      order == gate_order::none ? view<const T, 2>{} : p.gate,
          p.weight, nullptr,
          p.group,  p.weight_step,
          p.eps};
}
template <class T>
[[nodiscard]] norm_arguments<T> norm_arguments_of(const layer_norm_problem<T>& p) {
  const index_t width = p.x.extents[1];
  return {p.x, {}, p.weight, p.bias, std::max<index_t>(width, 1), width, p.eps};
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
std::size_t rms_norm_vjp_workspace_bytes(const rms_norm_problem<T>& p) {
  const index_t width = p.x.extents[1];
  return static_cast<std::size_t>(detail::norm_part_count<T>(p.x.extents[0], width / p.group) *
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
void layer_norm(cudaStream_t stream, const layer_norm_problem<T>& p, view<T, 2> y) {
  auto o = detail::norm_arguments_of(p);
  o.y = y;
  detail::check_norm("layer_norm", o, y.extents);
  detail::launch_norm<detail::norm_kind::layer, gate_order::none>(stream, o);
}

template <class T>
std::size_t layer_norm_vjp_workspace_bytes(const layer_norm_problem<T>& p) {
  return static_cast<std::size_t>(2 * detail::norm_part_count<T>(p.x.extents[0], 1) *
                                  p.x.extents[1]) *
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
  SSMLIB_INSTANTIATE(cuda_norm, void rms_norm<T>(cudaStream_t, gate_order,                         \
                                                 const rms_norm_problem<T>&, view<T, 2>));         \
  SSMLIB_INSTANTIATE(cuda_norm,                                                                    \
                     std::size_t rms_norm_vjp_workspace_bytes<T>(const rms_norm_problem<T>&));     \
  SSMLIB_INSTANTIATE(cuda_norm,                                                                    \
                     void rms_norm_vjp<T>(cudaStream_t, gate_order, const rms_norm_problem<T>&,    \
                                          view<const T, 2>, const rms_norm_gradients<T>&, void*)); \
  SSMLIB_INSTANTIATE(cuda_norm,                                                                    \
                     void layer_norm<T>(cudaStream_t, const layer_norm_problem<T>&, view<T, 2>));  \
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
