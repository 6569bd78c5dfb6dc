#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/conv1d_parts.cuh>

/// @file
/// As forward, a thread walks a run of tokens, but carries the gradients of the last inputs,
/// complete after `width` tokens, and the sums for weight and bias; four runs are added up in a
/// block, blocks by a second kernel.

namespace ssm::kernels::cuda {

namespace detail {

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

template <class T>
SSMLIB_DEVICE accum_t<T> conv1d_slope_any(const conv1d_problem<T>& p, const view<const T, 2>& dy,
                                          const sequence_range& s, index_t t, index_t c) {
  const accum_t<T> d = widen(dy.data[t * dy.strides[0] + c]);
  if (p.activation == conv1d_activation::none) return d;
  return d * silu_and_slope(conv1d_sum_any(p, s, t, c)).slope;
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
        p.weight.data[c * p.weight.strides[0] + (width - 1 - (k - t)) * p.weight.strides[1]];
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

}  // namespace detail

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
