#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/ssd_step_parts.cuh>

#include <cstdint>
#include <limits>
#include <string>

namespace ssm::kernels::cuda {

namespace detail {

/// Eight consecutive elements of the state in 16 or 32 bytes.
template <class S>
struct state_piece;
template <>
struct state_piece<float> {
  float4 raw[2];

  SSMLIB_DEVICE void load(const float* p) {
    raw[0] = reinterpret_cast<const float4*>(p)[0];
    raw[1] = reinterpret_cast<const float4*>(p)[1];
  }
  SSMLIB_DEVICE void unpack(float (&v)[8]) const {
    v[0] = raw[0].x, v[1] = raw[0].y, v[2] = raw[0].z, v[3] = raw[0].w;
    v[4] = raw[1].x, v[5] = raw[1].y, v[6] = raw[1].z, v[7] = raw[1].w;
  }
  static SSMLIB_DEVICE void store(float* p, const float (&v)[8]) {
    reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
  static SSMLIB_DEVICE void round(float (&)[8]) {}
};
template <>
struct state_piece<bf16> {
  uint4 raw;

  SSMLIB_DEVICE void load(const bf16* p) { raw = *reinterpret_cast<const uint4*>(p); }
  SSMLIB_DEVICE void unpack(float (&v)[8]) const {
    const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static SSMLIB_DEVICE uint4 pack(const float (&v)[8]) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                      pack_bf16(v[6], v[7]));
  }
  static SSMLIB_DEVICE void store(bf16* p, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(p) = pack(v);
  }
  static SSMLIB_DEVICE void round(float (&v)[8]) {
    state_piece{pack(v)}.unpack(v);
  }
};

inline constexpr int step_batch = 2;  // tokens between two barriers
inline constexpr int step_keys = 4;   // of the state that a thread holds
inline constexpr int step_width = 4;  // of the convolution, at most

/// Shared memory of step_kernel.
template <int P, int N>
struct step_shared {
  float x[2][step_batch][P];  // of two batches: outputs of one are written while the next starts
  float b[step_batch][N], c[step_batch][N];
  float sums[step_batch][P * N / (8 * step_keys) / 32][P];
  step_decay<float> decay[step_batch];
};

/// A block holds the state of one head, a thread eight features of four keys.
template <class T, class S, int P, int N>
class register_step {
 public:
  static constexpr int threads = P * N / (8 * step_keys), lanes = P / 8;
  static constexpr int channels = (P + 2 * N + threads - 1) / threads;

  SSMLIB_DEVICE register_step(const step_place<T, S>& place, step_shared<P, N>& shared)
      : at_(place),
        a_(place.a),
        shared_(shared),
        feature_(static_cast<int>(threadIdx.x) % lanes * 8),
        key_(static_cast<int>(threadIdx.x) / lanes * step_keys) {}

  SSMLIB_DEVICE void load() {
    const S* const from = at_.state() + key_ * a_.state_step + feature_;
    state_piece<S> pieces[step_keys];
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      pieces[i].load(from + i * a_.state_step);
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      pieces[i].unpack(h_[i]);
  }
  SSMLIB_DEVICE void store() const {
    S* const to = at_.state() + key_ * a_.state_step + feature_;
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      state_piece<S>::store(to + i * a_.state_step, h_[i]);
  }

  /// Asks for what the convolution of the tokens from `first` on needs besides their own inputs.
  SSMLIB_DEVICE void prepare(int first) {
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int c = static_cast<int>(threadIdx.x) + i * threads;
      if (c < P + 2 * N) {
        const int channel = at_.channel(c);
        bias_[i] = a_.conv_bias != nullptr ? a_.conv_bias[channel] : 0.0f;
#pragma unroll
        for (int j = 0; j < step_width; ++j) {
          const int back = step_width - 1 - j;
          taps_[i][j] = back < a_.width
                            ? a_.taps[index_t{a_.width - 1 - back} * a_.channels + channel]
                            : 0.0f;
          if (back > 0) past_[i][j] = back < a_.width ? widen(at_.input(first - back, channel)) : 0;
        }
      }
    }
  }
  /// Tokens [first, first + count), count <= step_batch, for which prepare(first) was called.
  template <bool Put>
  SSMLIB_DEVICE void take(int first, int count, bool last) {
    const int own = threadIdx.x;  // of the outputs, the first that this thread puts
    float gate = 1.0f;
    if (Put && own < count * P) gate = at_.gate(first + own / P, own % P);
    convolve(first, count);
    const int decay_thread = threads - 32;
    if (static_cast<int>(threadIdx.x) >= decay_thread &&
        static_cast<int>(threadIdx.x) < decay_thread + count) {
      const int e = static_cast<int>(threadIdx.x) - decay_thread;
      shared_.decay[e] = at_.decay(first + e);
    }
    __syncthreads();
    for (int e = 0; e < count; ++e)
      advance<Put>(e, last && e == count - 1);
    __syncthreads();
    if constexpr (Put) {
      for (int i = own; i < count * P; i += threads) {
        const int e = i / P, p = i % P;
        float sum = shared_.sums[e][0][p];
#pragma unroll
        for (int w = 1; w < threads / 32; ++w)
          sum += shared_.sums[e][w][p];
        if (i != own) gate = at_.gate(first + e, p);
        at_.put(first + e, p, sum, shared_.x[half_][e][p], gate);
      }
    }
    half_ ^= 1;
  }

 private:
  SSMLIB_DEVICE void convolve(int first, int count) {
    T inputs[channels][step_batch];
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int c = static_cast<int>(threadIdx.x) + i * threads;
#pragma unroll
      for (int e = 0; e < step_batch; ++e) {
        if (c < P + 2 * N && e < count) inputs[i][e] = at_.input(first + e, at_.channel(c));
      }
    }
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int c = static_cast<int>(threadIdx.x) + i * threads;
      if (c < P + 2 * N) {
        float* const to = c < P       ? &shared_.x[half_][0][c]
                          : c < P + N ? &shared_.b[0][c - P]
                                      : &shared_.c[0][c - P - N];
        const int step = c < P ? P : N;
        const bool keep = first >= 0 && at_.keeps(c);
#pragma unroll
        for (int e = 0; e < step_batch; ++e) {
          if (e < count) {
            if (keep) *at_.ring_input(first + e, at_.channel(c)) = inputs[i][e];
            const float input = widen(inputs[i][e]);
            float sum = bias_[i];
#pragma unroll
            for (int j = 0; j < step_width - 1; ++j)
              sum = fmaf(taps_[i][j], past_[i][j], sum);
            sum = fmaf(taps_[i][step_width - 1], input, sum);
#pragma unroll
            for (int j = 0; j + 2 < step_width; ++j)
              past_[i][j] = past_[i][j + 1];
            past_[i][step_width - 2] = input;
            to[e * step] = a_.activate ? silu_of(sum) : sum;
          }
        }
      }
    }
  }

  template <bool Put>
  SSMLIB_DEVICE void advance(int e, bool last) {
    const step_decay<float> decay = shared_.decay[e];
    float u[8], sums[8] = {};
#pragma unroll
    for (int p = 0; p < 8; ++p)
      u[p] = decay.delta * shared_.x[half_][e][feature_ + p];
    if (decay.factor == 0.0f && !decay.near_one) {
      // A reset forgets whatever was there, infinities too.
#pragma unroll
      for (int i = 0; i < 8 * step_keys; ++i)
        h_[i / 8][i % 8] = 0.0f;
    }
    if (decay.near_one) {
      move<Put, true>(e, decay.factor, u, sums);
    } else {
      move<Put, false>(e, decay.factor, u, sums);
    }
    if (!last) {
#pragma unroll
      for (int i = 0; i < step_keys; ++i)
        state_piece<S>::round(h_[i]);
    }
    if constexpr (Put) add_keys(e, sums);
  }
  template <bool Put, bool NearOne>
  SSMLIB_DEVICE void move(int e, float factor, const float (&u)[8], float (&sums)[8]) {
#pragma unroll
    for (int i = 0; i < step_keys; ++i) {
      const float b = shared_.b[e][key_ + i], c = shared_.c[e][key_ + i];
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        const float moved = fmaf(factor, h_[i][p], b * u[p]);
        h_[i][p] = NearOne ? h_[i][p] + moved : moved;
        if constexpr (Put) sums[p] = fmaf(c, h_[i][p], sums[p]);
      }
    }
  }
  /// Adds the sums of the lanes that hold the same features; each ends with a part of them.
  SSMLIB_DEVICE void add_keys(int e, const float (&sums)[8]) {
    const int lane = threadIdx.x % 32;
    float four[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float mine = lane & 16 ? sums[p + 4] : sums[p],
                  other = lane & 16 ? sums[p] : sums[p + 4];
      four[p] = mine + __shfl_xor_sync(0xffffffffu, other, 16);
    }
    float* to = &shared_.sums[e][threadIdx.x / 32][feature_ + (lane & 16) / 4];
    if constexpr (lanes == 16) {
      *reinterpret_cast<float4*>(to) = make_float4(four[0], four[1], four[2], four[3]);
    } else {
      static_assert(lanes == 8);
      float two[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const float mine = lane & 8 ? four[p + 2] : four[p],
                    other = lane & 8 ? four[p] : four[p + 2];
        two[p] = mine + __shfl_xor_sync(0xffffffffu, other, 8);
      }
      *reinterpret_cast<float2*>(to + (lane & 8) / 4) = make_float2(two[0], two[1]);
    }
  }

  const step_place<T, S>& at_;
  const step_arguments<T, S>& a_;
  step_shared<P, N>& shared_;
  int feature_, key_, half_ = 0;
  float h_[step_keys][8];
  float taps_[channels][step_width], past_[channels][step_width - 1], bias_[channels];
};

template <class T, class S, int P, int N>
__global__ void __launch_bounds__(P* N / (8 * step_keys),
                                  P* N < 16384 ? 768 / (P * N / (8 * step_keys)) : 1)
    step_kernel(const step_arguments<T, S> a) {
  __shared__ __align__(16) step_shared<P, N> shared;
  if (a.early) {
    let_next_kernel_start();
  } else {
    wait_for_kernel_ahead();
  }
  step_place<T, S> at(a, blockIdx.x);
  register_step<T, S, P, N> step(at, shared);
  step.load();
  const bool replay = a.pending != nullptr;
  // What was taken before needs nothing of the kernel ahead.
  if (replay) {
    const int pending = a.pending[at.sequence];
    for (int j = -pending; j < 0; j += step_batch) {
      step.prepare(j);
      step.template take<false>(j, min(step_batch, -j), false);
    }
    if (pending > 0) step.store();
  }
  step.prepare(0);
  if (a.early) {
    wait_for_kernel_ahead();
  } else {
    let_next_kernel_start();
  }
  at.find_tokens();
  for (int j = 0; j < at.count; j += step_batch) {
    if (j > 0) step.prepare(j);
    const int count = min(step_batch, at.count - j);
    step.template take<true>(j, count, j + count == at.count);
  }
  if (!replay && at.count > 0) step.store();
}

template <class T, class S>
void check_step(const ssd_step_problem<T, S>& p) {
  const index_t inner = p.heads * p.features, channels = inner + 2 * p.groups * p.key_size;
  const auto rows = [](const auto& v, index_t columns) {
    return v.extent(1) == columns && (v.stride(1) == 1 || columns <= 1);
  };
  const bool fits = p.heads > 0 && p.groups > 0 && p.heads % p.groups == 0 &&
                    rows(p.xbc, channels) && rows(p.dt, p.heads) && rows(p.y, inner) &&
                    (!p.z || rows(p.z, inner)) && p.ring.inputs.extent(0) == p.sequences &&
                    p.ring.inputs.extent(2) == channels &&
                    p.state.extents == shape<4>{p.sequences, p.heads, p.key_size, p.features} &&
                    (p.state.stride(3) == 1 || p.features == 1) &&
                    (p.pending == nullptr ||
                     p.ring.dt.extents == shape<3>{p.sequences, p.ring.inputs.extent(1), p.heads});
  if (!fits) {
    throw shape_error(
        "ssm: ssd_step_forward: with " + std::to_string(p.sequences) + " sequences, " +
        std::to_string(p.heads) + " heads of " + std::to_string(p.features) + " features, " +
        std::to_string(p.groups) + " groups and key size " + std::to_string(p.key_size) +
        " xbc is " + to_string(p.xbc.extents) + ", the ring " + to_string(p.ring.inputs.extents) +
        ", the state " + to_string(p.state.extents) +
        "; wanted channels heads * features + 2 groups * key size and a state of (sequences x "
        "heads x key size x features)");
  }
  const index_t rows_needed = p.width - 1 + p.max_length + (p.pending ? p.max_pending : 0);
  if (p.max_length > step_tokens || p.max_pending > step_tokens || p.width < 1 ||
      p.ring.inputs.extent(1) < rows_needed || p.position == nullptr) {
    throw value_error("ssm: ssd_step_forward: " + std::to_string(p.max_length) + " tokens, " +
                      std::to_string(p.max_pending) + " to replay and a ring of " +
                      std::to_string(p.ring.inputs.extent(1)) +
                      " rows; wanted at most 16 of each, positions and " +
                      std::to_string(rows_needed) + " rows");
  }
  constexpr index_t limit = std::numeric_limits<std::int32_t>::max();
  if (p.sequences * p.heads > limit || channels > limit || p.ring.inputs.extent(1) > limit / 2) {
    throw shape_error("ssm: ssd_step_forward: " + std::to_string(p.sequences) + " sequences of " +
                      std::to_string(p.heads) + " heads with " + std::to_string(channels) +
                      " channels, wanted fewer than 2^31 heads in all and channels");
  }
}

template <class T, class S>
[[nodiscard]] step_arguments<T, S> arguments_of(const ssd_step_problem<T, S>& p) {
  const auto& in = p.ring.inputs;
  const auto whole = [](index_t n) { return static_cast<int>(n); };
  return {whole(p.heads),
          whole(p.groups),
          whole(p.features),
          whole(p.key_size),
          whole(p.max_length),
          whole(p.xbc.extent(1)),
          p.offsets,
          p.xbc.data,
          p.dt.data,
          p.z.data,
          p.xbc.stride(0),
          p.dt.stride(0),
          p.z.stride(0),
          p.taps,
          p.conv_bias,
          whole(p.width),
          p.activate,
          p.a,
          p.dt_bias,
          p.d,
          p.low,
          p.high,
          in.data,
          p.ring.dt.data,
          whole(in.extent(1)),
          in.stride(0),
          in.stride(1),
          p.ring.dt.stride(0),
          p.ring.dt.stride(1),
          p.position,
          p.state.data,
          p.state.stride(0),
          p.state.stride(1),
          p.state.stride(2),
          p.y.data,
          p.y.stride(0),
          p.pending,
          p.early};
}

template <class T, class S>
[[nodiscard]] bool state_aligned(const view<S, 4>& s) {
  bool aligned = reinterpret_cast<std::uintptr_t>(s.data) % 16 == 0 && s.stride(3) == 1;
  for (int d = 0; d < 3; ++d)
    aligned = aligned && s.stride(d) * static_cast<index_t>(sizeof(S)) % 16 == 0;
  return aligned;
}

}  // namespace detail

template <class T, class S>
void ssd_step_forward(cudaStream_t stream, const ssd_step_problem<T, S>& p) {
  detail::check_step(p);
  if (p.sequences == 0 || p.features == 0) return;
  const detail::step_arguments<T, S> a = detail::arguments_of(p);
  const index_t blocks = p.sequences * p.heads;
  if constexpr (!std::is_same_v<T, double>) {
    const auto launch = [&](auto features, auto keys) {
      constexpr int P = decltype(features)::value, N = decltype(keys)::value;
      if (p.features != P || p.key_size != N) return false;
      launch_overlapped(stream, detail::step_kernel<T, S, P, N>, blocks,
                        P * N / (8 * detail::step_keys), 0, 1, a);
      return true;
    };
    using std::integral_constant;
    const bool fast = p.width <= detail::step_width && detail::state_aligned<T>(p.state);
    if (fast && (launch(integral_constant<int, 64>{}, integral_constant<int, 128>{}) ||
                 launch(integral_constant<int, 64>{}, integral_constant<int, 64>{}) ||
                 launch(integral_constant<int, 64>{}, integral_constant<int, 256>{}) ||
                 launch(integral_constant<int, 128>{}, integral_constant<int, 128>{}))) {
      return;
    }
  }
  const std::size_t shared = detail::step_general_shared<accum_t<T>>(p.key_size);
  if (shared > 220 * 1024) {
    throw shape_error("ssm: ssd_step_forward: key size " + std::to_string(p.key_size) +
                      " does not fit the shared memory of a block, wanted at most " +
                      std::to_string(220 * 1024 / (2 * 16 * sizeof(accum_t<T>))));
  }
  launch_overlapped(stream, detail::general_step_kernel<T, S>, blocks, detail::step_general_threads,
                    shared, 1, a);
}

#define SSMLIB_DETAIL_LIST(T, S)    \
  SSMLIB_INSTANTIATE(cuda_ssd_step, \
                     void ssd_step_forward<T, S>(cudaStream_t, const ssd_step_problem<T, S>&))
SSMLIB_DETAIL_LIST(bf16, bf16);
SSMLIB_DETAIL_LIST(bf16, float);
SSMLIB_DETAIL_LIST(float, float);
SSMLIB_DETAIL_LIST(double, double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
