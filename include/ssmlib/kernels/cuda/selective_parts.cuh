#pragma once

#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/selective.hpp>

/// @file
/// What the selective scan and its gradient share: the tokens and channels of a warp, and how rows
/// of states and pairs of channels come and go.

namespace ssm::kernels::cuda::detail {

inline constexpr int scan_tokens = static_cast<int>(selective_checkpoint_tokens);

template <class T>
struct selective_arguments {
  selective_problem<T> p;
  index_t groups, group_channels;
  index_t segments, segment_length;  // of a sequence; lengths are multiples of scan_tokens
  bool paired;                       // rows of channels can be read two at a time
  bool quads;                        // rows of states can be read four at a time
  index_t channels, states;

  [[nodiscard]] __host__ __device__ index_t units() const { return p.sequences * segments; }
};

/// One cut of a sequence.
struct token_range {
  index_t sequence, segment, first, begin, end;  // `first`: of the sequence
  bool last;                                     // the sequence ends here

  /// Which kept state stands before token t, a multiple of scan_tokens from the first one.
  [[nodiscard]] __device__ index_t checkpoint(index_t t) const {
    return first / scan_tokens + sequence + (t - first) / scan_tokens;
  }
};

template <class T>
SSMLIB_DEVICE token_range range_of(const selective_arguments<T>& o, index_t unit) {
  token_range r;
  r.sequence = unit / o.segments;
  r.segment = unit % o.segments;
  r.first = o.p.offsets ? o.p.offsets[r.sequence] : r.sequence * o.p.max_length;
  const index_t stop = o.p.offsets ? o.p.offsets[r.sequence + 1] : r.first + o.p.max_length;
  r.begin = min(r.first + r.segment * o.segment_length, stop);
  r.end = min(r.begin + o.segment_length, stop);
  r.last = r.end == stop && (r.begin < r.end || r.segment == 0);
  return r;
}

/// How the lanes of a warp share channels and states, in tiles of Tokens.
template <int Own, int Lanes, int Tokens = scan_tokens>
struct lane_layout {
  static constexpr int tokens = Tokens;
  static constexpr int states = Own * Lanes;
  static constexpr int pairs = 32 / Lanes;  // of channels
  static constexpr int channels = 2 * pairs;
  // Pairs of channels of one tile of tokens that a lane turns into steps: always the same
  // channels, at tokens `pairs` lanes apart.
  static constexpr int items = Tokens / Lanes > 0 ? Tokens / Lanes : 1;
  static constexpr int item_step = 32 / pairs;  // tokens

  int lane = static_cast<int>(threadIdx.x % 32);
  int state = lane % Lanes * Own;  // the first one
  int pair = lane / Lanes;
  int item_pair = lane % pairs, item_token = lane / pairs;
};

/// Which channels a warp has: the first, how many of them exist, and the groups.
struct channel_range {
  index_t begin, count, b_group, c_group;
};

template <class T>
SSMLIB_DEVICE channel_range channels_of(const selective_arguments<T>& o, index_t tile,
                                        index_t tile_channels) {
  const index_t tiles = (o.group_channels + tile_channels - 1) / tile_channels;
  const index_t group = tile / tiles, offset = tile % tiles * tile_channels;
  return {group * o.group_channels + offset, min(tile_channels, o.group_channels - offset),
          group * o.p.b.extents[1] / o.groups, group * o.p.c.extents[1] / o.groups};
}

/// The states of a lane, two channels of Own numbers, from rows of N dense numbers.
template <int Own, class R>
SSMLIB_DEVICE void load_rows(const R* from, index_t states, int state, int channels,
                             R (&to)[2][Own]) {
  const bool dense = states % Own == 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int valid = i < channels ? static_cast<int>(min(index_t{Own}, states - state)) : 0;
    const auto row = load_numbers<Own>(from + i * states + state, valid, dense);
#pragma unroll
    for (int j = 0; j < Own; ++j)
      to[i][j] = row.v[j];
  }
}
template <int Own, class R>
SSMLIB_DEVICE void store_rows(const R (&from)[2][Own], index_t states, int state, int channels,
                              R* to) {
  const bool dense = states % Own == 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int valid = i < channels ? static_cast<int>(min(index_t{Own}, states - state)) : 0;
    numbers<R, Own> row;
#pragma unroll
    for (int j = 0; j < Own; ++j)
      row.v[j] = from[i][j];
    store_numbers<Own>(to + i * states + state, row, valid, dense);
  }
}
/// The same with strides, for what the caller owns.
template <int Own, class R>
SSMLIB_DEVICE void load_strided(const R* from, index_t channel_stride, index_t state_stride,
                                index_t states, int state, int channels, R (&to)[2][Own]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < Own; ++j) {
      const bool valid = i < channels && state + j < states;
      to[i][j] = valid ? from[i * channel_stride + (state + j) * state_stride] : R(0);
    }
}
template <int Own, class R, class To>
SSMLIB_DEVICE void store_strided(const R (&from)[2][Own], index_t channel_stride,
                                 index_t state_stride, index_t states, int state, int channels,
                                 bool add, To* to) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < Own; ++j) {
      if (i >= channels || state + j >= states) continue;
      To& x = to[i * channel_stride + (state + j) * state_stride];
      x = add ? x + from[i][j] : from[i][j];
    }
}

/// A tile's rows of b or c, widened, padded with zeros to States numbers.
template <int States, int Tokens, int Threads, class T>
class state_rows {
 public:
  using real = accum_t<T>;
  static constexpr int quads = Tokens * States / 4;
  static constexpr int share = (quads + Threads - 1) / Threads;
  static constexpr bool held = share <= 4;  // in registers, ahead of their use

  struct source {
    const T* from;  // row `first`
    int first;
    index_t stride;
    int tokens, states;  // that exist
    bool aligned;
  };

  SSMLIB_DEVICE void load(const source& s, int thread) {
    if constexpr (!held) return;
    if (s.aligned) {
#pragma unroll
      for (int k = 0; k < (held ? share : 0); ++k)
        raw_[k] = quad<true>(s, thread + k * Threads);
    } else {
#pragma unroll
      for (int k = 0; k < (held ? share : 0); ++k)
        raw_[k] = quad<false>(s, thread + k * Threads);
    }
  }
  SSMLIB_DEVICE void store(const source& s, real* to, int thread) const {
#pragma unroll(held ? share : 2)
    for (int k = 0; k < share; ++k) {
      const int i = thread + k * Threads;
      if (quads % Threads != 0 && i >= quads) continue;
      packed_t<T, 4> raw;
      if constexpr (held) {
        raw = raw_[k];
      } else {
        raw = s.aligned ? quad<true>(s, i) : quad<false>(s, i);
      }
      reinterpret_cast<numbers<real, 4>*>(to)[i] = widen(raw);
    }
  }

 private:
  template <bool Aligned>
  SSMLIB_DEVICE static packed_t<T, 4> quad(const source& s, int i) {
    const int t = i / (States / 4), n = i % (States / 4) * 4;
    const bool valid = i < quads && t < s.tokens && n < s.states;
    const T* p = s.from + (t - s.first) * s.stride + n;
    if constexpr (Aligned) {
      packed_t<T, 4> x{};
      if (valid) x = *reinterpret_cast<const packed_t<T, 4>*>(p);
      return x;
    } else {
      return load_singly<4>(p, valid ? min(4, s.states - n) : 0);
    }
  }

  packed_t<T, 4> raw_[held ? share : 1];
};

/// A lane's pairs of channels in one tile of tokens: Items of them, `step` numbers apart in memory.
template <int Items, int ItemStep, class T>
SSMLIB_DEVICE void load_pairs(const T* p, index_t step, int token, int tokens, int channels,
                              bool paired, packed_t<T, 2> (&to)[Items]) {
  if (paired) {  // then the pair exists as a whole or not at all
    const int count = channels > 0 ? tokens : 0;
#pragma unroll
    for (int k = 0; k < Items; ++k) {
      to[k] = {};
      if (token + k * ItemStep < count) {
        to[k] = *reinterpret_cast<const packed_t<T, 2>*>(p + k * step);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < Items; ++k)
      to[k] = load_singly<2>(p + k * step, token + k * ItemStep < tokens ? channels : 0);
  }
}
template <class T>
SSMLIB_DEVICE void store_pair(T* p, packed_t<T, 2> x, int channels, bool paired) {
  if (paired) {
    if (channels > 0) *reinterpret_cast<packed_t<T, 2>*>(p) = x;
  } else {
    numbers<T, 2> r;
    memcpy(&r, &x, sizeof r);
    if (channels > 0) p[0] = r.v[0];
    if (channels > 1) p[1] = r.v[1];
  }
}

}  // namespace ssm::kernels::cuda::detail
