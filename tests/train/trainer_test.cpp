#include "bigram_model.hpp"
#include <ssmlib/train/selection.hpp>
#include <ssmlib/train/trainer.hpp>

#include <limits>
#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::bigram_model;
using ssm_test::contains;
using ssm_test::training_bits;

/// A model, its data and its optimizer, as a run needs them.
template <Real T>
struct run {
  explicit run(index_t vocabulary = 16)
      : model(vocabulary),
        tokens(ssm_test::chain_tokens(700, vocabulary, 5)),
        loader(ssm_test::one_shard(tokens), {.sequence_length = 10, .seed = 2}),
        optimizer(parameters_of<T>(model)) {}

  index_t train_to(const training_options& options, const training_callbacks& callbacks = {},
                   int threads = 1) {
    const cpu::context ctx(threads);
    return train(
        optimizer, loader,
        [this](const pass<T>& p, const token_batch& b) { return model.loss(p, b); }, options,
        callbacks, ctx);
  }

  bigram_model<T> model;
  std::vector<std::int32_t> tokens;
  data_loader<token_spans<std::int32_t>> loader;
  adamw<T> optimizer;
};

training_options some_options(index_t steps) {
  return {.steps = steps,
          .tokens_per_step = 70,
          .learning_rate = 0.05,
          .schedule = cosine_schedule{.steps = 40, .warmup = 4, .final = 0.1},
          .micro_batch = 3};
}

}  // namespace

TEST_CASE("train/trainer: the loss falls to what the data allow", "[train][trainer]") {
  run<float> r;
  std::vector<double> losses;
  auto options = some_options(300);
  options.schedule = cosine_schedule{.steps = 300, .warmup = 10};
  r.train_to(options, {.on_step = [&](const step_info& i) { losses.push_back(i.loss); }});
  REQUIRE(losses.size() == 300);
  // The chain's entropy: 0.7 + 0.3 / 16 for one token, 0.3 / 16 for each of 15 others.
  const double p = 0.7 + 0.3 / 16, q = 0.3 / 16;
  const double entropy = -p * std::log(p) - 15 * q * std::log(q);
  double late = 0;
  for (std::size_t i = 280; i < 300; ++i)
    late += losses[i] / 20;
  CHECK(losses[0] > 2.5);
  CHECK(late < entropy + 0.1);
}

TEST_CASE("train/trainer: a step tells what it did", "[train][trainer]") {
  run<double> r;
  std::vector<step_info> infos;
  CHECK(r.train_to(some_options(6), {.on_step = [&](const step_info& i) { infos.push_back(i); }}) ==
        6);
  REQUIRE(infos.size() == 6);
  for (std::size_t i = 0; i < 6; ++i) {
    CHECK(infos[i].step == static_cast<index_t>(i));
    CHECK(infos[i].learning_rate ==
          0.05 * cosine_schedule{.steps = 40, .warmup = 4, .final = 0.1}(infos[i].step));
    CHECK(infos[i].tokens > 40);
    CHECK(infos[i].tokens <= 70);
    CHECK(infos[i].gradient_norm > 0);
    CHECK(infos[i].seconds > 0);
  }
}

TEST_CASE("train/trainer: micro-batches of any size give the batch's update", "[train][trainer]") {
  run<double> expected;
  auto options = some_options(12);
  options.micro_batch = 0;
  expected.train_to(options);
  for (const index_t size : {1, 2, 3, 5, 7, 100}) {
    run<double> r;
    options.micro_batch = size;
    r.train_to(options);
    CHECK(r.loader.state() == expected.loader.state());
    // AdamW divides by sqrt(v): 12 steps of 0.05 amplify 1e-16 by at most 1 / sqrt(v) each.
    CHECK(ssm_test::largest_difference(r.model.table, expected.model.table) <= 1e-12);
  }
}

TEST_CASE("train/trainer: threads do not change a bit", "[train][trainer][threads]") {
  run<float> one(200), two(200);
  one.train_to(some_options(5), {}, 1);
  two.train_to(some_options(5), {}, 2);
  CHECK(training_bits(one.optimizer) == training_bits(two.optimizer));
}

TEST_CASE("train/trainer: a run that is stopped goes on to the same bits", "[train][trainer]") {
  run<float> whole, cut;
  whole.train_to(some_options(20));
  index_t asked = 0;
  const training_callbacks stops{.should_stop = [&] { return ++asked % 4 == 0; }};
  CHECK(cut.train_to(some_options(20), stops) == 3);
  while (cut.train_to(some_options(20), stops) < 20) {
  }
  CHECK(training_bits(whole.optimizer) == training_bits(cut.optimizer));
}

TEST_CASE("train/trainer: the norm of the update's gradient is clipped", "[train][trainer]") {
  // With one step, m = (1 - beta1) g: its norm is that of the clipped gradient.
  run<double> r;
  auto options = some_options(1);
  options.clip = 1e-3;
  double before = 0;
  r.train_to(options, {.on_step = [&](const step_info& i) { before = i.gradient_norm; }});
  double squares = 0;
  for (const auto& m : r.optimizer.first_moments()) {
    for (index_t i = 0; i < m.size(); ++i)
      squares += m(i) * m(i);
  }
  CHECK(before > 1e-2);
  CHECK(std::sqrt(squares) == ssm_test::approx(0.1 * 1e-3).epsilon(1e-12));
}

TEST_CASE("train/trainer: what is not finite stops the run and leaves the step before",
          "[train][trainer][error]") {
  run<float> r, expected;
  expected.train_to(some_options(4));
  index_t calls = 0;
  const auto loss = [&](const pass<float>& p, const token_batch& b) {
    const auto sum = r.model.loss(p, b);
    if (++calls == 4 * 3 + 2) {  // in the fifth step
      p.tape->record(sum.sum, [&r, t = p.tape] {
        t->gradient(r.model.bias)(3) = std::numeric_limits<float>::infinity();
      });
    }
    return sum;
  };
  CHECK_THROWS_WITH(train(r.optimizer, r.loader, loss, some_options(20)),
                    contains("step 4: the gradient of 'bias' (16) is inf at value 3"));
  CHECK(training_bits(r.optimizer) == training_bits(expected.optimizer));
  CHECK(r.loader.state() == expected.loader.state());
  r.train_to(some_options(20));
  expected.train_to(some_options(20));
  CHECK(training_bits(r.optimizer) == training_bits(expected.optimizer));
}

TEST_CASE("train/trainer: a loss that is not finite names the step", "[train][trainer][error]") {
  run<float> r;
  r.model.bias(1) = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(r.train_to(some_options(2)), numeric_error);
  CHECK_THROWS_WITH(r.train_to(some_options(2)), contains("step 0: the loss is"));
}

TEST_CASE("train/trainer: a batch that is no multiple of the sequence is refused",
          "[train][trainer][error]") {
  run<float> r;
  auto options = some_options(2);
  options.tokens_per_step = 75;
  CHECK_THROWS_WITH(r.train_to(options), contains("75 tokens a step with sequences of 10"));
  options.tokens_per_step = 0;
  CHECK_THROWS_AS(r.train_to(options), value_error);
}
