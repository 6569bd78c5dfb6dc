#pragma once

#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/reduce.hpp>
#include <ssmlib/mixer/cumulative_decay.hpp>
#include <ssmlib/mixer/matrix_panels.hpp>

#include <algorithm>
#include <concepts>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

namespace ssm::detail {

/// Panels of the semiseparable family,
///
///     M[t, s] = alpha a[t, s] w_s phi(q_t) . phi(k_s)  for s <= t,   + D_h for s = t
///
/// with the decay a. With r the last token of a panel, a[t, s] = a[t, r] a[r, s] for the rows
/// below: one product of scaled queries and scaled keys. The square on the diagonal is a product
/// times its decays. Rows that decayed to 0 cost nothing.
///
/// The gradient of log_a at u sums Z = dM o M over all pairs s < u <= t. Per panel that is a sum
/// of whole rows for u below it and of whole columns plus part of the square for u in it, so
/// nothing is subtracted; the sums come from the products that dq and dk need.
/// @cost  per panel, row and head: 2 n N flops, 4 n N for the gradient, of n columns, N features
/// @source Dao and Gu 2024, arXiv:2405.21060, section 6 (the factors of a block).
template <MatrixMixer L, Real T, FeatureMap Phi>
class semiseparable_panels final : public matrix_panels<T> {
 public:
  /// @param d  (Hd) or absent: the diagonal
  semiseparable_panels(const masked_gram<L, T, cpu, Phi>& m, const tensor<T, 1>& d,
                       const sequence_layout& layout, index_t heads, tape<T>* t,
                       const cpu::context& ctx)
      : layout_(layout),
        heads_(heads),
        alpha_(static_cast<T>(m.kernel.alpha)),
        raw_q_(input_tokens(m.kernel.q)),
        raw_k_(input_tokens(m.kernel.k)),
        q_(input_tokens(mapped<Phi>(ctx, m.kernel.q))),
        k_(input_tokens(mapped<Phi>(ctx, m.kernel.k))),
        d_(d),
        decay_(m.mask, layout),
        dq_(gradient_tokens(t, m.kernel.q)),
        dk_(gradient_tokens(t, m.kernel.k)) {
    if (t && d) dd_ = t->gradient(d);
    if constexpr (has_log_a) {
      weight_ = input_tokens(m.mask.weight);
      dweight_ = gradient_tokens(t, m.mask.weight);
      dlog_a_ = gradient_tokens(t, m.mask.log_a);
    } else if constexpr (has_gamma) {
      gamma_ = m.mask.gamma;
      if (t) dgamma_ = t->gradient(gamma_);
    }
    for (const index_t count : {q_.extent(1), k_.extent(1), decay_.heads(), d ? d.extent(0) : 0})
      groups_ = std::gcd(groups_, count);
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return heads_; }
  [[nodiscard]] bool is_causal() const override { return true; }

  [[nodiscard]] bool has_cheap_rows() const override { return true; }

  void tile_into(const cpu::context& ctx, index_t, index_t row, index_t s0,
                 const tensor<T, 3>& out) const override {
    const index_t s1 = s0 + out.extent(2), end = row + out.extent(0);
    const index_t below = std::clamp(s1, row, end);
    for_row_pieces(ctx, heads_, below, end, [&](index_t h, index_t part, index_t t0, index_t t1) {
      if (part == 0) {
        clear(rows_of_head(out, h, 0, std::clamp<index_t>(s0 - row, 0, end - row)));
        square(h, row, end, s0, s1, out);
      }
      const scratch<T> keys((s1 - s0) * features()), queries(block * features());
      scaled_keys(h, s0, s1, keys.data());
      for_blocks(h, s1 - 1, t0, t1, queries.data(), [&](index_t b0, index_t b1, const T* scale) {
        const view<T, 2> rows = rows_of_head(out, h, b0 - row, b1 - row);
        if (scale) {
          kernels::gemm<T>(T(1), matrix(queries.data(), b1 - b0),
                           transposed(matrix(keys.data(), s1 - s0)), T(0), rows);
        } else {
          clear(rows);
        }
      });
    });
  }

  [[nodiscard]] bool is_constant(index_t, index_t row, index_t row_end, index_t,
                                 index_t s1) const override {
    bool all = row >= s1 && decay_.heads() > 0;
    for (index_t h = 0; all && h < decay_.heads(); ++h)
      all = decay_.vanishes(h, s1 - 1, row, row_end);
    return all;
  }

  void add_vjp(const cpu::context& ctx, index_t, index_t row, index_t s0,
               const tensor<T, 3>& values, const tensor<T, 3>& d) override {
    const index_t s1 = s0 + d.extent(2), n = s1 - s0;
    const index_t end = row + d.extent(0), below = std::clamp(s1, row, end);
    const index_t parts = pieces(end - below);
    // dkey holds, of every head and part of the rows, sum over t of a[t, r] d[t, s] q_t.
    const scratch<T> dkey(heads_ * parts * n * features());
    const scratch<double> row_sums(heads_ * (end - below));
    for_row_pieces(ctx, groups_, below, end, [&](index_t g, index_t part, index_t t0, index_t t1) {
      for (index_t h = g * heads_ / groups_; h < (g + 1) * heads_ / groups_; ++h) {
        add_rows(h, s0, s1, t0, t1, rows_of_head(d, h, t0 - row, t1 - row),
                 dkey.data() + (h * parts + part) * n * features(),
                 row_sums.data() + h * (end - below) + (t0 - below));
      }
    });
    ctx.parallel_for(groups_, [&](index_t g) {
      for (index_t h = g * heads_ / groups_; h < (g + 1) * heads_ / groups_; ++h) {
        T* dk = dkey.data() + h * parts * n * features();
        for (index_t part = 1; part < parts; ++part)
          kernels::axpy<T>(n * features(), T(1), dk + part * n * features(), dk);
        const std::vector<double> pairs = add_columns(h, row, s0, s1, values, d, dk);
        add_decay(h, s0, s1, below, end, pairs.data(), row_sums.data() + h * (end - below));
      }
    });
  }

 private:
  static constexpr bool has_log_a = std::same_as<L, semiseparable_mask<T, cpu>>;
  static constexpr bool has_gamma = std::same_as<L, decay_mask<T, cpu>>;
  static constexpr index_t block = 256;        // rows whose tile stays in the cache
  static constexpr index_t piece = 2 * block;  // rows of a task

  [[nodiscard]] index_t features() const { return q_.extent(2); }
  [[nodiscard]] index_t query_head(index_t h) const { return group_of(h, heads_, q_.extent(1)); }
  [[nodiscard]] index_t key_head(index_t h) const { return group_of(h, heads_, k_.extent(1)); }
  [[nodiscard]] index_t mask_head(index_t h) const { return group_of(h, heads_, decay_.heads()); }
  [[nodiscard]] T weight(index_t s, index_t h) const {
    return weight_ ? weight_(s, mask_head(h)) : T(1);
  }
  [[nodiscard]] view<T, 2> matrix(T* data, index_t rows) const {
    return {data, {rows, features()}, {features(), 1}};
  }

  static void clear(view<T, 2> rows) {
    for (index_t t = 0; t < rows.extents[0]; ++t) {
      std::memset(rows.data + t * rows.strides[0], 0,
                  static_cast<std::size_t>(rows.extents[1]) * sizeof(T));
    }
  }
  [[nodiscard]] static index_t pieces(index_t rows) {
    return std::max<index_t>(1, (rows + piece - 1) / piece);
  }
  // f(g, part, t0, t1) for pieces of the rows [begin, end) of every g; at least one, maybe empty.
  template <class F>
  static void for_row_pieces(const cpu::context& ctx, index_t groups, index_t begin, index_t end,
                             F f) {
    const index_t parts = pieces(end - begin);
    ctx.parallel_for(groups * parts, [&](index_t task) {
      const index_t t0 = begin + task % parts * piece;
      f(task / parts, task % parts, t0, std::min(end, t0 + piece));
    });
  }
  // f(b0, b1, scale) for blocks of the rows [t0, t1), with scale[t - b0] = a[t, r] and `queries`
  // the scaled rows of q; scale is null where all of them are 0.
  template <class F>
  void for_blocks(index_t h, index_t r, index_t t0, index_t t1, T* queries, F f) const {
    T scale[block];
    for (index_t b0 = t0; b0 < t1; b0 += block) {
      const index_t b1 = std::min(t1, b0 + block);
      const bool any = decay_.after(mask_head(h), r, b0, b1, scale);
      if (any) {
        kernels::detail::scaled_rows<T>(rows_of_head(q_, query_head(h), b0, b1), scale,
                                        matrix(queries, b1 - b0));
      }
      f(b0, b1, any ? scale : nullptr);
    }
  }
  // out[s - s0] = alpha a[r, s], r the last column.
  void column_scales(index_t h, index_t s0, index_t s1, T* out) const {
    decay_.before(mask_head(h), s1 - 1, s0, s1, out);
    kernels::scale<T>(s1 - s0, alpha_, out);
  }
  void scaled_keys(index_t h, index_t s0, index_t s1, T* keys) const {
    const scratch<T> scale(s1 - s0);
    column_scales(h, s0, s1, scale.data());
    for (index_t s = s0; s < s1; ++s)
      scale[s - s0] *= weight(s, h);
    kernels::detail::scaled_rows<T>(rows_of_head(k_, key_head(h), s0, s1), scale.data(),
                                    matrix(keys, s1 - s0));
  }
  // factors[t - t0, s - s0] = alpha a[t, s], 0 for s > t.
  void square_factors(index_t h, index_t t0, index_t t1, index_t s0, index_t s1, T* factors) const {
    const index_t n = s1 - s0;
    for (index_t t = t0; t < t1; ++t) {
      T* f = factors + (t - t0) * n;
      decay_.before(mask_head(h), t, s0, t + 1, f);
      kernels::scale<T>(t + 1 - s0, alpha_, f);
      std::fill(f + (t + 1 - s0), f + n, T(0));
    }
  }
  // The rows of a tile that are columns too.
  void square(index_t h, index_t row, index_t end, index_t s0, index_t s1,
              const tensor<T, 3>& out) const {
    const index_t t0 = std::max(row, s0), t1 = std::min(end, s1), n = s1 - s0;
    if (t0 >= t1) return;
    const scratch<T> factors((t1 - t0) * n);
    square_factors(h, t0, t1, s0, s1, factors.data());
    const view<T, 2> rows = rows_of_head(out, h, t0 - row, t1 - row);
    kernels::gemm<T>(T(1), rows_of_head(q_, query_head(h), t0, t1),
                     transposed(rows_of_head(k_, key_head(h), s0, s1)), T(0), rows);
    for (index_t t = t0; t < t1; ++t) {
      for (index_t s = s0; s < s1; ++s) {
        const T f = factors[(t - t0) * n + (s - s0)];
        T& entry = rows(t - t0, s - s0);
        entry = f == T(0) ? T(0) : entry * f * weight(s, h);
      }
      if (d_) rows(t - t0, t - s0) += d_(group_of(h, heads_, d_.extent(0)));
    }
  }

  // to[j] += factor * slope(x_j) * from[j]: the chain rule of the feature map.
  static void add_features(index_t n, T factor, const T* from, const T* x, T* to) {
    if constexpr (std::same_as<Phi, feature::identity>) {
      kernels::axpy<T>(n, factor, from, to);
    } else {
      for (index_t j = 0; j < n; ++j)
        to[j] += factor * Phi::slope(x[j]) * from[j];
    }
  }
  // Rows [t0, t1) below the square: adds dq, sets dkey and the sums of Z over each row.
  void add_rows(index_t h, index_t s0, index_t s1, index_t t0, index_t t1, view<T, 2> d, T* dkey,
                double* row_sums) {
    const index_t n = s1 - s0, hq = query_head(h);
    const scratch<T> keys(n * features()), queries(block * features()), dquery(block * features());
    scaled_keys(h, s0, s1, keys.data());
    std::fill_n(dkey, n * features(), T(0));
    for_blocks(h, s1 - 1, t0, t1, queries.data(), [&](index_t b0, index_t b1, const T* scale) {
      if (scale == nullptr) {
        std::fill(row_sums + (b0 - t0), row_sums + (b1 - t0), 0.0);
        return;
      }
      const view<T, 2> rows{d.data + (b0 - t0) * d.strides[0], {b1 - b0, n}, d.strides};
      kernels::gemm<T>(T(1), transposed(rows), matrix(queries.data(), b1 - b0), T(1),
                       matrix(dkey, n));
      kernels::gemm<T>(T(1), rows, matrix(keys.data(), n), T(0), matrix(dquery.data(), b1 - b0));
      for (index_t t = b0; t < b1; ++t) {
        const T* from = dquery.data() + (t - b0) * features();
        row_sums[t - t0] = static_cast<double>(
            kernels::dot<T>(features(), from, queries.data() + (t - b0) * features()));
        if (dq_) {
          add_features(features(), scale[t - b0], from, &raw_q_(t, hq, 0), &dq_(t, hq, 0));
        }
      }
    });
  }
  // Adds dk, dw and dD from dkey and the square, and the square's dq. Returns, for every u of the
  // columns at [u - s0], the sum of Z over s < u <= t.
  [[nodiscard]] std::vector<double> add_columns(index_t h, index_t row, index_t s0, index_t s1,
                                                const tensor<T, 3>& values, const tensor<T, 3>& d,
                                                T* dkey) {
    const index_t n = s1 - s0, hk = key_head(h), width = features();
    const scratch<T> scale(n);
    column_scales(h, s0, s1, scale.data());
    std::vector<double> pairs(static_cast<std::size_t>(n), 0.0);
    double before = 0;
    for (index_t s = s0; s < s1; ++s) {
      T* key = dkey + (s - s0) * width;
      kernels::scale<T>(width, scale[s - s0], key);
      pairs[static_cast<std::size_t>(s - s0)] = before;
      before += static_cast<double>(weight(s, h) * kernels::dot<T>(width, key, &k_(s, hk, 0)));
    }
    add_square(h, row, s0, s1, values, d, dkey, pairs.data());
    for (index_t s = s0; s < s1; ++s) {
      const T* key = dkey + (s - s0) * width;
      if (dweight_) dweight_(s, mask_head(h)) += kernels::dot<T>(width, key, &k_(s, hk, 0));
      if (dk_) add_features(width, weight(s, h), key, &raw_k_(s, hk, 0), &dk_(s, hk, 0));
    }
    return pairs;
  }
  // The square's part of dq, dkey, dD and of the pairs within it.
  void add_square(index_t h, index_t row, index_t s0, index_t s1, const tensor<T, 3>& values,
                  const tensor<T, 3>& d, T* dkey, double* pairs) {
    const index_t t0 = std::max(row, s0), t1 = std::min(row + d.extent(0), s1);
    if (t0 >= t1) return;
    const index_t n = s1 - s0, m = t1 - t0, hq = query_head(h);
    const scratch<T> x(m * n), keys(n * features()), dquery(m * features());
    square_factors(h, t0, t1, s0, s1, x.data());
    T diagonal = 0;
    for (index_t t = t0; t < t1; ++t) {
      const T* g = &d(t - row, h, 0);
      const T* value = &values(t - row, h, 0);
      T* factor = x.data() + (t - t0) * n;
      double sum = 0;
      for (index_t s = s0; s < t; ++s) {
        sum += static_cast<double>(g[s - s0]) * static_cast<double>(value[s - s0]);
        pairs[s + 1 - s0] += sum;
      }
      for (index_t s = s0; s <= t; ++s)
        factor[s - s0] *= g[s - s0];
      diagonal += g[t - s0];
    }
    if (dd_) dd_(group_of(h, heads_, dd_.extent(0))) += diagonal;
    const view<T, 2> dx{x.data(), {m, n}, {n, 1}};
    kernels::gemm<T>(T(1), transposed(dx), rows_of_head(q_, hq, t0, t1), T(1), matrix(dkey, n));
    if (!dq_) return;
    for (index_t s = s0; s < s1; ++s)
      copy_scaled(weight(s, h), &k_(s, key_head(h), 0), keys.data() + (s - s0) * features());
    kernels::gemm<T>(T(1), dx, matrix(keys.data(), n), T(0), matrix(dquery.data(), m));
    for (index_t t = t0; t < t1; ++t) {
      add_features(features(), T(1), dquery.data() + (t - t0) * features(), &raw_q_(t, hq, 0),
                   &dq_(t, hq, 0));
    }
  }
  void copy_scaled(T factor, const T* from, T* to) const {
    simd::map<T>(features(), from, to, [factor](simd::pack<T> v) SSMLIB_LAMBDA_INLINE {
      return simd::pack<T>(factor) * v;
    });
  }
  void add_decay(index_t h, index_t s0, index_t s1, index_t below, index_t end, const double* pairs,
                 const double* row_sums) const {
    if (!dlog_a_ && !dgamma_) return;
    const index_t hm = mask_head(h);
    double all = 0, rows = 0;
    const auto add = [&](index_t u, double z) {
      if (dlog_a_) dlog_a_(u, hm) += static_cast<T>(z);
      all += z;
    };
    for (index_t u = end - 1; u >= below; --u) {
      rows += row_sums[u - below];
      add(u, rows);
    }
    for (index_t u = s1; u < below && rows != 0; ++u)
      add(u, rows);
    for (index_t u = s0 + 1; u < s1; ++u)
      add(u, pairs[u - s0]);
    if (dgamma_) dgamma_(hm) += static_cast<T>(all / static_cast<double>(gamma_(hm)));
  }

  sequence_layout layout_;
  index_t heads_;
  T alpha_;
  tensor<T, 3> raw_q_, raw_k_, q_, k_;  // (tokens, H, N); q_ and k_ after the feature map
  tensor<T, 1> d_;
  cumulative_decay<T> decay_;
  tensor<T, 2> weight_;
  tensor<T, 1> gamma_;
  tensor<T, 3> dq_, dk_;
  tensor<T, 2> dweight_, dlog_a_;
  tensor<T, 1> dd_, dgamma_;
  index_t groups_ = 0;  // of heads that share no operand
};

/// How a mixer is read as a semiseparable matrix with a diagonal, if it is one.
template <class M>
struct semiseparable_parts {
  static constexpr bool exist = false;
};
template <class L, class T, class Phi>
requires is_semiseparable_mask<L>
struct semiseparable_parts<masked_gram<L, T, cpu, Phi>> {
  static constexpr bool exist = true;
  [[nodiscard]] static auto panels(const masked_gram<L, T, cpu, Phi>& m, tape<T>* t,
                                   const cpu::context& ctx) {
    return std::make_shared<semiseparable_panels<L, T, Phi>>(m, tensor<T, 1>{}, layout_of(m),
                                                             m.heads(), t, ctx);
  }
};
template <class L, class T, class Phi>
requires is_semiseparable_mask<L>
struct semiseparable_parts<with_diagonal<masked_gram<L, T, cpu, Phi>>> {
  static constexpr bool exist = true;
  [[nodiscard]] static auto panels(const with_diagonal<masked_gram<L, T, cpu, Phi>>& m, tape<T>* t,
                                   const cpu::context& ctx) {
    return std::make_shared<semiseparable_panels<L, T, Phi>>(m.inner, m.d, layout_of(m), m.heads(),
                                                             t, ctx);
  }
};

}  // namespace ssm::detail
