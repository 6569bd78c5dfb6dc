#pragma once

#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/recurrence.hpp>
#include <ssmlib/kernels/cuda/ssd_parts.cuh>

/// @file
/// A block holds some features of one head's state in registers: a thread Own consecutive keys of
/// Width features. Tokens come through shared memory a few at a time. The sum over keys is made by
/// the thread, then by pairs of threads of ever farther keys: the same tree for every number of
/// features that a block has.

namespace ssm::kernels::cuda {

namespace detail {

/// The factors of earlier tokens as device code takes them.
template <class T>
struct replay_ring {
  T* data = nullptr;
  index_t sequence = 0, row = 0, group = 0;
  int heads_a_group = 1;

  replay_ring() = default;
  template <int R>
  replay_ring(const view<T, R>& v, index_t heads)
      : data(v.data),
        sequence(v.stride(0)),
        row(v.stride(1)),
        group(v.stride(2)),
        heads_a_group(static_cast<int>(heads / v.extent(2))) {}

  SSMLIB_DEVICE T* at(index_t s, index_t r, int h) const {
    return data + s * sequence + r * row + h / heads_a_group * group;
  }
};

template <class T>
struct recurrence_arguments {
  using real = accum_t<T>;

  ssd_arguments<T> p;
  ssd_operand<T> y;
  ssd_state_operand<const real> initial;
  ssd_state_operand<real> final, ring;
  bool initial_aligned, final_aligned, ring_aligned;
  index_t slots;
  const index_t* first_position;
  int quads, key_groups;  // of threads, powers of two
  int slices;             // of the features
  int batch;              // tokens between barriers
  // replay
  replay_ring<T> old_k, old_x;
  replay_ring<real> old_log_a, old_weight;
  index_t ring_rows;
  const index_t* position;
  const std::int32_t* pending;

  /// No new token, no operands: then the ring alone tells.
  [[nodiscard]] SSMLIB_DEVICE bool has_log() const {
    return p.log_a.data != nullptr || p.dt.data != nullptr || old_log_a.data != nullptr;
  }
};

/// What a token does to the state: S = factor S + w k x^T, or S += factor S + w k x^T where the
/// decay is near 1 and factor is the decay less 1.
template <class R>
struct token_decay {
  R factor, weight;
  int near_one;

  static SSMLIB_DEVICE token_decay from_log(R log_a, R weight) {
    const R a = exp(log_a);
    if (is_near_one(a) && log_a != R(0)) return {static_cast<R>(expm1(log_a)), weight, 1};
    return {a, weight, 0};
  }
  static SSMLIB_DEVICE token_decay from_value(R a, R weight) {
    return is_near_one(a) && a != R(1) ? token_decay{a - R(1), weight, 1}
                                       : token_decay{a, weight, 0};
  }

 private:
  /// Nearer than 1/1024: farther away the past is forgotten before a biased rounding matters.
  static SSMLIB_DEVICE bool is_near_one(R a) { return a > R(1) - R(1) / R(1024); }
};

inline constexpr int recurrence_batch = 4;  // tokens between barriers, at most

template <class R>
inline constexpr int recurrence_width = 16 / static_cast<int>(sizeof(R));  // features of a thread

/// Shared memory of a block: two buffers of `batch` tokens.
template <class R>
struct recurrence_space {
  int batch, keys, features, warps;

  /// Keys a token, so that rows start at 16 bytes.
  [[nodiscard]] __host__ __device__ static int padded(int keys) { return (keys + 3) / 4 * 4; }
  [[nodiscard]] __host__ __device__ int buffer() const {
    return batch * (2 * keys + features + warps * features);
  }
  [[nodiscard]] __host__ __device__ std::size_t bytes() const {
    return 2 * (static_cast<std::size_t>(buffer()) * sizeof(R) + batch * sizeof(token_decay<R>));
  }
};

/// The sum of Count parts, `step` apart, by pairs of neighbours.
template <int Count, class R>
SSMLIB_DEVICE R sum_of_parts(const R* parts, int step) {
  if constexpr (Count == 1) {
    return parts[0];
  } else {
    return sum_of_parts<Count / 2>(parts, step) +
           sum_of_parts<Count / 2>(parts + Count / 2 * step, step);
  }
}
template <class R>
SSMLIB_DEVICE R sum_of_parts(const R* parts, int step, int count) {
  switch (count) {
    case 1:
      return sum_of_parts<1>(parts, step);
    case 2:
      return sum_of_parts<2>(parts, step);
    case 4:
      return sum_of_parts<4>(parts, step);
    case 8:
      return sum_of_parts<8>(parts, step);
    case 16:
      return sum_of_parts<16>(parts, step);
    default:
      return sum_of_parts<32>(parts, step);
  }
}

/// One block: one head of one sequence, `quads` * Width features. Tokens count from the first new
/// one; replayed ones are negative.
template <class T, int Own, bool Full, bool Replay>
class recurrence_block {
 public:
  using R = accum_t<T>;
  static constexpr int width = recurrence_width<R>;

  SSMLIB_DEVICE recurrence_block(const recurrence_arguments<T>& o, R* space)
      : o_(o), steps_(o.p, head_of(o)) {
    slice_ = static_cast<int>(blockIdx.x % static_cast<unsigned>(o.slices));
    head_ = head_of(o);
    sequence_ = index_t{blockIdx.x} / o.slices / o.p.heads;
    quad_ = static_cast<int>(threadIdx.x) % o.quads;
    key_ = static_cast<int>(threadIdx.x) / o.quads * Own;
    own_ = max(0, min(Own, o.p.key_size - key_));
    features_ = o.quads * width;
    from_ = slice_ * features_;
    valid_ = max(0, min(width, o.p.features - from_ - quad_ * width));
    keys_ = recurrence_space<R>::padded(o.key_groups * Own);
    warps_ = static_cast<int>(blockDim.x) / 32;
    const recurrence_space<R> sizes{o.batch, keys_, features_, warps_};
    buffer_ = sizes.buffer();
    space_ = space;
    decays_ = reinterpret_cast<token_decay<R>*>(space + 2 * buffer_);
    begin_ = o.p.begin(sequence_);
    count_ = o.p.end(sequence_) - begin_;
    if constexpr (Replay) position_ = o.position[sequence_];
    d_ = o.p.d.data == nullptr ? R(0) : *o.p.d.head(head_);
  }

  SSMLIB_DEVICE void run() {
    const index_t first = Replay ? -index_t{o_.pending[sequence_]} : 0;
    load_state();
    if (first < count_) load(first, 0);
    int buffer = 0;
    for (index_t t = first; t < count_; t += o_.batch, buffer ^= 1) {
      __syncthreads();  // the buffer is filled, and the other one read
      if (t + o_.batch < count_) load(t + o_.batch, buffer ^ 1);
      const int n = static_cast<int>(min(index_t{o_.batch}, count_ - t));
      for (int e = 0; e < n; ++e)
        take(t + e, e, buffer);
      __syncthreads();
      put(t, n, buffer);
    }
    if (!Replay || count_ <= 0) store_state(o_.final, sequence_, o_.final_aligned);
  }

 private:
  static SSMLIB_DEVICE int head_of(const recurrence_arguments<T>& o) {
    return static_cast<int>(blockIdx.x / static_cast<unsigned>(o.slices) %
                            static_cast<unsigned>(o.p.heads));
  }
  [[nodiscard]] SSMLIB_DEVICE R* queries(int b) const { return space_ + b * buffer_; }
  [[nodiscard]] SSMLIB_DEVICE R* keys(int b) const { return queries(b) + o_.batch * keys_; }
  [[nodiscard]] SSMLIB_DEVICE R* values(int b) const { return keys(b) + o_.batch * keys_; }
  [[nodiscard]] SSMLIB_DEVICE R* parts(int b) const { return values(b) + o_.batch * features_; }

  SSMLIB_DEVICE void load_state() {
    const R* from = o_.initial.at(sequence_, head_);
#pragma unroll
    for (int i = 0; i < Own; ++i) {
      numbers<R, width> row{};
      if (from != nullptr && i < own_) {
        row = load_numbers<width>(from + (key_ + i) * o_.initial.row + from_ + quad_ * width,
                                  valid_, o_.initial_aligned);
      }
#pragma unroll
      for (int c = 0; c < width; ++c)
        h_[i][c] = row.v[c];
    }
  }
  SSMLIB_DEVICE void store_state(const ssd_state_operand<R>& states, index_t row, bool aligned) {
    if (states.data == nullptr) return;
    R* to = states.at(row, head_);
#pragma unroll
    for (int i = 0; i < Own; ++i) {
      numbers<R, width> out;
#pragma unroll
      for (int c = 0; c < width; ++c)
        out.v[c] = h_[i][c];
      if (i < own_) {
        store_numbers<width>(to + (key_ + i) * states.row + from_ + quad_ * width, out, valid_,
                             aligned);
      }
    }
  }

  /// Row of a token in the rings of factors.
  [[nodiscard]] SSMLIB_DEVICE index_t ring_row(index_t t) const {
    return (position_ + t) % o_.ring_rows;
  }
  /// Whether this block keeps the factors of its group: those that heads share belong to the first.
  [[nodiscard]] SSMLIB_DEVICE bool keeps(int heads_a_group) const {
    return head_ % heads_a_group == 0;
  }
  /// An element of k or x, which is kept for a replay where `keep` says so.
  SSMLIB_DEVICE R element(const ssd_operand<const T>& of, const replay_ring<T>& old, index_t t,
                          int column, bool keep) const {
    if constexpr (Replay) {
      T* kept = old.at(sequence_, ring_row(t), head_) + column;
      if (t < 0) return widen(*kept);
      const T value = of.head(head_)[(begin_ + t) * of.token + column * of.column];
      if (keep) *kept = value;
      return widen(value);
    } else {
      return widen(of.head(head_)[(begin_ + t) * of.token + column * of.column]);
    }
  }
  [[nodiscard]] SSMLIB_DEVICE token_decay<R> decay(index_t t) const {
    ssd_step<R> step{R(0), R(1)};
    if (!Replay || t >= 0) step = steps_.compute(steps_.load(begin_ + t));
    if constexpr (Replay) {
      const auto exchange = [&](const replay_ring<R>& old, R& value) {
        if (old.data == nullptr) return;
        R* kept = old.at(sequence_, ring_row(t), head_);
        if (t < 0) {
          value = *kept;
        } else if (slice_ == 0 && keeps(old.heads_a_group)) {
          *kept = value;
        }
      };
      exchange(o_.old_log_a, step.log_a);
      exchange(o_.old_weight, step.weight);
    }
    if (o_.has_log()) return token_decay<R>::from_log(step.log_a, step.weight);
    const R gamma = o_.p.gamma.data == nullptr ? R(1) : *o_.p.gamma.head(head_);
    return token_decay<R>::from_value(gamma, step.weight);
  }

  /// Tokens from t on, into a buffer: a thread has a column of q, k or x.
  SSMLIB_DEVICE void load(index_t t, int b) const {
    const int n = static_cast<int>(min(index_t{o_.batch}, count_ - t));
    const int threads = static_cast<int>(blockDim.x), tid = static_cast<int>(threadIdx.x);
    const bool keep_k = slice_ == 0 && keeps(o_.old_k.heads_a_group);
    const bool keep_x = keeps(o_.old_x.heads_a_group);
    const auto column = [&](R* to, int step, bool valid, auto get) {
      R value[recurrence_batch];
#pragma unroll
      for (int e = 0; e < recurrence_batch; ++e)
        value[e] = valid && e < n ? get(t + e) : R(0);
#pragma unroll
      for (int e = 0; e < recurrence_batch; ++e)
        if (e < n) to[e * step] = value[e];
    };
#pragma unroll 1
    for (int i = tid; i < 2 * keys_ + features_; i += threads) {
      if (i < keys_) {
        const T* from = o_.p.q.head(head_) + begin_ * o_.p.q.token + i * o_.p.q.column;
        column(queries(b) + i, keys_, i < o_.p.key_size, [&](index_t at) -> R {
          return Replay && at < 0 ? R(0) : widen(from[at * o_.p.q.token]);
        });
      } else if (i < 2 * keys_) {
        const int c = i - keys_;
        column(keys(b) + c, keys_, c < o_.p.key_size,
               [&](index_t at) { return element(o_.p.k, o_.old_k, at, c, keep_k); });
      } else {
        const int c = i - 2 * keys_;
        column(values(b) + c, features_, from_ + c < o_.p.features,
               [&](index_t at) { return element(o_.p.x, o_.old_x, at, from_ + c, keep_x); });
      }
    }
    // The last threads have the least to load.
    for (int e = threads - 1 - tid; e < n; e += threads)
      decays_[b * o_.batch + e] = decay(t + e);
  }

  SSMLIB_DEVICE void take(index_t t, int e, int b) {
    if constexpr (Replay) {
      if (t == 0) store_state(o_.final, sequence_, o_.final_aligned);
    }
    if (o_.ring.data != nullptr && t >= count_ - o_.slots) {
      const index_t at = (o_.first_position != nullptr ? o_.first_position[sequence_] : 0) + t;
      store_state(o_.ring, at % o_.slots * o_.p.sequences + sequence_, o_.ring_aligned);
    }
    const token_decay<R> decay = decays_[b * o_.batch + e];
    const auto input =
        *reinterpret_cast<const numbers<R, width>*>(values(b) + e * features_ + quad_ * width);
    R x[width], sums[width] = {};
#pragma unroll
    for (int c = 0; c < width; ++c)
      x[c] = decay.weight * input.v[c];
    const R *q = queries(b) + e * keys_ + key_, *k = keys(b) + e * keys_ + key_;
    if (decay.near_one) {
      move<true>(decay.factor, x, q, k, sums);
    } else {
      if (decay.factor == R(0)) {
        // A reset forgets whatever was there, infinities too.
#pragma unroll
        for (int i = 0; i < Own * width; ++i)
          h_[i / width][i % width] = R(0);
      }
      move<false>(decay.factor, x, q, k, sums);
    }
    if (Replay && t < 0) return;
    const int group = min(32, o_.quads * o_.key_groups);
    for (int step = o_.quads; step < group; step *= 2) {
#pragma unroll
      for (int c = 0; c < width; ++c)
        sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], step);
    }
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    if (lane < o_.quads) {
      numbers<R, width> out;
#pragma unroll
      for (int c = 0; c < width; ++c)
        out.v[c] = sums[c];
      *reinterpret_cast<numbers<R, width>*>(parts(b) + (e * warps_ + warp) * features_ +
                                            quad_ * width) = out;
    }
  }
  template <bool NearOne>
  SSMLIB_DEVICE void move(R factor, const R (&x)[width], const R* q, const R* k, R (&sums)[width]) {
    constexpr int vector = Own < width ? Own : width;
    if (key_ >= keys_) return;
#pragma unroll
    for (int j = 0; j < Own; j += vector) {
      const auto qs = *reinterpret_cast<const numbers<R, vector>*>(q + j);
      const auto ks = *reinterpret_cast<const numbers<R, vector>*>(k + j);
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        if (Full || j + i < own_) {
#pragma unroll
          for (int c = 0; c < width; ++c) {
            R& h = h_[j + i][c];
            const R moved = fma(factor, h, ks.v[i] * x[c]);
            h = NearOne ? h + moved : moved;
            sums[c] = fma(qs.v[i], h, sums[c]);
          }
        }
      }
    }
  }

  SSMLIB_DEVICE void put(index_t t, int n, int b) const {
    const int feature_bits = 31 - __clz(features_);
    const int used = max(1, o_.quads * o_.key_groups / 32);
    for (int i = static_cast<int>(threadIdx.x); i < n * features_;
         i += static_cast<int>(blockDim.x)) {
      const int e = i >> feature_bits, c = i & (features_ - 1);
      if ((Replay && t + e < 0) || from_ + c >= o_.p.features) continue;
      const R sum = sum_of_parts(parts(b) + e * warps_ * features_ + c, features_, used);
      const R y = fma(d_, values(b)[i], o_.p.alpha * sum);
      o_.y.head(head_)[(begin_ + t + e) * o_.y.token + (from_ + c) * o_.y.column] = narrow<T>(y);
    }
  }

  const recurrence_arguments<T>& o_;
  ssd_steps<T> steps_;
  R h_[Own][width];
  R* space_;
  token_decay<R>* decays_;
  index_t sequence_, begin_, count_, position_ = 0;
  int slice_, head_, quad_, key_, own_, features_, from_, valid_, keys_, warps_, buffer_;
  R d_;
};

template <class T, int Own, bool Full, bool Replay, int Limit>
__global__ void __launch_bounds__(Limit, Limit > 256                ? 1
                                         : sizeof(T) == 8 || Replay ? 2
                                                                    : 3)
    recurrence_kernel(const __grid_constant__ recurrence_arguments<T> o) {
  extern __shared__ __align__(128) unsigned char shared[];
  recurrence_block<T, Own, Full, Replay> block(o, reinterpret_cast<accum_t<T>*>(shared));
  block.run();
}

}  // namespace detail
}  // namespace ssm::kernels::cuda
