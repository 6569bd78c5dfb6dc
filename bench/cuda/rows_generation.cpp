#include "harness.hpp"

#include <memory>

namespace cuda_bench {

using namespace ssm;

namespace {

/// Sequences with a context, one step of which is timed. A step's position moves on by one.
struct generation {
  generation(const model_config& config, index_t batch, index_t context, const cuda::context& ctx)
      : model(config, 1), steps(model, batch, 0, {}, ctx) {
    philox random(3);
    token_rows prompts(static_cast<std::size_t>(batch));
    for (auto& prompt : prompts) {
      for (index_t i = 0; i < context; ++i)
        prompt.push_back(static_cast<std::int32_t>(random.below(config.vocabulary)));
    }
    (void)steps.read(prompts);
  }

  language_model<bf16, cuda> model;
  decoder<language_model<bf16, cuda>> steps;
};

model_config transformer_config() {
  model_config c = hybrid_config();
  c.pattern.clear();
  for (int i = 0; i < 37; ++i)
    c.pattern += "*-";
  return c;
}

}  // namespace

model_config hybrid_config() {
  model_config c;
  c.vocabulary = 32000;
  c.width = 2048;
  c.pattern = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-";
  c.attention.heads = 16;
  c.attention.kv_heads = 8;
  c.attention.rope = rope_options{};
  c.mamba2.heads = 64;
  c.mamba2.groups = 8;
  c.mlp = mlp_kind::gelu;
  return c;
}

// A Transformer of as many parameters, 1.7e9 without the embedding, and as many key heads.
void add_generation_rows(std::vector<row>& rows, const cuda::context& ctx) {
  struct shape_of {
    index_t batch, context;
  };
  for (const shape_of& s : {shape_of{1, 4096}, {1, 32768}, {1, 131072}, {8, 4096}, {8, 16384}}) {
    for (const bool is_hybrid : {false, true}) {
      rows.push_back({std::string("generation step, ") + (is_hybrid ? "hybrid" : "Transformer") +
                          " b" + std::to_string(s.batch) + " after " + std::to_string(s.context),
                      made_first(ctx,
                                 [=, &ctx] {
                                   const auto g = std::make_shared<generation>(
                                       is_hybrid ? hybrid_config() : transformer_config(), s.batch,
                                       s.context, ctx);
                                   return std::function<void()>([g] { (void)g->steps.step(); });
                                 }),
                      0,
                      0,
                      {},
                      {}});
    }
  }
}

}  // namespace cuda_bench
