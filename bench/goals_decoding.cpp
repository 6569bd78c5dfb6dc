#include "allocations.hpp"
#include "goals.hpp"
#include <ssmlib/decode/generate.hpp>
#include <ssmlib/model/language_model.hpp>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace bench {

namespace {

using model = ssm::language_model<float>;

/// Greedy decoding by steps of one token.
struct decoding {
  decoding(const bench::model& m, const ssm::cpu::context& c)
      : lm(m), ctx(c), state(lm.initial_state(1)), id(index_t{1}, index_t{1}) {
    id(0, 0) = 1;
  }
  void step() {
    const ssm::pass<float> p{ctx, nullptr, true};
    const auto logits = lm.head()(p, lm.advance(p, state, id));
    const float* first = logits.data();
    id(0, 0) = static_cast<std::int32_t>(std::max_element(first, first + logits.size()) - first);
  }
  void steps(index_t n) {
    for (index_t i = 0; i < n; ++i)
      step();
  }

  const bench::model& lm;
  const ssm::cpu::context& ctx;
  ssm::model_state state;
  ssm::tensor<std::int32_t, 2> id;
};

ssm::model_config small_hybrid() {
  ssm::model_config c;
  c.width = 64;
  c.pattern = "M-*-";
  c.attention = {.heads = 4, .rope = ssm::rope_options{}};
  c.mamba2 = {.heads = 4, .head_dim = 32, .state = 32};
  return c;
}
/// The widths of Mamba-2 130M.
ssm::model_config mamba2_130m() {
  ssm::model_config c;
  c.vocabulary = 50288;
  c.width = 768;
  c.pattern = std::string(24, 'M');
  c.mamba2 = {.heads = 24, .head_dim = 64, .state = 128};
  return c;
}

constexpr index_t counted_steps = 1000;

/// Counts what happens inside `decode`. An identical run before it must have filled the pool.
goal_row allocation_row(const std::string& what, const std::function<void()>& decode) {
  if (!allocation_count::works()) return {what, "0", "-", verdict::not_measured};
  auto& pool = ssm::cpu_memory_pool::instance();
  const std::size_t before = pool.stats().system_allocations;
  std::size_t count = 0;
  {
    const allocation_count counter(std::getenv("SSMLIB_BENCH_TRACE") != nullptr);
    decode();
    count = counter.count();
  }
  const std::size_t from_pool = pool.stats().system_allocations - before;
  return {what, "0",
          std::to_string(count) + " mallocs, of them " + std::to_string(from_pool) + " by the pool",
          count == 0 ? verdict::met : verdict::missed};
}

void add_allocation_rows(const ssm::cpu::context& ctx, std::vector<goal_row>& rows) {
  const model m(small_hybrid(), 1);
  decoding(m, ctx).steps(counted_steps);  // fills the pool, growth of the key-value cache included
  decoding counted(m, ctx);
  rows.push_back(allocation_row("mallocs over 1,000 decoding steps, M-*-, batch 1",
                                [&] { counted.steps(counted_steps); }));
  const auto generate = [&](index_t n) {
    return [&, n] { (void)ssm::generate(m, {{1, 2, 3}}, {.max_new_tokens = n}, ctx); };
  };
  generate(2 * counted_steps)();
  goal_row whole =
      allocation_row("generate() of 1,000 tokens, its result included", generate(counted_steps));
  goal_row twice = allocation_row("", generate(2 * counted_steps));
  whole.measured += "; of 2,000: " + twice.measured;
  whole.goal = std::string("-");
  whole.verdict = verdict::information;
  rows.push_back(std::move(whole));
}

}  // namespace

goal_report add_decoding_goals(session& s) {
  constexpr index_t tokens = 8;
  if (!s.options().quick) {
    const auto shared = std::make_shared<std::unique_ptr<model>>();  // 520 MB, made once
    s.add({.name = "goal/decode",
           .work = {tokens, unit::tokens},
           .prepare =
               [shared, &ctx = s.context()] {
                 if (!*shared) *shared = std::make_unique<model>(mamba2_130m(), 1);
                 const auto d = std::make_shared<decoding>(**shared, ctx);
                 return [shared, d] { d->steps(tokens); };
               },
           .seconds = 0.4});
  }
  return [&ctx = s.context()](const session& done, const ceilings& c, std::vector<goal_row>& rows) {
    if (done.wants("goal/mallocs")) add_allocation_rows(ctx, rows);
    const timing t = done.time_of("goal/decode");
    if (!t) return;
    const double rate = tokens / t.median, bytes = 4.0 * 129e6 * rate;
    rows.push_back(
        {"decoding, Mamba-2 130M, batch 1", "-",
         digits(rate) + " tokens/s (reads " + percent(bytes / c.copy) + " of the copy's bytes/s)",
         verdict::information});
  };
}

}  // namespace bench
