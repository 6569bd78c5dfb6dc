#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/kernels/cpu/optimizer.hpp>
#include <ssmlib/nn/parameter.hpp>
#include <ssmlib/nn/weight_cache.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace ssm {

struct adamw_options {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;  ///< for parameters that decay (parameter::decays) only
};

namespace detail {

/// Pieces of a list of tensors that are worth a task each: a large tensor is cut, small ones are
/// taken together. The cuts depend on the sizes only.
class tensor_pieces {
 public:
  struct piece {
    std::size_t tensor;
    index_t begin, end;
  };

  /// @param size_of  of an element of the list
  template <class List, class F>
  tensor_pieces(const List& list, F size_of) {
    index_t filled = task_values;  // the first piece opens a task
    for (std::size_t p = 0; p < list.size(); ++p) {
      const index_t size = size_of(list[p]);
      for (index_t begin = 0; begin < size; begin += task_values) {
        const index_t end = std::min(size, begin + task_values);
        if (filled + (end - begin) > task_values) {
          tasks_.push_back(pieces_.size());
          filled = 0;
        }
        filled += end - begin;
        pieces_.push_back({p, begin, end});
      }
    }
    tasks_.push_back(pieces_.size());
  }

  [[nodiscard]] const std::vector<piece>& pieces() const { return pieces_; }

  /// f(index of the piece, piece) for all of them, in parallel.
  template <class F>
  void for_each(const cpu::context& ctx, F f) const {
    ctx.parallel_for(static_cast<index_t>(tasks_.size()) - 1, [&](index_t t) {
      const auto task = static_cast<std::size_t>(t);
      for (std::size_t i = tasks_[task]; i < tasks_[task + 1]; ++i)
        f(i, pieces_[i]);
    });
  }

 private:
  static constexpr index_t task_values = 16384;
  std::vector<piece> pieces_;
  std::vector<std::size_t> tasks_{};  // where each task's pieces begin, and the end of the last's
};

/// @throws value_error  two parameters share values, which would be updated twice.
/// @throws shape_error  a parameter's values do not lie one after another.
template <Floating T, Backend B>
void check_parameters(const std::vector<parameter<T, B>>& list) {
  std::vector<const parameter<T, B>*> order;
  for (const auto& p : list) {
    if (!p.value.is_contiguous()) {
      throw shape_error("ssm: adamw: the values of '" + p.name + "', " + to_string(p.extents) +
                        ", have gaps; wanted a dense tensor");
    }
    if (p.value.size() > 0) order.push_back(&p);
  }
  const auto begin = [](const parameter<T, B>* p) { return p->value.data(); };
  std::sort(order.begin(), order.end(), [&](const auto* a, const auto* b) {
    return std::less<const accum_t<T>*>()(begin(a), begin(b));
  });
  for (std::size_t i = 1; i < order.size(); ++i) {
    if (std::less<const accum_t<T>*>()(begin(order[i]),
                                       begin(order[i - 1]) + order[i - 1]->value.size())) {
      throw value_error("ssm: adamw: the parameters '" + order[i - 1]->name + "' and '" +
                        order[i]->name + "' share memory; list a tied parameter once");
    }
  }
}

}  // namespace detail

/// A parameter with its gradient and moments, all dense.
template <Real R, Backend B = cpu>
struct adamw_values {
  tensor<R, 1, B> value, gradient, first, second;
  bool decays;
  tensor<bf16, 1, B> copy{};  ///< takes the new values too, or absent; not on the CPU
};

/// One update of all parameters. @param step  its `keep` is that of parameters that decay
template <Real R>
void apply_adamw(const cpu::context& ctx, const kernels::adamw_step<R>& step,
                 const std::vector<adamw_values<R>>& list) {
  const detail::tensor_pieces pieces(list, [](const adamw_values<R>& v) { return v.value.size(); });
  pieces.for_each(ctx, [&](std::size_t, const detail::tensor_pieces::piece& p) {
    const adamw_values<R>& v = list[p.tensor];
    kernels::adamw_step<R> mine = step;
    if (!v.decays) mine.keep = R(1);
    kernels::adamw(p.end - p.begin, mine, v.gradient.data() + p.begin, v.first.data() + p.begin,
                   v.second.data() + p.begin, v.value.data() + p.begin);
  });
}

/// AdamW over a list of parameters: Adam with decoupled weight decay. With gradient g at step t,
///
///     m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
///     w = (1 - rate decay) w - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
///
/// Decay applies to matrices and filters only, never to norms, biases, A_log, dt_bias and D.
/// @source Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; the moments are those of
///         Kingma and Ba 2015, arXiv:1412.6980.
template <Floating T, Backend B = cpu>
class adamw {
 public:
  /// @param parameters  what trains; the values are shared with the model
  /// @throws value_error  an option is out of range, or two parameters share memory.
  /// @throws shape_error  a parameter is not dense.
  explicit adamw(std::vector<parameter<T, B>> parameters, const adamw_options& options = {});

  /// One update of every parameter from its gradient times `gradient_scale`. Results do not depend
  /// on the number of threads.
  /// @param learning_rate  >= 0
  /// @param weights        whose copies of the parameters get the new values too, or null
  /// @throws value_error  the tape does not watch a parameter.
  /// @cost 4 reads and 3 writes a value, and the copies.
  void step(tape<T, B>& t, double learning_rate, double gradient_scale = 1.0,
            const typename B::context& ctx = default_context<B>(),
            weight_cache<T, B>* weights = nullptr);

  /// How many updates there have been.
  [[nodiscard]] index_t steps() const { return steps_; }
  [[nodiscard]] const std::vector<parameter<T, B>>& parameters() const { return parameters_; }
  [[nodiscard]] const adamw_options& options() const { return options_; }
  /// m and v, one tensor a parameter, sharing the elements: to save and to restore.
  [[nodiscard]] const std::vector<tensor<accum_t<T>, 1, B>>& first_moments() const {
    return first_;
  }
  [[nodiscard]] const std::vector<tensor<accum_t<T>, 1, B>>& second_moments() const {
    return second_;
  }
  /// Sets the number of updates, when the moments are restored. @throws value_error  negative.
  void set_steps(index_t steps) {
    if (steps < 0) {
      throw value_error("ssm: adamw: set_steps(" + std::to_string(steps) + "): wanted >= 0");
    }
    steps_ = steps;
  }

 private:
  std::vector<parameter<T, B>> parameters_;
  adamw_options options_;
  std::vector<tensor<accum_t<T>, 1, B>> first_, second_;
  index_t steps_ = 0;
};

template <Floating T, Backend B>
adamw<T, B>::adamw(std::vector<parameter<T, B>> parameters, const adamw_options& options)
    : parameters_(std::move(parameters)), options_(options) {
  const auto in_unit = [](double beta) { return beta >= 0 && beta < 1; };
  if (!in_unit(options.beta1) || !in_unit(options.beta2) || !(options.epsilon > 0) ||
      !(options.weight_decay >= 0)) {
    throw value_error("ssm: adamw: beta1 " + std::to_string(options.beta1) + ", beta2 " +
                      std::to_string(options.beta2) + ", epsilon " +
                      std::to_string(options.epsilon) + ", weight decay " +
                      std::to_string(options.weight_decay) +
                      "; wanted 0 <= beta < 1, epsilon > 0, weight decay >= 0");
  }
  detail::check_parameters(parameters_);
  for (const parameter<T, B>& p : parameters_) {
    first_.push_back(tensor<accum_t<T>, 1, B>::zeros(p.value.size()));
    second_.push_back(tensor<accum_t<T>, 1, B>::zeros(p.value.size()));
  }
}

template <Floating T, Backend B>
void adamw<T, B>::step(tape<T, B>& t, double learning_rate, double gradient_scale,
                       const typename B::context& ctx, weight_cache<T, B>* weights) {
  if (!(learning_rate >= 0)) {
    throw value_error("ssm: adamw: step with the learning rate " + std::to_string(learning_rate) +
                      "; wanted >= 0");
  }
  const typename B::scope scope(ctx);
  std::vector<adamw_values<accum_t<T>, B>> list;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const parameter<T, B>& p = parameters_[i];
    list.push_back({p.value, t.gradient(p.value), first_[i], second_[i], p.decays()});
    if (!list.back().gradient && p.value) {
      throw value_error("ssm: adamw: the tape does not watch the parameter '" + p.name +
                        "'; watch it before the forward pass");
    }
  }
  if constexpr (std::same_as<T, bf16>) {
    for (std::size_t i = 0; weights != nullptr && i < list.size(); ++i)
      list[i].copy = weights->copy_to_update(list[i].value);
  }
  ++steps_;
  const auto count = static_cast<double>(steps_);
  using R = accum_t<T>;
  kernels::adamw_step<R> c;
  c.gradient_scale = static_cast<R>(gradient_scale);
  c.beta1 = static_cast<R>(options_.beta1);
  c.beta2 = static_cast<R>(options_.beta2);
  c.rest1 = static_cast<R>(1 - options_.beta1);
  c.rest2 = static_cast<R>(1 - options_.beta2);
  c.keep = static_cast<R>(1 - learning_rate * options_.weight_decay);
  c.rate = static_cast<R>(learning_rate / (1 - std::pow(options_.beta1, count)));
  c.root_factor = static_cast<R>(1 / std::sqrt(1 - std::pow(options_.beta2, count)));
  c.epsilon = static_cast<R>(options_.epsilon);
  apply_adamw(ctx, c, list);
}

#define SSMLIB_DETAIL_LIST(T) SSMLIB_INSTANTIATE(training, class adamw<T>)
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
