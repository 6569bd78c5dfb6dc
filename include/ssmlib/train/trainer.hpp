#pragma once

#include <ssmlib/train/data.hpp>
#include <ssmlib/train/gradient.hpp>
#include <ssmlib/train/schedule.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <concepts>
#include <functional>
#include <string>

namespace ssm {

/// Gives out batches and can be put back: data_loader, or a user's own for other data. Batches are
/// handed to the loss as they are: those with a layout (see pack_documents) train on documents of
/// any lengths.
template <class L>
concept Loader = requires(L& loader, index_t n) {
  loader.next(n);
  loader.restore(loader.state());
  { loader.sequence_length() } -> std::convertible_to<index_t>;
};

/// Sums a loss over a batch: loss_sum<T, B> f(const pass<T, B>&, const batch&). It records on the
/// pass's tape and counts what it sums.
template <class F, class T, class B, class L>
concept LossFunction = requires(F& f, L& loader, const pass<T, B>& p) {
  { f(p, loader.next(index_t{1})) } -> std::convertible_to<loss_sum<T, B>>;
};

struct training_options {
  index_t steps;            ///< of the whole run, what came before a resumption included
  index_t tokens_per_step;  ///< of the batch: a multiple of the sequence length
  double learning_rate;     ///< where the schedule is 1
  std::function<double(index_t)> schedule = constant_schedule{};
  /// Sequences that pass through the model at once; 0: all of the batch. Memory and time depend on
  /// it, the result does not (but for rounding).
  index_t micro_batch = 0;
  double clip = 1.0;  ///< largest norm of the gradient; 0: no limit
};

/// One step, as it is told to callbacks.
struct step_info {
  index_t step;          ///< 0 for the first of the run
  double loss;           ///< mean over what the loss counted, before the update
  double learning_rate;  ///< of this step
  double gradient_norm;  ///< before clipping
  index_t tokens;        ///< what the loss counted
  double seconds;        ///< wall time of this step
};

struct training_callbacks {
  /// After each step, when parameters, moments, step counter and loader fit together: the place to
  /// save a checkpoint.
  std::function<void(const step_info&)> on_step = {};
  /// Asked before each step; true ends the run early.
  std::function<bool()> should_stop = {};
};

namespace detail {

/// Sequences in a batch. @throws value_error  options that make no batch.
inline index_t batch_sequences(const training_options& o, index_t sequence_length) {
  if (o.tokens_per_step < 1 || o.tokens_per_step % sequence_length != 0) {
    throw value_error("ssm: train: " + std::to_string(o.tokens_per_step) +
                      " tokens a step with sequences of " + std::to_string(sequence_length) +
                      "; wanted a multiple of the sequence length");
  }
  if (o.steps < 0 || o.micro_batch < 0 || !(o.clip >= 0) || !(o.learning_rate >= 0)) {
    throw value_error("ssm: train: " + std::to_string(o.steps) + " steps, micro-batches of " +
                      std::to_string(o.micro_batch) + ", clip " + std::to_string(o.clip) +
                      ", learning rate " + std::to_string(o.learning_rate) + "; wanted >= 0");
  }
  if (!o.schedule) throw value_error("ssm: train: the schedule is empty; give a function of steps");
  return o.tokens_per_step / sequence_length;
}

template <Floating T, Backend B, class L, class F>
[[nodiscard]] step_info train_step(adamw<T, B>& optimizer, L& loader, F& loss,
                                   const training_options& options, const pass<T, B>& p) {
  tape<T, B>& t = *p.tape;
  const index_t step = optimizer.steps();
  const index_t sequences = batch_sequences(options, loader.sequence_length());
  const index_t at_once = options.micro_batch > 0 ? options.micro_batch : sequences;
  gradient_accumulator<T, B> sum(t);
  for (index_t done = 0; done < sequences; done += at_once)
    sum.add(loss(p, loader.next(std::min(at_once, sequences - done))));
  // The norm first: on CUDA it is what waits for the step, and then the loss is there.
  const double norm = gradient_norm(t, optimizer.parameters(), sum.scale(), p.ctx);
  const double mean_loss = sum.mean_loss();
  if (!std::isfinite(mean_loss)) {
    throw numeric_error("ssm: train: step " + std::to_string(step) + ": the loss is " +
                        std::to_string(mean_loss) + "; lower the learning rate");
  }
  require_finite_gradient(norm, t, optimizer.parameters(), step);
  const double rate = options.learning_rate * options.schedule(step);
  optimizer.step(t, rate, sum.scale() * clip_factor(norm, options.clip), p.ctx, p.weights);
  return {step, mean_loss, rate, norm, sum.count(), 0.0};
}

}  // namespace detail

/// Trains: batch after batch, gradients of micro-batches are summed, clipped by their global norm,
/// and AdamW takes a step. It starts at optimizer.steps(), so that a run whose optimizer, loader
/// and parameters are restored goes on to the same bits as one that never ended. Nothing is
/// printed.
///
/// Only the optimizer's parameters are watched by the tape; all others are frozen. A bf16 model's
/// passes read working copies of the parameters (nn/weight_cache.hpp), which the optimizer keeps up
/// to date: callbacks may change parameters, the loss may not.
///
///     adamw<float> optimizer(select_parameters(all, names).trained);
///     train(optimizer, loader,
///           [&](const pass<float>& p, const token_batch& b) { return loss_of(model, p, b); },
///           {.steps = 1000, .tokens_per_step = 4096, .learning_rate = 1e-3},
///           {.on_step = [&](const step_info& i) { save_checkpoint(...); }});
///
/// @return the steps that the optimizer has taken: options.steps, or fewer after should_stop.
/// @throws numeric_error  a loss or gradient that is not finite, with the step and the first bad
///                        parameter. Parameters and moments are those of the step before, and so is
///                        the loader's state, after this and any other exception.
/// @throws value_error    options out of range.
template <Floating T, Backend B, Loader L, LossFunction<T, B, L> F>
index_t train(adamw<T, B>& optimizer, L& loader, F&& loss, const training_options& options,
              const training_callbacks& callbacks = {},
              const typename B::context& ctx = default_context<B>()) {
  (void)detail::batch_sequences(options, loader.sequence_length());
  const typename B::scope scope(ctx);
  tape<T, B> t;
  for (const parameter<T, B>& p : optimizer.parameters())
    t.watch(p.value);
  weight_cache<T, B> weights;
  const pass<T, B> p{.ctx = ctx, .tape = &t, .weights = &weights};
  while (optimizer.steps() < options.steps) {
    if (callbacks.should_stop && callbacks.should_stop()) break;
    if (callbacks.should_stop || callbacks.on_step) weights.clear();  // they may change parameters
    const auto start = std::chrono::steady_clock::now();
    const auto before = loader.state();
    step_info info{};
    try {
      info = detail::train_step(optimizer, loader, loss, options, p);
    } catch (...) {
      loader.restore(before);
      throw;
    }
    info.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (callbacks.on_step) callbacks.on_step(info);
  }
  return optimizer.steps();
}

}  // namespace ssm
