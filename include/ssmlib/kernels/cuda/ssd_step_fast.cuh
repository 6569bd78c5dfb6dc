#pragma once

#include <ssmlib/kernels/cuda/ssd_step_parts.cuh>

#include <cstdint>

/// @file
/// The Mamba-2 step with the state of a head in the registers of a block.

namespace ssm::kernels::cuda::detail {

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

// Tokens between two barriers: more take longer code, which takes longer to come.
inline constexpr int step_batch = 2;
inline constexpr int step_keys = 4;   // of the state that a thread holds
inline constexpr int step_width = 4;  // of the convolution, at most

/// Eight features of step_keys keys of the state take a token; sums += C^T of them.
template <bool Put, bool NearOne>
SSMLIB_DEVICE void move_piece(float (&h)[step_keys][8], float factor, const float (&u)[8],
                              const float* b, const float* c, float (&sums)[8]) {
#pragma unroll
  for (int i = 0; i < step_keys; ++i) {
    const float bi = b[i], ci = c[i];
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      const float moved = fmaf(factor, h[i][p], bi * u[p]);
      h[i][p] = NearOne ? h[i][p] + moved : moved;
      if constexpr (Put) sums[p] = fmaf(ci, h[i][p], sums[p]);
    }
  }
}
template <bool Put>
SSMLIB_DEVICE void advance_piece(float (&h)[step_keys][8], const step_decay<float>& decay,
                                 const float* x, const float* b, const float* c, float (&sums)[8]) {
  float u[8];
#pragma unroll
  for (int p = 0; p < 8; ++p)
    u[p] = decay.delta * x[p];
  if (decay.near_one) {
    move_piece<Put, true>(h, decay.factor, u, b, c, sums);
    return;
  }
  if (decay.factor == 0.0f) {
    // A reset forgets whatever was there, infinities too.
#pragma unroll
    for (int i = 0; i < 8 * step_keys; ++i)
      h[i / 8][i % 8] = 0.0f;
  }
  move_piece<Put, false>(h, decay.factor, u, b, c, sums);
}

/// Adds the sums of the lanes of a warp that hold the same features, every `Lanes` lanes; each
/// writes a part of them to its features in `to`.
template <int Lanes>
SSMLIB_DEVICE void add_keys(const float (&sums)[8], float* to) {
  const int lane = threadIdx.x % 32;
  float four[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const float mine = lane & 16 ? sums[p + 4] : sums[p];
    const float other = lane & 16 ? sums[p] : sums[p + 4];
    four[p] = mine + __shfl_xor_sync(0xffffffffu, other, 16);
  }
  to += (lane & 16) / 4;
  if constexpr (Lanes == 16) {
    *reinterpret_cast<float4*>(to) = make_float4(four[0], four[1], four[2], four[3]);
  } else {
    static_assert(Lanes == 8);
    float two[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const float mine = lane & 8 ? four[p + 2] : four[p];
      const float other = lane & 8 ? four[p] : four[p + 2];
      two[p] = mine + __shfl_xor_sync(0xffffffffu, other, 8);
    }
    *reinterpret_cast<float2*>(to + (lane & 8) / 4) = make_float2(two[0], two[1]);
  }
}

/// Shared memory of step_kernel.
template <int P, int N>
struct step_shared {
  static constexpr int batch = step_batch;
  float x[2][batch][P];  // of two batches: outputs of one are written while the next starts
  float b[batch][N], c[batch][N];
  float sums[batch][P * N / (8 * step_keys) / 32][P];
  step_decay<float> decay[batch];
};

/// A block holds the state of one head, a thread eight features of four keys.
template <class T, class S, int P, int N>
class register_step {
 public:
  static constexpr int threads = P * N / (8 * step_keys), lanes = P / 8;
  static constexpr int channels = (P + 2 * N + threads - 1) / threads, batch = step_batch;

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

  /// Asks for what the convolution of the tokens from `first` on needs besides their own inputs;
  /// once, since it keeps the last inputs.
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
          taps_[i][j] = back < a_.width ? a_.tap(a_.width - 1 - back, channel) : 0.0f;
          if (back > 0) past_[i][j] = back < a_.width ? widen(at_.input(first - back, channel)) : 0;
        }
      }
    }
  }
  /// Tokens [first, first + count), count <= batch, the next after prepare() or the last call.
  template <bool Put>
  SSMLIB_DEVICE void take(int first, int count, bool last) {
    const int own = threadIdx.x;  // of the outputs, the first that this thread puts
    float gates[(batch * P + threads - 1) / threads];
#pragma unroll
    for (int r = 0; Put && r * threads < batch * P; ++r) {
      const int i = own + r * threads;
      gates[r] = i < count * P ? at_.gate(first + i / P, i % P) : 1.0f;
    }
    convolve(first, count);
    const int decay_thread = threads - 32;
    if (static_cast<int>(threadIdx.x) >= decay_thread &&
        static_cast<int>(threadIdx.x) < decay_thread + count) {
      const int e = static_cast<int>(threadIdx.x) - decay_thread;
      shared_.decay[e] = at_.decay(first + e);
    }
    __syncthreads();
    for (int e = 0; e < count; ++e) {
      if (Put && a_.slots > 0) keep(at_.snapshot(first + e));
      advance<Put>(e, last && e == count - 1);
    }
    __syncthreads();
    if constexpr (Put) {
#pragma unroll
      for (int r = 0; r * threads < batch * P; ++r) {
        const int i = own + r * threads, e = i / P, p = i % P;
        if (i >= count * P) break;
        float sum = shared_.sums[e][0][p];
#pragma unroll
        for (int w = 1; w < threads / 32; ++w)
          sum += shared_.sums[e][w][p];
        at_.put(first + e, p, sum, shared_.x[half_][e][p], gates[r]);
      }
    }
    half_ ^= 1;
  }

 private:
  SSMLIB_DEVICE void convolve(int first, int count) {
    T inputs[channels][batch];
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int c = static_cast<int>(threadIdx.x) + i * threads;
#pragma unroll
      for (int e = 0; e < batch; ++e) {
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
        for (int e = 0; e < batch; ++e) {
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

  SSMLIB_DEVICE void keep(S* snapshot) const {
    if (snapshot == nullptr) return;
    S* const to = snapshot + key_ * a_.snapshot_step + feature_;
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      state_piece<S>::store(to + i * a_.snapshot_step, h_[i]);
  }
  template <bool Put>
  SSMLIB_DEVICE void advance(int e, bool last) {
    float sums[8] = {};
    advance_piece<Put>(h_, shared_.decay[e], &shared_.x[half_][e][feature_], &shared_.b[e][key_],
                       &shared_.c[e][key_], sums);
    if (!last) {
#pragma unroll
      for (int i = 0; i < step_keys; ++i)
        state_piece<S>::round(h_[i]);
    }
    if constexpr (Put) add_keys<lanes>(sums, &shared_.sums[e][threadIdx.x / 32][feature_]);
  }

  const step_place<T, S>& at_;
  const step_arguments<T, S>& a_;
  step_shared<P, N>& shared_;
  int feature_, key_, half_ = 0;
  float h_[step_keys][8];
  float taps_[channels][step_width], past_[channels][step_width - 1], bias_[channels];
};

template <class T, class S, int P, int N>
__global__ void __launch_bounds__(P* N / (8 * step_keys), 8192 * 2 / (P * N))
    step_kernel(const step_arguments<T, S> a) {
  constexpr int batch = step_batch;
  __shared__ __align__(16) step_shared<P, N> shared;
  if (!a.early) wait_for_kernel_ahead();
  step_place<T, S> at(a, blockIdx.x);
  register_step<T, S, P, N> step(at, shared);
  step.load();
  const bool replay = a.pending != nullptr;
  // What was taken before needs nothing of the kernel ahead.
  if (replay) {
    const int pending = a.pending[at.sequence];
    step.prepare(-pending);
    for (int j = -pending; j < 0; j += batch)
      step.template take<false>(j, min(batch, -j), false);
    if (pending > 0) step.store();
  } else {
    step.prepare(0);
  }
  wait_for_kernel_ahead();
  let_next_kernel_start();
  at.find_tokens();
  for (int j = 0; j < at.count; j += batch) {
    const int count = min(batch, at.count - j);
    step.template take<true>(j, count, j + count == at.count);
  }
  if (!replay && at.count > 0) step.store();
}

/// Shared memory of one_token_kernel.
template <int P, int N, int Heads>
struct one_token_shared {
  float x[Heads * P], b[N], c[N];
  float sums[Heads][P * N / (8 * step_keys) / 32][P];
  step_decay<float> decay[Heads];
};

/// One token of every sequence, `Heads` heads of a group a block: their states are all on the way
/// before the first is needed, and B and C are convolved once for them.
template <class T, class S, int P, int N, int Heads>
__global__ void __launch_bounds__(P* N / (8 * step_keys), 8192 * 2 / (P * N))
    one_token_kernel(const step_arguments<T, S> a) {
  constexpr int threads = P * N / (8 * step_keys), lanes = P / 8, all = Heads * P + 2 * N;
  constexpr int channels = (all + threads - 1) / threads;
  static_assert(Heads * P <= threads);
  __shared__ __align__(16) one_token_shared<P, N, Heads> shared;
  if (!a.early) wait_for_kernel_ahead();
  step_place<T, S> at(a, blockIdx.x * Heads);
  const int own = threadIdx.x;  // channel of x, and output
  const int feature = own % lanes * 8, key = own / lanes * step_keys;
  S* const state = at.state() + key * a.state_step + feature;
  state_piece<S> pieces[Heads][step_keys];
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      pieces[h][i].load(state + h * a.state_head + i * a.state_step);
  }
  float taps[channels][step_width], past[channels][step_width - 1], bias[channels];
  int channel[channels];
#pragma unroll
  for (int i = 0; i < channels; ++i) {
    const int c = own + i * threads;
    if (c < all) {
      channel[i] = c < Heads * P ? at.head * P + c : at.channel(c - (Heads - 1) * P);
      bias[i] = a.conv_bias != nullptr ? a.conv_bias[channel[i]] : 0.0f;
#pragma unroll
      for (int j = 0; j < step_width; ++j) {
        const int back = step_width - 1 - j;
        taps[i][j] = back < a.width ? a.tap(a.width - 1 - back, channel[i]) : 0.0f;
        if (back > 0) past[i][j] = back < a.width ? widen(at.input(-back, channel[i])) : 0.0f;
      }
    }
  }
  wait_for_kernel_ahead();
  let_next_kernel_start();
  at.find_tokens();
  T inputs[channels];
#pragma unroll
  for (int i = 0; i < channels; ++i) {
    if (own + i * threads < all) inputs[i] = at.input(0, channel[i]);
  }
  float gate = 1.0f;
  if (own < Heads * P) gate = at.gate(0, own);
  if (own >= threads - 32 && own < threads - 32 + Heads) {
    step_place<T, S> its = at;
    its.head += own - (threads - 32);
    shared.decay[own - (threads - 32)] = its.decay(0);
  }
#pragma unroll
  for (int i = 0; i < channels; ++i) {
    const int c = own + i * threads;
    if (c < all) {
      if (c < Heads * P || at.keeps(P)) *at.ring_input(0, channel[i]) = inputs[i];
      float sum = bias[i];
#pragma unroll
      for (int j = 0; j < step_width - 1; ++j)
        sum = fmaf(taps[i][j], past[i][j], sum);
      sum = fmaf(taps[i][step_width - 1], widen(inputs[i]), sum);
      (c < Heads * P       ? shared.x[c]
       : c < Heads * P + N ? shared.b[c - Heads * P]
                           : shared.c[c - Heads * P - N]) = a.activate ? silu_of(sum) : sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    float values[step_keys][8], sums[8] = {};
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      pieces[h][i].unpack(values[i]);
    advance_piece<true>(values, shared.decay[h], shared.x + h * P + feature, shared.b + key,
                        shared.c + key, sums);
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      state_piece<S>::store(state + h * a.state_head + i * a.state_step, values[i]);
    add_keys<lanes>(sums, &shared.sums[h][own / 32][feature]);
  }
  __syncthreads();
  if (own < Heads * P) {
    const int h = own / P, p = own % P;
    float sum = shared.sums[h][0][p];
#pragma unroll
    for (int w = 1; w < threads / 32; ++w)
      sum += shared.sums[h][w][p];
    step_place<T, S> its = at;
    its.head += h;
    its.put(0, p, sum, shared.x[own], gate);
  }
}

}  // namespace ssm::kernels::cuda::detail
