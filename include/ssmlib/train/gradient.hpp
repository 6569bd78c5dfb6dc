#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/nn/pass.hpp>
#include <ssmlib/train/adamw.hpp>

#include <cmath>
#include <string>
#include <vector>

namespace ssm {

/// A loss before it is divided: what a loss function gives the trainer.
template <Real T>
struct loss_sum {
  tensor<T, 1> sum;   ///< (1), the loss summed over what it counts; recorded on the tape
  index_t count = 0;  ///< tokens (or matrices, pairs, ...) in the sum; masked ones are not
};

/// The gradient of one batch from micro-batches of any sizes. The result is that of the one big
/// batch: sums are added, and what all of them count together divides, once, at the end. A mean of
/// means would weigh the tokens of a short micro-batch more.
///
/// Rounding: each value is a sum of the same terms in another order, so it differs from the big
/// batch's by at most 2 n eps times the sum of the terms' magnitudes, n the number of terms.
template <Real T>
class gradient_accumulator {
 public:
  /// Starts from zero: drops what the tape has recorded and zeroes its gradients.
  explicit gradient_accumulator(tape<T>& t) : tape_(t) {
    t.clear();
    t.zero_gradients();
  }

  /// Runs the backward pass of one micro-batch.
  /// @throws shape_error  the sum is not one number.
  /// @throws value_error  the loss depends on nothing that the tape watches, or counts less than 0.
  void add(const loss_sum<T>& loss) {
    if (loss.sum.size() != 1) {
      throw shape_error("ssm: gradient_accumulator: the loss is " +
                        to_string<1>(loss.sum.extents()) + ", wanted (1); sum it");
    }
    if (loss.count < 0) {
      throw value_error("ssm: gradient_accumulator: the loss counts " + std::to_string(loss.count) +
                        " tokens; wanted >= 0");
    }
    const tensor<T, 1> seed = tape_.gradient(loss.sum);
    if (!seed) {
      throw value_error(
          "ssm: gradient_accumulator: the loss depends on no watched parameter; watch what trains "
          "before the forward pass and give it the tape");
    }
    sum_ += static_cast<double>(loss.sum(0));
    count_ += loss.count;
    seed.fill(T(1));
    tape_.backward();
    tape_.clear();
  }

  /// What all micro-batches counted.
  [[nodiscard]] index_t count() const { return count_; }
  /// The loss per counted token; 0 where nothing was counted.
  [[nodiscard]] double mean_loss() const { return sum_ * scale(); }
  /// What turns the tape's gradients, which are those of the sum, into those of the mean.
  [[nodiscard]] double scale() const {
    return count_ > 0 ? 1.0 / static_cast<double>(count_) : 0.0;
  }

 private:
  tape<T>& tape_;
  double sum_ = 0;
  index_t count_ = 0;
};

/// The norm of a list of parameters' gradients as one vector, in double and in an order that does
/// not depend on the number of threads.
/// @param scale  multiplies every gradient
/// @cost one read a value.
template <Real T>
[[nodiscard]] double gradient_norm(tape<T>& t, const std::vector<parameter<T>>& parameters,
                                   double scale = 1.0,
                                   const cpu::context& ctx = default_context<cpu>()) {
  std::vector<tensor<T, 1>> gradients;
  for (const parameter<T>& p : parameters)
    gradients.push_back(t.gradient(p.value));
  const detail::parameter_pieces pieces(parameters);
  std::vector<double> sums(pieces.pieces().size());
  pieces.for_each(ctx, [&](std::size_t i, const detail::parameter_pieces::piece& p) {
    const tensor<T, 1>& g = gradients[p.parameter];
    if (g) sums[i] = kernels::sum_of_squares_in_double(p.end - p.begin, g.data() + p.begin);
  });
  double sum = 0;
  for (const double s : sums)
    sum += s;
  return std::abs(scale) * std::sqrt(sum);
}

/// What a gradient of this norm is multiplied by so that its norm is at most `largest`.
/// @param largest  0: no limit
[[nodiscard]] inline double clip_factor(double norm, double largest) {
  return largest > 0 && norm > largest ? largest / norm : 1.0;
}

/// @throws numeric_error  the norm is not finite; names the step and the first parameter with a
///                        gradient that is not.
template <Real T>
void require_finite_gradient(double norm, tape<T>& t, const std::vector<parameter<T>>& parameters,
                             index_t step) {
  if (std::isfinite(norm)) return;
  const std::string where = "ssm: train: step " + std::to_string(step) + ": ";
  for (const parameter<T>& p : parameters) {
    const tensor<T, 1> g = t.gradient(p.value);
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
