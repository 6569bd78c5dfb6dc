#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/nn/pass.hpp>
#include <ssmlib/train/adamw.hpp>

#include <cmath>
#include <string>
#include <vector>

namespace ssm {

/// A loss before it is divided: what a loss function gives the trainer.
template <Floating T, Backend B = cpu>
struct loss_sum {
  tensor<accum_t<T>, 1, B> sum;  ///< (1), the loss summed over what it counts; recorded on the tape
  index_t count = 0;  ///< tokens (or matrices, pairs, ...) in the sum; masked ones are not
};

/// The gradient of one batch from micro-batches of any sizes. The result is that of the one big
/// batch: sums are added, and what all of them count together divides, once, at the end. A mean of
/// means would weigh the tokens of a short micro-batch more.
///
/// Rounding: each value is a sum of the same terms in another order, so it differs from the big
/// batch's by at most 2 n eps times the sum of the terms' magnitudes, n the number of terms.
template <Floating T, Backend B = cpu>
class gradient_accumulator {
 public:
  /// Starts from zero: drops what the tape has recorded and zeroes its gradients.
  explicit gradient_accumulator(tape<T, B>& t) : tape_(t) {
    t.clear();
    t.zero_gradients();
  }

  /// Runs the backward pass of one micro-batch.
  /// @throws shape_error  the sum is not one number.
  /// @throws value_error  the loss depends on nothing that the tape watches, or counts less than 0.
  void add(const loss_sum<T, B>& loss) {
    if (loss.sum.size() != 1) {
      throw shape_error("ssm: gradient_accumulator: the loss is " +
                        to_string<1>(loss.sum.extents()) + ", wanted (1); sum it");
    }
    if (loss.count < 0) {
      throw value_error("ssm: gradient_accumulator: the loss counts " + std::to_string(loss.count) +
                        " tokens; wanted >= 0");
    }
    const tensor<accum_t<T>, 1, B> seed = tape_.gradient(loss.sum);
    if (!seed) {
      throw value_error(
          "ssm: gradient_accumulator: the loss depends on no watched parameter; watch what trains "
          "before the forward pass and give it the tape");
    }
    sums_.push_back(loss.sum);
    count_ += loss.count;
    seed.fill(accum_t<T>(1));
    tape_.backward();
    tape_.clear();
  }

  /// What all micro-batches counted.
  [[nodiscard]] index_t count() const { return count_; }
  /// The loss per counted token; 0 where nothing was counted. On CUDA it waits for the losses, in
  /// the context that is current.
  [[nodiscard]] double mean_loss() const {
    double sum = 0;
    for (const auto& s : sums_)
      sum += static_cast<double>(detail::on_host(s).data()[0]);
    return sum * scale();
  }
  /// What turns the tape's gradients, which are those of the sum, into those of the mean.
  [[nodiscard]] double scale() const {
    return count_ > 0 ? 1.0 / static_cast<double>(count_) : 0.0;
  }

 private:
  tape<T, B>& tape_;
  std::vector<tensor<accum_t<T>, 1, B>> sums_;  // of the micro-batches
  index_t count_ = 0;
};

/// The sum of the squares of all values of a list of tensors, of which any may be absent.
template <Real R>
[[nodiscard]] double apply_sum_of_squares(const cpu::context& ctx,
                                          const std::vector<tensor<R, 1>>& list) {
  const detail::tensor_pieces pieces(list, [](const tensor<R, 1>& t) { return t.size(); });
  std::vector<double> sums(pieces.pieces().size());
  pieces.for_each(ctx, [&](std::size_t i, const detail::tensor_pieces::piece& p) {
    sums[i] = kernels::sum_of_squares_in_double(p.end - p.begin, list[p.tensor].data() + p.begin);
  });
  double sum = 0;
  for (const double s : sums)
    sum += s;
  return sum;
}

/// The norm of a list of parameters' gradients as one vector, in double and in an order that does
/// not depend on the number of threads. On CUDA it waits for them.
/// @param scale  multiplies every gradient
/// @cost one read a value.
template <Floating T, Backend B>
[[nodiscard]] double gradient_norm(tape<T, B>& t, const std::vector<parameter<T, B>>& parameters,
                                   double scale = 1.0,
                                   const typename B::context& ctx = default_context<B>()) {
  const typename B::scope scope(ctx);
  std::vector<tensor<accum_t<T>, 1, B>> gradients;
  for (const parameter<T, B>& p : parameters)
    gradients.push_back(t.gradient(p.value));
  return std::abs(scale) * std::sqrt(apply_sum_of_squares(ctx, gradients));
}

/// What a gradient of this norm is multiplied by so that its norm is at most `largest`.
/// @param largest  0: no limit
[[nodiscard]] inline double clip_factor(double norm, double largest) {
  return largest > 0 && norm > largest ? largest / norm : 1.0;
}

/// @throws numeric_error  the norm is not finite; names the step and the first parameter with a
///                        gradient that is not.
template <Floating T, Backend B>
void require_finite_gradient(double norm, tape<T, B>& t,
                             const std::vector<parameter<T, B>>& parameters, index_t step) {
  if (std::isfinite(norm)) return;
  const std::string where = "ssm: train: step " + std::to_string(step) + ": ";
  for (const parameter<T, B>& p : parameters) {
    const tensor<accum_t<T>, 1> g = detail::on_host(t.gradient(p.value));
    for (index_t i = 0; i < g.size(); ++i) {
      if (!std::isfinite(g(i))) {
        throw numeric_error(where + "the gradient of '" + p.name + "' " + to_string(p.extents) +
                            " is " + std::to_string(g(i)) + " at value " + std::to_string(i) +
                            "; lower the learning rate or clip the gradient");
      }
    }
  }
  throw numeric_error(where + "the gradient's norm is " + std::to_string(norm) +
                      " though every value is finite; lower the learning rate");
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(training, double gradient_norm<T>(tape<T>&, const std::vector<parameter<T>>&, \
                                                       double, const cpu::context&));              \
  SSMLIB_INSTANTIATE(training, void require_finite_gradient<T>(                                    \
                                   double, tape<T>&, const std::vector<parameter<T>>&, index_t))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
