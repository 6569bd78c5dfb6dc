#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/selective_parts.hpp>

#include <algorithm>
#include <limits>
#include <optional>

/// @file
/// The selective scan, forward. The lanes of a register are neighbouring channels, so nothing is
/// summed across lanes and memory is read in the order it has; the N numbers of the state of these
/// channels are N registers' worth of working memory. The time of a token is that of its N
/// exponentials, so they get an exponential of their own.

namespace ssm::kernels {

namespace detail {

/// What the scan of one tile works on; pointers are at the tile's first channel.
template <Real T>
struct tile_rows {
  const T *delta, *u, *c, *b, *skip;
  T* y;
  index_t delta_stride, u_stride, c_stride, b_stride, y_stride;
};

enum class scan_pass {
  whole,       ///< y = c . h with h = exp(delta a) h + delta b u
  correction,  ///< y += c . h with h = exp(delta a) h: what an initial state adds
};

/// Rows [begin, end) of one register of channels.
template <scan_pass Pass, bool Full, Real T>
void scan_rows(const tile_rows<T>& o, index_t begin, index_t end, index_t lanes, index_t states,
               const T* a, T* h) {
  using P = simd::pack<T>;
  constexpr index_t w = P::width;
  for (index_t t = begin; t < end; ++t) {
    const P delta = load_lanes<Full>(o.delta + t * o.delta_stride, lanes);
    P input(T(0)), y(T(0));
    if constexpr (Pass == scan_pass::whole) {
      const P u = load_lanes<Full>(o.u + t * o.u_stride, lanes);
      input = delta * u;
      if (o.skip != nullptr) y = load_lanes<Full>(o.skip, lanes) * u;
    } else {
      y = load_lanes<Full>(o.y + t * o.y_stride, lanes);
    }
    const T* b = o.b + t * o.b_stride;
    const T* c = o.c + t * o.c_stride;
    for (index_t n = 0; n < states; ++n) {
      P state = decay(delta, P::load(a + n * w)) * P::load(h + n * w);
      if constexpr (Pass == scan_pass::whole) state = simd::fma(P(b[n]), input, state);
      y = simd::fma(P(c[n]), state, y);
      state.store(h + n * w);
    }
    store_lanes<Full>(y, o.y + t * o.y_stride, lanes);
  }
}

/// Rows [begin, end) of a tile, in blocks of time that stay in the cache.
template <scan_pass Pass, Real T>
void scan_tile(const tile_rows<T>& o, index_t begin, index_t end, index_t channels, index_t states,
               const T* a, T* h) {
  constexpr index_t w = simd::pack<T>::width, block = 32;
  for (index_t t0 = begin; t0 < end; t0 += block) {
    const index_t t1 = std::min(end, t0 + block);
    // Rows are far apart in memory, which hides them from the hardware's own look-ahead.
    for (index_t t = t1; t < std::min(end, t1 + block); ++t) {
      for (index_t d = 0; d < channels; d += 64 / static_cast<index_t>(sizeof(T))) {
        __builtin_prefetch(o.delta + t * o.delta_stride + d);
        __builtin_prefetch(o.u + t * o.u_stride + d);
        __builtin_prefetch(o.y + t * o.y_stride + d, 1);
      }
    }
    for (index_t d = 0; d < channels; d += w) {
      tile_rows<T> pack = o;
      for (const T** p : {&pack.delta, &pack.u})
        *p += d;
      if (pack.skip != nullptr) pack.skip += d;
      pack.y += d;
      if (d + w <= channels) {
        scan_rows<Pass, true>(pack, t0, t1, w, states, a + d * states, h + d * states);
      } else {
        scan_rows<Pass, false>(pack, t0, t1, channels - d, states, a + d * states, h + d * states);
      }
    }
  }
}

/// Time cut into blocks: where channels alone cannot feed two threads, or as the caller wishes.
template <Real T>
class time_blocks {
 public:
  time_blocks(const selective_operands<T>& o, index_t size)
      : size_(size), narrow_(o.channels() <= simd::pack<T>::width), first_(o.sequences + 1) {
    first_[0] = 0;
    for (index_t i = 0; i < o.sequences; ++i) {
      const index_t length = o.offsets[i + 1] - o.offsets[i], step = block_of(length);
      first_[i + 1] = first_[i] + std::max<index_t>(1, (length + step - 1) / step);
    }
  }
  /// Tokens a block of a sequence of this length.
  [[nodiscard]] index_t block_of(index_t length) const {
    if (size_ > 0) return size_;
    return narrow_ && length >= 8192 ? (length + 1) / 2 : std::max<index_t>(1, length);
  }
  [[nodiscard]] index_t first(index_t i) const { return first_[i]; }
  [[nodiscard]] index_t count(index_t i) const { return first_[i + 1] - first_[i]; }
  /// The sequence of a block.
  [[nodiscard]] index_t sequence(index_t block, index_t sequences) const {
    return std::upper_bound(first_.data(), first_.data() + sequences + 1, block) - first_.data() -
           1;
  }

 private:
  index_t size_;
  bool narrow_;
  scratch<index_t> first_;
};

/// The forward scan of one call.
template <Real T>
class selective_forward {
 public:
  selective_forward(const selective_operands<T>& o, index_t block, view<const T, 3> initial,
                    view<T, 3> final, const selective_ring<T>& ring, view<T, 2> y)
      : o_(o), initial_(initial), final_(final), ring_(ring), y_(y), tiling_(o), blocks_(o, block) {
    const index_t total = blocks_.first(o.sequences);
    if (total > o.sequences) edges_.emplace(total * tiling_.count() * tile_size());
  }

  void run(const cpu::context& ctx) {
    const index_t tiles = tiling_.count();
    const index_t total = blocks_.first(o_.sequences);
    ctx.parallel_for(total * tiles, [&](index_t i) { first_pass(i / tiles, i % tiles); });
    if (!edges_) return;
    ctx.parallel_for(o_.sequences * tiles, [&](index_t i) { join(i / tiles, i % tiles); });
    ctx.parallel_for(total * tiles, [&](index_t i) { correct(i / tiles, i % tiles); });
  }

 private:
  static constexpr index_t width = simd::pack<T>::width;

  [[nodiscard]] index_t tile_size() const { return channel_tiling<T>::packs * width * o_.states(); }
  [[nodiscard]] T* edge(index_t block, index_t tile) const {
    return edges_->data() + (block * tiling_.count() + tile) * tile_size();
  }
  [[nodiscard]] tile_rows<T> rows_of(const channel_tile& tile) const {
    return {o_.delta.data + tile.begin,
            o_.u.data + tile.begin,
            o_.c.data + tile.c_group * o_.c.strides[1],
            o_.b.data + tile.b_group * o_.b.strides[1],
            o_.skip ? o_.skip.data + tile.begin : nullptr,
            y_.data + tile.begin,
            o_.delta.strides[0],
            o_.u.strides[0],
            o_.c.strides[0],
            o_.b.strides[0],
            y_.strides[0]};
  }
  void load_decay(const channel_tile& tile, T* a) const {
    load_states(o_.a.data + tile.begin * o_.a.strides[0], o_.a.strides[0], o_.a.strides[1],
                tile.end - tile.begin, o_.states(), decay_scale<T>, a);
  }
  void load_initial(index_t sequence, const channel_tile& tile, T* h) const {
    if (!initial_) return std::fill_n(h, tile_size(), T(0)), void();
    load_states(&initial_(sequence, tile.begin, index_t{0}), initial_.strides[1],
                initial_.strides[2], tile.end - tile.begin, o_.states(), T(1), h);
  }
  void store_final(index_t sequence, const channel_tile& tile, const T* h) const {
    if (!final_) return;
    store_states(h, tile.end - tile.begin, final_, sequence, tile.begin,
                 [](T& to, T from) { to = from; });
  }

  // Every block from the state zero, the first of a sequence from its initial state.
  void first_pass(index_t block, index_t tile_index) const {
    const index_t i = blocks_.sequence(block, o_.sequences), k = block - blocks_.first(i);
    const index_t step = blocks_.block_of(o_.offsets[i + 1] - o_.offsets[i]);
    const index_t begin = o_.offsets[i] + k * step, end = std::min(o_.offsets[i + 1], begin + step);
    const channel_tile tile = tiling_[tile_index];
    const index_t channels = tile.end - tile.begin;
    scratch<T> a(tile_size()), h(tile_size());
    load_decay(tile, a.data());
    if (k == 0) {
      load_initial(i, tile, h.data());
    } else {
      std::fill_n(h.data(), tile_size(), T(0));
    }
    const tile_rows<T> rows = rows_of(tile);
    if (ring_.rows) {
      scan_with_snapshots(i, begin, end, tile, rows, a.data(), h.data());
    } else {
      scan_tile<scan_pass::whole>(rows, begin, end, channels, o_.states(), a.data(), h.data());
    }
    if (blocks_.count(i) == 1) {
      store_final(i, tile, h.data());
    } else {
      std::copy_n(h.data(), tile_size(), edge(block, tile_index));
    }
  }

  void scan_with_snapshots(index_t i, index_t begin, index_t end, const channel_tile& tile,
                           const tile_rows<T>& rows, const T* a, T* h) const {
    const index_t channels = tile.end - tile.begin;
    for (index_t t = begin; t < end; ++t) {
      if (t >= end - ring_.slots) {  // earlier ones would be overwritten
        const index_t position = ring_.first_position[i] + (t - begin);
        store_states(h, channels, ring_.rows, position % ring_.slots * o_.sequences + i, tile.begin,
                     [](T& to, T from) { to = from; });
      }
      scan_tile<scan_pass::whole>(rows, t, t + 1, channels, o_.states(), a, h);
    }
  }

  // Edges: from the blocks' own final states to the states before the blocks.
  void join(index_t i, index_t tile_index) const {
    if (blocks_.count(i) == 1) return;
    using P = simd::pack<T>;
    const channel_tile tile = tiling_[tile_index];
    const index_t states = o_.states(), step = blocks_.block_of(o_.offsets[i + 1] - o_.offsets[i]);
    scratch<T> a(tile_size()), h(tile_size());
    load_decay(tile, a.data());
    load_initial(i, tile, h.data());
    for (index_t k = 0; k < blocks_.count(i); ++k) {
      T* own = edge(blocks_.first(i) + k, tile_index);
      const index_t begin = o_.offsets[i] + k * step;
      const index_t end = std::min(o_.offsets[i + 1], begin + step);
      T steps[channel_tiling<T>::packs * width] = {};
      for (index_t t = begin; t < end; ++t) {
        for (index_t d = tile.begin; d < tile.end; ++d)
          steps[d - tile.begin] += o_.delta(t, d);
      }
      const index_t used = (tile.end - tile.begin + width - 1) / width * width * states;
      for (index_t j = 0; j < used; j += width) {
        P state = P::load(own + j);
        if (k > 0) {  // the first block began with the initial state
          const P d = P::load(steps + j / (width * states) * width);
          state = simd::fma(decay(d, P::load(a.data() + j)), P::load(h.data() + j), state);
        }
        P::load(h.data() + j).store(own + j);
        state.store(h.data() + j);
      }
    }
    store_final(i, tile, h.data());
  }

  void correct(index_t block, index_t tile_index) const {
    const index_t i = blocks_.sequence(block, o_.sequences), k = block - blocks_.first(i);
    if (k == 0) return;
    const index_t step = blocks_.block_of(o_.offsets[i + 1] - o_.offsets[i]);
    const index_t begin = o_.offsets[i] + k * step, end = std::min(o_.offsets[i + 1], begin + step);
    const channel_tile tile = tiling_[tile_index];
    scratch<T> a(tile_size());
    load_decay(tile, a.data());
    scan_tile<scan_pass::correction>(rows_of(tile), begin, end, tile.end - tile.begin, o_.states(),
                                     a.data(), edge(block, tile_index));
  }

  const selective_operands<T>& o_;
  view<const T, 3> initial_;
  view<T, 3> final_;
  selective_ring<T> ring_;
  view<T, 2> y_;
  channel_tiling<T> tiling_;
  time_blocks<T> blocks_;
  std::optional<scratch<T>> edges_;
};

}  // namespace detail

/// No cut of time: what makes a token's bits independent of how its sequence is split.
inline constexpr index_t whole_sequences = std::numeric_limits<index_t>::max() / 4;

/// The selective scan: y = c . h, h = exp(delta a) h + delta b u, for every channel.
///
/// @param block    tokens a block of the parallel scan over time; 0: the kernel's choice;
///                 whole_sequences: one block a sequence
/// @param initial  (sequences, D, N) or absent: zero
/// @param final    (sequences, D, N) or absent; may be `initial`
/// @param ring     where the states before the last tokens go, or default; needs whole_sequences
/// @param y        (tokens, D), unit inner stride; overwritten
/// @cost  T D N exponentials; with more than one block a sequence up to twice as many.
template <Real T>
void selective_scan(const cpu::context& ctx, const selective_operands<T>& o, index_t block,
                    view<const T, 3> initial, view<T, 3> final, const selective_ring<T>& ring,
                    view<T, 2> y) {
  if (o.channels() == 0 || o.sequences == 0) return;
  detail::selective_forward<T>(o, block, initial, final, ring, y).run(ctx);
}

#define SSMLIB_DETAIL_LIST(T)                                                            \
  SSMLIB_INSTANTIATE(                                                                    \
      selective,                                                                         \
      void selective_scan<T>(const cpu::context&, const selective_operands<T>&, index_t, \
                             view<const T, 3>, view<T, 3>, const selective_ring<T>&, view<T, 2>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
