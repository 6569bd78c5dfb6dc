#include "bigram_model.hpp"

#include <limits>
#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::bigram_model;
using ssm_test::contains;

token_batch some_batch(index_t sequences, index_t length, index_t vocabulary) {
  const auto tokens = ssm_test::chain_tokens(4 * sequences * length, vocabulary, 3);
  data_loader loader(ssm_test::one_shard(tokens), {.sequence_length = length});
  return loader.next(sequences);
}

token_batch part(const token_batch& b, index_t begin, index_t end) {
  return {b.inputs.slice(0, begin, end), b.targets.slice(0, begin, end)};
}

/// The mean's gradient, from micro-batches that end at these sequences.
template <Real T>
std::vector<tensor<T, 1>> accumulated(const bigram_model<T>& model, const token_batch& batch,
                                      const std::vector<index_t>& ends, double& loss) {
  tape<T> t;
  const auto list = parameters_of<T>(model);
  for (const auto& p : list)
    t.watch(p.value);
  gradient_accumulator<T> sum(t);
  index_t begin = 0;
  for (const index_t end : ends) {
    sum.add(model.loss({.tape = &t}, part(batch, begin, end)));
    begin = end;
  }
  loss = sum.mean_loss();
  std::vector<tensor<T, 1>> gradients;
  for (const auto& p : list) {
    gradients.push_back(t.gradient(p.value).clone());
    for (index_t i = 0; i < gradients.back().size(); ++i)
      gradients.back()(i) *= static_cast<T>(sum.scale());
  }
  return gradients;
}

}  // namespace

TEST_CASE("train/gradient: accumulation over uneven micro-batches equals the one big batch",
          "[train][gradient]") {
  const bigram_model<double> model(12);
  const token_batch batch = some_batch(11, 9, 12);
  double loss = 0;
  const auto expected = accumulated(model, batch, {11}, loss);
  const std::vector<std::vector<index_t>> cuts{{1, 11}, {4, 8, 11}, {5, 6, 7, 11}};
  for (const auto& ends : cuts) {
    double cut_loss = 0;
    const auto actual = accumulated(model, batch, ends, cut_loss);
    CHECK(std::abs(cut_loss - loss) <= 1e-12 * loss);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      CHECK(ssm_test::largest_difference(actual[i], expected[i]) <= 1e-12);
    }
  }
}

TEST_CASE("train/gradient: micro-batches weigh by what they count, not equally",
          "[train][gradient]") {
  // All targets of the first sequence but one are masked: a mean of means would differ.
  const bigram_model<double> model(12);
  token_batch batch = some_batch(2, 9, 12);
  for (index_t t = 1; t < 9; ++t)
    batch.targets(0, t) = 0;
  batch.targets(0, 0) = 5;
  double both = 0, first = 0, second = 0;
  (void)accumulated(model, batch, {1, 2}, both);
  (void)accumulated(model, part(batch, 0, 1), {1}, first);
  (void)accumulated(model, part(batch, 1, 2), {1}, second);
  index_t counted = 0;
  for (index_t t = 0; t < 9; ++t)
    counted += batch.targets(1, t) != 0 ? 1 : 0;
  const double weighted =
      (first + second * static_cast<double>(counted)) / static_cast<double>(counted + 1);
  CHECK(std::abs(both - weighted) <= 1e-12);
  CHECK(std::abs(both - (first + second) / 2) > 1e-3);
}

TEST_CASE("train/gradient: the model's gradient equals central differences", "[train][gradient]") {
  const bigram_model<double> model(5);
  const token_batch batch = some_batch(3, 7, 5);
  double loss = 0;
  const auto gradient = accumulated(model, batch, {3}, loss);
  for (const index_t i : {0, 7, 12, 24}) {
    double& w = model.table.data()[i];
    const double at = w, h = 1e-6;
    double up = 0, down = 0;
    w = at + h;
    (void)accumulated(model, batch, {3}, up);
    w = at - h;
    (void)accumulated(model, batch, {3}, down);
    w = at;
    CHECK(std::abs((up - down) / (2 * h) - gradient[0](i)) <= 1e-8);
  }
}

TEMPLATE_TEST_CASE("train/gradient: the norm is that of all gradients together",
                   "[train][gradient]", float, double) {
  std::vector<parameter<TestType>> list;
  tape<TestType> t;
  long double squares = 0;
  for (const index_t n : {1, 31, 16385, 40000}) {
    list.push_back({"p", tensor<TestType, 1>::zeros(n), {n}, parameter_kind::matrix});
    t.watch(list.back().value);
    const auto g = t.gradient(list.back().value);
    g.copy_from(normal<TestType, 1>({n}, 1.0, static_cast<std::uint64_t>(n)));
    for (index_t i = 0; i < n; ++i)
      squares += static_cast<long double>(g(i)) * static_cast<long double>(g(i));
  }
  const double expected = static_cast<double>(std::sqrt(squares));
  CHECK(std::abs(gradient_norm(t, list) - expected) <= 1e-13 * expected);
  CHECK(std::abs(gradient_norm(t, list, 0.25) - 0.25 * expected) <= 1e-13 * expected);
  const cpu::context one(1), three(3);
  CHECK(gradient_norm(t, list, 1.0, one) == gradient_norm(t, list, 1.0, three));
}

TEST_CASE("train/gradient: squares beyond the range of float do not spoil the norm",
          "[train][gradient]") {
  tape<float> t;
  const std::vector<parameter<float>> list{
      {"w", tensor<float, 1>::zeros(4), {4}, parameter_kind::matrix}};
  t.watch(list[0].value);
  t.gradient(list[0].value).fill(1e30f);
  CHECK(gradient_norm(t, list) == ssm_test::approx(2e30).epsilon(1e-6));
  t.gradient(list[0].value).fill(1e-30f);
  CHECK(gradient_norm(t, list) == ssm_test::approx(2e-30).epsilon(1e-6));
}

TEST_CASE("train/gradient: clipping brings a long gradient to the limit and leaves a short one",
          "[train][gradient]") {
  CHECK(clip_factor(4.0, 1.0) == 0.25);
  CHECK(clip_factor(1.0, 1.0) == 1.0);
  CHECK(clip_factor(0.5, 1.0) == 1.0);
  CHECK(clip_factor(0.0, 1.0) == 1.0);
  CHECK(clip_factor(1e9, 0.0) == 1.0);
}

TEST_CASE("train/gradient: a gradient that is not finite names the step and the first parameter",
          "[train][gradient][error]") {
  const bigram_model<float> model(4);
  const auto list = parameters_of<float>(model);
  tape<float> t;
  for (const auto& p : list)
    t.watch(p.value);
  t.gradient(list[0].value).fill(1.0f);
  t.gradient(list[1].value).fill(1.0f);
  CHECK_NOTHROW(require_finite_gradient(gradient_norm(t, list), t, list, 7));
  t.gradient(list[1].value)(2) = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_WITH(require_finite_gradient(gradient_norm(t, list), t, list, 7),
                    contains("step 7: the gradient of 'bias' (4) is") && contains("at value 2"));
  t.gradient(list[0].value)(5) = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH(require_finite_gradient(gradient_norm(t, list), t, list, 7),
                    contains("'table' (4 x 4) is inf at value 5"));
  CHECK_THROWS_AS(require_finite_gradient(gradient_norm(t, list), t, list, 7), numeric_error);
}

TEST_CASE("train/gradient: a loss without a watched parameter is refused",
          "[train][gradient][error]") {
  tape<float> t;
  gradient_accumulator<float> sum(t);
  CHECK_THROWS_WITH(sum.add({tensor<float, 1>::zeros(1), 1}),
                    contains("depends on no watched parameter"));
  CHECK_THROWS_AS(sum.add({tensor<float, 1>::zeros(2), 1}), shape_error);
}
