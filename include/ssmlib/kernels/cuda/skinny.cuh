#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/skinny_stream.cuh>
#include <ssmlib/kernels/cuda/skinny_warpgroup.cuh>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

namespace ssm::kernels::cuda {

namespace detail {

/// Up to this many rows a block keeps f(x) in shared memory.
inline constexpr index_t skinny_stream_rows = 8;

template <class X, class W, class Y>
void check_skinny(const skinny_problem<X, W, Y>& p) {
  const index_t m = p.x.extent(0), k = p.x.extent(1), n = p.w.extent(0);
  const auto fits = [](const auto& v, index_t rows, index_t columns) {
    return !v ||
           (v.extent(0) == rows && v.extent(1) == columns && (v.stride(1) == 1 || columns <= 1));
  };
  if (p.w.extent(1) != k || !fits(p.x, m, k) || !fits(p.w, n, k) || !fits(p.y, m, n) ||
      !fits(p.gate, m, k) || !fits(p.residual, m, n)) {
    throw shape_error("ssm: skinny_forward: x is " + to_string(p.x.extents) + ", w is " +
                      to_string(p.w.extents) + ", y is " + to_string(p.y.extents) +
                      "; wanted (m x k), (n x k), (m x n), a gate like x, a residual like y and "
                      "unit inner strides");
  }
  if (m > 64) {
    throw shape_error("ssm: skinny_forward: x has " + std::to_string(m) +
                      " rows, wanted at most 64; use a matrix product");
  }
  if (p.group < 0 || (p.group > 0 && k % p.group != 0)) {
    throw shape_error("ssm: skinny_forward: groups of " + std::to_string(p.group) +
                      " features do not divide the " + std::to_string(k) + " of x");
  }
  if (n > std::numeric_limits<int>::max() - 64 || k > std::numeric_limits<int>::max() - 64) {
    throw shape_error("ssm: skinny_forward: w is " + to_string(p.w.extents) +
                      ", wanted fewer than 2^31 rows and columns");
  }
}

template <class X, class W, class Y>
[[nodiscard]] skinny_arguments<X, W, Y> arguments_of(const skinny_problem<X, W, Y>& p,
                                                     void* workspace) {
  const auto m = static_cast<int>(p.x.extent(0)), k = static_cast<int>(p.x.extent(1));
  return {p.x.data,
          p.gate.data,
          p.w.data,
          p.y.data,
          p.residual.data,
          p.x.stride(0),
          p.gate.stride(0),
          p.w.stride(0),
          p.y.stride(0),
          p.residual.stride(0),
          p.bias,
          p.norm_weight,
          p.epsilon,
          m,
          static_cast<int>(p.w.extent(0)),
          k,
          p.group == 0 ? k : static_cast<int>(p.group),
          p.normalise,
          p.early,
          workspace,
          nullptr};
}

template <class T>
[[nodiscard]] bool rows_aligned(const view<T, 2>& v) {
  return !v || (reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 &&
                (v.stride(0) * static_cast<index_t>(sizeof(T)) % 16 == 0 || v.extent(0) == 1));
}

/// Whether f(x) goes through the tensor cores. Without clusters blocks keep eight rows of it: that
/// there is room for them must not depend on how many rows there are.
template <class X, class W, class Y>
[[nodiscard]] bool skinny_by_tiles(const skinny_problem<X, W, Y>& p) {
  if constexpr (std::is_same_v<W, bf16>) {
    const index_t k = p.x.extent(1), group = p.group == 0 ? k : p.group;
    const bool rounded = std::is_same_v<X, bf16> || p.normalise || p.gate;
    return rounded && k % 8 == 0 && group % 8 == 0 && rows_aligned(p.x) && rows_aligned(p.gate) &&
           rows_aligned(p.w) && reinterpret_cast<std::uintptr_t>(p.norm_weight) % 16 == 0 &&
           (usable_rung(p.most) == rung::sm_90a ||
            stream_shared_bytes(3, static_cast<int>(skinny_stream_rows), static_cast<int>(k)) <=
                static_cast<std::size_t>(shared_bytes_of_block()));
  } else {
    return false;
  }
}

/// Whether m rows of f(x) and a ring worth having fit a block of the stream kernel. Below sm_90a
/// the ring is short, and skinny_by_tiles has asked for its room.
[[nodiscard]] inline bool stream_fits(index_t m, index_t k, rung most) {
  return m <= skinny_stream_rows &&
         (usable_rung(most) < rung::sm_90a ||
          stream_shared_bytes(6, static_cast<int>(m), static_cast<int>(k)) <= 200 * 1024);
}

/// Rows of f(x) in the warpgroup kernel's workspace; 0: blocks make it themselves.
[[nodiscard]] inline index_t packed_rows(index_t m, index_t k, rung most) {
  if (usable_rung(most) < rung::sm_90a || stream_fits(m, k, most)) return 0;
  return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
}

template <class X, class Y>
void launch_stream(cudaStream_t stream, const skinny_arguments<X, bf16, Y>& a, rung most) {
  const int blocks = std::min(multiprocessors(), (a.n + 7) / 8);
  const auto launch = [&](auto rows, auto depth) {
    constexpr int Rows = decltype(rows)::value, Depth = decltype(depth)::value;
    launch_overlapped(stream, skinny_stream_kernel<Rows, Depth, X, Y>, blocks, skinny_threads,
                      stream_shared_bytes(Depth, a.m, a.k), 1, a);
  };
  // As deep as leaves half of a multiprocessor's memory to the product behind, at usual sizes.
  using std::integral_constant;
  if (usable_rung(most) < rung::sm_90a) {
    launch(integral_constant<int, 8>{}, integral_constant<int, 3>{});
  } else if (a.m == 1) {
    launch(integral_constant<int, 1>{}, integral_constant<int, 6>{});
  } else if (a.m == 2) {
    launch(integral_constant<int, 2>{}, integral_constant<int, 4>{});
  } else if (a.m <= 4) {
    launch(integral_constant<int, 4>{}, integral_constant<int, 4>{});
  } else {
    launch(integral_constant<int, 8>{}, integral_constant<int, 3>{});
  }
}

/// The stream kernel for as many rows at a time as it takes.
template <class X, class Y>
void launch_pieces(cudaStream_t stream, const skinny_arguments<X, bf16, Y>& a, rung most) {
  int rows = static_cast<int>(skinny_stream_rows);
  while (rows > 1 && !stream_fits(rows, a.k, most))
    rows /= 2;
  for (int first = 0; first < a.m; first += rows) {
    skinny_arguments<X, bf16, Y> piece = a;
    piece.m = std::min(rows, a.m - first);
    piece.x += first * a.x_step;
    piece.y += first * a.y_step;
    if (piece.gate != nullptr) piece.gate += first * a.gate_step;
    if (piece.residual != nullptr) piece.residual += first * a.residual_step;
    launch_stream(stream, piece, most);
  }
}

template <class X, class Y>
void launch_packed(cudaStream_t stream, skinny_arguments<X, bf16, Y> a, index_t rows) {
  // The workspace holds f(x), then the factors of its rows.
  a.scales = reinterpret_cast<float*>(static_cast<bf16*>(a.packed) +
                                      rows * skinny_units(a.k) * skinny_unit);
  launch_overlapped(stream, pack_rows_kernel<skinny_arguments<X, bf16, Y>>, rows, skinny_threads, 0,
                    1,
                    pack_rows_arguments<skinny_arguments<X, bf16, Y>>{a, static_cast<int>(rows)});
  skinny_arguments<bf16, bf16, Y> packed{};
  packed.w = a.w, packed.w_step = a.w_step;
  packed.y = a.y, packed.y_step = a.y_step;
  packed.residual = a.residual, packed.residual_step = a.residual_step;
  packed.bias = a.bias;
  packed.m = a.m, packed.n = a.n, packed.k = a.k, packed.group = a.group;
  packed.normalise = a.normalise, packed.early = a.early;
  packed.packed = a.packed, packed.scales = a.scales;
  launch_warpgroup(stream, packed, static_cast<int>(rows));
}

template <class X, class W, class Y>
void launch_general(cudaStream_t stream, const skinny_arguments<X, W, Y>& a) {
  using real = typename skinny_arguments<X, W, Y>::real;
  const index_t blocks = std::min<index_t>((a.n + 7) / 8, 8 * multiprocessors());
  if (!a.normalise && a.gate == nullptr) {
    launch_overlapped(stream, general_product_kernel<X, W, Y, X>, blocks, skinny_threads, 0, 1,
                      general_product_arguments<X, W, Y, X>{a, a.x, a.x_step});
    return;
  }
  launch_overlapped(stream, general_rows_kernel<X, W, Y>, a.m, skinny_threads, 0, 1, a);
  launch_overlapped(
      stream, general_product_kernel<real, W, Y, X>, blocks, skinny_threads, 0, 1,
      general_product_arguments<real, W, Y, X>{a, static_cast<const real*>(a.packed), a.k});
}

}  // namespace detail

template <class X, class W, class Y>
std::size_t skinny_workspace_bytes(const skinny_problem<X, W, Y>& p) {
  detail::check_skinny(p);
  const index_t m = p.x.extent(0), k = p.x.extent(1);
  if (detail::skinny_by_tiles(p)) {
    const index_t rows = detail::packed_rows(m, k, p.most);
    return static_cast<std::size_t>(rows * round_up(k, 64) * 2 + rows * 4);
  }
  if (!p.normalise && !p.gate) return 0;
  return static_cast<std::size_t>(m * k) * sizeof(typename skinny_problem<X, W, Y>::real);
}

template <class X, class W, class Y>
void skinny_forward(cudaStream_t stream, const skinny_problem<X, W, Y>& p, void* workspace) {
  detail::check_skinny(p);
  if (p.x.extent(0) == 0 || p.w.extent(0) == 0) return;
  const auto a = detail::arguments_of(p, workspace);
  if constexpr (std::is_same_v<W, bf16>) {
    if (detail::skinny_by_tiles(p)) {
      const index_t rows = detail::packed_rows(a.m, a.k, p.most);
      rows == 0 ? detail::launch_pieces(stream, a, p.most) : detail::launch_packed(stream, a, rows);
      return;
    }
  }
  detail::launch_general(stream, a);
}

#define SSMLIB_DETAIL_LIST(X, W, Y)                                                                \
  SSMLIB_INSTANTIATE(cuda_skinny,                                                                  \
                     std::size_t skinny_workspace_bytes<X, W, Y>(const skinny_problem<X, W, Y>&)); \
  SSMLIB_INSTANTIATE(cuda_skinny, void skinny_forward<X, W, Y>(                                    \
                                      cudaStream_t, const skinny_problem<X, W, Y>&, void*))
SSMLIB_DETAIL_LIST(bf16, bf16, bf16);
SSMLIB_DETAIL_LIST(bf16, bf16, float);
SSMLIB_DETAIL_LIST(float, bf16, bf16);
SSMLIB_DETAIL_LIST(float, bf16, float);
SSMLIB_DETAIL_LIST(float, float, float);
SSMLIB_DETAIL_LIST(double, double, double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
