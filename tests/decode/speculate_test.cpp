#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/decode/speculate.hpp>

#include <cmath>
#include <string>
#include <vector>

using namespace ssm;
using ssm_test::small_config;

namespace {

const token_rows prompts = {{1, 2, 3}, {4}, {5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4}};

// A head of its own: with a tied one, models without training repeat the last token and agree.
model_config untied(const std::string& pattern) {
  auto c = small_config(pattern);
  c.tie_embeddings = false;
  return c;
}

std::string any_target() {
  return GENERATE(as<std::string>{}, "*-*-", "M-M-", "M-*-", "G-m-");
}

}  // namespace

TEST_CASE("decode/generate: a sequence does not depend on what else is in the batch",
          "[decode][generate]") {
  const std::string pattern = any_target();
  CAPTURE(pattern);
  const language_model<float> m(small_config(pattern), 1);
  const sampling_options sampling{.temperature = 1.0, .top_k = 10, .top_p = 0.9, .seed = 5};
  const auto together = generate(m, {prompts[0], prompts[2]}, {.max_new_tokens = 20});
  const auto alone = generate(m, {prompts[2]}, {.max_new_tokens = 20});
  CHECK(together[1] == alone[0]);
  CHECK(generate(m, prompts, {.max_new_tokens = 20, .sampling = sampling}) ==
        generate(m, prompts, {.max_new_tokens = 20, .sampling = sampling}));
}

TEST_CASE("decode/generate: greedy tokens are the argmax of a whole pass", "[decode][generate]") {
  const std::string pattern = any_target();
  CAPTURE(pattern);
  const language_model<double> m(small_config(pattern), 1);
  const auto tokens = generate(m, {prompts[0]}, {.max_new_tokens = 12})[0];
  std::vector<std::int32_t> all = prompts[0];
  all.insert(all.end(), tokens.begin(), tokens.end());
  tensor<std::int32_t, 2> ids(1, static_cast<index_t>(all.size()));
  for (std::size_t i = 0; i < all.size(); ++i)
    ids(0, static_cast<index_t>(i)) = all[i];
  const auto logits = m.head()({}, m.hidden({}, ids));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const auto row = static_cast<index_t>(prompts[0].size() + i) - 1;
    CHECK(argmax(detail::logits_row(logits, row)) == tokens[i]);
  }
}

TEST_CASE("decode/generate: stop tokens end a sequence, the others go on", "[decode][generate]") {
  const language_model<float> m(small_config("M-"), 1);
  const auto free_run = generate(m, prompts, {.max_new_tokens = 10});
  const std::int32_t stop = free_run[0][3];
  const auto stopped = generate(m, prompts, {.max_new_tokens = 10, .stop = stop});
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto end = std::ranges::find(free_run[i], stop);
    const auto length = static_cast<std::size_t>(end - free_run[i].begin());
    CHECK(stopped[i].size() == std::min<std::size_t>(10, length + 1));
  }
  CHECK(speculate(m, m, prompts, {.max_new_tokens = 10, .stop = stop}).tokens == stopped);
}

TEST_CASE("decode/speculate: greedy text equals plain greedy text with a random draft",
          "[decode][speculate]") {
  const std::string pattern = any_target();
  const index_t k = GENERATE(1, 4, 15);
  CAPTURE(pattern, k);
  const language_model<float> target(untied(pattern), 1), draft(untied("M"), 77);
  const auto plain = generate(target, prompts, {.max_new_tokens = 40});
  const auto fast = speculate(target, draft, prompts, {.max_new_tokens = 40}, {.draft_tokens = k});
  CHECK(fast.tokens == plain);
  // A draft that knows nothing agrees about once in 19.
  CHECK(fast.statistics.tokens_per_step() < 2.0);
  CHECK(fast.statistics.tokens_per_step() >= 1.0);
}

TEST_CASE("decode/speculate: a target that is its own draft emits exactly K + 1 tokens a step",
          "[decode][speculate]") {
  const std::string pattern = any_target();
  const index_t k = GENERATE(1, 3, 4);
  CAPTURE(pattern, k);
  const language_model<float> m(small_config(pattern), 1);
  // The first token comes from the prompt; the rest in whole steps.
  const auto r = speculate(m, m, prompts, {.max_new_tokens = 1 + 6 * (k + 1)}, {.draft_tokens = k});
  CHECK(r.statistics.tokens_per_step() == double(k + 1));
  CHECK(r.statistics.acceptance() == 1.0);
  CHECK(r.tokens == generate(m, prompts, {.max_new_tokens = 1 + 6 * (k + 1)}));
}

TEST_CASE("decode/speculate: sampled tokens have the target's distribution",
          "[decode][speculate]") {
  const language_model<float> target(untied("*"), 1), draft(untied("M"), 3);
  const index_t runs = 3000;
  // Pairs of the second and third token, whose first is drawn from the prompt.
  std::vector<double> direct(19 * 19), fast(19 * 19);
  const token_rows one = {{1, 2}};
  for (index_t i = 0; i < runs; ++i) {
    const generate_options options{
        .max_new_tokens = 3,
        .sampling = {.temperature = 0.7, .top_k = 4, .seed = static_cast<std::uint64_t>(i)}};
    const auto count = [](std::vector<double>& to, const std::vector<std::int32_t>& t) {
      to[static_cast<std::size_t>(t[1] * 19 + t[2])] += 1;
    };
    count(direct, generate(target, one, options)[0]);
    const generate_options other{
        .max_new_tokens = 3,
        .sampling = {.temperature = 0.7, .top_k = 4, .seed = static_cast<std::uint64_t>(i + runs)}};
    count(fast, speculate(target, draft, one, other, {.draft_tokens = 2}).tokens[0]);
  }
  double chi = 0, cells = 0;
  for (std::size_t i = 0; i < direct.size(); ++i) {
    const double sum = direct[i] + fast[i];
    if (sum < 20) continue;
    chi += (direct[i] - fast[i]) * (direct[i] - fast[i]) / sum;
    cells += 1;
  }
  CAPTURE(chi, cells);
  CHECK(cells >= 10);
  // Two samples of one distribution: chi-square with about `cells` degrees; 5 standard deviations.
  CHECK(chi < cells + 5 * std::sqrt(2 * cells));
}

TEST_CASE("decode/sampling: filters keep what they say and probabilities sum to 1",
          "[decode][sampling]") {
  const std::vector<float> logits = {0.0f, 2.0f, 1.0f, -1.0f, 2.0f};
  std::vector<double> p;
  const auto kept = [&] { return std::ranges::count_if(p, [](double x) { return x > 0; }); };
  next_token_distribution<float>(logits, {.temperature = 0}, p);
  CHECK(p[1] == 1.0);  // the first of equals
  next_token_distribution<float>(logits, {.temperature = 1, .top_k = 3}, p);
  CHECK(kept() == 3);
  CHECK(p[0] + p[1] + p[2] + p[3] + p[4] == ssm_test::approx(1.0));
  next_token_distribution<float>(logits, {.temperature = 1, .top_p = 0.5}, p);
  CHECK(kept() == 2);
  next_token_distribution<float>(logits, {.temperature = 1, .min_p = 0.3}, p);
  CHECK(kept() == 3);
  CHECK(pick(p, 0.0) == 1);
  CHECK(pick(p, 0.9999999) == 4);
  CHECK_THROWS_AS(check_sampling({.temperature = -1}), value_error);
  CHECK_THROWS_AS(check_sampling({.top_p = 0}), value_error);
}

TEST_CASE("decode/speculate: bad calls are one sentence", "[decode][speculate][error]") {
  const language_model<float> m(small_config("M"), 1);
  CHECK_THROWS_WITH((void)speculate(m, m, {{}}), ssm_test::contains("prompt 0 is empty"));
  CHECK_THROWS_WITH((void)speculate(m, m, prompts, {}, {.draft_tokens = 16}),
                    ssm_test::contains("draft_tokens is 16"));
  auto other = small_config("M");
  other.vocabulary = 20;
  const language_model<float> wide(other, 1);
  CHECK_THROWS_WITH((void)speculate(m, wide, prompts), ssm_test::contains("vocabulary"));
}
