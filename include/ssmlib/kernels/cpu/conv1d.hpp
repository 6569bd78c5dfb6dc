#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/activation.hpp>

#include <algorithm>

/// @file
/// Causal depthwise convolution along time, per sequence:
///
///     pre[t, c] = bias[c] + sum over j in [0, width) of tap[j, c] x[t - (width - 1) + j, c]
///     y[t, c]   = pre[t, c] or silu(pre[t, c])
///
/// Inputs before a sequence come from its history. A token's bits depend on its `width` inputs
/// alone, wherever they are stored.

namespace ssm::kernels {

enum class conv1d_activation { none, silu };

/// The inputs before the tokens at hand, (sequences, rows, channels). Without positions the last of
/// `rows` rows is the newest input; with them the rows are a ring, and the input at position p lies
/// in row p mod `rows`. Absent: zeros.
template <class T>
struct conv1d_history {
  T* data = nullptr;
  index_t rows = 0, channels = 0;
  const index_t* position = nullptr;

  /// The input `back` >= 1 tokens before the first token of sequence i. @pre data
  [[nodiscard]] T* row(index_t i, index_t back) const {
    index_t r = rows - back;
    if (position != nullptr) r = ((position[i] - back) % rows + rows) % rows;
    return data + (i * rows + r) * channels;
  }
};

template <Real T>
struct conv1d_problem {
  view<const T, 2> x;  ///< (tokens, channels)
  const T* taps;       ///< (width, channels), dense
  const T* bias;       ///< (channels)
  const T* zeros;      ///< (channels)
  index_t width;
  conv1d_activation activation;
  conv1d_history<const T> history;
  const index_t* offsets;  ///< sequences + 1 tokens
  index_t sequences;
};

/// Gradients that are added to; null data: not wanted.
template <Real T>
struct conv1d_gradients {
  view<T, 2> x;               ///< (tokens, channels)
  view<T, 2> weight;          ///< (channels, width)
  T* bias = nullptr;          ///< (channels)
  conv1d_history<T> history;  ///< rows of width - 1, no positions
};

namespace detail {

/// f(i, t) for the tokens t of [begin, end) with their sequences i.
template <class F>
void for_tokens(const index_t* offsets, index_t sequences, index_t begin, index_t end, F f) {
  index_t i = std::upper_bound(offsets, offsets + sequences + 1, begin) - offsets - 1;
  for (index_t t = begin; t < end; ++t) {
    while (t >= offsets[i + 1])
      ++i;
    f(i, t);
  }
}

/// The rows that the taps of token t meet, oldest first.
template <Real T>
void conv1d_inputs(const conv1d_problem<T>& p, index_t i, index_t t, const T** rows) {
  for (index_t j = 0; j < p.width; ++j) {
    const index_t back = p.width - 1 - j, before = back - (t - p.offsets[i]);
    if (before <= 0) {
      rows[j] = p.x.data + (t - back) * p.x.stride(0);
    } else {
      rows[j] = p.history.data ? p.history.row(i, before) : p.zeros;
    }
  }
}

/// One token, `n` channels. Width 0 stands for a run-time width.
template <int Width, Real T>
SSMLIB_ALWAYS_INLINE simd::pack<T> conv1d_sum(const conv1d_problem<T>& p, const T* const* rows,
                                              index_t c, index_t count) {
  const index_t width = Width ? Width : p.width, channels = p.x.extent(1);
  simd::pack<T> sum = load_up_to(p.bias + c, count);
  for (index_t j = 0; j < width; ++j) {
    sum = simd::fma(load_up_to(p.taps + j * channels + c, count), load_up_to(rows[j] + c, count),
                    sum);
  }
  return sum;
}

template <int Width, Real T>
void conv1d(const cpu::context& ctx, const conv1d_problem<T>& p, view<T, 2> y) {
  const index_t tokens = y.extent(0), channels = y.extent(1);
  for_each_piece(ctx, tokens, row_pieces(tokens, p.width * channels),
                 [&](index_t, index_t begin, index_t end) {
                   const scratch<const T*> rows(p.width);
                   for_tokens(p.offsets, p.sequences, begin, end, [&](index_t i, index_t t) {
                     conv1d_inputs(p, i, t, rows.data());
                     T* out = y.data + t * y.stride(0);
                     if (p.activation == conv1d_activation::silu) {
                       for_packs<T>(channels, [&](index_t c, index_t count) SSMLIB_LAMBDA_INLINE {
                         store_up_to(out + c, count,
                                     simd::silu(conv1d_sum<Width>(p, rows.data(), c, count)));
                       });
                     } else {
                       for_packs<T>(channels, [&](index_t c, index_t count) SSMLIB_LAMBDA_INLINE {
                         store_up_to(out + c, count, conv1d_sum<Width>(p, rows.data(), c, count));
                       });
                     }
                   });
                 });
}

/// The backward pass of the channels [c0, c0 + n). All tokens belong to one task, so that the sums
/// over tokens have one order. A tile of tokens is copied to dense rows first: rows of the tensors
/// are often a multiple of 4 KiB apart, where they compete for the same cache lines.
template <int Width, Real T>
class conv1d_backward {
 public:
  static constexpr index_t tile = 32;

  conv1d_backward(const conv1d_problem<T>& p, view<const T, 2> dy, const conv1d_gradients<T>& d,
                  index_t c0, index_t n)
      : p_(p),
        dy_(dy),
        d_(d),
        c0_(c0),
        n_(n),
        width_(Width ? Width : p.width),
        inputs_((tile + width_ - 1) * n),
        d_pre_((tile + width_ - 1) * n),
        sums_((width_ + 1) * n) {
    std::fill_n(sums_.data(), (width_ + 1) * n, T(0));
  }

  void run() {
    for (index_t i = 0; i < p_.sequences; ++i) {
      const index_t begin = p_.offsets[i], end = p_.offsets[i + 1];
      if (begin == end) continue;
      // From the last tile to the first: dx needs the d_pre of later tokens, which are zero at the
      // end of the sequence and then those of the tile before.
      index_t t0 = begin + (end - 1 - begin) / tile * tile;
      std::fill_n(d_pre_.data() + (end - t0) * n_, (width_ - 1) * n_, T(0));
      for (; t0 >= begin; t0 -= tile) {
        const index_t count = std::min(tile, end - t0);
        load(i, t0, count);
        if (p_.activation == conv1d_activation::silu) through_silu(count);
        add_to_sums(count);
        store(i, t0, count);
        std::copy_backward(d_pre_.data(), d_pre_.data() + (width_ - 1) * n_,
                           d_pre_.data() + (tile + width_ - 1) * n_);
      }
    }
    finish();
  }

 private:
  void load(index_t i, index_t t0, index_t count) {
    for (index_t r = 0; r < count + width_ - 1; ++r) {
      const index_t t = t0 - (width_ - 1) + r, before = p_.offsets[i] - t;
      const T* from = p_.zeros;
      if (before <= 0) {
        from = p_.x.data + t * p_.x.stride(0);
      } else if (p_.history.data) {
        from = p_.history.row(i, before);
      }
      std::copy_n(from + c0_, n_, inputs_.data() + r * n_);
    }
    for (index_t r = 0; r < count; ++r) {
      std::copy_n(dy_.data + (t0 + r) * dy_.stride(0) + c0_, n_, d_pre_.data() + r * n_);
    }
  }

  /// d_pre = dy silu'(pre), with pre summed in the order of the forward pass.
  void through_silu(index_t count) {
    const index_t all = p_.x.extent(1), n = n_, width = width_;
    const T *x = inputs_.data(), *taps = p_.taps + c0_, *bias = p_.bias + c0_;
    T* d = d_pre_.data();
    for (index_t r = 0; r < count; ++r) {
      for_packs<T>(n, [=](index_t c, index_t lanes) SSMLIB_LAMBDA_INLINE {
        simd::pack<T> pre = load_up_to(bias + c, lanes);
        for (index_t j = 0; j < (Width ? Width : width); ++j) {
          pre = simd::fma(load_up_to(taps + j * all + c, lanes),
                          load_up_to(x + (r + j) * n + c, lanes), pre);
        }
        const auto slope = silu_and_slope(pre).slope;
        store_up_to(d + r * n + c, lanes, load_up_to(d + r * n + c, lanes) * slope);
      });
    }
  }

  /// The gradients of the taps and of the bias, a running sum for each so that they overlap.
  void add_to_sums(index_t count) {
    constexpr int known = Width ? Width : 1;
    for (index_t j = 0; j < width_; j += known) {
      const bool with_bias = j + known == width_;
      const index_t n = n_, width = width_;
      const T *x = inputs_.data() + j * n_, *d = d_pre_.data();
      T* sums = sums_.data();
      for_packs<T>(n, [=](index_t c, index_t lanes) SSMLIB_LAMBDA_INLINE {
        simd::pack<T> taps[known], bias(T(0));
        for (auto& sum : taps)
          sum = simd::pack<T>(T(0));
        for (index_t r = 0; r < count; ++r) {
          const auto g = load_up_to(d + r * n + c, lanes);
          simd::unroll<known>([&](auto k) SSMLIB_LAMBDA_INLINE {
            taps[k] = simd::fma(g, load_up_to(x + (r + k) * n + c, lanes), taps[k]);
          });
          bias += g;
        }
        for (int k = 0; k < known; ++k)
          add_up_to(sums + (j + k) * n + c, lanes, taps[k]);
        if (with_bias) add_up_to(sums + width * n + c, lanes, bias);
      });
    }
  }

  /// dx[t] += sum over j of tap[j] d_pre[t + (width - 1) - j]; before the sequence, its history.
  void store(index_t i, index_t t0, index_t count) {
    const index_t first = t0 == p_.offsets[i] ? 1 - width_ : 0;
    for (index_t r = first; r < count; ++r) {
      T* out = nullptr;
      if (r >= 0 && d_.x) out = d_.x.data + (t0 + r) * d_.x.stride(0) + c0_;
      if (r < 0 && d_.history.data) out = d_.history.row(i, -r) + c0_;
      if (out == nullptr) continue;
      const index_t all = p_.x.extent(1), n = n_, width = width_;
      const T *taps = p_.taps + c0_, *d = d_pre_.data();
      for_packs<T>(n, [=](index_t c, index_t lanes) SSMLIB_LAMBDA_INLINE {
        simd::pack<T> sum(T(0));
        for (index_t j = 0; j < (Width ? Width : width); ++j) {
          const index_t from = r + width - 1 - j;
          if (from < 0) break;
          sum = simd::fma(load_up_to(taps + j * all + c, lanes),
                          load_up_to(d + from * n + c, lanes), sum);
        }
        add_up_to(out + c, lanes, sum);
      });
    }
  }

  void finish() {
    for (index_t j = 0; j <= width_; ++j) {
      const T* sum = sums_.data() + j * n_;
      for (index_t c = 0; c < n_; ++c) {
        if (j == width_ && d_.bias) d_.bias[c0_ + c] += sum[c];
        if (j < width_ && d_.weight) d_.weight(c0_ + c, j) += sum[c];
      }
    }
  }

  const conv1d_problem<T>& p_;
  view<const T, 2> dy_;
  const conv1d_gradients<T>& d_;
  index_t c0_, n_, width_;
  scratch<T> inputs_;  // (tile + width - 1, n): row r is the input at t0 - (width - 1) + r
  scratch<T> d_pre_;   // (tile + width - 1, n): row r belongs to token t0 + r
  scratch<T> sums_;    // (width + 1, n): gradients of the taps and of the bias
};

/// f.operator()<Width>() with the usual widths as constants and 0 for the others.
template <class F>
void with_conv1d_width(index_t width, F f) {
  switch (width) {
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    default:
      return f.template operator()<0>();
  }
}

}  // namespace detail

/// y = the convolution of the problem. Nothing crosses a sequence's beginning, to the bit.
/// @cost 2 width flops an element; bound by memory, or by exp with silu.
template <Real T>
void causal_conv1d(const cpu::context& ctx, const conv1d_problem<T>& p, view<T, 2> y) {
  detail::with_conv1d_width(p.width, [&]<int Width>() { detail::conv1d<Width>(ctx, p, y); });
}

/// Adds to the gradients that are wanted.
template <Real T>
void causal_conv1d_vjp(const cpu::context& ctx, const conv1d_problem<T>& p, view<const T, 2> dy,
                       const conv1d_gradients<T>& d) {
  constexpr index_t step = 512 / static_cast<index_t>(sizeof(T));  // 8 cache lines
  const index_t channels = dy.extent(1);
  ctx.parallel_ranges(channels, channels / step + 1, step, [&](index_t begin, index_t end) {
    detail::with_conv1d_width(p.width, [&]<int Width>() {
      detail::conv1d_backward<Width, T>(p, dy, d, begin, end - begin).run();
    });
  });
}

/// Row r of `out` (sequences, rows, channels) becomes the input `rows - r` tokens before the end of
/// its sequence, from the history where the sequence is shorter.
template <Real T>
void conv1d_final_inputs(const conv1d_problem<T>& p, view<T, 3> out) {
  const index_t rows = out.extent(1), channels = out.extent(2);
  for (index_t i = 0; i < p.sequences; ++i) {
    for (index_t r = 0; r < rows; ++r) {
      const index_t t = p.offsets[i + 1] - rows + r, before = p.offsets[i] - t;
      const T* from = p.zeros;
      if (before <= 0) {
        from = p.x.data + t * p.x.stride(0);
      } else if (p.history.data) {
        from = p.history.row(i, before);
      }
      std::copy_n(from, channels, &out(i, r, 0));
    }
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(                                                                            \
      layers, void causal_conv1d<T>(const cpu::context&, const conv1d_problem<T>&, view<T, 2>)); \
  SSMLIB_INSTANTIATE(layers,                                                                     \
                     void causal_conv1d_vjp<T>(const cpu::context&, const conv1d_problem<T>&,    \
                                               view<const T, 2>, const conv1d_gradients<T>&));   \
  SSMLIB_INSTANTIATE(layers, void conv1d_final_inputs<T>(const conv1d_problem<T>&, view<T, 3>))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
