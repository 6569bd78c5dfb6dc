// plan() against what the pool of a context really had in use at most, for the same work.

#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace {

using namespace ssm;

/// Large enough that one forgotten tensor of activations or one weight is more than 2 %.
model_config config_of(const std::string& pattern) {
  model_config c{.vocabulary = 4096, .width = 512, .pattern = pattern};
  c.attention.heads = 8;
  c.attention.kv_heads = 2;
  c.attention.rope = rope_options{};
  c.mamba2.heads = 16;
  c.mamba2.head_dim = 64;
  c.mamba2.state = 64;
  return c;
}
constexpr index_t batch = 2, length = 300;

struct kind {
  const char* name;
  const char* pattern;
};
constexpr kind kinds[] = {
    {"Mamba-2", "MMMM"}, {"a Transformer", "*-*-*-"}, {"a hybrid", "M-M*-M-"}};

/// A context with a model of its own, to be measured.
template <class T>
struct real_run {
  cuda::context ctx;
  cuda::scope scope{ctx};
  language_model<T, cuda> model;

  explicit real_run(const model_config& c) : model(c, 0) { ctx.synchronize(); }
  [[nodiscard]] double in_use() const { return static_cast<double>(ctx.memory().in_use); }
  [[nodiscard]] double peak() const { return static_cast<double>(ctx.memory().peak); }
};

/// `planned` within 2 % of what the pool of `ctx` had.
void check_close(const std::string& what, std::size_t planned, double real) {
  INFO(what << ": planned " << planned << " bytes, the pool had "
            << static_cast<std::size_t>(real));
  CHECK(std::abs(static_cast<double>(planned) - real) <= 0.02 * real);
}

std::string described(const memory_plan& p, const cuda::context& ctx) {
  const auto mib = [](std::size_t bytes) {
    return std::to_string(static_cast<double>(bytes) / (1 << 20)) + " MiB";
  };
  return "weights " + mib(p.weights) + ", copies " + mib(p.copies) + ", gradients " +
         mib(p.gradients) + ", optimizer " + mib(p.optimizer) + ", states " + mib(p.states) +
         ", activations " + mib(p.activations) + ", workspace " + mib(p.workspace) +
         "; the pool kept " + mib(ctx.memory().in_use + ctx.memory().cached);
}

tensor<std::int32_t, 2> tokens(index_t b, index_t n) {
  tensor<std::int32_t, 2> ids(b, n);
  philox random(7);
  for (index_t i = 0; i < ids.size(); ++i)
    ids.data()[i] = static_cast<std::int32_t>(random.below(4096));
  return ids;
}

/// Random tokens, for train().
struct random_loader {
  [[nodiscard]] token_batch next(index_t sequences) const {
    return {tokens(sequences, length), tokens(sequences, length)};
  }
  [[nodiscard]] index_t state() const { return 0; }
  void restore(index_t) const {}
  [[nodiscard]] index_t sequence_length() const { return length; }
};

}  // namespace

TEMPLATE_TEST_CASE("cuda/plan: inference takes the bytes that are planned", "[cuda][plan]", bf16,
                   float) {
  using T = TestType;
  for (const kind& k : kinds) {
    const model_config c = config_of(k.pattern);
    const memory_plan p = plan<T>(c, batch, length);
    const real_run<T> real(c);
    INFO(k.name);
    check_close("weights", p.weights, real.in_use());
    real.ctx.reset_peak();
    {
      weight_cache<T, cuda> weights;
      const pass<T, cuda> with{.ctx = real.ctx, .weights = &weights};
      const auto hidden = real.model.hidden(with, tokens(batch, length));
      (void)real.model.head()(with, hidden.slice(1, length - 1, length));
    }
    check_close("peak of inference; " + described(p, real.ctx), p.total(), real.peak());
    CHECK(plan(real.model, batch, length).total() == p.total());
  }
}

TEMPLATE_TEST_CASE("cuda/plan: decoding takes the bytes that are planned, its states too",
                   "[cuda][plan]", bf16, float) {
  using T = TestType;
  for (const kind& k : kinds) {
    const model_config c = config_of(k.pattern);
    const memory_plan p = plan_decoding<T>(c, batch, length, 2);
    const real_run<T> real(c);
    const double weights = real.in_use();
    INFO(k.name);
    real.ctx.reset_peak();
    weight_cache<T, cuda> copies;
    auto state = real.model.initial_state(batch, 2);
    double workspace = 0;
    for (const index_t n : {length - 1, index_t{1}}) {
      const pass<T, cuda> with{.ctx = real.ctx, .weights = &copies};
      const auto hidden = real.model.advance(with, state, tokens(batch, n));
      (void)real.model.head()(with, hidden.slice(1, n - 1, n));
      workspace = real.ctx.products() ? 32 << 20 : 0;
    }
    check_close("peak of decoding; " + described(p, real.ctx), p.total(), real.peak());
    check_close("states", p.states,
                real.in_use() - weights - workspace - static_cast<double>(copies.bytes()));
    CHECK(p.copies == copies.bytes());
  }
}

TEMPLATE_TEST_CASE("cuda/plan: training takes the bytes that are planned", "[cuda][plan]", bf16,
                   float) {
  using T = TestType;
  for (const kind& k : kinds) {
    const model_config c = config_of(k.pattern);
    for (const index_t micro_batch : {index_t{0}, index_t{1}}) {
      const memory_plan p = plan_training<T>(c, batch, length, {.micro_batch = micro_batch});
      const real_run<T> real(c);
      INFO(k.name << ", micro-batches of " << micro_batch);
      real.ctx.reset_peak();
      adamw<T, cuda> optimizer(real.model.parameters());
      random_loader loader;
      train(
          optimizer, loader,
          [&](const pass<T, cuda>& with, const token_batch& b) {
            return next_token_loss(real.model, with, b);
          },
          {.steps = 3,
           .tokens_per_step = batch * length,
           .learning_rate = 1e-4,
           .micro_batch = micro_batch},
          {}, real.ctx);
      check_close("peak of training; " + described(p, real.ctx), p.total(), real.peak());
      CHECK(p.gradients == p.weights);
      CHECK(p.optimizer == 2 * p.weights);
    }
  }
}

TEST_CASE("cuda/plan: recomputed activations are planned so", "[cuda][plan]") {
  language_model<bf16, cuda> model(config_of("M-M*-M-"), 0);
  const memory_plan kept = plan_training(model, batch, length);
  model.set_checkpointing(true);
  const memory_plan again = plan_training(model, batch, length);
  CHECK(again.activations < kept.activations);
  CHECK(again.gradients == kept.gradients);
}

TEST_CASE("cuda/plan: a plan leaves the device's memory and the default context alone",
          "[cuda][plan]") {
  const auto& ctx = default_context<cuda>();
  ctx.synchronize();
  std::size_t before = 0, after = 0, total = 0;
  const std::size_t in_use = ctx.memory().in_use;
  model_config c = config_of("M-M*-M-");
  c.width = 4096;
  c.attention.heads = 32;
  c.mamba2.heads = 128;
  const memory_plan p = plan_training<bf16>(c, 512, 8192);  // loads code, which takes memory once
  SSMLIB_CHECK_CUDA(cudaMemGetInfo(&before, &total));
  CHECK(plan_training<bf16>(c, 512, 8192).total() == p.total());
  SSMLIB_CHECK_CUDA(cudaMemGetInfo(&after, &total));
  CHECK(p.total() > total);  // more than the device has
  CHECK(before - std::min(before, after) < (std::size_t{64} << 20));
  CHECK(ctx.memory().in_use == in_use);
  const auto x = to<cuda>(uniform<float, 1>({5}, 0, 1, 3));
  CHECK(to<cpu>(x)(4) == uniform<float, 1>({5}, 0, 1, 3)(4));
}

TEST_CASE("cuda/plan: a dry run's memory has no bytes, and what is read of it is zero",
          "[cuda][plan]") {
  const cuda_dry_run dry;
  const cuda::scope scope(dry.context());
  const tensor<float, 1, cuda> huge(index_t{1} << 44);
  CHECK(dry.in_use() == std::size_t{4} << 44);
  const auto small = tensor<float, 1, cuda>::full({3}, 2.0f);
  CHECK(dry.context().is_dry_run());
  CHECK(to<cpu>(small, dry.context())(0) == 0.0f);
}
