#pragma once

#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/tensor/view.hpp>

#include <algorithm>

/// @file
/// What the forward and the backward selective scan share: operands, tiles of channels, their
/// exponential, and states with channels in the lanes.

namespace ssm::kernels {

/// What the recurrence h = exp(delta a) h + delta b u, y = c . h reads.
template <Real T>
struct selective_operands {
  view<const T, 2> delta;  ///< (tokens, D), unit inner stride
  view<const T, 2> a;      ///< (D, N)
  view<const T, 3> c;      ///< (tokens, Gc, N), unit inner stride
  view<const T, 3> b;      ///< (tokens, Gb, N), unit inner stride; one of Gc, Gb divides the other
  view<const T, 2> u;      ///< (tokens, D), unit inner stride
  const index_t* offsets;  ///< sequences + 1 token offsets
  index_t sequences;
  view<const T, 1> skip{};  ///< (D), unit stride, or absent: y += skip u

  [[nodiscard]] index_t channels() const { return delta.extents[1]; }
  [[nodiscard]] index_t states() const { return a.extents[1]; }
};

/// Where the states before each token go: (slots * sequences, D, N), see ssm::carry.
template <Real T>
struct selective_ring {
  view<T, 3> rows;
  index_t slots = 0;
  const index_t* first_position = nullptr;
};

namespace detail {

/// Channels of one task: at most `packs` registers of them, all of one group.
struct channel_tile {
  index_t begin, end, c_group, b_group;
};

template <Real T>
class channel_tiling {
 public:
  static constexpr index_t width = simd::pack<T>::width;
  static constexpr index_t packs = 4;

  explicit channel_tiling(const selective_operands<T>& o)
      : channels_(o.channels()),
        c_groups_(o.c.extents[1]),
        b_groups_(o.b.extents[1]),
        groups_(std::max(c_groups_, b_groups_)),
        tiles_a_group_((channels_ / groups_ + packs * width - 1) / (packs * width)) {}

  [[nodiscard]] index_t count() const { return groups_ * tiles_a_group_; }
  [[nodiscard]] channel_tile operator[](index_t i) const {
    const index_t group = i / tiles_a_group_, size = channels_ / groups_;
    const index_t begin = group * size + i % tiles_a_group_ * packs * width;
    return {begin, std::min(begin + packs * width, (group + 1) * size), group * c_groups_ / groups_,
            group * b_groups_ / groups_};
  }

 private:
  index_t channels_, c_groups_, b_groups_, groups_, tiles_a_group_;
};

/// exp(d a) for a that is already multiplied by decay_scale: 2^(d a) needs no second reduction.
template <Real T>
inline constexpr T decay_scale = T(1);
template <>
inline constexpr float decay_scale<float> = 1.44269504088896340736f;

SSMLIB_ALWAYS_INLINE simd::pack<double> decay(simd::pack<double> d, simd::pack<double> a) {
  return simd::exp(d * a);
}
/// Relative error 2e-7; results below the smallest normal number are 0.
SSMLIB_ALWAYS_INLINE simd::pack<float> decay(simd::pack<float> d, simd::pack<float> a) {
  using P = simd::pack<float>;
  // (2^r - 1) / r on [-1/2, 1/2], interpolated at Chebyshev nodes; relative error of 2^r 4e-9
  static constexpr float c[] = {6.9314718803e-01f, 2.4022650761e-01f, 5.5503571142e-02f,
                                9.6180825573e-03f, 1.3390863365e-03f, 1.5453162945e-04f};
  // The sum's low bits are the exponent with its bias: at -127 they shift to the number 0, at 128
  // to infinity.
  constexpr float round = 0x1.8p23f + 127.0f;
  const P x = simd::min(simd::max(d * a, P(-127.0f)), P(128.0f));
  const P shifted = x + P(round);
  const P r = x - (shifted - P(round));
  const P power = (P::vec)((P::uvec)shifted.v << 23);
  return simd::fma(r, simd::detail::polynomial(r, c), P(1.0f)) * power;
}

template <bool Full, Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> load_lanes(const T* p, index_t lanes) {
  if constexpr (Full) return simd::pack<T>::load(p);
  return simd::pack<T>::load_part(p, lanes);
}
template <bool Full, Real T>
SSMLIB_ALWAYS_INLINE void store_lanes(simd::pack<T> x, T* p, index_t lanes) {
  if constexpr (Full) return x.store(p);
  x.store_part(p, lanes);
}

/// The (channels x N) numbers of a parameter or state, channels to lanes: register n of pack j is
/// to[(j * N + n) * width].
template <Real T>
void load_states(const T* from, index_t channel_stride, index_t state_stride, index_t channels,
                 index_t states, T scale, T* to) {
  constexpr index_t w = simd::pack<T>::width;
  std::fill_n(to, (channels + w - 1) / w * w * states, T(0));
  for (index_t d = 0; d < channels; ++d) {
    T* lane = to + d / w * w * states + d % w;
    for (index_t n = 0; n < states; ++n) {
      lane[n * w] = scale * from[d * channel_stride + n * state_stride];
    }
  }
}
template <Real T, class F>
void store_states(const T* from, index_t channels, view<T, 3> to, index_t row, index_t begin,
                  F combine) {
  constexpr index_t w = simd::pack<T>::width;
  const index_t states = to.extents[2];
  for (index_t d = 0; d < channels; ++d) {
    const T* lane = from + d / w * w * states + d % w;
    for (index_t n = 0; n < states; ++n)
      combine(to(row, begin + d, n), lane[n * w]);
  }
}

}  // namespace detail
}  // namespace ssm::kernels
