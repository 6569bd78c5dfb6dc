#pragma once

#include <ssmlib/kernels/cuda/gated_parts.cuh>

/// @file
/// Gated linear attention and the delta rule token by token. A block owns 32 columns of a head's
/// state in registers: a warp some keys, a lane a column. Sums over keys go key by key inside a
/// warp, then warp by warp: one order for every token. The operands of the next token are under way
/// while a token is computed.

namespace ssm::kernels::cuda::detail::gated {

template <class T>
struct step_arguments {
  using R = accum_t<T>;
  sequence_rows rows;
  index_t heads;
  view<const T, 3> q, k, v;
  view<const R, 3> log_gate;         // gated linear attention
  view<const R, 2> log_decay, beta;  // the delta rule
  R alpha;
  view<T, 3> y;
  gated_states<T> states;
  state_ring<T> ring;
};

template <class T>
SSMLIB_DEVICE index_t head_offset(const view<T, 3>& x, index_t head, index_t heads) {
  return head * x.extents[1] / heads * x.strides[1];
}
template <class T>
SSMLIB_DEVICE index_t head_offset(const view<T, 2>& x, index_t head, index_t heads) {
  return head * x.extents[1] / heads * x.strides[1];
}

template <class T, int Keys, bool Delta>
__global__ void __launch_bounds__(threads, sizeof(accum_t<T>) == 8 ? 1 : Keys <= 16 ? 3 : 2)
    step_kernel(const __grid_constant__ step_arguments<T> o) {
  using R = accum_t<T>;
  constexpr int warps = threads / 32;
  __shared__ R staged[2][3][warps * Keys], partial[2][warps][32];
  const index_t keys = o.q.extents[2], features = o.v.extents[2], slices = (features + 31) / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mine = threadIdx.x;
  const index_t p = index_t{blockIdx.x} % slices * 32 + lane;
  const index_t head = blockIdx.x / slices % o.heads, i = blockIdx.x / slices / o.heads;
  const index_t begin = o.rows.begin(i), length = o.rows.length(i);
  const bool real_column = p < features, stages = mine < keys;
  R s[Keys];
  const auto each_key = [&](auto f) {
#pragma unroll
    for (int n = 0; n < Keys; ++n)
      if (warp * Keys + n < keys && real_column) f(warp * Keys + n, s[n]);
  };
  const auto store = [&](const view<R, 4>& to, index_t row) {
    each_key([&](int n, R& x) {
      to.data[row * to.strides[0] + head * to.strides[1] + n * to.strides[2] + p * to.strides[3]] =
          x;
    });
  };
#pragma unroll
  for (int n = 0; n < Keys; ++n)
    s[n] = R(0);
  if (o.states.initial.data != nullptr) {
    const auto& from = o.states.initial;
    each_key([&](int n, R& x) {
      x = from.data[i * from.strides[0] + head * from.strides[1] + n * from.strides[2] +
                    p * from.strides[3]];
    });
  }
  for (int n = threadIdx.x; n < 2 * 3 * warps * Keys; n += threads)
    staged[0][0][n] = R(0);  // keys that are not there
  __syncthreads();
  R q = R(0), k = R(0), gate = R(0), v = R(0), decay = R(0), beta = R(0);
  const auto fetch = [&](index_t t) {
    if (t >= length) return;
    const index_t row = begin + t;
    if (stages) {
      q = widen(o.q.data[row * o.q.strides[0] + head_offset(o.q, head, o.heads) + mine]);
      k = widen(o.k.data[row * o.k.strides[0] + head_offset(o.k, head, o.heads) + mine]);
      if constexpr (!Delta) {
        gate =
            o.log_gate
                .data[row * o.log_gate.strides[0] + head_offset(o.log_gate, head, o.heads) + mine];
      }
    }
    if (real_column) {
      v = widen(o.v.data[row * o.v.strides[0] + head_offset(o.v, head, o.heads) + p]);
    }
    if constexpr (Delta) {
      decay =
          o.log_decay.data[row * o.log_decay.strides[0] + head_offset(o.log_decay, head, o.heads)];
      beta = o.beta.data[row * o.beta.strides[0] + head_offset(o.beta, head, o.heads)];
    }
  };
  R value = R(0), kept = R(0), rate = R(0);  // of the token in hand
  const auto stage = [&](index_t t) {
    if (stages) {
      staged[t % 2][0][mine] = o.alpha * q;
      staged[t % 2][1][mine] = k;
      if constexpr (!Delta) staged[t % 2][2][mine] = ::exp(gate);
    }
  };
  fetch(0);
  stage(0);
  value = v, kept = ::exp(decay), rate = beta;
  fetch(1);
  __syncthreads();
  for (index_t t = 0; t < length; ++t) {
    if (o.ring.rows.data != nullptr && t >= length - o.ring.slots) {
      store(o.ring.rows, (o.ring.first_position[i] + t) % o.ring.slots * o.rows.sequences + i);
    }
    const R* query = staged[t % 2][0] + warp * Keys;
    const R* key = staged[t % 2][1] + warp * Keys;
    R sum = R(0), add = value;
    if constexpr (Delta) {
#pragma unroll
      for (int n = 0; n < Keys; ++n)
        sum += key[n] * s[n];
      partial[0][warp][lane] = sum;
      __syncthreads();
      sum = R(0);
#pragma unroll
      for (int w = 0; w < warps; ++w)
        sum += partial[0][w][lane];
      add = rate * (value - kept * sum);
      sum = R(0);
    }
#pragma unroll
    for (int n = 0; n < Keys; ++n) {
      R keep = kept;
      if constexpr (!Delta) keep = staged[t % 2][2][warp * Keys + n];
      s[n] = keep * s[n] + key[n] * add;
      sum += query[n] * s[n];
    }
    const int sums = Delta ? 1 : static_cast<int>(t % 2);
    partial[sums][warp][lane] = sum;
    stage(t + 1);
    value = v, kept = ::exp(decay), rate = beta;
    fetch(t + 2);
    __syncthreads();
    if (warp == 0 && real_column) {
      sum = R(0);
#pragma unroll
      for (int w = 0; w < warps; ++w)
        sum += partial[sums][w][lane];
      o.y.data[(begin + t) * o.y.strides[0] + head * o.y.strides[1] + p] = narrow<T>(sum);
    }
  }
  if (o.states.final.data != nullptr) store(o.states.final, i);
}

template <bool Delta, class T>
void launch_step(cudaStream_t stream, const step_arguments<T>& o) {
  const index_t keys = o.q.extent(2), slices = (o.v.extent(2) + 31) / 32;
  const index_t blocks = o.rows.sequences * o.heads * slices;
  if (keys <= 64) {
    launch(stream, step_kernel<T, 8, Delta>, blocks, 0, o);
  } else if (keys <= 128) {
    launch(stream, step_kernel<T, 16, Delta>, blocks, 0, o);
  } else {
    launch(stream, step_kernel<T, 32, Delta>, blocks, 0, o);
  }
}

}  // namespace ssm::kernels::cuda::detail::gated
