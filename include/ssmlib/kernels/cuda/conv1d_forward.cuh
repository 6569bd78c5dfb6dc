#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/conv1d_parts.cuh>

/// @file
/// A thread owns Vector neighbouring channels and walks a run of tokens with the last inputs in
/// registers, so that memory is read once; rows are fetched several at a time.

namespace ssm::kernels::cuda {

namespace detail {

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

/// The gradient of row r of the final inputs goes to the token that it was, or to its row of the
/// initial state.
template <class T>
__global__ void conv1d_final_vjp_kernel(const __grid_constant__ conv1d_problem<T> p,
                                        view<const T, 3> d_final, view<T, 2> dx,
                                        view<T, 3> d_initial) {
  using R = accum_t<T>;
  const index_t channels = d_final.extents[2], rows = d_final.extents[1];
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= p.sequences * rows * channels) return;
  const index_t c = i % channels, r = i / channels % rows;
  const sequence_range s = sequence_at(p, i / channels / rows);
  const index_t t = s.end - rows + r, before = s.begin - t;
  T* to = nullptr;
  if (before <= 0 && dx.data) to = dx.data + t * dx.strides[0] + c;
  if (before > 0 && d_initial.data) {
    to = d_initial.data + s.sequence * d_initial.strides[0] +
         (rows - before) * d_initial.strides[1] + c;
  }
  if (to == nullptr) return;
  const T from = d_final.data[s.sequence * d_final.strides[0] + r * d_final.strides[1] + c];
  *to = narrow<T>(R(widen(*to)) + R(widen(from)));
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
  conv1d_final(stream, p, final);
}

template <class T>
void conv1d_final(cudaStream_t stream, const conv1d_problem<T>& p, view<T, 3> final) {
  const index_t channels = p.channels();
  if (final.data == nullptr || p.sequences * channels * (p.width() - 1) == 0) return;
  detail::conv1d_final_kernel<T>
      <<<detail::conv1d_grid((p.sequences * channels + 127) / 128), 128, 0, stream>>>(p, final);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void conv1d_final_vjp(cudaStream_t stream, const conv1d_problem<T>& p, view<const T, 3> d_final,
                      view<T, 2> dx, view<T, 3> d_initial) {
  if (d_final.extents[0] != p.sequences || (dx.data && dx.extents[1] != d_final.extents[2]) ||
      (d_initial.data && d_initial.extents != d_final.extents)) {
    throw shape_error("ssm: conv1d_final_vjp: the gradient of the last inputs is " +
                      to_string<3>(d_final.extents) + " for " + std::to_string(p.sequences) +
                      " sequences, dx is " + to_string<2>(dx.extents) + " and d_initial " +
                      to_string<3>(d_initial.extents) + "; wanted equal sizes");
  }
  const index_t count = d_final.size();
  if (count == 0 || (!dx.data && !d_initial.data)) return;
  detail::conv1d_final_vjp_kernel<T>
      <<<detail::conv1d_grid((count + 127) / 128), 128, 0, stream>>>(p, d_final, dx, d_initial);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(cuda_conv1d, void conv1d_forward<T>(cudaStream_t, const conv1d_problem<T>&, \
                                                         view<T, 2>, view<T, 3>));               \
  SSMLIB_INSTANTIATE(cuda_conv1d,                                                                \
                     void conv1d_final<T>(cudaStream_t, const conv1d_problem<T>&, view<T, 3>));  \
  SSMLIB_INSTANTIATE(cuda_conv1d,                                                                \
                     void conv1d_final_vjp<T>(cudaStream_t, const conv1d_problem<T>&,            \
                                              view<const T, 3>, view<T, 2>, view<T, 3>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
