#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/reduce.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

/// @file
/// How rows are cut for the threads of a card, what is accumulated along them, and the kernels that
/// do it. A group of neighbours, 16 bytes of them, is the unit of everything: it belongs to one
/// thread whether it is read at once or, where it is not aligned, number by number.

namespace ssm::kernels::cuda::detail {

inline constexpr int row_block = 256;
template <class T>
inline constexpr int row_group = 16 / static_cast<int>(sizeof(T));

/// `lanes` threads (a power of two) share a row, or each of its `pieces`.
struct row_plan {
  index_t rows = 0, length = 0, groups = 0, pieces = 1;
  int lanes = 1;
  bool aligned = false;

  /// @param a_lane  groups that a thread takes, if a row has enough lanes for that
  template <class T>
  static row_plan of(const row_problem<T>& p, index_t a_lane, bool cut = true) {
    row_plan plan;
    plan.rows = p.rows;
    plan.length = p.length;
    plan.groups = (p.length + row_group<T> - 1) / row_group<T>;
    while (plan.lanes < row_block && plan.lanes * a_lane < plan.groups)
      plan.lanes *= 2;
    if (cut && plan.lanes == row_block) {
      const index_t longest = std::max<index_t>(1, plan.groups / (row_block * 4));
      plan.pieces = std::clamp<index_t>(most_pieces / std::max<index_t>(1, p.rows), 1, longest);
    }
    const bool steps = p.rows <= 1 || p.length % row_group<T> == 0;
    plan.aligned = steps && reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0;
    return plan;
  }
  [[nodiscard]] constexpr int rows_a_block() const { return row_block / lanes; }
  [[nodiscard]] index_t units() const {
    return (rows + rows_a_block() - 1) / rows_a_block() * pieces;
  }

  static constexpr index_t most_pieces = 1056;
};

inline unsigned row_blocks_for(index_t units) {
  return static_cast<unsigned>(std::min<index_t>(units, index_t{1} << 30));
}

/// Any struct of a thread `step` lanes away.
template <class State>
SSMLIB_DEVICE State exchange(const State& mine, int step) {
  constexpr int words = sizeof(State) / 4;
  static_assert(sizeof(State) % 4 == 0);
  State theirs;
  const auto* from = reinterpret_cast<const std::uint32_t*>(&mine);
  auto* to = reinterpret_cast<std::uint32_t*>(&theirs);
#pragma unroll
  for (int w = 0; w < words; ++w)
    to[w] = __shfl_xor_sync(0xffffffffu, from[w], step);
  return theirs;
}

/// What the lanes of a row have found, merged in a fixed tree; every lane gets it. All threads of
/// the block come here.
template <class Op>
SSMLIB_DEVICE typename Op::state merge_lanes(typename Op::state mine, int lanes) {
  using State = typename Op::state;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int step = min(lanes, 32) / 2; step > 0; step /= 2) {
    // The lower lane's stands first, so that both see the same.
    const State theirs = exchange(mine, step);
    mine = (lane & step) == 0 ? Op::merge(mine, theirs) : Op::merge(theirs, mine);
  }
  if (lanes <= 32) return mine;
  __shared__ State parts[row_block / 32];
  const int warp = static_cast<int>(threadIdx.x) / 32, first = warp / (lanes / 32) * (lanes / 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[warp] = mine;
  __syncthreads();
  mine = parts[first];
  for (int w = 1; w < lanes / 32; ++w)
    mine = Op::merge(mine, parts[first + w]);
  return mine;
}

/// The sum of a group in a fixed tree.
template <class A, int Count>
SSMLIB_DEVICE A group_sum(A (&v)[Count]) {
#pragma unroll
  for (int step = Count / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < step; ++i)
      v[i] += v[i + step];
  return v[0];
}

template <class T>
struct sum_operation {
  struct state {
    double sum;
  };
  static SSMLIB_DEVICE state none() { return {0.0}; }
  static SSMLIB_DEVICE state merge(const state& a, const state& b) { return {a.sum + b.sum}; }
  static SSMLIB_DEVICE void take(state& s, index_t, const numbers<T, row_group<T>>& x, int) {
    accum_t<T> v[row_group<T>];
#pragma unroll
    for (int i = 0; i < row_group<T>; ++i)
      v[i] = widen(x.v[i]);
    s.sum += static_cast<double>(group_sum(v));
  }
};

/// The larger of two numbers; NaN if one is.
SSMLIB_DEVICE float larger_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
SSMLIB_DEVICE double larger_or_nan(double a, double b) {
  return b > a || b != b ? b : a;
}

/// e^x. Beside bf16 an error of 2^-20 is none.
template <class T, class A>
SSMLIB_DEVICE A exponential_for(A x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return power_of_two(static_cast<A>(log2_of_e) * x);
  } else {
    return ::exp(x);
  }
}

/// The largest element; NaN where there is one.
template <class T>
struct peak_operation {
  using A = accum_t<T>;
  struct state {
    A value;
  };
  static SSMLIB_DEVICE state none() { return {-std::numeric_limits<A>::infinity()}; }
  static SSMLIB_DEVICE state merge(const state& a, const state& b) {
    return {larger_or_nan(a.value, b.value)};
  }
  static SSMLIB_DEVICE void take(state& s, index_t, const numbers<T, row_group<T>>& x, int valid) {
#pragma unroll
    for (int i = 0; i < row_group<T>; ++i)
      if (i < valid) s.value = larger_or_nan(s.value, widen(x.v[i]));
  }
};

/// The largest element and where it stands: the first of equals, and of NaNs, which count as
/// largest.
template <class T>
struct largest_operation {
  using A = accum_t<T>;
  struct alignas(16) state {
    A value;
    index_t at;
  };
  static SSMLIB_DEVICE state none() {
    return {-std::numeric_limits<A>::infinity(), std::numeric_limits<index_t>::max()};
  }
  static SSMLIB_DEVICE bool beats(A b, index_t b_at, const state& a) {
    if (b != b || a.value != a.value) return b != b && (a.value == a.value || b_at < a.at);
    return b > a.value || (b == a.value && b_at < a.at);
  }
  static SSMLIB_DEVICE state merge(const state& a, const state& b) {
    return beats(b.value, b.at, a) ? b : a;
  }
  static SSMLIB_DEVICE void take(state& s, index_t at, const numbers<T, row_group<T>>& x,
                                 int valid) {
#pragma unroll
    for (int i = 0; i < row_group<T>; ++i) {
      const A value = widen(x.v[i]);
      if (i < valid && beats(value, at + i, s)) s = {value, at + i};
    }
  }
};

/// The largest element and the sum of exp(x - largest): rows that are read twice.
template <class T>
struct softmax_operation {
  using A = accum_t<T>;
  struct state {
    double largest, sum;
  };
  static SSMLIB_DEVICE state none() { return {-std::numeric_limits<double>::infinity(), 0.0}; }
  /// The sum as if `largest` were the larger one.
  static SSMLIB_DEVICE double rescaled(const state& s, double largest) {
    if (s.sum == 0) return 0.0;
    return s.sum * static_cast<double>(exponential_for<T>(static_cast<A>(s.largest - largest)));
  }

  static SSMLIB_DEVICE state merge(const state& a, const state& b) {
    const double largest = larger_or_nan(a.largest, b.largest);
    return {largest, rescaled(a, largest) + rescaled(b, largest)};
  }
  static SSMLIB_DEVICE void take(state& s, index_t, const numbers<T, row_group<T>>& x, int valid) {
    A v[row_group<T>];
    A group = -std::numeric_limits<A>::infinity();
#pragma unroll
    for (int i = 0; i < row_group<T>; ++i) {
      v[i] = i < valid ? widen(x.v[i]) : -std::numeric_limits<A>::infinity();
      group = larger_or_nan(group, v[i]);
    }
    const double largest = larger_or_nan(s.largest, static_cast<double>(group));
    if (largest == -std::numeric_limits<double>::infinity()) return;  // nothing but -infinity yet
    if (largest != s.largest) s = {largest, rescaled(s, largest)};
#pragma unroll
    for (int i = 0; i < row_group<T>; ++i)
      v[i] = exponential_for<T>(v[i] - static_cast<A>(largest));
    s.sum += static_cast<double>(group_sum(v));
  }
};

/// finish(row, state) for each row, or its pieces' states to `parts`.
template <class T, class Op, class Finish>
__global__ void __launch_bounds__(row_block)
    reduce_rows_kernel(const T* x, const __grid_constant__ row_plan plan, typename Op::state* parts,
                       const __grid_constant__ Finish finish) {
  constexpr int V = row_group<T>;
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes;
  const index_t units = (plan.rows + plan.rows_a_block() - 1) / plan.rows_a_block() * plan.pieces;
  for (index_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const index_t piece = unit % plan.pieces;
    const index_t row = unit / plan.pieces * plan.rows_a_block() + threadIdx.x / plan.lanes;
    const T* from = x + row * plan.length;
    const index_t end = row < plan.rows ? plan.groups * (piece + 1) / plan.pieces : 0;
    typename Op::state s = Op::none();
#pragma unroll 4
    for (index_t g = plan.groups * piece / plan.pieces + lane; g < end; g += plan.lanes) {
      const int valid = static_cast<int>(min(index_t{V}, plan.length - g * V));
      Op::take(s, g * V, load_numbers<V>(from + g * V, valid, plan.aligned), valid);
    }
    s = merge_lanes<Op>(s, plan.lanes);
    if (lane != 0 || row >= plan.rows) continue;
    if (plan.pieces > 1) {
      parts[row * plan.pieces + piece] = s;
    } else {
      finish(row, s);
    }
  }
}

/// A block a row that was cut.
template <class Op, class Finish>
__global__ void __launch_bounds__(row_block)
    merge_pieces_kernel(const typename Op::state* parts, index_t rows, index_t pieces,
                        const __grid_constant__ Finish finish) {
  for (index_t row = blockIdx.x; row < rows; row += gridDim.x) {
    typename Op::state s = Op::none();
    for (index_t piece = threadIdx.x; piece < pieces; piece += row_block)
      s = Op::merge(s, parts[row * pieces + piece]);
    s = merge_lanes<Op>(s, row_block);
    if (threadIdx.x == 0) finish(row, s);
  }
}

template <class Op, class T, class Finish>
void reduce(cudaStream_t stream, const row_problem<T>& p, const Finish& finish, void* workspace) {
  if (p.rows == 0) return;
  const row_plan plan = row_plan::of(p, 4);
  auto* parts = static_cast<typename Op::state*>(workspace);
  reduce_rows_kernel<T, Op>
      <<<row_blocks_for(plan.units()), row_block, 0, stream>>>(p.x, plan, parts, finish);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (plan.pieces == 1) return;
  merge_pieces_kernel<Op>
      <<<row_blocks_for(p.rows), row_block, 0, stream>>>(parts, p.rows, plan.pieces, finish);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

/// The element of row r, counted over the first three axes, and its place `i` along the last.
template <class T>
SSMLIB_DEVICE T* row_of(const view<T, 4>& v, index_t r) {
  const index_t plane = r / v.extents[2];
  return v.data + plane / v.extents[1] * v.strides[0] + plane % v.extents[1] * v.strides[1] +
         r % v.extents[2] * v.strides[2];
}

/// Adds a group to a row of any stride.
template <class T>
SSMLIB_DEVICE void add_group(const view<T, 4>& to, index_t row, index_t at,
                             const accum_t<T> (&x)[row_group<T>], int valid, bool aligned) {
  constexpr int V = row_group<T>;
  T* p = row_of(to, row) + at * to.strides[3];
  if (aligned) {
    numbers<T, V> old = load_numbers<V>(static_cast<const T*>(p), valid, true);
#pragma unroll
    for (int i = 0; i < V; ++i)
      old.v[i] = narrow<T>(widen(old.v[i]) + x[i]);
    store_numbers<V>(p, old, valid, true);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i >= valid) break;
      T& target = p[i * to.strides[3]];
      target = narrow<T>(widen(target) + x[i]);
    }
  }
}
template <class T>
[[nodiscard]] bool rows_are_groups(const view<T, 4>& v) {
  constexpr index_t V = row_group<T>;
  bool whole = reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 && v.strides[3] == 1;
  for (std::size_t d = 0; d < 3; ++d)
    whole = whole && (v.extents[d] == 1 || v.strides[d] % V == 0);
  return whole;
}

}  // namespace ssm::kernels::cuda::detail
