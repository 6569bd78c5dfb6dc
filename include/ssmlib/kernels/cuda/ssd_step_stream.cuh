#pragma once

#include <ssmlib/kernels/cuda/hopper.cuh>
#include <ssmlib/kernels/cuda/ssd_step_fast.cuh>

#include <algorithm>
#include <cstdint>

/// @file
/// One token of many sequences: the copy engine brings the states of a block's heads to shared
/// memory, several ahead of the head that is moved. They go back from registers: a store by the
/// engine would have to wait for all loads and stores under way.

namespace ssm::kernels::cuda::detail {

/// How a block of state_stream_kernel is cut.
template <class S, int P, int N>
struct state_stream {
  static constexpr int threads = P * N / (8 * step_keys);
  static constexpr int bytes = P * N * static_cast<int>(sizeof(S));  // of a head's state
  // Of a multiprocessor: while one moves states, the other convolves.
  static constexpr int blocks = bytes <= 32 * 1024 && threads <= 256 ? 2 : 1;
  static constexpr int most = 192 * 1024 / blocks;
  static constexpr int depth = most / bytes < 16 ? most / bytes : 16;
  // Heads between two barriers.
  static constexpr int heads = depth / 3 < threads / P ? depth / 3 : threads / P;
  static constexpr int channels = (heads * P + 2 * N + threads - 1) / threads;
};

/// Shared memory of state_stream_kernel before its states.
template <class S, int P, int N>
struct state_stream_shared {
  static constexpr int heads = state_stream<S, P, N>::heads;
  float x[2][heads * P], b[N], c[N];  // x of two groups of heads
  float sums[heads][P * N / (8 * step_keys) / 32][P];
  step_decay<float> decay[2][heads];
  std::uint64_t full[state_stream<S, P, N>::depth];
};

template <class T, class S>
struct state_stream_arguments {
  step_arguments<T, S> a;
  int all;    // heads of all sequences
  int depth;  // states that a block holds
};

/// Neighbouring heads of one sequence that share B and C.
struct head_group {
  int sequence, head, count;
};

template <class T, class S, int P, int N>
class state_stream_block {
 public:
  using cut = state_stream<S, P, N>;

  SSMLIB_DEVICE state_stream_block(const state_stream_arguments<T, S>& p,
                                   state_stream_shared<S, P, N>& shared, unsigned char* states)
      : p_(p), a_(p.a), shared_(shared), states_(states) {
    const int begin = static_cast<int>(index_t{p.all} * blockIdx.x / gridDim.x);
    left_ = static_cast<int>(index_t{p.all} * (blockIdx.x + 1) / gridDim.x) - begin;
    to_load_ = left_;
    load_sequence_ = begin / a_.heads, load_head_ = begin - load_sequence_ * a_.heads;
  }

  SSMLIB_DEVICE void run() {
    if (!a_.early) wait_for_kernel_ahead();
    head_group now{load_sequence_, load_head_, 0};
    if (threadIdx.x == 0) {
      for (int s = 0; s < p_.depth; ++s)
        barrier_init(shared_.full + s, 1);
      barrier_init_done();
      load(cut::heads);
    }
    now = group_after(now);
    ask(now);
    wait_for_kernel_ahead();
    let_next_kernel_start();
    ask_tokens(now);
    // Behind what is asked for first: it would wait for all of these.
    if (threadIdx.x == 0) load(p_.depth - cut::heads);
    __syncthreads();  // barriers are made
    for (int half = 0; now.count > 0; half ^= 1) {
      const float skip = skip_, gate = gate_now();
      convolve(now, half);
      const head_group next = group_after(now);
      if (next.count > 0) ask(next), ask_tokens(next);
      __syncthreads();
#pragma unroll 1
      for (int h = 0; h < now.count; ++h)
        move(now, h, half);
      __syncthreads();
      if (threadIdx.x == 0) load(now.count);
      put(now, half, skip, gate);
      now = next;
    }
  }

 private:
  static constexpr int threads = cut::threads, channels = cut::channels;

  /// The next group of this block's heads, empty behind the last.
  [[nodiscard]] SSMLIB_DEVICE head_group group_after(const head_group& g) {
    head_group next{g.sequence, g.head + g.count, 0};
    if (next.head == a_.heads) ++next.sequence, next.head = 0;
    int of_group = a_.heads - next.head;
    if (a_.groups > 1) of_group = a_.heads / a_.groups - next.head % (a_.heads / a_.groups);
    next.count = min(min(of_group, cut::heads), left_);
    left_ -= next.count;
    return next;
  }
  [[nodiscard]] SSMLIB_DEVICE step_place<T, S> place_of(const head_group& g) const {
    return {a_, g.sequence, g.head, history_, ring_slot_};
  }
  [[nodiscard]] SSMLIB_DEVICE S* state(int sequence, int head) const {
    return a_.state + index_t{sequence} * a_.state_sequence + index_t{head} * a_.state_head;
  }
  /// Starts the copies of up to `count` more states, into the places that were read first.
  SSMLIB_DEVICE void load(int count) {
    for (; count > 0 && to_load_ > 0; --count, --to_load_) {
      barrier_arrive_expect(shared_.full + load_slot_, cut::bytes);
      load_bulk(states_ + load_slot_ * cut::bytes, state(load_sequence_, load_head_), cut::bytes,
                shared_.full + load_slot_);
      if (++load_slot_ == p_.depth) load_slot_ = 0;
      if (++load_head_ == a_.heads) ++load_sequence_, load_head_ = 0;
    }
  }

  /// Asks for what a group's convolution needs besides the new tokens.
  SSMLIB_DEVICE void ask(const head_group& g) {
    // B and C stay while neither the sequence nor the group of heads changes.
    const int of_group = a_.heads / a_.groups;
    fresh_ = g.sequence != sequence_ || g.head % of_group == 0;
    if (g.sequence != sequence_) {
      sequence_ = g.sequence;
      const index_t position = a_.position[sequence_];
      history_ = static_cast<int>(min(position, index_t{1} << 20));
      ring_slot_ = static_cast<int>(position % a_.ring_rows);
    }
    const step_place<T, S> at = place_of(g);
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int c = channel_of(at, g, i);
      if (c < 0) continue;
      bias_[i] = a_.conv_bias != nullptr ? a_.conv_bias[c] : 0.0f;
#pragma unroll
      for (int j = 0; j < step_width; ++j) {
        const int back = step_width - 1 - j;
        taps_[i][j] = back < a_.width ? a_.tap(a_.width - 1 - back, c) : 0.0f;
        if (back > 0) past_[i][j] = back < a_.width ? at.input(-back, c) : T();
      }
    }
  }
  SSMLIB_DEVICE void ask_tokens(const head_group& g) {
    const step_place<T, S> at = place_of(g);
    const int own = threadIdx.x;
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int c = channel_of(at, g, i);
      if (c >= 0) inputs_[i] = at.input(0, c);
    }
    if (own < g.count * P) {
      if (a_.z != nullptr) z_ = a_.z[at.row * a_.z_step + at.head * P + own];
      if (a_.d != nullptr) skip_ = a_.d[at.head + own / P];
    }
    if (own >= threads - 32 && own < threads - 32 + g.count) {
      const int head = at.head + own - (threads - 32);
      dt_ = a_.dt[at.row * a_.dt_step + head];
      dt_bias_ = a_.dt_bias != nullptr ? a_.dt_bias[head] : 0.0f;
      rate_ = a_.rate(head);
    }
  }
  /// The channel of xbc that is this thread's i-th of a group, or -1.
  [[nodiscard]] SSMLIB_DEVICE int channel_of(const step_place<T, S>& at, const head_group& g,
                                             int i) const {
    const int c = static_cast<int>(threadIdx.x) + i * threads;
    if (c < cut::heads * P) return c < g.count * P ? at.head * P + c : -1;
    return fresh_ && c < cut::heads * P + 2 * N ? at.channel(c - (cut::heads - 1) * P) : -1;
  }
  SSMLIB_DEVICE void convolve(const head_group& g, int half) {
    const step_place<T, S> at = place_of(g);
    const int own = threadIdx.x;
    if (own >= threads - 32 && own < threads - 32 + g.count) {
      shared_.decay[half][own - (threads - 32)] =
          decay_of<float>(widen(dt_) + dt_bias_, rate_, a_.low, a_.high);
    }
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      const int channel = channel_of(at, g, i), c = own + i * threads;
      if (channel < 0) continue;
      if (c < cut::heads * P || at.keeps(P)) *at.ring_input(0, channel) = inputs_[i];
      float sum = bias_[i];
#pragma unroll
      for (int j = 0; j < step_width - 1; ++j)
        sum = fmaf(taps_[i][j], widen(past_[i][j]), sum);
      sum = fmaf(taps_[i][step_width - 1], widen(inputs_[i]), sum);
      (c < cut::heads * P       ? shared_.x[half][c]
       : c < cut::heads * P + N ? shared_.b[c - cut::heads * P]
                                : shared_.c[c - cut::heads * P - N]) =
          a_.activate ? silu_of(sum) : sum;
    }
  }
  [[nodiscard]] SSMLIB_DEVICE float gate_now() const {
    return a_.z != nullptr ? silu_of(widen(z_)) : 1.0f;
  }
  /// Head h of a group takes its token.
  SSMLIB_DEVICE void move(const head_group& g, int h, int half) {
    constexpr int lanes = P / 8;
    const int own = threadIdx.x, feature = own % lanes * 8, key = own / lanes * step_keys;
    barrier_wait(shared_.full + slot_, parity_);
    const int place = key * P + feature;
    const S* const from = reinterpret_cast<const S*>(states_ + slot_ * cut::bytes) + place;
    S* const to = state(g.sequence, g.head + h) + place;
    state_piece<S> pieces[step_keys];
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      pieces[i].load(from + i * P);
    float values[step_keys][8], sums[8] = {};
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      pieces[i].unpack(values[i]);
    advance_piece<true>(values, shared_.decay[half][h], shared_.x[half] + h * P + feature,
                        shared_.b + key, shared_.c + key, sums);
#pragma unroll
    for (int i = 0; i < step_keys; ++i)
      state_piece<S>::store(to + i * P, values[i]);
    add_keys<lanes>(sums, &shared_.sums[h][own / 32][feature]);
    if (++slot_ == p_.depth) slot_ = 0, parity_ ^= 1;
  }
  SSMLIB_DEVICE void put(const head_group& g, int half, float skip, float gate) const {
    const int own = threadIdx.x;
    if (own >= g.count * P) return;
    const int h = own / P, p = own % P;
    float sum = shared_.sums[h][0][p];
#pragma unroll
    for (int w = 1; w < threads / 32; ++w)
      sum += shared_.sums[h][w][p];
    if (a_.d != nullptr) sum = fma(skip, shared_.x[half][own], sum);
    a_.y[index_t{g.sequence} * a_.y_step + g.head * P + own] = narrow<T>(sum * gate);
  }

  const state_stream_arguments<T, S>& p_;
  const step_arguments<T, S>& a_;
  state_stream_shared<S, P, N>& shared_;
  unsigned char* states_;
  int left_;  // heads behind the last group
  int to_load_, load_sequence_, load_head_, load_slot_ = 0;
  bool fresh_ = true;
  int sequence_ = -1, history_ = 0, ring_slot_ = 0, slot_ = 0, parity_ = 0;
  // Of the next group, on their way.
  float taps_[channels][step_width], bias_[channels], skip_ = 0, dt_bias_ = 0, rate_ = 0;
  T past_[channels][step_width - 1], inputs_[channels], z_{}, dt_{};
};

template <class T, class S, int P, int N>
__global__ void __launch_bounds__(state_stream<S, P, N>::threads, state_stream<S, P, N>::blocks)
    state_stream_kernel(const state_stream_arguments<T, S> p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char states[];
  __shared__ __align__(16) state_stream_shared<S, P, N> shared;
  state_stream_block<T, S, P, N>(p, shared, states).run();
#endif
}

/// Whether the states of a head lie together and there are many for a multiprocessor; then
/// launches the kernel.
template <class T, class S, int P, int N>
[[nodiscard]] bool launch_state_stream(cudaStream_t stream, const step_arguments<T, S>& a,
                                       index_t heads) {
  using cut = state_stream<S, P, N>;
  const int blocks = cut::blocks * multiprocessors();
  if (a.state_step != P || heads < index_t{16} * multiprocessors() ||
      device_rung() < rung::sm_90a) {
    return false;
  }
  const index_t share = (heads + blocks - 1) / blocks;
  const int depth = static_cast<int>(std::min<index_t>(share, cut::depth));
  launch_overlapped(stream, state_stream_kernel<T, S, P, N>, blocks, cut::threads,
                    static_cast<std::size_t>(depth * cut::bytes), 1,
                    state_stream_arguments<T, S>{a, static_cast<int>(heads), depth});
  return true;
}

}  // namespace ssm::kernels::cuda::detail
