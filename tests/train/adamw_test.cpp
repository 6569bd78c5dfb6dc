#include <ssmlib/io.hpp>
#include <ssmlib/tensor/random.hpp>
#include <ssmlib/train/adamw.hpp>

#include <cstdlib>
#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::contains;

std::filesystem::path goldens() {
  const char* folder = std::getenv("SSMLIB_GOLDENS");
  return std::filesystem::path(folder != nullptr ? folder : SSMLIB_TEST_DATA) / "ops";
}

template <Real T>
parameter<T> named(const std::string& name, const tensor<T, 1>& value,
                   parameter_kind kind = parameter_kind::matrix) {
  return {name, value, {value.size()}, kind};
}

/// One step with given gradients.
template <Real T>
void step_with(adamw<T>& optimizer, const std::vector<tensor<T, 1>>& gradients, double rate,
               double scale = 1.0, const cpu::context& ctx = default_context<cpu>()) {
  tape<T> t;
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    t.watch(optimizer.parameters()[i].value);
    t.gradient(optimizer.parameters()[i].value).copy_from(gradients[i]);
  }
  optimizer.step(t, rate, scale, ctx);
}

}  // namespace

TEMPLATE_TEST_CASE("train/adamw: the trajectory is the reference's", "[train][adamw][golden]",
                   float, double) {
  const safetensors_reader file(goldens() / "adamw.safetensors");
  const auto start = file.load<TestType, 2>("in.w");
  const auto gradients = file.load<TestType, 3>("in.grads");
  const auto expected = file.load<double, 3>("out.trajectory");
  const auto o = file.load<double, 1>("in.lr_beta1_beta2_eps_decay");
  const index_t values = start.size();
  const auto w = start.reshape(values);
  adamw<TestType> optimizer({named("w", w)}, {o(1), o(2), o(3), o(4)});

  double largest = 0, largest_error = 0, squares = 0, error_squares = 0;
  for (index_t t = 0; t < gradients.extent(0); ++t) {
    step_with(optimizer, {gradients.slice(0, t, t + 1).reshape(values)}, o(0));
    const auto reference = expected.slice(0, t, t + 1).reshape(values);
    for (index_t i = 0; i < values; ++i) {
      const double error = std::abs(static_cast<double>(w(i)) - reference(i));
      largest = std::max(largest, std::abs(reference(i)));
      if (!(error <= largest_error)) largest_error = std::isnan(error) ? INFINITY : error;
      squares += reference(i) * reference(i);
      error_squares += error * error;
    }
  }
  REQUIRE(largest > 0);
  if (std::is_same_v<TestType, double>) {
    CHECK(largest_error <= 1e-6 * largest);
  } else {
    CHECK(largest_error <= 1e-4 * largest);
    CHECK(std::sqrt(error_squares) <= 1e-5 * std::sqrt(squares));
  }
}

TEST_CASE("train/adamw: matrices and filters decay, norms, biases and decay parameters never",
          "[train][adamw]") {
  using enum parameter_kind;
  for (const parameter_kind kind : {matrix, filter, norm, bias, decay}) {
    const auto w = tensor<double, 1>::full({3}, 2.0);
    adamw<double> optimizer({named("w", w, kind)}, {.weight_decay = 0.5});
    step_with(optimizer, {tensor<double, 1>::zeros(3)}, 0.1);
    CHECK(w(1) == (kind == matrix || kind == filter ? 2.0 * (1 - 0.1 * 0.5) : 2.0));
  }
}

TEST_CASE("train/adamw: a scaled gradient is a gradient times the scale", "[train][adamw]") {
  const auto g = normal<double, 1>({37}, 1.0, 1);
  const auto a = normal<double, 1>({37}, 1.0, 2), b = a.clone();
  const auto halved = g.clone();
  for (index_t i = 0; i < 37; ++i)
    halved(i) *= 0.5;
  adamw<double> scaled({named("w", a)}), plain({named("w", b)});
  step_with(scaled, {g}, 0.1, 0.5);
  step_with(plain, {halved}, 0.1);
  for (index_t i = 0; i < 37; ++i)
    CHECK(a(i) == b(i));
}

TEMPLATE_TEST_CASE("train/adamw: threads do not change a bit", "[train][adamw][threads]", float,
                   double) {
  // Sizes around the vectors' width and around a task's.
  const std::vector<index_t> sizes{1, 7, 16383, 16384, 16385, 0, 50001, 33};
  std::vector<std::vector<tensor<TestType, 1>>> results;
  for (const int threads : {1, 2, 5}) {
    const cpu::context ctx(threads);
    std::vector<parameter<TestType>> list;
    std::vector<tensor<TestType, 1>> gradients;
    for (const index_t n : sizes) {
      list.push_back(named("p" + std::to_string(list.size()),
                           normal<TestType, 1>({n}, 1.0, static_cast<std::uint64_t>(n))));
      gradients.push_back(normal<TestType, 1>({n}, 1.0, static_cast<std::uint64_t>(n) + 1));
    }
    adamw<TestType> optimizer(list);
    for (int i = 0; i < 3; ++i)
      step_with(optimizer, gradients, 0.01, 1.0, ctx);
    results.emplace_back();
    for (const auto& p : list)
      results.back().push_back(p.value);
  }
  for (std::size_t run = 1; run < results.size(); ++run) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const auto bytes = static_cast<std::size_t>(sizes[i]) * sizeof(TestType);
      CHECK(std::memcmp(results[0][i].data(), results[run][i].data(), bytes) == 0);
    }
  }
}

TEST_CASE("train/adamw: a tied parameter that is listed twice is refused",
          "[train][adamw][error]") {
  const auto w = tensor<float, 1>::zeros(8);
  CHECK_THROWS_WITH(adamw<float>({named("embedding", w), named("head", w)}),
                    contains("'embedding' and 'head' share memory"));
  CHECK_NOTHROW(adamw<float>({named("a", w.slice(0, 0, 4)), named("b", w.slice(0, 4, 8))}));
}

TEST_CASE("train/adamw: options out of range are refused", "[train][adamw][error]") {
  const auto list = std::vector{named("w", tensor<float, 1>::zeros(2))};
  CHECK_THROWS_AS(adamw<float>(list, {.beta1 = 1.0}), value_error);
  CHECK_THROWS_AS(adamw<float>(list, {.beta2 = -0.1}), value_error);
  CHECK_THROWS_AS(adamw<float>(list, {.epsilon = 0.0}), value_error);
  CHECK_THROWS_AS(adamw<float>(list, {.weight_decay = -1.0}), value_error);
}

TEST_CASE("train/adamw: a parameter that the tape does not watch is refused",
          "[train][adamw][error]") {
  adamw<float> optimizer({named("w", tensor<float, 1>::zeros(2))});
  tape<float> t;
  CHECK_THROWS_WITH(optimizer.step(t, 0.1), contains("does not watch the parameter 'w'"));
  CHECK(optimizer.steps() == 0);
}
