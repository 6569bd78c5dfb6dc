#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/conv1d_step.hpp>

#include <algorithm>
#include <limits>
#include <string>

/// @file
/// A thread has a few neighbouring channels of one sequence and walks through tokens. Where all
/// tokens of a sequence are one walk, it stores each input after the token's output: the row it
/// goes to held an input that no later token meets. Longer ones are cut, and a second kernel stores
/// the last inputs.

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int conv1d_step_threads = 128;
inline constexpr index_t conv1d_walk = 64;  // tokens, at most

template <class T>
struct conv1d_step_arguments {
  conv1d_step_problem<T> p;
  view<T, 2> y;
  index_t pieces, walks;  // groups of channels of a thread, cuts of a sequence
  bool aligned;           // the channels of a thread can be moved at once
  bool stores;            // inputs, to the ring
  bool dense_weight;      // the taps of a thread lie together, at 16 bytes
};

template <class T>
inline constexpr int conv1d_step_channels = sizeof(T) == 8 ? 2 : 4;

/// Some channels of one sequence. Width 0 stands for a run-time width: inputs are read for every
/// tap then.
template <class T, int Width>
class conv1d_walker {
 public:
  using R = accum_t<T>;
  static constexpr int count = conv1d_step_channels<T>;
  using values = numbers<R, count>;

  SSMLIB_DEVICE conv1d_walker(const conv1d_step_arguments<T>& o, index_t sequence, index_t channel)
      : o_(o),
        channel_(channel),
        valid_(static_cast<int>(min(index_t{count}, o.p.x.extents[1] - channel))) {
    begin_ = o.p.offsets ? o.p.offsets[sequence] : sequence * o.p.max_length;
    length_ = (o.p.offsets ? o.p.offsets[sequence + 1] : begin_ + o.p.max_length) - begin_;
    position_ = o.p.position[sequence];
    slot_ = o.p.ring.extents[1] > 0 ? position_ % o.p.ring.extents[1] : 0;
    ring_ = o.p.ring.data + sequence * o.p.ring.strides[0] + channel;
  }

  SSMLIB_DEVICE void walk(index_t first) const {
    const index_t end = min(length_, first + conv1d_walk);
    if (first >= end) return;
    values bias{};
    if (o_.p.bias != nullptr) bias = load_numbers<count>(o_.p.bias + channel_, valid_, false);
    if constexpr (Width > 0) {
      R tap[Width][count];
      values past[Width];  // of the token at hand: the oldest first
      const auto dense = load_numbers<count * Width>(o_.p.weight.data + channel_ * Width,
                                                     o_.dense_weight ? valid_ * Width : 0, true);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
#pragma unroll
        for (int c = 0; c < count; ++c) {
          tap[j][c] = o_.dense_weight ? dense.v[c * Width + j] : c < valid_ ? weight(c, j) : R(0);
        }
        if (j + 1 < Width) past[j + 1] = input(first - (Width - 1) + j);
      }
      constexpr int ahead = 4;
      for (index_t t0 = first; t0 < end; t0 += ahead) {
        numbers<T, count> raw[ahead];
#pragma unroll
        for (int e = 0; e < ahead; ++e)
          if (t0 + e < end) raw[e] = row(t0 + e);
#pragma unroll
        for (int e = 0; e < ahead; ++e) {
          if (t0 + e >= end) break;
#pragma unroll
          for (int j = 0; j + 1 < Width; ++j)
            past[j] = past[j + 1];
          past[Width - 1] = widened(raw[e]);
          values sum = bias;
#pragma unroll
          for (int j = 0; j < Width; ++j)
#pragma unroll
            for (int c = 0; c < count; ++c)
              sum.v[c] = fma(tap[j][c], past[j].v[c], sum.v[c]);
          put(t0 + e, sum);
          store(t0 + e, raw[e]);
        }
      }
    } else {
      const index_t width = o_.p.weight.extents[1];
      for (index_t t = first; t < end; ++t) {
        values sum = bias;
        for (index_t j = 0; j < width; ++j) {
          const values x = input(t - (width - 1) + j);
#pragma unroll
          for (int c = 0; c < count; ++c)
            sum.v[c] = fma(c < valid_ ? weight(c, j) : R(0), x.v[c], sum.v[c]);
        }
        put(t, sum);
        store(t, row(t));
      }
    }
  }
  /// The last inputs, where walks do not store theirs: row `index` of the ring.
  SSMLIB_DEVICE void store_last(index_t index) const {
    const index_t rows = o_.p.ring.extents[1];
    const index_t t = length_ - 1 - index;
    if (t >= 0 && index < rows) put_ring(t, row(t));
  }

 private:
  [[nodiscard]] SSMLIB_DEVICE R weight(int c, index_t j) const {
    return o_.p.weight.data[(channel_ + c) * o_.p.weight.strides[0] + j * o_.p.weight.strides[1]];
  }
  [[nodiscard]] SSMLIB_DEVICE static values widened(const numbers<T, count>& raw) {
    values v;
#pragma unroll
    for (int c = 0; c < count; ++c)
      v.v[c] = widen(raw.v[c]);
    return v;
  }
  [[nodiscard]] SSMLIB_DEVICE numbers<T, count> row(index_t t) const {
    return load_numbers<count>(o_.p.x.data + (begin_ + t) * o_.p.x.strides[0] + channel_, valid_,
                               o_.aligned);
  }
  [[nodiscard]] SSMLIB_DEVICE T* ring_row(index_t t) const {
    // One division a sequence: history is never farther away than the ring is long.
    const index_t rows = o_.p.ring.extents[1];
    index_t row = slot_ + (t < rows ? t : t % rows);
    if (row < 0) row += rows;
    if (row >= rows) row -= rows;
    return ring_ + row * o_.p.ring.strides[1];
  }
  /// The input of a token, which may be of an earlier call or before the sequence.
  [[nodiscard]] SSMLIB_DEVICE values input(index_t t) const {
    if (t >= 0) return widened(row(t));
    if (position_ + t < 0) return {};
    return widened(load_numbers<count>(ring_row(t), valid_, o_.aligned));
  }
  SSMLIB_DEVICE void put(index_t t, values sum) const {
    numbers<T, count> out;
#pragma unroll
    for (int c = 0; c < count; ++c) {
      if (o_.p.activation == conv1d_activation::silu) sum.v[c] = silu(sum.v[c]);
      out.v[c] = narrow<T>(sum.v[c]);
    }
    store_numbers<count>(o_.y.data + (begin_ + t) * o_.y.strides[0] + channel_, out, valid_,
                         o_.aligned);
  }
  SSMLIB_DEVICE void put_ring(index_t t, const numbers<T, count>& raw) const {
    store_numbers<count>(ring_row(t), raw, valid_, o_.aligned);
  }
  SSMLIB_DEVICE void store(index_t t, const numbers<T, count>& raw) const {
    if (o_.stores && t >= length_ - o_.p.ring.extents[1]) put_ring(t, raw);
  }

  const conv1d_step_arguments<T>& o_;
  index_t channel_;
  int valid_;
  index_t begin_, length_, position_, slot_;
  T* ring_;
};

template <class T, int Width>
__global__ void __launch_bounds__(conv1d_step_threads)
    conv1d_step_kernel(const __grid_constant__ conv1d_step_arguments<T> o) {
  const index_t i = index_t{blockIdx.x} * conv1d_step_threads + threadIdx.x;
  const index_t piece = i % o.pieces, walk = i / o.pieces % o.walks, s = i / o.pieces / o.walks;
  if (s >= o.p.sequences) return;
  conv1d_walker<T, Width>(o, s, piece * conv1d_step_channels<T>).walk(walk * conv1d_walk);
}

template <class T>
__global__ void __launch_bounds__(conv1d_step_threads)
    conv1d_ring_kernel(const __grid_constant__ conv1d_step_arguments<T> o, index_t rows) {
  const index_t i = index_t{blockIdx.x} * conv1d_step_threads + threadIdx.x;
  const index_t piece = i % o.pieces, row = i / o.pieces % rows, s = i / o.pieces / rows;
  if (s >= o.p.sequences) return;
  conv1d_walker<T, 0>(o, s, piece * conv1d_step_channels<T>).store_last(row);
}

template <class T>
void check_conv1d_step(const conv1d_step_problem<T>& p, const view<T, 2>& y) {
  const index_t channels = p.channels();
  const auto unit = [&](index_t stride) { return stride == 1 || channels <= 1; };
  const bool fits = p.weight.extent(0) == channels && p.width() >= 1 &&
                    p.ring.extent(0) == p.sequences && p.ring.extent(2) == channels &&
                    p.ring.extent(1) >= p.width() - 1 && y.extents == p.x.extents &&
                    unit(p.x.stride(1)) && unit(y.stride(1)) && unit(p.ring.stride(2)) &&
                    (p.position != nullptr || p.sequences == 0) &&
                    (p.offsets != nullptr || p.tokens() == p.sequences * p.max_length);
  if (fits) return;
  throw shape_error("ssm: conv1d_step: x is " + to_string(p.x.extents) + ", y " +
                    to_string(y.extents) + ", the weight " + to_string(p.weight.extents) +
                    " and the ring " + to_string(p.ring.extents) + " for " +
                    std::to_string(p.sequences) +
                    " sequences; wanted (tokens x channels) twice, (channels x width), (sequences "
                    "x at least width - 1 x channels), unit inner strides, and positions");
}

template <class T>
[[nodiscard]] unsigned conv1d_step_blocks(index_t threads) {
  const index_t blocks = (threads + conv1d_step_threads - 1) / conv1d_step_threads;
  if (blocks > std::numeric_limits<int>::max()) {
    throw shape_error("ssm: conv1d_step: " + std::to_string(threads) +
                      " pieces of sequences are more than a grid takes; cut the batch");
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace detail

template <class T>
void conv1d_step(cudaStream_t stream, const conv1d_step_problem<T>& p, view<T, 2> y) {
  using namespace detail;
  check_conv1d_step(p, y);
  if (p.sequences == 0 || p.channels() == 0 || p.max_length == 0) return;
  constexpr int count = conv1d_step_channels<T>;
  conv1d_step_arguments<T> o{p,
                             y,
                             (p.channels() + count - 1) / count,
                             (p.max_length + conv1d_walk - 1) / conv1d_walk,
                             false,
                             false,
                             false};
  o.aligned = rows_are_aligned(p.x.data, p.x.stride(0), count) &&
              rows_are_aligned(y.data, y.stride(0), count) &&
              rows_are_aligned(p.ring.data, p.ring.stride(0), count) &&
              rows_are_aligned(p.ring.data, p.ring.stride(1), count);
  const index_t rows = p.ring.extent(1);
  o.stores = o.walks == 1 && rows > 0;
  o.dense_weight = p.weight.stride(1) == 1 && p.weight.stride(0) == p.width() &&
                   reinterpret_cast<std::uintptr_t>(p.weight.data) % 16 == 0 &&
                   count * p.width() * static_cast<index_t>(sizeof(accum_t<T>)) % 16 == 0;
  const unsigned blocks = conv1d_step_blocks<T>(p.sequences * o.walks * o.pieces);
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, conv1d_step_threads, 0, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  switch (p.width()) {
    case 2:
      launch(conv1d_step_kernel<T, 2>);
      break;
    case 3:
      launch(conv1d_step_kernel<T, 3>);
      break;
    case 4:
      launch(conv1d_step_kernel<T, 4>);
      break;
    default:
      launch(conv1d_step_kernel<T, 0>);
  }
  if (o.stores || rows == 0) return;
  const index_t stored = std::min(rows, p.max_length);
  conv1d_ring_kernel<T>
      <<<conv1d_step_blocks<T>(p.sequences * stored * o.pieces), conv1d_step_threads, 0, stream>>>(
          o, stored);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)          \
  SSMLIB_INSTANTIATE(cuda_conv1d_step, \
                     void conv1d_step<T>(cudaStream_t, const conv1d_step_problem<T>&, view<T, 2>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
