#pragma once

#include <ssmlib/expr/elementwise.hpp>
#include <ssmlib/lower/evaluate.hpp>

#include <algorithm>
#include <functional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ssm {

/// Reverse-mode differentiation, one entry per evaluated expression.
///
/// Gradients are found by memory: the gradient of a tensor is the same geometry over a gradient
/// buffer that belongs to the tensor's buffer. So a slice or a reshape needs no entry: the gradient
/// of a part is that part of the gradient, and everything accumulates with +=.
///
/// An entry keeps what it captured (tensors, by count) until it has run. A null tape* means
/// inference: the same code, nothing saved.
template <Floating T, Backend B = cpu>
class tape {
 public:
  tape() = default;
  tape(const tape&) = delete;
  tape& operator=(const tape&) = delete;

  /// Wants the gradient of a parameter. It accumulates over backward() calls until
  /// zero_gradients().
  template <Element U, int R>
  void watch(const tensor<U, R, B>& parameter) {
    slots_[parameter.storage().id()] = {parameter.storage(), {}, true};
  }
  template <Element U, int R>
  void unwatch(const tensor<U, R, B>& parameter) {
    slots_.erase(parameter.storage().id());
  }

  /// Whether any gradient through t is wanted.
  template <Element U, int R>
  [[nodiscard]] bool wants(const tensor<U, R, B>& t) const {
    return t && slots_.contains(t.storage().id());
  }

  /// The gradient of t so far, to read or to add to; absent if it is not wanted.
  template <Element U, int R>
  [[nodiscard]] tensor<U, R, B> gradient(const tensor<U, R, B>& t) {
    if (!t) return {};
    const auto found = slots_.find(t.storage().id());
    if (found == slots_.end()) return {};
    if (found->second.shared && !is_running_output(found->first)) make_own(found->second);
    return t.rebind(gradient_buffer(found->second));
  }

  /// For the entry of `output`, of which t is a term: output's gradient becomes that of t, without
  /// a copy. It is copied when somebody adds to one of those that share it while another is wanted.
  /// @return false, and nothing is done, if t has a gradient already, or is a parameter, a part of
  ///         a tensor, or not wanted; the entry adds then. On the CPU always, where a sum with zero
  ///         has no negative zeros.
  template <Element U, int R>
  bool share_gradient(const tensor<U, R, B>& output, const tensor<U, R, B>& t) {
    if constexpr (std::same_as<B, cpu>) return false;
    const auto from = slots_.find(output.storage().id()), to = slots_.find(t.storage().id());
    if (from == slots_.end() || to == slots_.end() || from == to || to->second.parameter ||
        to->second.gradient.id() != nullptr || !is_whole(output) || !is_whole(t) ||
        output.extents() != t.extents()) {
      return false;
    }
    (void)output.rebind(gradient_buffer(from->second)).data();  // with its zeros
    to->second.gradient = from->second.gradient;
    from->second.shared = to->second.shared = true;
    return true;
  }

  /// Appends an entry for `output`: backward() will run `add_gradients`, which reads
  /// gradient(output) and adds to the gradients of what it captured.
  template <Element U, int R, class F>
  void record(const tensor<U, R, B>& output, F add_gradients) {
    record_outputs(std::move(add_gradients), output);
  }

  /// Appends one entry for several outputs: it is run if any of them has a gradient. The gradient
  /// of an output that nobody used is zero.
  template <class F, class... Tensors>
  void record_outputs(F add_gradients, const Tensors&... outputs) {
    (slots_.try_emplace(outputs.storage().id(), slot{outputs.storage(), {}, false}), ...);
    entries_.push_back({{outputs.storage().id()...}, std::move(add_gradients), B::current()});
  }

  /// Runs the entries from the last to the first and drops them. Seed the result first, by filling
  /// gradient(loss).
  void backward() { backward_to(0); }

  /// The number of entries now, for backward_to: how checkpointing nests.
  [[nodiscard]] std::size_t mark() const { return entries_.size(); }
  void backward_to(std::size_t mark) {
    while (entries_.size() > mark) {
      entry last = std::move(entries_.back());
      entries_.pop_back();
      const bool reached = std::ranges::any_of(last.outputs, [&](const void* output) {
        const auto found = slots_.find(output);
        return found != slots_.end() && found->second.gradient.id() != nullptr;
      });
      if (reached) {
        const typename B::scope scope(last.context);
        const running_entry running(running_, last.outputs);
        last.run();
      }
      // Entries are run in reverse, so nobody else reads these gradients.
      for (const void* output : last.outputs) {
        const auto found = slots_.find(output);
        if (found != slots_.end() && !found->second.parameter) slots_.erase(found);
      }
    }
  }

  /// Drops entries and the gradients of everything that is not a watched parameter.
  void clear() {
    entries_.clear();
    std::erase_if(slots_, [](const auto& item) { return !item.second.parameter; });
  }
  void zero_gradients() {
    for (auto& [id, s] : slots_) {
      if (s.gradient.id() != nullptr) detail::elements<B>::zero(s.gradient);
    }
  }

 private:
  struct slot {
    buffer<B> value;  // keeps the address from being reused
    buffer<B> gradient;
    bool parameter;
    bool shared = false;  // perhaps another slot has the same gradient
  };
  struct entry {
    std::vector<const void*> outputs;
    std::function<void()> run;
    [[no_unique_address]] decltype(B::current()) context;
  };

  struct running_entry {
    running_entry(const std::vector<const void*>*& now, const std::vector<const void*>& outputs)
        : now_(now), before_(std::exchange(now, &outputs)) {}
    ~running_entry() { now_ = before_; }
    running_entry(const running_entry&) = delete;
    running_entry& operator=(const running_entry&) = delete;

   private:
    const std::vector<const void*>*& now_;
    const std::vector<const void*>* before_;
  };

  const buffer<B>& gradient_buffer(slot& s) {
    if (s.gradient.id() == nullptr) {
      s.gradient = buffer<B>(s.value.bytes());
      detail::elements<B>::zero(s.gradient);
    }
    return s.gradient;
  }
  void make_own(slot& s) {
    s.shared = false;
    if (s.gradient.use_count() == 1) return;
    const buffer<B> copy(s.gradient.bytes());
    const detail::strided_axes bytes{{1, 1, 1, static_cast<index_t>(copy.bytes())}, {0, 0, 0, 1}};
    detail::elements<B>::copy(copy.data(), bytes, s.gradient.data(), bytes, 1);
    s.gradient = copy;
  }
  template <Element U, int R>
  [[nodiscard]] static bool is_whole(const tensor<U, R, B>& t) {
    return t.is_contiguous() &&
           static_cast<std::size_t>(t.size()) * sizeof(U) == t.storage().bytes();
  }
  /// An entry only reads the gradients of its outputs.
  [[nodiscard]] bool is_running_output(const void* id) const {
    return running_ != nullptr && std::ranges::find(*running_, id) != running_->end();
  }

  std::unordered_map<const void*, slot> slots_;
  std::vector<entry> entries_;
  const std::vector<const void*>* running_ = nullptr;  // the outputs of the entry that runs
};

/// Anything with operands, an eval and a vjp_into: mixer products and elementwise expressions.
template <class E>
concept Differentiable = requires(E& e) {
  typename E::value_type;
  E::operands(e, [](std::string_view, auto&, operand) {});
};

namespace detail {

/// Whether an expression is a sum of tensors of one type, each of which has the gradient dy.
template <class E, class Tensor>
inline constexpr bool is_sum_of = std::same_as<E, Tensor>;
template <class A, class C, class Tensor>
inline constexpr bool is_sum_of<binary_expression<elementwise::add, A, C>, Tensor> =
    is_sum_of<A, Tensor>&& is_sum_of<C, Tensor>;

template <Differentiable E, Floating T>
[[nodiscard]] bool wants_operand(const E& e, const tape<T, typename E::backend>* t) {
  if (t == nullptr) return false;
  bool wanted = false;
  E::operands(e, [&](std::string_view, const auto& tensor, operand) {
    if constexpr (requires { t->wants(tensor); }) wanted = wanted || t->wants(tensor);
  });
  return wanted;
}

/// y = e has been evaluated: records add_vjp(dy, gradients), the vector-Jacobian product of e.
template <Differentiable E, class Tensor, Floating T, class F>
void record_vjp(const E& e, const Tensor& y, tape<T, typename E::backend>* t, F add_vjp) {
  t->record(y, [e, y, t, add_vjp = std::move(add_vjp)] {
    E gradients = e;
    E::operands(gradients, [&](std::string_view, auto& tensor, operand) {
      if constexpr (is_sum_of<E, Tensor>) {
        if (t->share_gradient(y, tensor)) {
          tensor = {};
          return;
        }
      }
      if constexpr (requires { t->gradient(tensor); }) {
        tensor = t->gradient(tensor);
      } else {
        tensor = {};
      }
    });
    add_vjp(t->gradient(y), gradients);
  });
}

/// The same with the expression's own vjp_into, if it is wanted.
template <Differentiable E, class Tensor, Floating T>
void record_expression(const E& e, const Tensor& y, tape<T, typename E::backend>* t,
                       const typename E::backend::context& ctx) {
  if (!wants_operand(e, t)) return;
  record_vjp(e, y, t,
             [e, &ctx](const Tensor& dy, E& gradients) { vjp_into(e, dy, gradients, ctx); });
}

}  // namespace detail

/// Evaluates e, and records its vector-Jacobian product when t is not null and any operand's
/// gradient is wanted.
template <Differentiable E, Floating T>
[[nodiscard]] auto eval(
    const E& e, tape<T, typename E::backend>* t,
    const typename E::backend::context& ctx = default_context<typename E::backend>()) {
  const typename E::backend::scope scope(ctx);
  if constexpr (requires { eval_with_vjp(e, ctx); }) {
    if (detail::wants_operand(e, t)) {
      auto r = eval_with_vjp(e, ctx);
      detail::record_vjp(e, r.y, t, std::move(r.add_vjp));
      return r.y;
    }
    return eval(e, ctx);
  } else {
    auto y = eval(e, ctx);
    detail::record_expression(e, y, t, ctx);
    return y;
  }
}
/// The same for an elementwise expression, rounded to another element type.
template <Floating To, Differentiable E, Floating T>
[[nodiscard]] auto eval_as(
    const E& e, tape<T, typename E::backend>* t,
    const typename E::backend::context& ctx = default_context<typename E::backend>()) {
  const typename E::backend::scope scope(ctx);
  auto y = eval_as<To>(e, ctx);
  detail::record_expression(e, y, t, ctx);
  return y;
}

/// y = f(x, tape) without keeping what f saves: the backward pass runs f again. For layers whose
/// activations do not fit.
/// @param f  T(const tensor<T, R, B>&, tape<T, B>*), the same result each time
/// @cost  one more forward pass of f; memory: x and y.
template <Floating T, Backend B, int R, class F>
[[nodiscard]] auto checkpoint(const tensor<T, R, B>& x, tape<T, B>* t, F f) {
  auto y = f(x, static_cast<tape<T, B>*>(nullptr));
  if (t == nullptr) return y;
  t->record(y, [x, y, t, f] {
    const std::size_t mark = t->mark();
    const auto again = f(x, t);
    if (t->wants(again) && !t->share_gradient(y, again)) {
      detail::add_to(t->gradient(again), t->gradient(y));
    }
    t->backward_to(mark);
  });
  return y;
}

}  // namespace ssm
