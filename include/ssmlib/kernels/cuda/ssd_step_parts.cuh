#pragma once

#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/ssd_step.hpp>

#include <cstdint>

/// @file
/// What the kernels of ssd_step_forward share, and the kernel for any size.

namespace ssm::kernels::cuda::detail {

inline constexpr int step_tokens = 16;  // of a call, and of a replay, at most

/// ssd_step_problem as kernels take it.
template <class T, class S>
struct step_arguments {
  using real = accum_t<T>;

  int heads, groups, features, key_size, tokens, channels;
  const index_t* offsets;
  const T *xbc, *dt, *z;
  index_t xbc_step, dt_step, z_step;
  const real *taps, *conv_bias;
  int width;
  bool activate;
  const real *a, *dt_bias, *d;
  real low, high;
  T *ring, *ring_dt;
  int ring_rows;
  index_t ring_sequence, ring_step, ring_dt_sequence, ring_dt_step;
  const index_t* position;
  S* state;
  index_t state_sequence, state_head, state_step;
  T* y;
  index_t y_step;
  const std::int32_t* pending;
  bool early;
  index_t tap_step, tap_channel;
  bool a_is_log;
  S* snapshots;
  index_t snapshot_row, snapshot_head, snapshot_step;
  int slots, sequences;

  [[nodiscard]] SSMLIB_DEVICE real tap(int j, int channel) const {
    return taps[index_t{j} * tap_step + channel * tap_channel];
  }
  [[nodiscard]] SSMLIB_DEVICE real rate(int head) const {
    return a_is_log ? -exp(a[head]) : a[head];
  }
};

/// What a token does to the state, S = factor S + B (delta x)^T, or S += factor S + B (delta x)^T
/// where the decay is near 1 and factor is the decay less 1.
template <class R>
struct step_decay {
  R delta, factor;
  bool near_one;
};
template <class R>
[[nodiscard]] SSMLIB_DEVICE step_decay<R> decay_of(R dt, R a, R low, R high) {
  const R raw = dt > R(20) ? dt : log1p(exp(dt));
  const R delta = fmin(fmax(raw, low), high), log_a = delta * a, decay = exp(log_a);
  const bool near_one = decay > R(1) - R(1) / R(1024) && log_a != R(0);
  return {delta, near_one ? static_cast<R>(expm1(log_a)) : decay, near_one};
}

template <class R>
[[nodiscard]] SSMLIB_DEVICE R silu_of(R x) {
  return x / (R(1) + exp(-x));
}

/// One sequence and head of a block: where its tokens, inputs and state are. Tokens count from the
/// first new one; replayed ones are negative.
template <class T, class S>
struct step_place {
  using real = accum_t<T>;

  const step_arguments<T, S>& a;
  int sequence, head, group;
  int history;      // inputs there have been, up to more than may be asked for
  int slot;         // of the first new token in the ring
  index_t row = 0;  // of the first new token
  int count = 0;    // new tokens

  SSMLIB_DEVICE step_place(const step_arguments<T, S>& arguments, unsigned block)
      : a(arguments),
        sequence(static_cast<int>(block / static_cast<unsigned>(a.heads))),
        head(static_cast<int>(block % static_cast<unsigned>(a.heads))),
        group(group_of_head(head)) {
    const index_t position = a.position[sequence];
    history = static_cast<int>(min(position, index_t{1} << 20));
    slot = static_cast<int>(position % a.ring_rows);
  }
  /// The one new token of a sequence whose history and slot are known.
  SSMLIB_DEVICE step_place(const step_arguments<T, S>& arguments, int its_sequence, int its_head,
                           int its_history, int its_slot)
      : a(arguments),
        sequence(its_sequence),
        head(its_head),
        group(group_of_head(its_head)),
        history(its_history),
        slot(its_slot),
        row(its_sequence),
        count(1) {}
  [[nodiscard]] SSMLIB_DEVICE int group_of_head(int h) const {
    return a.groups == 1 ? 0 : static_cast<int>(index_t{h} * a.groups / a.heads);
  }
  /// Where the new tokens lie: may not be known before the kernel ahead has finished.
  SSMLIB_DEVICE void find_tokens() {
    row = a.offsets != nullptr ? a.offsets[sequence] : index_t{sequence} * a.tokens;
    count = static_cast<int>(a.offsets != nullptr
                                 ? min(a.offsets[sequence + 1] - row, index_t{a.tokens})
                                 : index_t{a.tokens});
  }

  /// Channel c of this head's x, then of its group's B and C.
  [[nodiscard]] SSMLIB_DEVICE int channel(int c) const {
    if (c < a.features) return head * a.features + c;
    c -= a.features;
    const int of_b = a.heads * a.features + group * a.key_size;
    return c < a.key_size ? of_b + c : of_b + (a.groups - 1) * a.key_size + c;
  }
  /// Whether this block keeps the channel's inputs: B and C belong to their first head.
  [[nodiscard]] SSMLIB_DEVICE bool keeps(int c) const {
    return c < a.features || head == 0 || group_of_head(head - 1) != group;
  }
  [[nodiscard]] SSMLIB_DEVICE int ring_row(int token) const {
    int r = slot + token;
    if (r < 0) r += a.ring_rows;
    return r < a.ring_rows ? r : r - a.ring_rows;
  }
  [[nodiscard]] SSMLIB_DEVICE T* ring_input(int token, int channel) const {
    return a.ring + index_t{sequence} * a.ring_sequence + ring_row(token) * a.ring_step + channel;
  }
  [[nodiscard]] SSMLIB_DEVICE T input(int token, int channel) const {
    if (token >= 0) return a.xbc[(row + token) * a.xbc_step + channel];
    return history + token >= 0 ? *ring_input(token, channel) : T();
  }
  [[nodiscard]] SSMLIB_DEVICE T* ring_dt(int token) const {
    return a.ring_dt + index_t{sequence} * a.ring_dt_sequence + ring_row(token) * a.ring_dt_step +
           head;
  }
  [[nodiscard]] SSMLIB_DEVICE step_decay<real> decay(int token) const {
    T dt;
    if (token >= 0) {
      dt = a.dt[(row + token) * a.dt_step + head];
      if (a.pending != nullptr) *ring_dt(token) = dt;
    } else {
      dt = *ring_dt(token);
    }
    const real bias = a.dt_bias != nullptr ? a.dt_bias[head] : real(0);
    return decay_of<real>(widen(dt) + bias, a.rate(head), a.low, a.high);
  }
  [[nodiscard]] SSMLIB_DEVICE S* state() const {
    return a.state + index_t{sequence} * a.state_sequence + index_t{head} * a.state_head;
  }
  /// Where the state before a new token is kept for rollback, or null.
  [[nodiscard]] SSMLIB_DEVICE S* snapshot(int token) const {
    if (token < 0 || count - token > a.slots) return nullptr;
    const index_t slot = (a.position[sequence] + token) % a.slots;
    return a.snapshots + (slot * a.sequences + sequence) * a.snapshot_row +
           index_t{head} * a.snapshot_head;
  }
  [[nodiscard]] SSMLIB_DEVICE real gate(int token, int p) const {
    if (a.z == nullptr) return real(1);
    return silu_of<real>(widen(a.z[(row + token) * a.z_step + head * a.features + p]));
  }
  SSMLIB_DEVICE void put(int token, int p, real sum, real x, real gate) const {
    if (a.d != nullptr) sum = fma(a.d[head], x, sum);
    a.y[(row + token) * a.y_step + head * a.features + p] = narrow<T>(sum * gate);
  }
};

// -------------------------------------------------------------------------------------- any size

inline constexpr int step_general_threads = 128;

template <class R>
[[nodiscard]] constexpr std::size_t step_general_shared(index_t key_size) {
  return static_cast<std::size_t>(2 * step_tokens * key_size) * sizeof(R);
}

/// A thread holds one feature of up to 16 tokens and walks down its column of the state.
template <class T, class S>
class general_step {
 public:
  using real = accum_t<T>;

  SSMLIB_DEVICE general_step(const step_place<T, S>& place, real* space, step_decay<real>* decays)
      : at_(place), a_(place.a), b_(space), c_(space + step_tokens * a_.key_size), decay_(decays) {}

  /// Tokens [first, first + count), count <= 16.
  SSMLIB_DEVICE void take(int first, int count, bool put, bool store) const {
    const int keys = a_.key_size;
    for (int i = threadIdx.x; i < count * 2 * keys; i += step_general_threads) {
      const int e = i / (2 * keys), n = i % (2 * keys);
      (n < keys ? b_[e * keys + n] : c_[e * keys + n - keys]) =
          convolve(first + e, a_.features + n);
    }
    if (static_cast<int>(threadIdx.x) < count) decay_[threadIdx.x] = at_.decay(first + threadIdx.x);
    __syncthreads();
    for (int p = threadIdx.x; p < a_.features; p += step_general_threads)
      column(p, first, count, put, store);
    __syncthreads();
  }

 private:
  [[nodiscard]] SSMLIB_DEVICE real convolve(int token, int c) const {
    const int channel = at_.channel(c);
    real sum = a_.conv_bias != nullptr ? a_.conv_bias[channel] : real(0);
    for (int j = 0; j < a_.width; ++j) {
      const T value = at_.input(token - (a_.width - 1) + j, channel);
      if (j == a_.width - 1 && token >= 0 && at_.keeps(c)) *at_.ring_input(token, channel) = value;
      sum = fma(a_.tap(j, channel), static_cast<real>(widen(value)), sum);
    }
    return a_.activate ? silu_of(sum) : sum;
  }
  SSMLIB_DEVICE void column(int p, int first, int count, bool put, bool store) const {
    real x[step_tokens], sums[step_tokens];
#pragma unroll
    for (int e = 0; e < step_tokens; ++e) {
      x[e] = e < count ? convolve(first + e, p) : real(0);
      sums[e] = real(0);
    }
    S* element = at_.state() + p;
    for (int n = 0; n < a_.key_size; ++n, element += a_.state_step) {
      real h = widen(*element);
#pragma unroll
      for (int e = 0; e < step_tokens; ++e) {
        if (e < count) {
          if (a_.slots > 0) {
            S* const kept = at_.snapshot(first + e);
            if (kept != nullptr) kept[n * a_.snapshot_step + p] = narrow<S>(h);
          }
          const step_decay<real> decay = decay_[e];
          const real added = b_[e * a_.key_size + n] * (decay.delta * x[e]);
          // A reset forgets whatever was there, infinities too.
          const real kept = decay.factor == real(0) && !decay.near_one ? real(0) : h;
          const real moved = fma(decay.factor, kept, added);
          h = decay.near_one ? kept + moved : moved;
          sums[e] = fma(c_[e * a_.key_size + n], h, sums[e]);
          h = widen(narrow<S>(h));
        }
      }
      if (store) *element = narrow<S>(h);
    }
    if (!put) return;
#pragma unroll
    for (int e = 0; e < step_tokens; ++e) {
      if (e < count) at_.put(first + e, p, sums[e], x[e], at_.gate(first + e, p));
    }
  }

  const step_place<T, S>& at_;
  const step_arguments<T, S>& a_;
  real *b_, *c_;
  step_decay<real>* decay_;
};

template <class T, class S>
__global__ void __launch_bounds__(step_general_threads)
    general_step_kernel(const step_arguments<T, S> a) {
  using real = accum_t<T>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ step_decay<real> decays[step_tokens];
  wait_for_kernel_ahead();
  let_next_kernel_start();
  step_place<T, S> at(a, blockIdx.x);
  at.find_tokens();
  const general_step<T, S> step(at, reinterpret_cast<real*>(shared), decays);
  const bool replay = a.pending != nullptr;
  if (replay) {
    const int pending = a.pending[at.sequence];
    if (pending > 0) step.take(-pending, pending, false, true);
  }
  if (at.count > 0) step.take(0, at.count, true, !replay);
}

}  // namespace ssm::kernels::cuda::detail
