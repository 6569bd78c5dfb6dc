#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/norm.hpp>

#include <algorithm>
#include <string>

/// @file
/// A team of one or more warps owns a group of features of a row and keeps it in registers between
/// the statistics and the result. Rows that are too wide for the registers or not aligned take the
/// same path with memory in their place.

namespace ssm::kernels::cuda::detail {

enum class norm_kind { rms, layer };

inline constexpr int norm_items = 4;         // vectors of a thread, at most
inline constexpr int norm_team_limit = 384;  // threads, for the registers
inline constexpr int norm_teams = 4;         // of a block, where they are warps

template <class T>
struct norm_arguments {
  using real = accum_t<T>;
  view<const T, 2> x, gate;
  const real *weight, *bias;
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

  /// Null reads as zeros. Rows are read once: they are not to push the weights out of the cache.
  SSMLIB_DEVICE void load(const T* row, const norm_team& team, index_t group) {
    row_ = row;
    if constexpr (Held) {
#pragma unroll
      for (int i = 0; i < Items; ++i) {
        raw_[i] = {};
        const index_t c = column(i, team);
        if (row != nullptr && c < group) raw_[i] = __ldcs(reinterpret_cast<const uint4*>(row + c));
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
  template <class S>
  SSMLIB_DEVICE static values of(const S* row, int i, const norm_team& team) {
    values v{};
    const S* p = row + column(i, team);
    if constexpr (Held) {
      const auto words = *reinterpret_cast<const numbers<S, vector>*>(p);
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
  const auto aligned_row = [](const accum_t<T>* p) {
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
  const index_t a_block = team == 32 ? norm_teams : 1;
  return static_cast<unsigned>((teams + a_block - 1) / a_block);
}
[[nodiscard]] inline unsigned norm_threads(int team) {
  return static_cast<unsigned>(team == 32 ? 32 * norm_teams : team);
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

}  // namespace ssm::kernels::cuda::detail
