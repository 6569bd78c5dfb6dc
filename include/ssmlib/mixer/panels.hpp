#pragma once

#include <ssmlib/expr/hadamard.hpp>
#include <ssmlib/expr/softmax.hpp>
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>
#include <ssmlib/lower/state.hpp>

#include <memory>
#include <vector>

namespace ssm {

/// A T x T matrix of any mixer, read and differentiated a few columns at a time, so that two
/// mixers can be compared entry by entry in O(T) memory. The type behind it is erased: whatever
/// models MatrixMixer can meet whatever else does (MOHAWK's matrix orientation).
template <Real T>
class matrix_panels {
 public:
  virtual ~matrix_panels() = default;

  [[nodiscard]] virtual const sequence_layout& layout() const = 0;
  [[nodiscard]] virtual index_t heads() const = 0;
  /// True where entries above the diagonal are zero, so that rows before the panel need no look.
  [[nodiscard]] virtual bool is_causal() const = 0;

  /// Columns [s0, s1), rows [row, end of sequence i); tokens count over the batch.
  /// @return (rows, heads, s1 - s0)
  [[nodiscard]] virtual tensor<T, 3> panel(const cpu::context& ctx, index_t i, index_t row,
                                           index_t s0, index_t s1) const = 0;

  /// Whether the gradient needs sums over whole rows. If so, observe() is shown every panel of a
  /// sequence with its gradient before the first add_vjp() of that sequence.
  [[nodiscard]] virtual bool needs_row_sums() const { return false; }
  virtual void observe(const cpu::context&, index_t /*i*/, index_t /*row*/, index_t /*s0*/,
                       const tensor<T, 3>& /*values*/, const tensor<T, 3>& /*d*/) {}
  /// Adds the vector-Jacobian product of one panel to the gradients of the mixer's operands.
  /// @param d  as panel()
  virtual void add_vjp(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                       const tensor<T, 3>& d) = 0;
};

/// Whether column s of a mixer depends on the tokens from s on only, so that panels can be read
/// from the operands after s. Normalised rows depend on all earlier columns.
template <class M>
inline constexpr bool has_local_columns = RecurrentMixer<M>;
template <class M>
inline constexpr bool has_local_columns<row_normalized<M>> = false;
template <class M>
inline constexpr bool has_local_columns<with_diagonal<M>> = has_local_columns<M>;

namespace detail {

/// Panels of any mixer: its product with columns of the identity.
template <MatrixMixer M>
class product_panels final : public matrix_panels<typename M::value_type> {
 public:
  using T = typename M::value_type;

  product_panels(M m, tape<T>* t) : mixer_(std::move(m)), layout_(layout_of(mixer_)) {
    gradients_ = mixer_;
    M::operands(gradients_, [&](std::string_view, auto& operand_tensor, operand) {
      using operand_type = std::remove_cvref_t<decltype(operand_tensor)>;
      if constexpr (std::same_as<typename operand_type::value_type, T>) {
        operand_tensor = t ? t->gradient(operand_tensor) : operand_type{};
      }
    });
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return mixer_.heads(); }
  [[nodiscard]] bool is_causal() const override { return RecurrentMixer<M>; }

  [[nodiscard]] tensor<T, 3> panel(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                                   index_t s1) const override {
    const index_t first = first_token(i, s0);
    const tensor<T, 4> y = eval(product(mixer_, i, first, s0, s1), ctx);
    tensor<T, 4> rows(1, layout_.end(i) - row, heads(), s1 - s0);
    // Tokens before `first` have no part in these columns.
    const index_t zero = std::max<index_t>(first - row, 0);
    rows.slice(1, 0, zero).fill(T(0));
    rows.slice(1, zero, rows.extent(1))
        .copy_from(y.slice(1, std::max(row - first, index_t{0}), y.extent(1)));
    return rows.reshape(rows.extent(1), rows.extent(2), rows.extent(3));
  }

  void add_vjp(const cpu::context& ctx, index_t i, index_t row, index_t s0,
               const tensor<T, 3>& d) override {
    const index_t first = first_token(i, s0), s1 = s0 + d.extent(2);
    const auto e = product(mixer_, i, first, s0, s1);
    auto dy = tensor<T, 4>::zeros(e.extents());
    const index_t skip = std::max<index_t>(first - row, 0);
    dy.slice(1, std::max(row - first, index_t{0}), dy.extent(1))
        .reshape(d.extent(0) - skip, d.extent(1), d.extent(2))
        .copy_from(d.slice(0, skip, d.extent(0)));
    auto gradients = product(gradients_, i, first, s0, s1);
    gradients.x = {};
    vjp_into(e, dy, gradients, carry_gradient<T>{}, ctx);
  }

 private:
  [[nodiscard]] index_t first_token(index_t i, index_t s0) const {
    return has_local_columns<M> ? s0 : layout_.begin(i);
  }
  [[nodiscard]] mix<M, 4> product(const M& m, index_t i, index_t first, index_t s0,
                                  index_t s1) const {
    const index_t end = layout_.end(i);
    mix<M, 4> e{m, {}, {}};
    M::operands(e.mixer, [&](std::string_view, auto& t, operand kind) {
      if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
        if (kind == operand::per_token && t) t = as_packed(t).slice(1, first, end);
      }
    });
    e.mixer.layout = sequence_layout::rectangular(1, end - first);
    e.x = tensor<T, 4>::zeros(1, end - first, 1, s1 - s0);
    for (index_t s = s0; s < s1; ++s)
      e.x(0, s - first, 0, s - s0) = T(1);
    return e;
  }

  M mixer_, gradients_;
  sequence_layout layout_;
};

/// Panels of softmax attention: exp(logits - log-sum-exp of the row), O(T) memory.
template <Real T>
class softmax_panels final : public matrix_panels<T> {
 public:
  softmax_panels(softmax_mixer<T> m, tape<T>* t, const cpu::context& ctx)
      : mixer_(std::move(m)),
        layout_(layout_of(mixer_)),
        q_(as_packed(mixer_.logits.q)),
        k_(as_packed(mixer_.logits.k)),
        log_sum_(layout_.tokens(), mixer_.heads()) {
    if (t) {
      dq_ = t->gradient(mixer_.logits.q);
      dk_ = t->gradient(mixer_.logits.k);
      if (dq_) dq_ = as_packed(dq_);
      if (dk_) dk_ = as_packed(dk_);
      row_sum_ = tensor<T, 2>::zeros(layout_.tokens(), mixer_.heads());
    }
    for (index_t i = 0; i < layout_.sequences(); ++i)
      find_log_sums(ctx, i);
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return mixer_.heads(); }
  [[nodiscard]] bool is_causal() const override { return mixer_.is_causal; }

  [[nodiscard]] tensor<T, 3> panel(const cpu::context& ctx, index_t i, index_t row, index_t s0,
                                   index_t s1) const override {
    tensor<T, 3> out(layout_.end(i) - row, heads(), s1 - s0);
    logits(ctx, row, s0, out);
    for_row_blocks(ctx, out, [&](index_t h, index_t r0, index_t r1) {
      for (index_t r = r0; r < r1; ++r) {
        const T sum = log_sum_(row + r, h);
        T* p = &out(r, h, 0);
        for (index_t s = 0; s < s1 - s0; ++s) {
          p[s] = mixer_.keeps(row + r, s0 + s) ? std::exp(p[s] - sum) : T(0);
        }
      }
    });
    return out;
  }

  [[nodiscard]] bool needs_row_sums() const override { return true; }
  void observe(const cpu::context& ctx, index_t, index_t row, index_t, const tensor<T, 3>& values,
               const tensor<T, 3>& d) override {
    for_row_blocks(ctx, values, [&](index_t h, index_t r0, index_t r1) {
      for (index_t r = r0; r < r1; ++r) {
        T sum = 0;
        for (index_t s = 0; s < values.extent(2); ++s)
          sum += values(r, h, s) * d(r, h, s);
        row_sum_(row + r, h) += sum;
      }
    });
  }

  // dS = P o (dP - sum_s P dP); dQ = alpha dS K; dK = alpha dS^T Q.
  void add_vjp(const cpu::context& ctx, index_t i, index_t row, index_t s0,
               const tensor<T, 3>& d) override {
    const index_t s1 = s0 + d.extent(2), rows = d.extent(0);
    const tensor<T, 3> ds = panel(ctx, i, row, s0, s1);
    for_row_blocks(ctx, ds, [&](index_t h, index_t r0, index_t r1) {
      for (index_t r = r0; r < r1; ++r) {
        for (index_t s = 0; s < s1 - s0; ++s) {
          ds(r, h, s) *= d(r, h, s) - row_sum_(row + r, h);
        }
      }
    });
    const T alpha = static_cast<T>(mixer_.logits.alpha);
    for (index_t h = 0; h < heads(); ++h) {
      const index_t hq = group_of(h, heads(), q_.extent(2)),
                    hk = group_of(h, heads(), k_.extent(2));
      const view<T, 2> tile{&ds(0, h, 0), {rows, s1 - s0}, {ds.strides()[0], index_t{1}}};
      if (dq_) {
        kernels::gemm<T>(ctx, alpha, tile, rows_of(k_, 0, hk, s0, s1), T(1),
                         rows_of(dq_, 0, hq, row, row + rows));
      }
      if (dk_) {
        kernels::gemm<T>(ctx, alpha, view<T, 2>{tile.data, {s1 - s0, rows}, {1, tile.strides[0]}},
                         rows_of(q_, 0, hq, row, row + rows), T(1), rows_of(dk_, 0, hk, s0, s1));
      }
    }
  }

 private:
  void logits(const cpu::context& ctx, index_t row, index_t s0, const tensor<T, 3>& out) const {
    const index_t rows = out.extent(0), columns = out.extent(2);
    for (index_t h = 0; h < heads(); ++h) {
      const view<T, 2> keys = rows_of(k_, 0, group_of(h, heads(), k_.extent(2)), s0, s0 + columns);
      kernels::gemm<T>(
          ctx, static_cast<T>(mixer_.logits.alpha),
          rows_of(q_, 0, group_of(h, heads(), q_.extent(2)), row, row + rows),
          view<T, 2>{keys.data, {keys.extents[1], columns}, {keys.strides[1], keys.strides[0]}},
          T(0), view<T, 2>{&out(0, h, 0), {rows, columns}, {out.strides()[0], index_t{1}}});
    }
  }
  void find_log_sums(const cpu::context& ctx, index_t i) {
    const index_t begin = layout_.begin(i), end = layout_.end(i);
    if (begin == end) return;
    const T low = -std::numeric_limits<T>::infinity();
    auto largest = tensor<T, 2>::full({end - begin, heads()}, low);
    auto sum = tensor<T, 2>::zeros(end - begin, heads());
    for (index_t s0 = begin; s0 < end; s0 += block) {
      const index_t s1 = std::min(end, s0 + block), row = is_causal() ? s0 : begin;
      tensor<T, 3> values(end - row, heads(), s1 - s0);
      logits(ctx, row, s0, values);
      for_row_blocks(ctx, values, [&](index_t h, index_t r0, index_t r1) {
        for (index_t r = r0; r < r1; ++r) {
          T top = low;
          for (index_t s = 0; s < s1 - s0; ++s) {
            T& v = values(r, h, s);
            if (!mixer_.keeps(row + r, s0 + s)) v = low;
            top = std::max(top, v);
          }
          if (top == low) continue;
          T& old = largest(row + r - begin, h);
          const T now = std::max(old, top);
          T& total = sum(row + r - begin, h);
          total *= std::exp(old - now);
          for (index_t s = 0; s < s1 - s0; ++s)
            total += std::exp(values(r, h, s) - now);
          old = now;
        }
      });
    }
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < heads(); ++h) {
        log_sum_(t, h) = largest(t - begin, h) + std::log(sum(t - begin, h));
      }
    }
  }
  template <class F>
  void for_row_blocks(const cpu::context& ctx, const tensor<T, 3>& t, F f) const {
    const index_t blocks = (t.extent(0) + block - 1) / block;
    ctx.parallel_for(blocks * t.extent(1), [&](index_t task) {
      const index_t r0 = task % blocks * block;
      f(task / blocks, r0, std::min(t.extent(0), r0 + block));
    });
  }

  static constexpr index_t block = 128;
  softmax_mixer<T> mixer_;
  sequence_layout layout_;
  tensor<T, 4> q_, k_, dq_, dk_;
  tensor<T, 2> log_sum_, row_sum_;
};

/// Panels of given matrices (b, H, T, T); no gradients.
template <Real T>
class dense_panels final : public matrix_panels<T> {
 public:
  explicit dense_panels(tensor<T, 4> matrices)
      : matrices_(std::move(matrices)),
        layout_(sequence_layout::rectangular(matrices_.extent(0), matrices_.extent(2))) {
    if (matrices_.extent(2) != matrices_.extent(3)) {
      throw shape_error("ssm: panels of " + to_string<4>(matrices_.extents()) +
                        ": wanted (batch x heads x time x time)");
    }
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return matrices_.extent(1); }
  [[nodiscard]] bool is_causal() const override { return false; }
  [[nodiscard]] tensor<T, 3> panel(const cpu::context&, index_t i, index_t row, index_t s0,
                                   index_t s1) const override {
    const index_t begin = layout_.begin(i);
    tensor<T, 3> out(layout_.end(i) - row, heads(), s1 - s0);
    for (index_t r = 0; r < out.extent(0); ++r) {
      for (index_t h = 0; h < heads(); ++h) {
        for (index_t s = s0; s < s1; ++s) {
          out(r, h, s - s0) = matrices_(i, h, row + r - begin, s - begin);
        }
      }
    }
    return out;
  }
  void add_vjp(const cpu::context&, index_t, index_t, index_t, const tensor<T, 3>&) override {}

 private:
  tensor<T, 4> matrices_;
  sequence_layout layout_;
};

}  // namespace detail

/// The panels of a mixer. @param t  the tape that holds its operands' gradients; null: read only
template <MatrixMixer M>
[[nodiscard]] std::shared_ptr<matrix_panels<typename M::value_type>> panels(
    M m, tape<typename M::value_type>* t = nullptr,
    [[maybe_unused]] const cpu::context& ctx = default_context<cpu>()) {
  using T = typename M::value_type;
  if constexpr (std::same_as<M, softmax_mixer<T>>) {
    return std::make_shared<detail::softmax_panels<T>>(std::move(m), t, ctx);
  } else {
    return std::make_shared<detail::product_panels<M>>(std::move(m), t);
  }
}
/// Matrices that are already there, (b, H, T, T).
template <Real T>
[[nodiscard]] std::shared_ptr<matrix_panels<T>> panels(tensor<T, 4> matrices) {
  return std::make_shared<detail::dense_panels<T>>(std::move(matrices));
}

}  // namespace ssm
