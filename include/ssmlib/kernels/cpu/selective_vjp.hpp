#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/selective.hpp>

#include <algorithm>
#include <type_traits>

/// @file
/// The gradient of the selective scan. States at the starts of blocks of time are kept from a
/// forward pass, those inside a block are recomputed. With g_t the gradient of h_t,
///
///     g_t = C_t dy_t + exp(delta_{t+1} a) g_{t+1}
///     d delta_t = sum_n g_t (B_t u_t + a w_t),   w_t = exp(delta_t a) h_{t-1}
///     d u_t = delta_t sum_n g_t B_t,   d a = sum_t delta_t g_t w_t
///     d B_t = sum_channels g_t delta_t u_t,   d C_t = sum_channels dy_t h_t
///     d skip = sum_t dy_t u_t
///
/// where w_t is kept as it was computed: as h_t - delta_t B_t u_t it would lose its bits.

namespace ssm::kernels {

/// Gradients of a selective scan; everything is added to, absent views are not wanted.
template <Real T>
struct selective_gradients {
  view<T, 2> delta;    ///< (tokens, D), unit inner stride
  view<T, 2> a;        ///< (D, N)
  view<T, 3> c;        ///< (tokens, Gc, N)
  view<T, 3> b;        ///< (tokens, Gb, N)
  view<T, 2> u;        ///< (tokens, D), unit inner stride
  view<T, 3> initial;  ///< (sequences, D, N)
  view<T, 1> skip{};   ///< (D)
};

namespace detail {

template <Real T>
class selective_backward {
 public:
  selective_backward(const selective_operands<T>& o, view<const T, 3> initial, view<const T, 2> dy,
                     view<const T, 3> d_final, const selective_gradients<T>& to)
      : o_(o),
        initial_(initial),
        d_final_(d_final),
        dy_(dy),
        to_(to),
        tiling_(o),
        tokens_(o.offsets[o.sequences] - o.offsets[0]),
        parts_(std::min<index_t>(o.sequences, 8)),
        d_a_(parts_ * tiling_.count() * tile_size()),
        d_skip_(parts_ * tiling_.count() * tile_channels),
        d_b_(to.b ? tiling_.count() * tokens_ * o.states() : 0),
        d_c_(to.c ? tiling_.count() * tokens_ * o.states() : 0) {}

  void run(const cpu::context& ctx) {
    const index_t tiles = tiling_.count();
    ctx.parallel_for(parts_ * tiles, [&](index_t i) { one_part(i / tiles, i % tiles); });
    ctx.parallel_for(tiles, [&](index_t i) { add_parameters(i); });
    ctx.parallel_ranges(tokens_, 16, 1, [&](index_t begin, index_t end) {
      add_tiles(to_.b, d_b_.data(), begin, end, [](const channel_tile& t) { return t.b_group; });
      add_tiles(to_.c, d_c_.data(), begin, end, [](const channel_tile& t) { return t.c_group; });
    });
  }

 private:
  static constexpr index_t width = simd::pack<T>::width;
  static constexpr index_t block = 32;  ///< tokens between kept states

  static constexpr index_t tile_channels = channel_tiling<T>::packs * width;

  using P = simd::pack<T>;

  /// Working memory of a tile.
  struct workspace {
    workspace(index_t tile_size, index_t states, index_t longest)
        : a(tile_size),
          h(tile_size),
          g(tile_size),
          starts(((longest + block - 1) / block) * tile_size),
          decays(block * states * width),
          before(block * states * width),
          d_b(block * states * width),
          d_c(block * states * width) {}
    scratch<T> a, h, g, starts, decays, before, d_b, d_c;
    T* d_a = nullptr;
    T* d_skip = nullptr;
  };

  [[nodiscard]] index_t tile_size() const { return channel_tiling<T>::packs * width * o_.states(); }

  // Sequences of one part, one after another: their share of d a is summed in that order.
  void one_part(index_t part, index_t tile_index) {
    const channel_tile tile = tiling_[tile_index];
    const index_t begin = o_.sequences * part / parts_, end = o_.sequences * (part + 1) / parts_;
    index_t longest = 0;
    for (index_t i = begin; i < end; ++i) {
      longest = std::max(longest, o_.offsets[i + 1] - o_.offsets[i]);
    }
    workspace w(tile_size(), o_.states(), longest);
    w.d_a = d_a_.data() + (part * tiling_.count() + tile_index) * tile_size();
    std::fill_n(w.d_a, tile_size(), T(0));
    w.d_skip = d_skip_.data() + (part * tiling_.count() + tile_index) * tile_channels;
    std::fill_n(w.d_skip, tile_channels, T(0));
    load_states(o_.a.data + tile.begin * o_.a.strides[0], o_.a.strides[0], o_.a.strides[1],
                tile.end - tile.begin, o_.states(), decay_scale<T>, w.a.data());
    for (index_t i = begin; i < end; ++i)
      one_sequence(i, tile, tile_index, w);
  }

  void load(view<const T, 3> from, index_t i, const channel_tile& tile, T* to) const {
    if (!from) return std::fill_n(to, tile_size(), T(0)), void();
    load_states(&from(i, tile.begin, index_t{0}), from.strides[1], from.strides[2],
                tile.end - tile.begin, o_.states(), T(1), to);
  }

  void one_sequence(index_t i, const channel_tile& tile, index_t tile_index, workspace& w) {
    const index_t begin = o_.offsets[i], end = o_.offsets[i + 1], states = o_.states();
    const index_t channels = tile.end - tile.begin;
    load(initial_, i, tile, w.h.data());
    load(d_final_, i, tile, w.g.data());
    const index_t blocks = (end - begin + block - 1) / block;
    for (index_t k = 0; k < blocks; ++k) {
      std::copy_n(w.h.data(), tile_size(), w.starts.data() + k * tile_size());
      if (k + 1 == blocks) break;  // the last block's states are recomputed below
      for (index_t d = 0; d < channels; d += width) {
        with_lanes(channels - d, [&](auto full) {
          advance<full.value>(tile, d, begin + k * block, begin + (k + 1) * block, w);
        });
      }
    }
    for (index_t k = blocks; k-- > 0;) {
      const index_t t0 = begin + k * block, t1 = std::min(end, t0 + block);
      std::fill_n(w.d_b.data(), (t1 - t0) * states * width, T(0));
      std::fill_n(w.d_c.data(), (t1 - t0) * states * width, T(0));
      for (index_t d = 0; d < channels; d += width) {
        with_lanes(channels - d, [&](auto full) {
          recompute<full.value>(tile, d, t0, t1, w.starts.data() + k * tile_size(), w);
          reverse<full.value>(tile, d, t0, t1, w);
        });
      }
      sum_lanes(to_.b, w.d_b.data(), d_b_.data(), tile_index, t0, t1);
      sum_lanes(to_.c, w.d_c.data(), d_c_.data(), tile_index, t0, t1);
    }
    if (to_.initial) {
      store_states(w.g.data(), channels, to_.initial, i, tile.begin,
                   [](T& to, T from) { to += from; });
    }
  }

  template <class F>
  static void with_lanes(index_t lanes, F f) {
    if (lanes >= width) {
      f(std::true_type{});
    } else {
      f(std::false_type{});
    }
  }

  [[nodiscard]] const T* weights(view<const T, 3> from, index_t t, index_t group) const {
    return from.data + t * from.strides[0] + group * from.strides[1];
  }

  // The states of a register of channels over tokens [t0, t1), without outputs.
  template <bool Full>
  void advance(const channel_tile& tile, index_t d, index_t t0, index_t t1, workspace& w) const {
    const index_t lanes = tile.end - tile.begin - d, states = o_.states();
    const T* a = w.a.data() + d * states;
    T* h = w.h.data() + d * states;
    for (index_t t = t0; t < t1; ++t) {
      const P delta = load_lanes<Full>(&o_.delta(t, tile.begin + d), lanes);
      const P input = delta * load_lanes<Full>(&o_.u(t, tile.begin + d), lanes);
      const T* b = weights(o_.b, t, tile.b_group);
      for (index_t n = 0; n < states; ++n) {
        const P kept = decay(delta, P::load(a + n * width)) * P::load(h + n * width);
        simd::fma(P(b[n]), input, kept).store(h + n * width);
      }
    }
  }

  // The decays of a block and the states before each of its tokens.
  template <bool Full>
  void recompute(const channel_tile& tile, index_t d, index_t t0, index_t t1, const T* starts,
                 workspace& w) const {
    const index_t lanes = tile.end - tile.begin - d, states = o_.states();
    const T* a = w.a.data() + d * states;
    T* h = w.h.data() + d * states;
    std::copy_n(starts + d * states, states * width, h);
    for (index_t t = t0; t < t1; ++t) {
      const P delta = load_lanes<Full>(&o_.delta(t, tile.begin + d), lanes);
      const P input = delta * load_lanes<Full>(&o_.u(t, tile.begin + d), lanes);
      const T* b = weights(o_.b, t, tile.b_group);
      T* decays = w.decays.data() + (t - t0) * states * width;
      T* before = w.before.data() + (t - t0) * states * width;
      for (index_t n = 0; n < states; ++n) {
        const P factor = decay(delta, P::load(a + n * width)), state = P::load(h + n * width);
        factor.store(decays + n * width);
        state.store(before + n * width);
        simd::fma(P(b[n]), input, factor * state).store(h + n * width);
      }
    }
  }

  template <bool Full>
  void reverse(const channel_tile& tile, index_t d, index_t t0, index_t t1, workspace& w) const {
    const index_t lanes = tile.end - tile.begin - d, states = o_.states(), channel = tile.begin + d;
    const T* a = w.a.data() + d * states;
    T* g = w.g.data() + d * states;
    T* d_a = w.d_a + d * states;
    for (index_t t = t1; t-- > t0;) {
      const P delta = load_lanes<Full>(&o_.delta(t, channel), lanes);
      const P u = load_lanes<Full>(&o_.u(t, channel), lanes), input = delta * u;
      const P dy = load_lanes<Full>(&dy_(t, channel), lanes);
      const T* b = weights(o_.b, t, tile.b_group);
      const T* c = weights(o_.c, t, tile.c_group);
      const index_t row = (t - t0) * states * width;
      P through_b(T(0)), through_a(T(0));
      simd::fma(dy, u, P::load(w.d_skip + d)).store(w.d_skip + d);
      for (index_t n = 0; n < states; ++n) {
        const index_t i = n * width;
        const P factor = P::load(w.decays.data() + row + i);
        const P kept = factor * P::load(w.before.data() + row + i);
        const P gradient = simd::fma(P(c[n]), dy, P::load(g + i));
        T* d_b = w.d_b.data() + row + i;
        T* d_c = w.d_c.data() + row + i;
        simd::fma(dy, simd::fma(P(b[n]), input, kept), P::load(d_c)).store(d_c);
        simd::fma(gradient, input, P::load(d_b)).store(d_b);
        through_b = simd::fma(gradient, P(b[n]), through_b);
        const P weight = gradient * kept;
        through_a = simd::fma(weight, P::load(a + i), through_a);
        simd::fma(weight, delta, P::load(d_a + i)).store(d_a + i);
        (gradient * factor).store(g + i);
      }
      if (to_.u) {
        T* to = &to_.u(t, channel);
        P sum = simd::fma(delta, through_b, load_lanes<Full>(to, lanes));
        if (o_.skip) {
          sum = simd::fma(load_lanes<Full>(o_.skip.data + channel, lanes), dy, sum);
        }
        store_lanes<Full>(sum, to, lanes);
      }
      if (to_.delta) {
        T* to = &to_.delta(t, channel);
        const P sum = simd::fma(u, through_b, through_a * P(T(1) / decay_scale<T>));
        store_lanes<Full>(sum + load_lanes<Full>(to, lanes), to, lanes);
      }
    }
  }

  // One tile's share of d B or d C: (tile, token, n).
  void sum_lanes(view<T, 3> wanted, const T* from, T* to, index_t tile_index, index_t t0,
                 index_t t1) const {
    if (!wanted) return;
    const index_t count = (t1 - t0) * o_.states();
    T* rows = to + (tile_index * tokens_ + t0 - o_.offsets[0]) * o_.states();
    for (index_t i = 0; i < count; ++i)
      rows[i] = simd::horizontal_sum(P::load(from + i * width));
  }

  template <class F>
  void add_tiles(view<T, 3> to, const T* from, index_t begin, index_t end, F group_of_tile) const {
    if (!to) return;
    for (index_t tile = 0; tile < tiling_.count(); ++tile) {
      const index_t group = group_of_tile(tiling_[tile]);
      for (index_t t = begin; t < end; ++t) {
        const T* row = from + (tile * tokens_ + t) * o_.states();
        T* sum = &to(o_.offsets[0] + t, group, index_t{0});
        for (index_t n = 0; n < o_.states(); ++n)
          sum[n * to.strides[2]] += row[n];
      }
    }
  }

  // d a and d skip of a tile: its parts in order.
  void add_parameters(index_t tile_index) const {
    const channel_tile tile = tiling_[tile_index];
    const index_t channels = tile.end - tile.begin;
    for (index_t part = 0; part < parts_; ++part) {
      const index_t at = part * tiling_.count() + tile_index;
      if (to_.a) {
        const view<T, 3> to{to_.a.data,
                            {1, to_.a.extents[0], to_.a.extents[1]},
                            {0, to_.a.strides[0], to_.a.strides[1]}};
        store_states(d_a_.data() + at * tile_size(), channels, to, 0, tile.begin,
                     [](T& sum, T x) { sum += x; });
      }
      for (index_t d = 0; to_.skip && d < channels; ++d) {
        to_.skip(tile.begin + d) += d_skip_[at * tile_channels + d];
      }
    }
  }

  const selective_operands<T>& o_;
  view<const T, 3> initial_, d_final_;
  view<const T, 2> dy_;
  selective_gradients<T> to_;
  channel_tiling<T> tiling_;
  index_t tokens_, parts_;
  scratch<T> d_a_, d_skip_, d_b_, d_c_;
};

}  // namespace detail

/// Adds the gradient of sum(dy y) + sum(d_final final) of the selective scan.
///
/// @param initial  (sequences, D, N) or absent: what the forward scan began with
/// @param d_final  (sequences, D, N) or absent
/// @cost  2 T D N exponentials; memory T D N / 32 states and T N numbers a tile of channels.
template <Real T>
void selective_scan_vjp(const cpu::context& ctx, const selective_operands<T>& o,
                        view<const T, 3> initial, view<const T, 2> dy, view<const T, 3> d_final,
                        const selective_gradients<T>& gradients) {
  if (o.channels() == 0 || o.sequences == 0) return;
  detail::selective_backward<T>(o, initial, dy, d_final, gradients).run(ctx);
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(                                                                             \
      selective, void selective_scan_vjp<T>(const cpu::context&, const selective_operands<T>&,    \
                                            view<const T, 3>, view<const T, 2>, view<const T, 3>, \
                                            const selective_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
