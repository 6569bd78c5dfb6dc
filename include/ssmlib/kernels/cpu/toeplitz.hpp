#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/fft.hpp>
#include <ssmlib/kernels/cpu/rows.hpp>

#include <algorithm>

/// @file
/// Products with causal Toeplitz matrices L[t, s] = kernel[t - s] through Fourier transforms:
/// L X column by column, and L o (Q K^T) V as the sum over n of q_n o L (k_n o v_p). Two columns
/// are the real and imaginary part of one complex signal; a pack holds `width` such pairs.

namespace ssm::kernels {

/// Head h of `heads` uses head h * G / heads of an operand with G heads. Views are (tokens, heads,
/// features) with unit stride in the features.
template <Real T>
struct toeplitz_problem {
  view<const T, 2> kernel;  ///< (G, distances), at least as many as the longest sequence
  view<const T, 3> x;
  view<const T, 3> q, k;  ///< absent: the matrix is L itself
  T alpha = T(1);         ///< of alpha q . k
  index_t heads = 0;
  const index_t* offsets = nullptr;
  index_t sequences = 0;

  [[nodiscard]] index_t width() const { return x.extent(2); }
};

/// Gradients of heads' own operands, (tokens, heads, features), added to; absent ones are skipped.
template <Real T>
struct toeplitz_gradients {
  view<T, 2> kernel;  ///< as the problem's kernel
  view<T, 3> x, q, k;
};

namespace detail {

template <class T>
[[nodiscard]] T* token_row(view<T, 3> t, index_t token, index_t h, index_t heads) {
  return t.data + token * t.stride(0) + h * t.extent(1) / heads * t.stride(1);
}

/// Consecutive sequences of one length share the plan and the spectra of the kernels.
template <Real T>
class toeplitz_batch {
 public:
  toeplitz_batch(const cpu::context& ctx, const toeplitz_problem<T>& p, index_t first, index_t last)
      : p_(p),
        first_(first),
        count_(last - first),
        length_(p.offsets[first + 1] - p.offsets[first]),
        plan_(2 * length_ - 1),
        spectra_(2 * plan_.size() * p.kernel.extent(0)) {
    const view<const T, 2> kernels{p.kernel.data, {p.kernel.extent(0), length_}, p.kernel.strides};
    fft_spectra<T>(ctx, plan_, kernels, spectra_.data());
  }

  [[nodiscard]] index_t count() const { return count_; }
  [[nodiscard]] index_t length() const { return length_; }
  [[nodiscard]] const fft_plan<T>& plan() const { return plan_; }
  [[nodiscard]] index_t begin(index_t i) const { return p_.offsets[first_ + i]; }
  [[nodiscard]] const T* spectrum(index_t h) const {
    return spectra_.data() + 2 * plan_.size() * (h * p_.kernel.extent(0) / p_.heads);
  }

 private:
  const toeplitz_problem<T>& p_;
  index_t first_, count_, length_;
  fft_plan<T> plan_;
  scratch<T> spectra_;
};

/// f(batch) for each run of sequences of one length.
template <Real T, class F>
void for_each_batch(const cpu::context& ctx, const toeplitz_problem<T>& p, F f) {
  for (index_t first = 0; first < p.sequences;) {
    const index_t length = p.offsets[first + 1] - p.offsets[first];
    index_t last = first + 1;
    while (last < p.sequences && p.offsets[last + 1] - p.offsets[last] == length)
      ++last;
    if (length > 0) f(toeplitz_batch<T>(ctx, p, first, last));
    first = last;
  }
}

template <Real T>
SSMLIB_ALWAYS_INLINE complex_pack<T> zero_element() {
  return {simd::pack<T>(T(0)), simd::pack<T>(T(0))};
}

/// Columns of one operand as complex signals: column i of the first half is the real part, column
/// i of the second the imaginary part.
template <Real T>
struct column_pairs {
  index_t begin, real, imaginary;  ///< first column, counts

  static index_t blocks(index_t width) {
    return (width + 2 * simd::pack<T>::width - 1) / (2 * simd::pack<T>::width);
  }
  /// Block i of the nearly equal blocks of `width` columns.
  column_pairs(index_t width, index_t i) {
    const index_t n = blocks(width), end = width * (i + 1) / n;
    begin = width * i / n;
    real = (end - begin + 1) / 2;
    imaginary = end - begin - real;
  }
  [[nodiscard]] SSMLIB_ALWAYS_INLINE complex_pack<T> load(const T* row) const {
    return {load_up_to(row + begin, real), load_up_to(row + begin + real, imaginary)};
  }
  SSMLIB_ALWAYS_INLINE void store(T* row, complex_pack<T> x) const {
    store_up_to(row + begin, real, x.re);
    store_up_to(row + begin + real, imaginary, x.im);
  }
  SSMLIB_ALWAYS_INLINE void add(T* row, complex_pack<T> x) const {
    add_up_to(row + begin, real, x.re);
    add_up_to(row + begin + real, imaginary, x.im);
  }
};

/// Sums over lanes of B conj(A), element by element, added to `sum` (re, im).
template <Real T>
void add_cross_spectrum(index_t n, const T* a, const T* b, T* sum) {
  for (index_t i = 0; i < n; ++i) {
    const complex_pack<T> x = load_element(a + i * element_size<T>);
    const complex_pack<T> y = load_element(b + i * element_size<T>);
    sum[2 * i] += simd::horizontal_sum(simd::fma(y.re, x.re, y.im * x.im));
    sum[2 * i + 1] += simd::horizontal_sum(simd::fma(y.im, x.re, -(y.re * x.im)));
  }
}

/// kernel[g, d] += the real part of the correlations whose cross spectra are `parts`: `per_head`
/// of them for each of `heads` heads, added in order.
template <Real T>
void add_correlations(const cpu::context& ctx, const fft_plan<T>& plan, index_t length,
                      index_t heads, index_t per_head, const T* parts, view<T, 2> kernel) {
  constexpr index_t w = simd::pack<T>::width;
  const index_t n = plan.size(), groups = kernel.extent(0);
  const T scale = T(1) / static_cast<T>(n);
  ctx.parallel_for((groups + w - 1) / w, [&](index_t block) {
    const index_t first = block * w, lanes = std::min(w, groups - first);
    const scratch<T> sums(n * element_size<T>);
    std::fill_n(sums.data(), n * element_size<T>, T(0));
    for (index_t h = 0; h < heads; ++h) {
      const index_t lane = h * groups / heads - first;
      if (lane < 0 || lane >= lanes) continue;
      for (index_t part = h * per_head; part < (h + 1) * per_head; ++part) {
        for (index_t i = 0; i < n; ++i) {
          sums[i * element_size<T> + lane] += parts[2 * (part * n + i)];
          sums[i * element_size<T> + w + lane] += parts[2 * (part * n + i) + 1];
        }
      }
    }
    fft_inverse(plan, sums.data());
    for (index_t lane = 0; lane < lanes; ++lane) {
      for (index_t d = 0; d < length; ++d) {
        kernel(first + lane, d) += scale * sums[d * element_size<T> + lane];
      }
    }
  });
}

/// Tasks of a correlation over a batch: slices of the sequences, so that few heads still share.
inline index_t sequence_slices(index_t sequences) {
  return std::min<index_t>(sequences, 4);
}

}  // namespace detail

/// y = L x for every sequence and head; y (tokens, heads, P) is overwritten.
/// @cost O(T log T) a column; working memory O(T) a task.
template <Real T>
void toeplitz_fft(const cpu::context& ctx, const toeplitz_problem<T>& p, view<T, 3> y) {
  using namespace detail;
  const index_t blocks = column_pairs<T>::blocks(p.width());
  for_each_batch(ctx, p, [&](const toeplitz_batch<T>& batch) {
    ctx.parallel_for(batch.count() * p.heads * blocks, [&](index_t task) {
      const column_pairs<T> columns(p.width(), task % blocks);
      const index_t h = task / blocks % p.heads, begin = batch.begin(task / blocks / p.heads);
      const index_t length = batch.length();
      const scratch<T> block(batch.plan().size() * element_size<T>);
      fft_convolve<false>(
          batch.plan(), batch.spectrum(h), block.data(),
          [&](index_t t) SSMLIB_LAMBDA_INLINE {
            if (t >= length) return zero_element<T>();
            return columns.load(token_row(p.x, begin + t, h, p.heads));
          },
          [&](index_t t, complex_pack<T> v) SSMLIB_LAMBDA_INLINE {
            if (t < length) columns.store(token_row(y, begin + t, h, p.heads), v);
          });
    });
  });
}

/// dx += L^T dy and dkernel[d] += the sum over t and columns of dy[t] x[t - d].
template <Real T>
void toeplitz_fft_vjp(const cpu::context& ctx, const toeplitz_problem<T>& p, view<const T, 3> dy,
                      const toeplitz_gradients<T>& g) {
  using namespace detail;
  const index_t blocks = column_pairs<T>::blocks(p.width());
  for_each_batch(ctx, p, [&](const toeplitz_batch<T>& batch) {
    const fft_plan<T>& plan = batch.plan();
    const index_t n = plan.size(), length = batch.length();
    if (g.x) {
      ctx.parallel_for(batch.count() * p.heads * blocks, [&](index_t task) {
        const column_pairs<T> columns(p.width(), task % blocks);
        const index_t h = task / blocks % p.heads, begin = batch.begin(task / blocks / p.heads);
        const scratch<T> block(n * element_size<T>);
        fft_convolve<true>(
            plan, batch.spectrum(h), block.data(),
            [&](index_t t) SSMLIB_LAMBDA_INLINE {
              if (t >= length) return zero_element<T>();
              return columns.load(token_row(dy, begin + t, h, p.heads));
            },
            [&](index_t t, complex_pack<T> v) SSMLIB_LAMBDA_INLINE {
              if (t < length) columns.add(token_row(g.x, begin + t, h, p.heads), v);
            });
      });
    }
    if (!g.kernel) return;
    const index_t slices = sequence_slices(batch.count());
    const scratch<T> parts(2 * n * p.heads * blocks * slices);
    std::fill_n(parts.data(), 2 * n * p.heads * blocks * slices, T(0));
    ctx.parallel_for(p.heads * blocks * slices, [&](index_t task) {
      const column_pairs<T> columns(p.width(), task / slices % blocks);
      const index_t h = task / slices / blocks, slice = task % slices;
      const scratch<T> a(n * element_size<T>), b(n * element_size<T>);
      const auto transform_rows = [&](view<const T, 3> from, index_t begin, T* to) {
        fft_forward(plan, to, [&](index_t t) SSMLIB_LAMBDA_INLINE {
          if (t >= length) return zero_element<T>();
          return columns.load(token_row(from, begin + t, h, p.heads));
        });
      };
      for (index_t i = batch.count() * slice / slices; i < batch.count() * (slice + 1) / slices;
           ++i) {
        transform_rows(p.x, batch.begin(i), a.data());
        transform_rows(dy, batch.begin(i), b.data());
        add_cross_spectrum(n, a.data(), b.data(), parts.data() + 2 * n * task);
      }
    });
    add_correlations(ctx, plan, length, p.heads, blocks * slices, parts.data(), g.kernel);
  });
}

#define SSMLIB_DETAIL_LIST(T)                                                                  \
  SSMLIB_INSTANTIATE(toeplitz, void toeplitz_fft<T>(const cpu::context&,                       \
                                                    const toeplitz_problem<T>&, view<T, 3>));  \
  SSMLIB_INSTANTIATE(toeplitz,                                                                 \
                     void toeplitz_fft_vjp<T>(const cpu::context&, const toeplitz_problem<T>&, \
                                              view<const T, 3>, const toeplitz_gradients<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels
