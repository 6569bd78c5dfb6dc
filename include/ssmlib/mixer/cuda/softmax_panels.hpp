#pragma once

#include <ssmlib/expr/softmax.hpp>
#include <ssmlib/kernels/cuda/attention.hpp>
#include <ssmlib/mixer/cuda/matrix_panels.hpp>
#include <ssmlib/mixer/cuda/semiseparable_panels.hpp>

namespace ssm::detail {

/// Softmax attention on CUDA: exp(logits - log-sum-exp of the row). The log-sum-exps come from the
/// attention kernel, which is given keys for values.
/// @cost  per entry 4 D flops once, 2 D a tile, and 4 D for the gradient; memory O(tokens H).
template <Floating T>
class cuda_softmax_panels final : public matrix_panels<T, cuda> {
 public:
  using real = accum_t<T>;
  using place = kernels::cuda::matrix_place;

  cuda_softmax_panels(const softmax_mixer<T, cuda>& m, tape<T, cuda>* t, const cuda::context& ctx)
      : layout_(layout_of(m)),
        heads_(m.heads()),
        mixer_(m),
        products_(input_tokens(m.logits.q), input_tokens(m.logits.k)),
        log_sum_(heads_, layout_.tokens()) {
    if (t != nullptr) d_q_ = t->gradient(m.logits.q), d_k_ = t->gradient(m.logits.k);
    find_log_sums(ctx);
  }
  [[nodiscard]] const sequence_layout& layout() const override { return layout_; }
  [[nodiscard]] index_t heads() const override { return heads_; }
  [[nodiscard]] bool is_causal() const override { return mixer_.is_causal; }
  [[nodiscard]] bool has_cheap_rows() const override { return true; }

  [[nodiscard]] cuda_matrix_tile<T> tile_at(const cuda::context& ctx,
                                            const place& at) const override {
    cuda_matrix_tile<T> t = products_.compute(ctx, at);
    t.tile.form = kernels::cuda::matrix_form::softmax;
    t.tile.heads = static_cast<int>(heads_);
    t.tile.alpha = static_cast<real>(mixer_.logits.alpha);
    t.tile.log_sum = log_sum_.data();
    t.tile.tokens = layout_.tokens();
    t.tile.causal = mixer_.is_causal;
    t.tile.window = mixer_.is_causal ? mixer_.window : 0;
    return t;
  }

  [[nodiscard]] bool wants_gradients() const override { return d_q_ || d_k_; }
  [[nodiscard]] bool needs_row_sums() const override { return true; }
  void begin_gradients(const cuda::context&) override {
    if (d_q_) dq_ = tensor<real, 3, cuda>::zeros(products_.queries().extents());
    if (d_k_) dk_ = tensor<real, 3, cuda>::zeros(products_.keys().extents());
    row_sums_ = tensor<double, 2, cuda>::zeros(layout_.tokens(), heads_);
  }
  [[nodiscard]] kernels::cuda::matrix_sums sums() const override {
    return {row_sums_.data(), nullptr, nullptr, nullptr};
  }
  void add_products_vjp(const cuda::context& ctx, const place& at,
                        const tensor<T, 1, cuda>& d) override {
    products_.add_vjp(ctx, at, d, dq_, dk_);
  }
  void finish_gradients(const cuda::context& ctx) override {
    add_mapped_gradient<feature::identity>(ctx, mixer_.logits.q, dq_, d_q_);
    add_mapped_gradient<feature::identity>(ctx, mixer_.logits.k, dk_, d_k_);
    dq_ = dk_ = {};
    row_sums_ = {};
  }

 private:
  void find_log_sums(const cuda::context& ctx) const {
    if (layout_.tokens() == 0) return;
    const device_layout l(ctx, layout_);
    kernels::cuda::attention_problem<T> p;
    p.q = products_.queries().const_view();
    p.k = p.v = products_.keys().const_view();
    p.heads = heads_;
    p.offsets = l.offsets;
    p.sequences = l.sequences;
    p.max_length = l.max_length;
    p.scale = mixer_.logits.alpha;
    p.causal = mixer_.is_causal;
    p.window = mixer_.window;
    p.most = kernels::cuda::rung_of(ctx.arch());
    const tensor<T, 3, cuda> unused(layout_.tokens(), heads_, p.v.extent(2));
    kernels::cuda::attention_forward<T>(ctx.stream(), p, unused.view(), log_sum_.view());
  }

  sequence_layout layout_;
  index_t heads_;
  softmax_mixer<T, cuda> mixer_;
  query_key_products<T> products_;
  tensor<real, 2, cuda> log_sum_;  // (heads, tokens)
  tensor<T, 4, cuda> d_q_, d_k_;   // the operands' gradients
  tensor<real, 3, cuda> dq_, dk_;
  tensor<double, 2, cuda> row_sums_;
};

}  // namespace ssm::detail
