#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/conv1d.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

/// @file
/// What the convolution's passes share: where sequences begin, rows of neighbouring channels, the
/// weights of a thread, and the choice of a kernel.

namespace ssm::kernels::cuda::detail {

template <class T>
struct conv1d_targets {
  view<T, 2> y{};         // forward
  view<const T, 2> dy{};  // backward
  view<const T, 3> d_final{};
  view<T, 2> dx{};
  view<T, 3> d_initial{};
  accum_t<T>* parts = nullptr;  // (blocks of runs, width + 1, channels)
  index_t run = 0, runs = 0;    // tokens of a run, and how many runs
  bool add = false;
};

/// A sequence and its tokens.
struct sequence_range {
  index_t sequence, begin, end;
};

template <class T>
SSMLIB_DEVICE sequence_range sequence_at(const conv1d_problem<T>& p, index_t sequence) {
  if (p.offsets) return {sequence, p.offsets[sequence], p.offsets[sequence + 1]};
  return {sequence, sequence * p.max_length, (sequence + 1) * p.max_length};
}
/// The sequence of token t.
template <class T>
SSMLIB_DEVICE sequence_range sequence_of(const conv1d_problem<T>& p, index_t t) {
  if (!p.offsets) return sequence_at(p, t / p.max_length);
  index_t low = 0, high = p.sequences - 1;  // the last one that begins at or before t
  while (low < high) {
    const index_t middle = (low + high + 1) / 2;
    if (p.offsets[middle] <= t) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return sequence_at(p, low);
}
/// The next sequence that has tokens.
template <class T>
SSMLIB_DEVICE sequence_range sequence_after(const conv1d_problem<T>& p, sequence_range s) {
  do {
    s = sequence_at(p, s.sequence + 1);
  } while (s.begin == s.end);
  return s;
}

template <class T, int Vector>
using channel_row = numbers<accum_t<T>, Vector>;

template <int Vector, class T>
SSMLIB_DEVICE channel_row<T, Vector> load_channels(const T* p) {
  const auto raw = *reinterpret_cast<const packed_t<T, Vector>*>(p);
  if constexpr (Vector == 1) {
    return {widen(raw.v[0])};
  } else {
    return widen(raw);
  }
}
template <int Vector, class T>
SSMLIB_DEVICE void store_channels(T* p, const channel_row<T, Vector>& x) {
  numbers<T, Vector> r;
#pragma unroll
  for (int e = 0; e < Vector; ++e)
    r.v[e] = narrow<T>(x.v[e]);
  *reinterpret_cast<numbers<T, Vector>*>(p) = r;
}

/// The input of token t of a sequence, which may lie before it.
template <int Vector, class T>
SSMLIB_DEVICE channel_row<T, Vector> conv1d_input(const conv1d_problem<T>& p,
                                                  const sequence_range& s, index_t t, index_t c) {
  if (t >= s.begin) return load_channels<Vector>(p.x.data + t * p.x.strides[0] + c);
  if (p.initial.data == nullptr) return {};
  const index_t row = p.initial.extents[1] + (t - s.begin);
  return load_channels<Vector>(p.initial.data + s.sequence * p.initial.strides[0] +
                               row * p.initial.strides[1] + c);
}

template <class T, int Width, int Vector>
struct conv1d_weights {
  using R = accum_t<T>;
  R tap[Width][Vector], bias[Vector];

  SSMLIB_DEVICE conv1d_weights(const conv1d_problem<T>& p, index_t c) {
    const R* row = p.weight.data + c * p.weight.strides[0];
#pragma unroll
    for (int e = 0; e < Vector; ++e) {
      bias[e] = p.bias ? p.bias[c + e] : R(0);
      load(row, p.weight.strides[1], e);
      row += p.weight.strides[0];
    }
  }
  /// The taps of one channel, at once where they are neighbours.
  SSMLIB_DEVICE void load(const R* row, index_t step, int e) {
    if constexpr (Width == 2 || Width == 4) {
      using taps = numbers<R, Width>;
      if (step == 1 && reinterpret_cast<std::uintptr_t>(row) % alignof(taps) == 0) {
        const taps all = *reinterpret_cast<const taps*>(row);
#pragma unroll
        for (int j = 0; j < Width; ++j)
          tap[j][e] = all.v[j];
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < Width; ++j)
      tap[j][e] = row[j * step];
  }
  /// before[k] is the input k + 1 tokens back.
  SSMLIB_DEVICE R sum(const channel_row<T, Vector> (&before)[Width - 1],
                      const channel_row<T, Vector>& now, int e) const {
    R x = bias[e];
#pragma unroll
    for (int j = 0; j < Width - 1; ++j)
      x = fma(tap[j][e], before[Width - 2 - j].v[e], x);
    return fma(tap[Width - 1][e], now.v[e], x);
  }
};

template <int Width, class T, int Vector>
SSMLIB_DEVICE void push_row(channel_row<T, Vector> (&before)[Width - 1],
                            const channel_row<T, Vector>& now) {
#pragma unroll
  for (int k = Width - 2; k > 0; --k)
    before[k] = before[k - 1];
  before[0] = now;
}

/// Any width, a thread an element.
template <class T>
SSMLIB_DEVICE accum_t<T> conv1d_sum_any(const conv1d_problem<T>& p, const sequence_range& s,
                                        index_t t, index_t c) {
  using R = accum_t<T>;
  const index_t width = p.weight.extents[1];
  R x = p.bias ? p.bias[c] : R(0);
  for (index_t j = 0; j < width; ++j) {
    x = fma(p.weight.data[c * p.weight.strides[0] + j * p.weight.strides[1]],
            conv1d_input<1>(p, s, t - (width - 1) + j, c).v[0], x);
  }
  return x;
}

template <class T>
void check_conv1d(const char* name, const conv1d_problem<T>& p, const shape<2>& rows) {
  const auto fail = [&](const std::string& what) {
    throw shape_error("ssm: " + std::string(name) + ": " + what);
  };
  if (p.weight.extents[0] != p.channels() || p.width() < 1) {
    fail("x is " + to_string<2>(p.x.extents) + " and the weight " + to_string<2>(p.weight.extents) +
         "; wanted a row of at least one tap for each channel");
  }
  if (rows != p.x.extents) {
    fail("x is " + to_string<2>(p.x.extents) + " and the other rows " + to_string<2>(rows) +
         "; wanted equal sizes");
  }
  if (p.x.strides[1] != 1 && p.channels() > 1) {
    fail("the channels of x are " + std::to_string(p.x.strides[1]) + " apart; wanted neighbours");
  }
  if (p.offsets == nullptr && p.sequences * p.max_length != p.tokens()) {
    fail(std::to_string(p.sequences) + " sequences of " + std::to_string(p.max_length) +
         " tokens; wanted " + std::to_string(p.tokens()) + " tokens in all");
  }
}

/// Tokens of a run: enough runs for every multiprocessor, few enough to read little twice.
inline index_t conv1d_run(index_t tokens, index_t threads_a_token) {
  const index_t wanted = std::max<index_t>(1, 320000 / std::max<index_t>(threads_a_token, 1));
  return std::clamp<index_t>(tokens / wanted / 8 * 8, 8, 64);
}

[[nodiscard]] inline unsigned conv1d_grid(index_t blocks) {
  if (blocks > 0x7fffffff) {
    throw shape_error("ssm: causal conv1d: " + std::to_string(blocks) +
                      " blocks of work; wanted at most 2147483647: split the batch");
  }
  return static_cast<unsigned>(blocks);
}

/// f.operator()<Width, Vector, Activation>() for the usual widths.
template <class T, class F>
void with_conv1d_kernel(index_t width, bool aligned, conv1d_activation activation, F f) {
  const auto with_activation = [&]<int Width, int Vector>() {
    if (activation == conv1d_activation::silu) {
      f.template operator()<Width, Vector, conv1d_activation::silu>();
    } else {
      f.template operator()<Width, Vector, conv1d_activation::none>();
    }
  };
  constexpr int vector = sizeof(T) == 8 ? 2 : 4;
  const auto with_vector = [&]<int Width>() {
    if (aligned) {
      with_activation.template operator()<Width, vector>();
    } else {
      with_activation.template operator()<Width, 1>();
    }
  };
  switch (width) {
    case 2:
      return with_vector.template operator()<2>();
    case 3:
      return with_vector.template operator()<3>();
    default:
      return with_vector.template operator()<4>();
  }
}
inline bool usual_width(index_t width) {
  return width >= 2 && width <= 4;
}

template <class T, int R>
[[nodiscard]] bool conv1d_rows_aligned(const view<T, R>& v) {
  constexpr int vector = sizeof(T) == 8 ? 2 : 4;
  if (v.data == nullptr) return true;
  for (int d = 0; d + 1 < R; ++d)
    if (!rows_are_aligned(v.data, v.strides[d], vector)) return false;
  return true;
}

}  // namespace ssm::kernels::cuda::detail
