#pragma once

#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/mixer/sequence_mixer.hpp>
#include <ssmlib/model/model_state.hpp>
#include <ssmlib/nn/norm.hpp>

#include <algorithm>
#include <concepts>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

namespace ssm {

namespace detail {

/// Whether two mixers of one type are the same function of input and parameters: by their options,
/// where they have some that compare, and by the shapes of their parameters.
template <Floating T, Backend B, class Mixer>
[[nodiscard]] bool same_function(const Mixer& a, const Mixer& b) {
  if constexpr (requires { a.options().same_function(b.options()); }) {
    return a.options().same_function(b.options());
  } else {
    if constexpr (requires { a.options() == b.options(); }) {
      if (!(a.options() == b.options())) return false;
    }
    return std::ranges::equal(
        parameters_of<T, B>(a), parameters_of<T, B>(b),
        [](const auto& x, const auto& y) { return x.name == y.name && x.extents == y.extents; });
  }
}

}  // namespace detail

/// One layer of a model, whatever it is: the boundary between static types (inside a layer) and a
/// run-time list (the model). What distillation needs of a mixer goes through here too.
template <Floating T, Backend B = cpu>
class any_block {
 public:
  virtual ~any_block() = default;

  /// (b, T, d) -> (b, T, d), the residual connection included.
  [[nodiscard]] virtual tensor<T, 3, B> forward(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                                const sequence_layout& layout) const = 0;
  [[nodiscard]] virtual tensor<T, 3, B> advance(const pass<T, B>& p, any_state& state,
                                                const tensor<T, 3, B>& x,
                                                const sequence_layout& layout) const = 0;
  [[nodiscard]] virtual any_state initial_state(index_t sequences, index_t max_rollback) const = 0;
  [[nodiscard]] virtual std::vector<parameter<T, B>> parameters(std::string_view prefix) const = 0;
  /// The same layer with its own copy of the parameters.
  [[nodiscard]] virtual std::shared_ptr<any_block> clone() const = 0;

  /// Whether the block holds a sequence mixer, which mixer_matrix() and mixer_output() need.
  [[nodiscard]] bool has_mixer() const { return mixer_type() != typeid(void); }
  /// Whether both blocks hold a mixer, and these are the same function of input and parameters: of
  /// one type, with the same options but for those of their start.
  [[nodiscard]] bool has_same_mixer(const any_block& other) const {
    return has_mixer() && mixer_type() == other.mixer_type() && same_mixer(other.mixer_address());
  }
  /// The mixer, if it is an M, else null.
  template <class M>
  [[nodiscard]] const M* mixer_as() const {
    return mixer_type() == typeid(M) ? static_cast<const M*>(mixer_address()) : nullptr;
  }
  /// The mixer's T x T matrices for the block's input x, recorded on p.tape.
  [[nodiscard]] virtual std::shared_ptr<matrix_panels<T, B>> mixer_matrix(
      const pass<T, B>&, const tensor<T, 3, B>&, const sequence_layout&) const {
    throw value_error("ssm: mixer_matrix: this block has no sequence mixer; ask has_mixer()");
  }
  /// The mixer's output for the block's input x, before the residual connection.
  [[nodiscard]] virtual tensor<T, 3, B> mixer_output(const pass<T, B>&, const tensor<T, 3, B>&,
                                                     const sequence_layout&) const {
    throw value_error("ssm: mixer_output: this block has no sequence mixer; ask has_mixer()");
  }

 private:
  [[nodiscard]] virtual const std::type_info& mixer_type() const { return typeid(void); }
  [[nodiscard]] virtual const void* mixer_address() const { return nullptr; }
  /// @pre `other` is a mixer of the same type
  [[nodiscard]] virtual bool same_mixer(const void* /*other*/) const { return false; }
};

/// x + mixer(norm(x)): the pre-norm residual layer of Llama's attention, of Mamba and Mamba-2.
template <class Norm, SequenceMixer Mixer, Floating T = typename Mixer::value_type,
          Backend B = typename Mixer::backend>
class mixer_block final : public any_block<T, B> {
 public:
  mixer_block(Norm norm, Mixer mixer) : norm_(std::move(norm)), mixer_(std::move(mixer)) {}

  [[nodiscard]] tensor<T, 3, B> forward(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                        const sequence_layout& layout) const override {
    return eval(p, x + mixer_output(p, x, layout));
  }
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, any_state& state,
                                        const tensor<T, 3, B>& x,
                                        const sequence_layout& layout) const override {
    auto& mine = state.template as<state_of<Mixer>>();
    // A backend may have the whole layer in few kernels for few tokens.
    if constexpr (requires { advance_block(p, norm_, mixer_, mine, x, layout); }) {
      if (auto y = advance_block(p, norm_, mixer_, mine, x, layout)) return y;
    }
    return eval_as<T>(x + mixer_.advance(p, mine, norm_(p, x), layout), p.ctx);
  }
  [[nodiscard]] any_state initial_state(index_t sequences, index_t max_rollback) const override {
    return any_state(mixer_.initial_state(sequences, max_rollback));
  }
  [[nodiscard]] std::vector<parameter<T, B>> parameters(std::string_view prefix) const override {
    return parameters_of<T, B>(*this, prefix);
  }
  [[nodiscard]] std::shared_ptr<any_block<T, B>> clone() const override {
    return std::make_shared<mixer_block>(with_own_parameters(*this));
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "norm", self.norm_);
    visit(f, "mixer", self.mixer_);
  }
  [[nodiscard]] std::shared_ptr<matrix_panels<T, B>> mixer_matrix(
      const pass<T, B>& p, const tensor<T, 3, B>& x, const sequence_layout& layout) const override {
    return mixer_.matrix_panels_of(p, norm_(p, x), layout);
  }
  [[nodiscard]] tensor<T, 3, B> mixer_output(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                             const sequence_layout& layout) const override {
    return mixer_.forward(p, norm_(p, x), layout);
  }

 private:
  [[nodiscard]] const std::type_info& mixer_type() const override { return typeid(Mixer); }
  [[nodiscard]] const void* mixer_address() const override { return &mixer_; }
  [[nodiscard]] bool same_mixer(const void* other) const override {
    return detail::same_function<T, B>(mixer_, *static_cast<const Mixer*>(other));
  }

  Norm norm_;
  Mixer mixer_;
};

/// x + mlp(norm(x)).
template <Floating T, Backend B, class Norm, class Mlp>
class mlp_block final : public any_block<T, B> {
 public:
  mlp_block(Norm norm, Mlp mlp) : norm_(std::move(norm)), mlp_(std::move(mlp)) {}

  [[nodiscard]] tensor<T, 3, B> forward(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                        const sequence_layout&) const override {
    return eval(p, x + mlp_(p, norm_(p, x)));
  }
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, any_state&, const tensor<T, 3, B>& x,
                                        const sequence_layout& layout) const override {
    return forward(p, x, layout);
  }
  [[nodiscard]] any_state initial_state(index_t, index_t) const override { return {}; }
  [[nodiscard]] std::vector<parameter<T, B>> parameters(std::string_view prefix) const override {
    return parameters_of<T, B>(*this, prefix);
  }
  [[nodiscard]] std::shared_ptr<any_block<T, B>> clone() const override {
    return std::make_shared<mlp_block>(with_own_parameters(*this));
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "norm", self.norm_);
    visit(f, "mlp", self.mlp_);
  }

 private:
  Norm norm_;
  Mlp mlp_;
};

/// x + mixer(n) + mlp(n) with one n = norm(x): the parallel block of Phi.
template <class Norm, SequenceMixer Mixer, class Mlp, Floating T = typename Mixer::value_type,
          Backend B = typename Mixer::backend>
class parallel_block final : public any_block<T, B> {
 public:
  parallel_block(Norm norm, Mixer mixer, Mlp mlp)
      : norm_(std::move(norm)), mixer_(std::move(mixer)), mlp_(std::move(mlp)) {}

  [[nodiscard]] tensor<T, 3, B> forward(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                        const sequence_layout& layout) const override {
    const tensor<T, 3, B> n = norm_(p, x);
    return eval(p, x + mixer_.forward(p, n, layout) + mlp_(p, n));
  }
  [[nodiscard]] tensor<T, 3, B> advance(const pass<T, B>& p, any_state& state,
                                        const tensor<T, 3, B>& x,
                                        const sequence_layout& layout) const override {
    const tensor<T, 3, B> n = norm_(p, x);
    auto& mine = state.template as<state_of<Mixer>>();
    return eval_as<T>(x + mixer_.advance(p, mine, n, layout) + mlp_(p, n), p.ctx);
  }
  [[nodiscard]] any_state initial_state(index_t sequences, index_t max_rollback) const override {
    return any_state(mixer_.initial_state(sequences, max_rollback));
  }
  [[nodiscard]] std::vector<parameter<T, B>> parameters(std::string_view prefix) const override {
    return parameters_of<T, B>(*this, prefix);
  }
  [[nodiscard]] std::shared_ptr<any_block<T, B>> clone() const override {
    return std::make_shared<parallel_block>(with_own_parameters(*this));
  }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "norm", self.norm_);
    visit(f, "mixer", self.mixer_);
    visit(f, "mlp", self.mlp_);
  }
  [[nodiscard]] std::shared_ptr<matrix_panels<T, B>> mixer_matrix(
      const pass<T, B>& p, const tensor<T, 3, B>& x, const sequence_layout& layout) const override {
    return mixer_.matrix_panels_of(p, norm_(p, x), layout);
  }
  [[nodiscard]] tensor<T, 3, B> mixer_output(const pass<T, B>& p, const tensor<T, 3, B>& x,
                                             const sequence_layout& layout) const override {
    return mixer_.forward(p, norm_(p, x), layout);
  }

 private:
  [[nodiscard]] const std::type_info& mixer_type() const override { return typeid(Mixer); }
  [[nodiscard]] const void* mixer_address() const override { return &mixer_; }
  [[nodiscard]] bool same_mixer(const void* other) const override {
    return detail::same_function<T, B>(mixer_, *static_cast<const Mixer*>(other));
  }

  Norm norm_;
  Mixer mixer_;
  Mlp mlp_;
};

}  // namespace ssm
