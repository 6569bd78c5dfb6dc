#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/train/losses.hpp>

#include <vector>

namespace {

using namespace ssm;
using ssm_test::approx;
using ssm_test::flat;
using ids_tensor = tensor<std::int32_t, 2>;

/// Random ids; every fifth token does not count.
ids_tensor some_targets(index_t b, index_t length, index_t vocabulary) {
  ids_tensor ids(b, length);
  philox random(5);
  for (index_t i = 0; i < ids.size(); ++i) {
    ids.data()[i] = i % 5 == 3 ? -100 : static_cast<std::int32_t>(random.below(vocabulary));
  }
  return ids;
}
/// 1 where a target counts.
ids_tensor mask_of(const ids_tensor& targets) {
  ids_tensor mask(targets.extents());
  mask.zip_with(targets, [](std::int32_t& m, const std::int32_t& id) { m = id >= 0; });
  return mask;
}

double log_softmax(const tensor<double, 3>& logits, index_t i, index_t t, index_t v,
                   double temperature = 1) {
  double sum = 0;
  for (index_t u = 0; u < logits.extent(2); ++u)
    sum += std::exp(logits(i, t, u) / temperature);
  return logits(i, t, v) / temperature - std::log(sum);
}

double seed_and_run(tape<double>& tape, const tensor<double, 1>& loss) {
  tape.gradient(loss).fill(1.0);
  tape.backward();
  return loss(0);
}

TEST_CASE("train/losses: cross_entropy is the mean over counted tokens", "[train][losses]") {
  const auto logits = uniform<double, 3>({2, 7, 19}, -3, 3, 1);
  const auto targets = some_targets(2, 7, 19);
  double sum = 0;
  index_t count = 0;
  for (index_t i = 0; i < 2; ++i) {
    for (index_t t = 0; t < 7; ++t) {
      if (targets(i, t) < 0) continue;
      sum -= log_softmax(logits, i, t, targets(i, t));
      ++count;
    }
  }
  const auto r = cross_entropy(pass<double>{}, logits, targets);
  CHECK(r.tokens == count);
  CHECK(r.sum() == approx(sum).epsilon(1e-14));
  CHECK(r.loss(0) == approx(sum / static_cast<double>(count)).epsilon(1e-14));
  CHECK(cross_entropy(pass<double>{}, logits, targets, {.divide_by = 1}).loss(0) ==
        approx(sum).epsilon(1e-14));
  const auto single = cross_entropy(pass<float>{}, cast<float>(logits), targets);
  CHECK(single.loss(0) == approx(sum / static_cast<double>(count)).epsilon(3e-7));
}

TEST_CASE("train/losses: cross_entropy's gradient is that of differences", "[train][losses]") {
  const auto wide = uniform<double, 3>({2, 7, 25}, -3, 3, 1);
  const auto targets = some_targets(2, 7, 19);
  CHECK(ssm_test::gradient_error({flat(wide)}, [&](const pass<double>& p) {
          return std::vector{cross_entropy(p, wide.slice(2, 4, 23), targets).loss};
        }) < 1e-7);
}

TEST_CASE("train/losses: through the head, in blocks, the loss is that of the whole logits",
          "[train][losses]") {
  const index_t block = GENERATE(0, 1, 4, 5, 100);
  const auto hidden = uniform<double, 3>({2, 7, 6}, -2, 2, 1);
  const auto head = linear<double>::make(6, 19, {.bias = true, .seed = 4});
  const auto targets = some_targets(2, 7, 19);
  const auto whole = cross_entropy(pass<double>{}, head(pass<double>{}, hidden), targets);
  const auto r = lm_cross_entropy(pass<double>{}, hidden, head, targets, {.block_tokens = block});
  CHECK(r.loss(0) == approx(whole.loss(0)).epsilon(1e-14));
  CHECK(r.tokens == whole.tokens);
}

TEST_CASE("train/losses: lm_cross_entropy's gradients are those of differences",
          "[train][losses]") {
  const index_t block = GENERATE(0, 4);
  const auto wide = uniform<double, 3>({2, 7, 9}, -2, 2, 1);
  const auto head = linear<double>::make(6, 19, {.bias = true, .seed = 4});
  const auto targets = some_targets(2, 7, 19);
  CHECK(ssm_test::gradient_error(
            {flat(wide), flat(head.weight), flat(head.bias)}, [&](const pass<double>& p) {
              return std::vector{
                  lm_cross_entropy(p, wide.slice(2, 2, 8), head, targets, {.block_tokens = block})
                      .loss};
            }) < 1e-7);
}

TEST_CASE("train/losses: parts divided by the batch's tokens add up to the batch's gradient",
          "[train][losses]") {
  const auto hidden = uniform<double, 3>({4, 7, 6}, -2, 2, 1);
  const auto head = linear<double>::make(6, 19, {.seed = 4});
  const auto targets = some_targets(4, 7, 19);
  tape<double> whole, parts;
  whole.watch(head.weight);
  parts.watch(head.weight);
  const auto r = lm_cross_entropy(pass<double>{.tape = &whole}, hidden, head, targets);
  const double loss = seed_and_run(whole, r.loss);
  double sum = 0;
  for (const index_t i : {0, 2}) {
    sum += seed_and_run(
        parts,
        lm_cross_entropy(pass<double>{.tape = &parts}, hidden.slice(0, i, i + 2), head,
                         targets.slice(0, i, i + 2), {.divide_by = static_cast<double>(r.tokens)})
            .loss);
  }
  CHECK(sum == approx(loss).epsilon(1e-14));
  CHECK(ssm_test::relative_error(parts.gradient(head.weight), whole.gradient(head.weight)) < 1e-14);
}

TEST_CASE("train/losses: a batch without counted tokens has loss 0 and no gradient",
          "[train][losses]") {
  const auto hidden = uniform<double, 3>({1, 3, 6}, -2, 2, 1);
  const auto head = linear<double>::make(6, 19, {.seed = 4});
  tape<double> tape;
  tape.watch(hidden);
  const auto r =
      lm_cross_entropy(pass<double>{.tape = &tape}, hidden, head, ids_tensor::full({1, 3}, -100));
  CHECK(r.loss(0) == 0.0);
  CHECK(r.tokens == 0);
  CHECK(tape.mark() == 0);
}

TEST_CASE("train/losses: logits of -infinity and of 1e4 leave the loss finite and right",
          "[train][losses]") {
  auto logits = uniform<float, 3>({1, 1, 19}, -1, 1, 1);
  logits(0, 0, 3) = -std::numeric_limits<float>::infinity();
  logits(0, 0, 7) = 1e4f;
  logits(0, 0, 8) = 1e4f;
  ids_tensor target(1, 1);
  target(0, 0) = 7;
  tape<float> tape;
  tape.watch(logits);
  const auto r = cross_entropy(pass<float>{.tape = &tape}, logits, target);
  CHECK(r.loss(0) == approx(std::log(2.0)).epsilon(1e-6));
  tape.gradient(r.loss).fill(1.0f);
  tape.backward();
  CHECK(tape.gradient(logits)(0, 0, 7) == approx(-0.5).epsilon(1e-6));
  CHECK(tape.gradient(logits)(0, 0, 3) == 0.0f);
}

TEST_CASE("train/losses: a vocabulary of 50000 costs no precision in float", "[train][losses]") {
  const auto logits = normal<double, 3>({1, 3, 50000}, 3, 1);
  const auto targets = some_targets(1, 3, 50000);
  const auto rounded = cast<float>(logits);
  const auto exact = cross_entropy(pass<double>{}, cast<double>(rounded), targets);
  const auto single = cross_entropy(pass<float>{}, rounded, targets);
  CHECK(std::abs(single.sum() - exact.sum()) / exact.sum() < 1e-7);
}

TEST_CASE("train/losses: losses and gradients have the same bits with any number of threads",
          "[train][losses][threads]") {
  const auto hidden = uniform<float, 3>({2, 300, 32}, -2, 2, 1);
  const auto other = uniform<float, 3>({2, 300, 24}, -2, 2, 2);
  const auto head = linear<float>::make(32, 200, {.bias = true, .seed = 4});
  const auto other_head = linear<float>::make(24, 200, {.bias = true, .seed = 5});
  const auto targets = some_targets(2, 300, 200);
  std::vector<tensor<float, 1>> first;
  for (const int threads : {1, 2, 3}) {
    const cpu::context ctx(threads);
    tape<float> tape;
    tape.watch(hidden);
    tape.watch(head.weight);
    tape.watch(head.bias);
    const pass<float> p{ctx, &tape};
    const auto a = lm_cross_entropy(p, hidden, head, targets).loss;
    const auto b = lm_kl_divergence(p, hidden, head, other, other_head, mask_of(targets)).loss;
    tape.gradient(a).fill(1.0f);
    tape.gradient(b).fill(1.0f);
    tape.backward();
    const std::vector all{a, b, flat(tape.gradient(hidden)), flat(tape.gradient(head.weight)),
                          flat(tape.gradient(head.bias))};
    if (first.empty()) {
      for (const auto& t : all)
        first.push_back(t.clone());
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      CHECK(ssm_test::same_bits(all[i], first[i]));
  }
}

TEST_CASE("train/losses: no more than one block of logits is held", "[train][losses]") {
  const index_t tokens = 2048, vocabulary = 2000;
  const auto hidden = uniform<float, 3>({1, tokens, 8}, -2, 2, 1);
  const auto head = linear<float>::make(8, vocabulary, {.seed = 4});
  const auto targets = some_targets(1, tokens, vocabulary);
  tape<float> tape;
  tape.watch(hidden);
  tape.watch(head.weight);
  auto& pool = cpu_memory_pool::instance();
  pool.trim();
  pool.reset_peak();
  const auto before = pool.stats().in_use;
  const auto r =
      lm_cross_entropy(pass<float>{.tape = &tape}, hidden, head, targets, {.block_tokens = 64});
  tape.gradient(r.loss).fill(1.0f);
  tape.backward();
  // One block is 512 KB, all logits are 16 MB; the rest is gradients, numbers a token and the
  // working memory of the products.
  CHECK(pool.stats().peak - before < std::size_t{4} << 20);
}

TEST_CASE("train/losses: targets outside the vocabulary are refused by value",
          "[train][losses][error]") {
  const auto hidden = tensor<float, 3>::zeros(1, 3, 6);
  const auto head = linear<float>::make(6, 19);
  auto targets = ids_tensor::zeros(1, 3);
  targets(0, 1) = 19;
  CHECK_THROWS_WITH(lm_cross_entropy(pass<float>{}, hidden, head, targets),
                    ssm_test::contains("the target of token 1 is 19, the vocabulary has 19"));
  CHECK_THROWS_WITH(lm_cross_entropy(pass<float>{}, hidden, head, ids_tensor::zeros(1, 4)),
                    ssm_test::contains("the hidden states are (1 x 3 x 6), the targets (1 x 4)"));
  CHECK_THROWS_AS(cross_entropy(pass<float>{}, hidden, targets), value_error);
}

// ---- distillation -------------------------------------------------------------------------------

double divergence(const tensor<double, 3>& student, const tensor<double, 3>& teacher, index_t i,
                  index_t t, double temperature) {
  double sum = 0;
  for (index_t v = 0; v < student.extent(2); ++v) {
    const double log_p = log_softmax(teacher, i, t, v, temperature);
    sum += std::exp(log_p) * (log_p - log_softmax(student, i, t, v, temperature));
  }
  return sum;
}

TEST_CASE("train/losses: kl_divergence is its definition under both divisors", "[train][losses]") {
  const double temperature = GENERATE(0.5, 1.0, 2.0);
  const auto student = uniform<double, 3>({2, 7, 19}, -3, 3, 1);
  const auto teacher = uniform<double, 3>({2, 7, 19}, -3, 3, 2);
  const auto mask = mask_of(some_targets(2, 7, 19));
  double sum = 0;
  index_t count = 0;
  for (index_t i = 0; i < 2; ++i) {
    for (index_t t = 0; t < 7; ++t) {
      if (mask(i, t) == 0) continue;
      sum += divergence(student, teacher, i, t, temperature);
      ++count;
    }
  }
  const pass<double> p;
  const double squared = temperature * temperature;
  const auto r = kl_divergence(p, student, teacher, mask, {.temperature = temperature});
  CHECK(r.tokens == count);
  CHECK(r.sum() == approx(sum).epsilon(1e-13));
  CHECK(r.loss(0) == approx(sum * squared / static_cast<double>(count)).epsilon(1e-13));
  const auto per_sequence = kl_divergence(
      p, student, teacher, mask, {.temperature = temperature, .divisor = kl_divisor::batch});
  CHECK(per_sequence.loss(0) == approx(sum * squared / 2).epsilon(1e-13));
  const auto single = kl_divergence(pass<float>{}, cast<float>(student), cast<float>(teacher), mask,
                                    {.temperature = temperature});
  CHECK(single.loss(0) == approx(sum * squared / static_cast<double>(count)).epsilon(2e-6));
}

TEST_CASE("train/losses: kl_divergence's gradients for both logits are those of differences",
          "[train][losses]") {
  const double temperature = GENERATE(1.0, 2.0);
  const auto divisor = GENERATE(kl_divisor::tokens, kl_divisor::batch);
  const auto student = uniform<double, 3>({2, 7, 23}, -3, 3, 1);
  const auto teacher = uniform<double, 3>({2, 7, 19}, -3, 3, 2);
  const auto mask = mask_of(some_targets(2, 7, 19));
  CHECK(ssm_test::gradient_error({flat(student), flat(teacher)}, [&](const pass<double>& p) {
          return std::vector{kl_divergence(p, student, teacher, mask,
                                           {.temperature = temperature, .divisor = divisor})
                                 .loss};
        }) < 1e-7);
}

TEST_CASE("train/losses: through the heads, in blocks, the divergence is that of the whole logits",
          "[train][losses]") {
  const index_t block = GENERATE(0, 1, 4, 100);
  const auto student = uniform<double, 3>({2, 7, 6}, -2, 2, 1);
  const auto teacher = uniform<double, 3>({2, 7, 5}, -2, 2, 2);
  // The teacher's vocabulary is padded: the common entries count.
  const auto student_head = linear<double>::make(6, 19, {.bias = true, .seed = 4});
  const auto teacher_head = linear<double>::make(5, 24, {.bias = true, .seed = 5});
  const auto mask = mask_of(some_targets(2, 7, 19));
  const pass<double> p;
  const kl_options o{.temperature = 2, .block_tokens = block};
  const auto whole = kl_divergence(p, student_head(p, student), teacher_head(p, teacher), mask, o);
  const auto r = lm_kl_divergence(p, student, student_head, teacher, teacher_head, mask, o);
  CHECK(r.loss(0) == approx(whole.loss(0)).epsilon(1e-13));
  CHECK(r.tokens == whole.tokens);
}

TEST_CASE("train/losses: lm_kl_divergence's gradients are those of differences",
          "[train][losses]") {
  const bool teacher_too = GENERATE(false, true);
  const auto student = uniform<double, 3>({2, 7, 6}, -2, 2, 1);
  const auto teacher = uniform<double, 3>({2, 7, 5}, -2, 2, 2);
  const auto student_head = linear<double>::make(6, 19, {.bias = true, .seed = 4});
  const auto teacher_head = linear<double>::make(5, 24, {.bias = true, .seed = 5});
  const auto mask = mask_of(some_targets(2, 7, 19));
  std::vector<tensor<double, 1>> inputs{flat(student), flat(student_head.weight),
                                        flat(student_head.bias)};
  if (teacher_too) {
    for (const auto& t : {flat(teacher), flat(teacher_head.weight), flat(teacher_head.bias)}) {
      inputs.push_back(t);
    }
  }
  CHECK(ssm_test::gradient_error(inputs, [&](const pass<double>& p) {
          return std::vector{lm_kl_divergence(p, student, student_head, teacher, teacher_head, mask,
                                              {.temperature = 2, .block_tokens = 4})
                                 .loss};
        }) < 1e-7);
}

TEST_CASE("train/losses: a model has divergence 0 and gradient 0 from itself", "[train][losses]") {
  const auto logits = uniform<float, 3>({1, 3, 300}, -3, 3, 1), copy = logits.clone();
  tape<float> tape;
  tape.watch(logits);
  const auto r = kl_divergence(pass<float>{.tape = &tape}, logits, copy);
  CHECK(r.loss(0) == 0.0f);
  tape.gradient(r.loss).fill(1.0f);
  tape.backward();
  CHECK(ssm_test::same_bits(tape.gradient(logits), tensor<float, 3>::zeros(1, 3, 300)));
}

TEST_CASE("train/losses: divergences that cannot be are refused", "[train][losses][error]") {
  const auto logits = tensor<float, 3>::zeros(1, 3, 6);
  CHECK_THROWS_WITH(kl_divergence(pass<float>{}, logits, tensor<float, 3>::zeros(1, 4, 6)),
                    ssm_test::contains("the student is (1 x 3 x 6), the teacher (1 x 4 x 6)"));
  CHECK_THROWS_WITH(kl_divergence(pass<float>{}, logits, logits, ids_tensor::zeros(2, 3)),
                    ssm_test::contains("the mask (2 x 3)"));
  CHECK_THROWS_WITH(kl_divergence(pass<float>{}, logits, logits, {}, {.temperature = 0}),
                    ssm_test::contains("the temperature is 0"));
}

// ---- preferences --------------------------------------------------------------------------------

TEST_CASE("train/losses: sequence_log_probability adds up the counted tokens of each sequence",
          "[train][losses]") {
  const auto layout = sequence_layout::from_lengths({3, 0, 7, 4});
  const auto hidden = uniform<double, 3>({1, 14, 6}, -2, 2, 1);
  const auto head = linear<double>::make(6, 19, {.bias = true, .seed = 4});
  const auto targets = some_targets(1, 14, 19);
  auto mask = ids_tensor::full({1, 14}, 1);
  mask(0, 0) = mask(0, 5) = 0;
  const auto logits = head(pass<double>{}, hidden);
  const auto r = sequence_log_probability(pass<double>{}, hidden, head, targets, mask, layout);
  REQUIRE(r.extents() == shape<1>{4});
  for (index_t i = 0; i < 4; ++i) {
    double sum = 0;
    for (index_t t = layout.begin(i); t < layout.end(i); ++t) {
      if (targets(0, t) >= 0 && mask(0, t) != 0) sum += log_softmax(logits, 0, t, targets(0, t));
    }
    CHECK(r(i) == approx(sum).epsilon(1e-13));
  }
}

TEST_CASE("train/losses: sequence_log_probability's gradients are those of differences",
          "[train][losses]") {
  const auto layout = sequence_layout::from_lengths({3, 0, 7, 4});
  const auto hidden = uniform<double, 3>({1, 14, 6}, -2, 2, 1);
  const auto head = linear<double>::make(6, 19, {.bias = true, .seed = 4});
  const auto targets = some_targets(1, 14, 19);
  CHECK(ssm_test::gradient_error(
            {flat(hidden), flat(head.weight), flat(head.bias)}, [&](const pass<double>& p) {
              return std::vector{
                  sequence_log_probability(p, hidden, head, targets, ids_tensor{}, layout)};
            }) < 1e-7);
}

TEST_CASE("train/losses: dpo_loss's four gradients are those of differences", "[train][losses]") {
  std::vector<tensor<double, 1>> v;
  for (std::uint64_t i = 0; i < 4; ++i)
    v.push_back(uniform<double, 1>({6}, -20, 20, i));
  CHECK(ssm_test::gradient_error(v, [&](const pass<double>& p) {
          return std::vector{dpo_loss(p, v[0], v[1], v[2], v[3], 0.1).loss};
        }) < 1e-7);
}

TEST_CASE("train/losses: dpo_loss of the reference itself is log 2 with gradient -beta / 2",
          "[train][losses]") {
  const auto a = uniform<double, 1>({1}, -20, 20, 1), b = uniform<double, 1>({1}, -20, 20, 2);
  const auto policy = a.clone();
  tape<double> tape;
  tape.watch(policy);
  const auto r = dpo_loss(pass<double>{.tape = &tape}, policy, b, a, b, 0.3);
  CHECK(seed_and_run(tape, r.loss) == approx(std::log(2.0)).epsilon(1e-15));
  CHECK(tape.gradient(policy)(0) == approx(-0.15).epsilon(1e-15));
}

TEST_CASE("train/losses: dpo_loss stays finite where the margin is thousands", "[train][losses]") {
  auto chosen = tensor<double, 1>::full({1}, -1e5), other = tensor<double, 1>::zeros(1);
  tape<double> tape;
  tape.watch(chosen);
  const auto r = dpo_loss(pass<double>{.tape = &tape}, chosen, other, other, other, 0.1);
  CHECK(seed_and_run(tape, r.loss) == approx(1e4));
  CHECK(tape.gradient(chosen)(0) == approx(-0.1));
  CHECK(r.accuracy() == 0.0);
  CHECK(r.mean_margin() == approx(-1e4));
}

TEST_CASE("train/losses: a DPO without a positive beta or with unequal pairs is refused",
          "[train][losses][error]") {
  const auto two = tensor<float, 1>::zeros(2), three = tensor<float, 1>::zeros(3);
  CHECK_THROWS_AS(dpo_loss(pass<float>{}, two, two, two, two, 0.0), value_error);
  CHECK_THROWS_WITH(dpo_loss(pass<float>{}, two, three, two, two, 0.1), ssm_test::contains("(3)"));
}

}  // namespace
