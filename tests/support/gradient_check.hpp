#pragma once

#include <ssmlib/nn/pass.hpp>
#include <ssmlib/tensor/random.hpp>

#include <cmath>
#include <string>
#include <vector>

namespace ssm_test {

using ssm::index_t;

/// A tensor as one axis, sharing its elements.
template <class T, int R>
ssm::tensor<T, 1> flat(const ssm::tensor<T, R>& t) {
  return t.reshape(t.size());
}

/// The largest relative error of the tape's gradients, over one random direction for each input,
/// against central differences of sum(cotangent * output) in double.
///
/// @param inputs  dense tensors, flat; f reads them through the same storage
/// @param f       (const pass<double>&) -> flat outputs
///
/// The gradients come from two backward passes without zeroing between them, so an operation that
/// overwrites where it should add fails. The step 1e-5 leaves errors of about 1e-10 |f'''| from
/// truncation and 1e-16 / 1e-5 = 1e-11 |f| from rounding: 1e-7 has room for both.
template <class F>
double gradient_error(const std::vector<ssm::tensor<double, 1>>& inputs, F f) {
  ssm::tape<double> tape;
  for (const auto& input : inputs)
    tape.watch(input);
  std::vector<ssm::tensor<double, 1>> cotangents;
  for (int run = 0; run < 2; ++run) {
    const auto outputs = f(ssm::pass<double>{.tape = &tape});
    for (std::size_t o = 0; o < outputs.size(); ++o) {
      if (run == 0) {
        cotangents.push_back(ssm::uniform<double, 1>(outputs[o].extents(), -1, 1, 900 + o));
      }
      if (!tape.wants(outputs[o])) return 1e300;  // nothing was recorded
      tape.gradient(outputs[o]).copy_from(cotangents[o]);
    }
    tape.backward();
  }
  const auto value = [&] {
    const auto outputs = f(ssm::pass<double>{});
    double sum = 0;
    for (std::size_t o = 0; o < outputs.size(); ++o) {
      for (index_t i = 0; i < outputs[o].size(); ++i)
        sum += outputs[o](i) * cotangents[o](i);
    }
    return sum;
  };
  double worst = 0;
  for (std::size_t n = 0; n < inputs.size(); ++n) {
    const auto& input = inputs[n];
    const auto gradient = tape.gradient(input);
    const auto direction = ssm::uniform<double, 1>(input.extents(), -1, 1, 700 + n);
    const auto original = input.clone();
    const double step = 1e-5;
    double expected = 0, squares = 0;
    for (index_t i = 0; i < input.size(); ++i) {
      expected += 0.5 * gradient(i) * direction(i);
      squares += 0.25 * gradient(i) * gradient(i);
      input(i) = original(i) + step * direction(i);
    }
    const double above = value();
    for (index_t i = 0; i < input.size(); ++i)
      input(i) = original(i) - step * direction(i);
    const double below = value();
    input.copy_from(original);
    const double actual = (above - below) / (2 * step);
    const double error = std::abs(actual - expected) / std::max(std::sqrt(squares), 1e-3);
    worst = std::isnan(error) ? error : std::max(worst, error);
    if (std::isnan(worst)) return worst;
  }
  return worst;
}

/// |a - b| / |b| in the Euclidean norm; NaN where anything is.
template <class T, class U, int R>
double relative_error(const ssm::tensor<T, R>& a, const ssm::tensor<U, R>& b) {
  if (a.extents() != b.extents()) return 1e300;
  const auto x = ssm::cast<double>(a), y = ssm::cast<double>(b);
  double difference = 0, size = 0;
  for (index_t i = 0; i < x.size(); ++i) {
    difference += (x.data()[i] - y.data()[i]) * (x.data()[i] - y.data()[i]);
    size += y.data()[i] * y.data()[i];
  }
  return std::sqrt(difference) / std::max(std::sqrt(size), 1e-300);
}

/// The largest |a - b| over the largest |b|; NaN where anything is.
template <class T, class U, int R>
double largest_error(const ssm::tensor<T, R>& a, const ssm::tensor<U, R>& b) {
  if (a.extents() != b.extents()) return 1e300;
  const auto x = ssm::cast<double>(a), y = ssm::cast<double>(b);
  double difference = 0, size = 1e-300;
  for (index_t i = 0; i < x.size(); ++i) {
    const double d = std::abs(x.data()[i] - y.data()[i]);
    if (std::isnan(d)) return d;
    difference = std::max(difference, d);
    size = std::max(size, std::abs(y.data()[i]));
  }
  return difference / size;
}

/// The same bits in the same shape.
template <class T, int R>
bool same_bits(const ssm::tensor<T, R>& a, const ssm::tensor<T, R>& b) {
  if (a.extents() != b.extents()) return false;
  const auto x = a.contiguous(), y = b.contiguous();
  return std::memcmp(x.data(), y.data(), static_cast<std::size_t>(x.size()) * sizeof(T)) == 0;
}

/// A tensor of NaN: what an operation must overwrite.
template <class T, int R>
ssm::tensor<T, R> poisoned(const ssm::shape<R>& extents) {
  return ssm::tensor<T, R>::full(extents, static_cast<T>(std::nan("")));
}

}  // namespace ssm_test
