#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/kernels/cpu/optimizer.hpp>
#include <ssmlib/nn/parameter.hpp>

#include <algorithm>
#include <cmath>
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

/// Pieces of a list of parameters that are worth a task each: a large tensor is cut, small ones
/// are taken together. The cuts depend on the sizes only.
class parameter_pieces {
 public:
  struct piece {
    std::size_t parameter;
    index_t begin, end;
  };

  parameter_pieces() = default;
  template <Real T>
  explicit parameter_pieces(const std::vector<parameter<T>>& list) {
    index_t filled = task_values;  // the first piece opens a task
    for (std::size_t p = 0; p < list.size(); ++p) {
      const index_t size = list[p].value.size();
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
template <Real T>
void check_parameters(const std::vector<parameter<T>>& list) {
  std::vector<const parameter<T>*> order;
  for (const auto& p : list) {
    if (!p.value.is_contiguous()) {
      throw shape_error("ssm: adamw: the values of '" + p.name + "', " + to_string(p.extents) +
                        ", have gaps; wanted a dense tensor");
    }
    if (p.value.size() > 0) order.push_back(&p);
  }
  const auto begin = [](const parameter<T>* p) { return p->value.data(); };
  std::sort(order.begin(), order.end(), [&](const auto* a, const auto* b) {
    return std::less<const T*>()(begin(a), begin(b));
  });
  for (std::size_t i = 1; i < order.size(); ++i) {
    if (std::less<const T*>()(begin(order[i]), begin(order[i - 1]) + order[i - 1]->value.size())) {
      throw value_error("ssm: adamw: the parameters '" + order[i - 1]->name + "' and '" +
                        order[i]->name + "' share memory; list a tied parameter once");
    }
  }
}

}  // namespace detail

/// AdamW over a list of parameters: Adam with decoupled weight decay. With gradient g at step t,
///
///     m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
///     w = (1 - rate decay) w - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
///
/// Decay applies to matrices and filters only, never to norms, biases, A_log, dt_bias and D.
/// @source Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; the moments are those of
///         Kingma and Ba 2015, arXiv:1412.6980.
template <Real T>
class adamw {
 public:
  /// @param parameters  what trains; the values are shared with the model
  /// @throws value_error  an option is out of range, or two parameters share memory.
  /// @throws shape_error  a parameter is not dense.
  explicit adamw(std::vector<parameter<T>> parameters, const adamw_options& options = {});

  /// One update of every parameter from its gradient times `gradient_scale`. Results do not depend
  /// on the number of threads.
  /// @param learning_rate  >= 0
  /// @throws value_error  the tape does not watch a parameter.
  /// @cost 4 reads and 3 writes a value.
  void step(tape<T>& t, double learning_rate, double gradient_scale = 1.0,
            const cpu::context& ctx = default_context<cpu>());

  /// How many updates there have been.
  [[nodiscard]] index_t steps() const { return steps_; }
  [[nodiscard]] const std::vector<parameter<T>>& parameters() const { return parameters_; }
  [[nodiscard]] const adamw_options& options() const { return options_; }
  /// m and v, one tensor a parameter, sharing the elements: to save and to restore.
  [[nodiscard]] const std::vector<tensor<T, 1>>& first_moments() const { return first_; }
  [[nodiscard]] const std::vector<tensor<T, 1>>& second_moments() const { return second_; }
  /// Sets the number of updates, when the moments are restored. @throws value_error  negative.
  void set_steps(index_t steps) {
    if (steps < 0) {
      throw value_error("ssm: adamw: set_steps(" + std::to_string(steps) + "): wanted >= 0");
    }
    steps_ = steps;
  }

 private:
  std::vector<parameter<T>> parameters_;
  adamw_options options_;
  detail::parameter_pieces pieces_;
  std::vector<tensor<T, 1>> first_, second_, gradients_;
  index_t steps_ = 0;
};

template <Real T>
adamw<T>::adamw(std::vector<parameter<T>> parameters, const adamw_options& options)
    : parameters_(std::move(parameters)), options_(options), pieces_(parameters_) {
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
  for (const parameter<T>& p : parameters_) {
    first_.push_back(tensor<T, 1>::zeros(p.value.size()));
    second_.push_back(tensor<T, 1>::zeros(p.value.size()));
  }
  gradients_.resize(parameters_.size());
}

template <Real T>
void adamw<T>::step(tape<T>& t, double learning_rate, double gradient_scale,
                    const cpu::context& ctx) {
  if (!(learning_rate >= 0)) {
    throw value_error("ssm: adamw: step with the learning rate " + std::to_string(learning_rate) +
                      "; wanted >= 0");
  }
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    gradients_[i] = t.gradient(parameters_[i].value);
    if (!gradients_[i] && parameters_[i].value) {
      throw value_error("ssm: adamw: the tape does not watch the parameter '" +
                        parameters_[i].name + "'; watch it before the forward pass");
    }
  }
  ++steps_;
  const auto count = static_cast<double>(steps_);
  kernels::adamw_step<T> c;
  c.gradient_scale = static_cast<T>(gradient_scale);
  c.beta1 = static_cast<T>(options_.beta1);
  c.beta2 = static_cast<T>(options_.beta2);
  c.rest1 = static_cast<T>(1 - options_.beta1);
  c.rest2 = static_cast<T>(1 - options_.beta2);
  c.rate = static_cast<T>(learning_rate / (1 - std::pow(options_.beta1, count)));
  c.root_factor = static_cast<T>(1 / std::sqrt(1 - std::pow(options_.beta2, count)));
  c.epsilon = static_cast<T>(options_.epsilon);
  c.keep = T(1);
  const auto decayed = static_cast<T>(1 - learning_rate * options_.weight_decay);
  pieces_.for_each(ctx, [&](std::size_t, const detail::parameter_pieces::piece& p) {
    const parameter<T>& target = parameters_[p.parameter];
    kernels::adamw_step<T> mine = c;
    if (target.decays()) mine.keep = decayed;
    kernels::adamw(p.end - p.begin, mine, gradients_[p.parameter].data() + p.begin,
                   first_[p.parameter].data() + p.begin, second_[p.parameter].data() + p.begin,
                   target.value.data() + p.begin);
  });
  for (auto& g : gradients_)
    g = {};
}

#define SSMLIB_DETAIL_LIST(T) SSMLIB_INSTANTIATE(training, class adamw<T>)
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
