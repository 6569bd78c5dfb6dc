#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/conv1d.hpp>

#include <algorithm>
#include <string>

/// @file
/// A thread owns Vector neighbouring channels and walks a run of tokens with the last inputs in
/// registers, so that memory is read once; rows are fetched several at a time. Backward it carries
/// the gradients of the last inputs instead, complete after `width` tokens, and the sums for weight
/// and bias; four runs are added up in a block, blocks by a second kernel.

namespace ssm::kernels::cuda {

namespace detail {

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
#pragma unroll
    for (int e = 0; e < Vector; ++e) {
      bias[e] = p.bias ? R(widen(p.bias[c + e])) : R(0);
#pragma unroll
      for (int j = 0; j < Width; ++j)
        tap[j][e] = widen(p.weight.data[(c + e) * p.weight.strides[0] + j * p.weight.strides[1]]);
    }
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

template <class T, int Width, int Vector, conv1d_activation Activation>
__global__ void __launch_bounds__(128)
    conv1d_forward_kernel(const __grid_constant__ conv1d_problem<T> p,
                          const __grid_constant__ conv1d_targets<T> to) {
  using row = channel_row<T, Vector>;
  constexpr int batch = 8;
  const index_t columns = (p.x.extents[1] / Vector + 127) / 128;
  const index_t c = (index_t{blockIdx.x} % columns * 128 + threadIdx.x) * Vector;
  if (c >= p.x.extents[1]) return;
  const index_t tokens = p.x.extents[0], t0 = index_t{blockIdx.x} / columns * to.run;
  const index_t t1 = min(t0 + to.run, tokens);
  sequence_range s = sequence_of(p, t0);
  const conv1d_weights<T, Width, Vector> w(p, c);
  row before[Width - 1];
#pragma unroll
  for (int k = 0; k < Width - 1; ++k)
    before[k] = conv1d_input<Vector>(p, s, t0 - 1 - k, c);
  const T* x = p.x.data + t0 * p.x.strides[0] + c;
  T* y = to.y.data + t0 * to.y.strides[0] + c;
  for (index_t t = t0; t < t1; t += batch) {
    packed_t<T, Vector> raw[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      raw[k] = {};
      if (t + k < t1) raw[k] = *reinterpret_cast<const packed_t<T, Vector>*>(x);
      x += p.x.strides[0];
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (t + k >= t1) break;
      if (t + k == s.end) {
        s = sequence_after(p, s);
#pragma unroll
        for (int i = 0; i < Width - 1; ++i)
          before[i] = conv1d_input<Vector>(p, s, t + k - 1 - i, c);
      }
      row now, out;
      if constexpr (Vector == 1) {
        now = {widen(raw[k].v[0])};
      } else {
        now = widen(raw[k]);
      }
#pragma unroll
      for (int e = 0; e < Vector; ++e) {
        out.v[e] = w.sum(before, now, e);
        if constexpr (Activation == conv1d_activation::silu) out.v[e] = silu(out.v[e]);
      }
      store_channels<Vector>(y, out);
      y += to.y.strides[0];
      push_row<Width, T, Vector>(before, now);
    }
  }
}

/// The backward pass of one thread.
template <class T, int Width, int Vector, conv1d_activation Activation>
class conv1d_backward_run {
 public:
  using R = accum_t<T>;
  using row = channel_row<T, Vector>;
  static constexpr int batch = 4;

  const conv1d_problem<T>& p;
  const conv1d_targets<T>& to;
  index_t c, t0, t1;
  row d_tap[Width] = {}, d_bias = {};

  SSMLIB_DEVICE conv1d_backward_run(const conv1d_problem<T>& problem,
                                    const conv1d_targets<T>& targets, index_t channel,
                                    index_t begin)
      : p(problem),
        to(targets),
        c(channel),
        t0(begin),
        t1(min(begin + targets.run, problem.x.extents[0])) {}

  SSMLIB_DEVICE void run() {
    const index_t tokens = p.x.extents[0], stop = min(t1 + Width - 1, tokens);
    s_ = sequence_of(p, t0);
    const conv1d_weights<T, Width, Vector> w(p, c);
    row before[Width - 1];
#pragma unroll
    for (int k = 0; k < Width - 1; ++k) {
      before[k] = conv1d_input<Vector>(p, s_, t0 - 1 - k, c);
      open_[k] = {};
    }
    const T* x = p.x.data + t0 * p.x.strides[0] + c;
    const T* dy = to.dy.data + t0 * to.dy.strides[0] + c;
    for (index_t t = t0; t < stop; t += batch) {
      packed_t<T, Vector> raw_x[batch], raw_dy[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        raw_x[k] = {}, raw_dy[k] = {};
        if (t + k < stop) {
          raw_x[k] = *reinterpret_cast<const packed_t<T, Vector>*>(x);
          raw_dy[k] = *reinterpret_cast<const packed_t<T, Vector>*>(dy);
        }
        x += p.x.strides[0];
        dy += to.dy.strides[0];
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        if (t + k >= stop) break;
        if (t + k == s_.end) {
          close();
          if (t + k >= t1) return;
          s_ = sequence_after(p, s_);
#pragma unroll
          for (int i = 0; i < Width - 1; ++i)
            before[i] = conv1d_input<Vector>(p, s_, t + k - 1 - i, c);
        }
        row now, d;
        if constexpr (Vector == 1) {
          now = {widen(raw_x[k].v[0])}, d = {widen(raw_dy[k].v[0])};
        } else {
          now = widen(raw_x[k]), d = widen(raw_dy[k]);
        }
        row oldest;
#pragma unroll
        for (int e = 0; e < Vector; ++e) {
          if constexpr (Activation == conv1d_activation::silu) {
            d.v[e] *= silu_and_slope(w.sum(before, now, e)).slope;
          }
          if (t + k < t1) {
#pragma unroll
            for (int j = 0; j < Width - 1; ++j)
              d_tap[j].v[e] = fma(d.v[e], before[Width - 2 - j].v[e], d_tap[j].v[e]);
            d_tap[Width - 1].v[e] = fma(d.v[e], now.v[e], d_tap[Width - 1].v[e]);
            d_bias.v[e] += d.v[e];
          }
          // open_[i] belongs to the token i + 1 back.
          oldest.v[e] = fma(w.tap[0][e], d.v[e], open_[Width - 2].v[e]);
#pragma unroll
          for (int i = Width - 2; i > 0; --i)
            open_[i].v[e] = fma(w.tap[Width - 1 - i][e], d.v[e], open_[i - 1].v[e]);
          open_[0].v[e] = w.tap[Width - 1][e] * d.v[e];
        }
        store(t + k - (Width - 1), oldest);
        push_row<Width, T, Vector>(before, now);
      }
    }
    if (stop == s_.end) close();
  }

 private:
  /// The gradients that no further token of the sequence adds to.
  SSMLIB_DEVICE void close() {
#pragma unroll
    for (int i = Width - 2; i >= 0; --i) {
      if (to.d_final.data) {
        const row more =
            load_channels<Vector>(to.d_final.data + s_.sequence * to.d_final.strides[0] +
                                  (Width - 2 - i) * to.d_final.strides[1] + c);
#pragma unroll
        for (int e = 0; e < Vector; ++e)
          open_[i].v[e] += more.v[e];
      }
      store(s_.end - 1 - i, open_[i]);
      open_[i] = {};
    }
  }
  /// Of token t of the sequence or of its initial state, if this run is the one to write it.
  SSMLIB_DEVICE void store(index_t t, const row& x) const {
    if (t >= s_.begin) {
      if (t < t0 || t >= t1 || to.dx.data == nullptr) return;
      put(to.dx.data + t * to.dx.strides[0] + c, x);
    } else {
      if (s_.begin < t0 || s_.begin >= t1 || to.d_initial.data == nullptr) return;
      put(to.d_initial.data + s_.sequence * to.d_initial.strides[0] +
              (t - s_.begin + Width - 1) * to.d_initial.strides[1] + c,
          x);
    }
  }
  SSMLIB_DEVICE void put(T* at, row x) const {
    if (to.add) {
      const row old = load_channels<Vector>(static_cast<const T*>(at));
#pragma unroll
      for (int e = 0; e < Vector; ++e)
        x.v[e] += old.v[e];
    }
    store_channels<Vector>(at, x);
  }

  sequence_range s_;
  row open_[Width - 1];
};

template <class T, int Width, int Vector, conv1d_activation Activation>
__global__ void __launch_bounds__(128)
    conv1d_backward_kernel(const __grid_constant__ conv1d_problem<T> p,
                           const __grid_constant__ conv1d_targets<T> to) {
  using R = accum_t<T>;
  using row = channel_row<T, Vector>;
  const index_t channels = p.x.extents[1], columns = (channels / Vector + 31) / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t c = (index_t{blockIdx.x} % columns * 32 + lane) * Vector;
  const index_t four = index_t{blockIdx.x} / columns, run = four * 4 + warp;
  conv1d_backward_run<T, Width, Vector, Activation> own(p, to, c, run * to.run);
  if (c < channels && run < to.runs) own.run();
  if (to.parts == nullptr) return;
  __shared__ row shared[4][Width + 1][32];
#pragma unroll
  for (int j = 0; j < Width; ++j)
    shared[warp][j][lane] = own.d_tap[j];
  shared[warp][Width][lane] = own.d_bias;
  __syncthreads();
  if (c >= channels) return;
  for (int j = warp; j <= Width; j += 4) {
    row sum = shared[0][j][lane];
#pragma unroll
    for (int i = 1; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < Vector; ++e)
        sum.v[e] += shared[i][j][lane].v[e];
    R* part = to.parts + (four * (Width + 1) + j) * channels + c;
#pragma unroll
    for (int e = 0; e < Vector; ++e)
      part[e] = sum.v[e];
  }
}

/// Sums over the runs; row `width` of a part is the bias.
template <class R>
__global__ void conv1d_sum_kernel(const R* parts, index_t count, index_t channels, index_t width,
                                  R* d_weight, R* d_bias, bool add) {
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= (width + 1) * channels) return;
  const index_t j = i / channels, c = i % channels;
  R* to = j == width ? d_bias + c : d_weight + c * width + j;
  if (j == width ? d_bias == nullptr : d_weight == nullptr) return;
  R sum = R(0);
#pragma unroll 8
  for (index_t k = 0; k < count; ++k)
    sum += parts[k * (width + 1) * channels + i];
  *to = add ? *to + sum : sum;
}

/// Any width, a thread an element.
template <class T>
SSMLIB_DEVICE accum_t<T> conv1d_sum_any(const conv1d_problem<T>& p, const sequence_range& s,
                                        index_t t, index_t c) {
  using R = accum_t<T>;
  const index_t width = p.weight.extents[1];
  R x = p.bias ? R(widen(p.bias[c])) : R(0);
  for (index_t j = 0; j < width; ++j) {
    x = fma(R(widen(p.weight.data[c * p.weight.strides[0] + j * p.weight.strides[1]])),
            conv1d_input<1>(p, s, t - (width - 1) + j, c).v[0], x);
  }
  return x;
}
template <class T>
SSMLIB_DEVICE accum_t<T> conv1d_slope_any(const conv1d_problem<T>& p, const view<const T, 2>& dy,
                                          const sequence_range& s, index_t t, index_t c) {
  const accum_t<T> d = widen(dy.data[t * dy.strides[0] + c]);
  if (p.activation == conv1d_activation::none) return d;
  return d * silu_and_slope(conv1d_sum_any(p, s, t, c)).slope;
}

template <class T>
__global__ void conv1d_forward_any_kernel(const __grid_constant__ conv1d_problem<T> p,
                                          view<T, 2> y) {
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x, channels = p.x.extents[1];
  if (i >= p.x.extents[0] * channels) return;
  const index_t t = i / channels, c = i % channels;
  const auto pre = conv1d_sum_any(p, sequence_of(p, t), t, c);
  y.data[t * y.strides[0] + c] =
      narrow<T>(p.activation == conv1d_activation::silu ? silu(pre) : pre);
}

/// Gradients of token t, or for t < 0 of row t of the initial states.
template <class T>
__global__ void conv1d_inputs_any_kernel(const __grid_constant__ conv1d_problem<T> p,
                                         const __grid_constant__ conv1d_targets<T> to) {
  using R = accum_t<T>;
  const index_t channels = p.x.extents[1], width = p.weight.extents[1];
  index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const index_t inner = p.x.extents[0] * channels;
  if (i >= inner + p.sequences * (width - 1) * channels) return;
  const index_t c = i % channels;
  sequence_range s;
  index_t t;
  T* at;
  if (i < inner) {
    t = i / channels;
    s = sequence_of(p, t);
    if (to.dx.data == nullptr) return;
    at = to.dx.data + t * to.dx.strides[0] + c;
  } else {
    const index_t row = (i - inner) / channels % (width - 1);
    s = sequence_at(p, (i - inner) / (channels * (width - 1)));
    t = s.begin - (width - 1) + row;
    if (to.d_initial.data == nullptr) return;
    at = to.d_initial.data + s.sequence * to.d_initial.strides[0] + row * to.d_initial.strides[1] +
         c;
  }
  R sum = R(0);
  for (index_t k = max(t, s.begin); k < min(t + width, s.end); ++k) {
    const R tap =
        widen(p.weight.data[c * p.weight.strides[0] + (width - 1 - (k - t)) * p.weight.strides[1]]);
    sum = fma(tap, conv1d_slope_any(p, to.dy, s, k, c), sum);
  }
  if (to.d_final.data && t >= s.end - (width - 1)) {
    sum += widen(to.d_final.data[s.sequence * to.d_final.strides[0] +
                                 (t - s.end + width - 1) * to.d_final.strides[1] + c]);
  }
  *at = narrow<T>(to.add ? R(widen(*at)) + sum : sum);
}

template <class T>
__global__ void conv1d_weights_any_kernel(const __grid_constant__ conv1d_problem<T> p,
                                          const __grid_constant__ conv1d_targets<T> to) {
  using R = accum_t<T>;
  const index_t channels = p.x.extents[1], width = p.weight.extents[1];
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const index_t parts = (to.runs + 3) / 4;
  if (i >= parts * (width + 1) * channels) return;
  const index_t c = i % channels, j = i / channels % (width + 1);
  const index_t t0 = i / (channels * (width + 1)) * 4 * to.run;
  sequence_range s = sequence_of(p, t0);
  R sum = R(0);
  for (index_t t = t0; t < min(t0 + 4 * to.run, p.x.extents[0]); ++t) {
    if (t == s.end) s = sequence_after(p, s);
    const R x = j == width ? R(1) : conv1d_input<1>(p, s, t - (width - 1) + j, c).v[0];
    sum = fma(conv1d_slope_any(p, to.dy, s, t, c), x, sum);
  }
  to.parts[i] = sum;
}

/// Row r of `final` becomes the input `rows - r` tokens before the end of its sequence. Upwards, so
/// that it may be the initial state.
template <class T>
__global__ void conv1d_final_kernel(const __grid_constant__ conv1d_problem<T> p, view<T, 3> final) {
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x, channels = p.x.extents[1];
  if (i >= p.sequences * channels) return;
  const index_t c = i % channels, rows = final.extents[1];
  const sequence_range s = sequence_at(p, i / channels);
  for (index_t r = 0; r < rows; ++r) {
    final.data[s.sequence * final.strides[0] + r * final.strides[1] + c] =
        narrow<T>(conv1d_input<1>(p, s, s.end - rows + r, c).v[0]);
  }
}

/// d_initial of sequences without tokens: d_final.
template <class T>
__global__ void conv1d_empty_kernel(const __grid_constant__ conv1d_problem<T> p,
                                    const __grid_constant__ conv1d_targets<T> to) {
  using R = accum_t<T>;
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x, channels = p.x.extents[1];
  if (i >= p.sequences * channels) return;
  const index_t c = i % channels;
  const sequence_range s = sequence_at(p, i / channels);
  if (s.begin != s.end) return;
  for (index_t r = 0; r < to.d_initial.extents[1]; ++r) {
    R x = R(0);
    if (to.d_final.data) {
      x = widen(
          to.d_final.data[s.sequence * to.d_final.strides[0] + r * to.d_final.strides[1] + c]);
    }
    T& at =
        to.d_initial.data[s.sequence * to.d_initial.strides[0] + r * to.d_initial.strides[1] + c];
    at = narrow<T>(to.add ? R(widen(at)) + x : x);
  }
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

}  // namespace detail

template <class T>
void conv1d_forward(cudaStream_t stream, const conv1d_problem<T>& p, view<T, 2> y,
                    view<T, 3> final) {
  detail::check_conv1d("conv1d_forward", p, y.extents);
  const index_t tokens = p.tokens(), channels = p.channels();
  if (tokens * channels > 0 && !detail::usual_width(p.width())) {
    detail::conv1d_forward_any_kernel<T>
        <<<detail::conv1d_grid((tokens * channels + 255) / 256), 256, 0, stream>>>(p, y);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  } else if (tokens * channels > 0) {
    constexpr int vector = sizeof(T) == 8 ? 2 : 4;
    const bool aligned = channels % vector == 0 && detail::conv1d_rows_aligned(p.x) &&
                         detail::conv1d_rows_aligned(y) && detail::conv1d_rows_aligned(p.initial);
    detail::with_conv1d_kernel<T>(
        p.width(), aligned, p.activation,
        [&]<int Width, int Vector, conv1d_activation Activation>() {
          detail::conv1d_targets<T> to;
          to.y = y;
          to.run = round_up(detail::conv1d_run(tokens, channels / Vector) / 2, 8);
          const index_t columns = (channels / Vector + 127) / 128;
          const index_t runs = (tokens + to.run - 1) / to.run;
          detail::conv1d_forward_kernel<T, Width, Vector, Activation>
              <<<detail::conv1d_grid(columns * runs), 128, 0, stream>>>(p, to);
          SSMLIB_CHECK_CUDA(cudaGetLastError());
        });
  }
  if (final.data && p.sequences * channels * (p.width() - 1) > 0) {
    detail::conv1d_final_kernel<T>
        <<<detail::conv1d_grid((p.sequences * channels + 127) / 128), 128, 0, stream>>>(p, final);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }
}

template <class T>
std::size_t conv1d_backward_workspace_bytes(const conv1d_problem<T>& p) {
  const index_t run = detail::conv1d_run(p.tokens(), p.channels() / 4);
  const index_t parts = (p.tokens() + 4 * run - 1) / (4 * run);
  return static_cast<std::size_t>(parts * (p.width() + 1) * p.channels()) * sizeof(accum_t<T>);
}

template <class T>
void conv1d_backward(cudaStream_t stream, const conv1d_problem<T>& p, view<const T, 2> dy,
                     view<const T, 3> d_final, const conv1d_gradients<T>& d, void* workspace) {
  detail::check_conv1d("conv1d_backward", p, dy.extents);
  const index_t tokens = p.tokens(), channels = p.channels(), width = p.width();
  detail::conv1d_targets<T> to;
  to.dy = dy;
  to.d_final = d_final;
  to.dx = d.x;
  to.d_initial = d.initial;
  to.add = d.add;
  const bool sums = d.weight || d.bias;
  to.parts = sums ? static_cast<accum_t<T>*>(workspace) : nullptr;
  to.run = detail::conv1d_run(tokens, channels / 4);
  to.runs = (tokens + to.run - 1) / to.run;
  const index_t parts = (to.runs + 3) / 4;
  const auto blocks = [](index_t threads, int block) {
    return detail::conv1d_grid((threads + block - 1) / block);
  };
  if (tokens * channels > 0 && detail::usual_width(width)) {
    constexpr int vector = sizeof(T) == 8 ? 2 : 4;
    const bool aligned = channels % vector == 0 && detail::conv1d_rows_aligned(p.x) &&
                         detail::conv1d_rows_aligned(dy) &&
                         detail::conv1d_rows_aligned(p.initial) &&
                         detail::conv1d_rows_aligned(d.x) && detail::conv1d_rows_aligned(d_final) &&
                         detail::conv1d_rows_aligned(d.initial);
    detail::with_conv1d_kernel<T>(
        width, aligned, p.activation, [&]<int Width, int Vector, conv1d_activation Activation>() {
          const index_t columns = (channels / Vector + 31) / 32;
          detail::conv1d_backward_kernel<T, Width, Vector, Activation>
              <<<detail::conv1d_grid(columns * parts), 128, 0, stream>>>(p, to);
          SSMLIB_CHECK_CUDA(cudaGetLastError());
        });
    if (d.initial.data) {
      detail::conv1d_empty_kernel<T>
          <<<blocks(p.sequences * channels, 128), 128, 0, stream>>>(p, to);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    }
  } else {
    const index_t rows = tokens + (d.initial.data ? p.sequences * (width - 1) : 0);
    if (rows * channels > 0) {
      detail::conv1d_inputs_any_kernel<T><<<blocks(rows * channels, 128), 128, 0, stream>>>(p, to);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    }
    if (sums && tokens * channels > 0) {
      detail::conv1d_weights_any_kernel<T>
          <<<blocks(parts * (width + 1) * channels, 128), 128, 0, stream>>>(p, to);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    }
  }
  if (!sums || channels == 0) return;
  detail::conv1d_sum_kernel<<<blocks((width + 1) * channels, 64), 64, 0, stream>>>(
      to.parts, parts, channels, width, d.weight, d.bias, d.add);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(cuda_conv1d, void conv1d_forward<T>(cudaStream_t, const conv1d_problem<T>&,  \
                                                         view<T, 2>, view<T, 3>));                \
  SSMLIB_INSTANTIATE(cuda_conv1d,                                                                 \
                     std::size_t conv1d_backward_workspace_bytes<T>(const conv1d_problem<T>&));   \
  SSMLIB_INSTANTIATE(cuda_conv1d, void conv1d_backward<T>(cudaStream_t, const conv1d_problem<T>&, \
                                                          view<const T, 2>, view<const T, 3>,     \
                                                          const conv1d_gradients<T>&, void*))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
