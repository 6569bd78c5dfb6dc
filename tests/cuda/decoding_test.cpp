#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <exception>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// Decoding on CUDA: steps as graphs, and generate() and speculate() beside the CPU's.

using namespace ssm;
using ssm_test::random_ids;
using ssm_test::small_config;

namespace {

struct gla_options {
  index_t width = 0;
  friend bool operator==(const gla_options&, const gla_options&) = default;
};
/// Gated linear attention as a layer of its own.
template <Floating T, Backend B>
class gla : public sequence_mixer<gla<T, B>, T, B> {
 public:
  gla(const gla_options& o, std::uint64_t seed) : options_(o) {
    q_proj = linear<T, B>::make(o.width, o.width, {.seed = seed});
    k_proj = linear<T, B>::make(o.width, o.width, {.seed = seed + 1});
    v_proj = linear<T, B>::make(o.width, o.width, {.seed = seed + 2});
    g_proj = linear<T, B>::make(o.width, o.width, {.seed = seed + 3});
    o_proj = linear<T, B>::make(o.width, o.width, {.seed = seed + 4});
  }
  linear<T, B> q_proj, k_proj, v_proj, g_proj, o_proj;

  const gla_options& options() const { return options_; }
  index_t width() const { return options_.width; }
  index_t conv_channels() const { return 0; }
  index_t conv_width() const { return 1; }
  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "q_proj", self.q_proj);
    visit(f, "k_proj", self.k_proj);
    visit(f, "v_proj", self.v_proj);
    visit(f, "g_proj", self.g_proj);
    visit(f, "o_proj", self.o_proj);
  }
  auto project(const pass<T, B>& p, const tensor<T, 3, B>& u, const sequence_layout& layout,
               conv_state<T, B>*) const {
    constexpr index_t heads = 2;
    const auto gate = eval(-softplus(g_proj(p, u)), p.tape, p.ctx);
    auto product = packed(layout, gated(detail::split_heads(gate, heads),
                                        detail::split_heads(q_proj(p, u), heads) *
                                            transpose(detail::split_heads(k_proj(p, u), heads)))) *
                   detail::split_heads(v_proj(p, u), heads);
    return projected<decltype(product), T, B>{std::move(product), {}};
  }
  template <class Parts>
  tensor<T, 3, B> finish(const pass<T, B>& p, const tensor<T, 4, B>& y, const Parts&) const {
    return o_proj(p, detail::merge_heads(y));
  }

 private:
  gla_options options_;
};

/// 'g' is gated linear attention, 'w' attention with a window of 7 tokens.
template <Floating T, Backend B>
language_model<T, B> model_of(const std::string& pattern, std::uint64_t seed = 1) {
  auto config = small_config(pattern);
  // With a tied head, models without training repeat the last token.
  config.tie_embeddings = false;
  const auto windowed = [](const model_config& c, std::uint64_t s) {
    auto options = c.attention;
    options.window = 7;
    return mixer_layer<attention<T, B>>(c, options, s);
  };
  const auto gated_linear = [](const model_config& c, std::uint64_t s) {
    return mixer_layer<gla<T, B>>(c, gla_options{}, s);
  };
  return {config, seed, {{'w', windowed}, {'g', gated_linear}}};
}

constexpr const char* every_pattern[] = {"M", "m", "*", "w",    "L",      "R",  "g",
                                         "G", "D", "P", "M-*-", "m-w-G-", "p-M"};

template <class T, int R>
std::vector<T> elements_of(const tensor<T, R, cuda>& t) {
  const tensor<T, R> host = to<cpu>(t, cuda::current());
  return {host.data(), host.data() + host.size()};
}

const token_rows prompts = {{1, 2, 3}, {4}, {5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4}};

/// A model and a state that take every step by themselves.
template <class T>
struct plain_steps {
  const language_model<T, cuda>& model;
  model_state state;

  std::vector<T> operator()(const tensor<std::int32_t, 2>& ids) {
    const pass<T, cuda> p{.fixed_order = true};
    return elements_of(model.head()(p, model.advance(p, state, ids)));
  }
  void read(const token_rows& rows) {
    const detail::packed_ids packed(rows);
    (void)model.advance({}, state, packed.ids, packed.layout);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("cuda/decoding: a recorded step has the bits of a plain one at every position",
                   "[cuda][decoding]", float, bf16) {
  using T = TestType;
  for (const std::string pattern : every_pattern) {
    INFO("pattern " << pattern << ", " << sizeof(T) << " bytes");
    const auto model = model_of<T, cuda>(pattern);
    decoder<language_model<T, cuda>> steps(model, 3);
    plain_steps<T> plain{model, model.initial_state(3)};
    (void)steps.read(prompts);
    plain.read(prompts);
    int different = 0;
    for (std::uint64_t i = 0; i < 30; ++i) {
      const auto ids = random_ids(3, i % 5 == 4 ? 3 : 1, 10 + i);
      different += elements_of(steps.step(ids).logits) != plain(ids);
    }
    CHECK(different == 0);
    CHECK(steps.is_recorded(1));
    CHECK(steps.is_recorded(3));
    CHECK(steps.state() == plain.state);
  }
}

TEMPLATE_TEST_CASE("cuda/decoding: what is rolled back between recorded steps has never been",
                   "[cuda][decoding]", float, bf16) {
  using T = TestType;
  for (const std::string pattern : every_pattern) {
    INFO("pattern " << pattern << ", " << sizeof(T) << " bytes");
    const auto model = model_of<T, cuda>(pattern);
    decoder<language_model<T, cuda>> steps(model, 3, 4);
    plain_steps<T> plain{model, model.initial_state(3, 4)};
    (void)steps.read(prompts);
    plain.read(prompts);
    int different = 0;
    for (std::uint64_t i = 0; i < 8; ++i) {
      (void)steps.step(random_ids(3, 4, 100 + i));  // other tokens than come later
      steps.rollback(4);
      const auto ids = random_ids(3, 4, 200 + i);
      different += elements_of(steps.step(ids).logits) != plain(ids);
      const std::vector<index_t> counts{0, 1 + static_cast<index_t>(i) % 3, 4};
      steps.rollback(counts);
      plain.state.rollback(counts);
    }
    CHECK(different == 0);
    CHECK(steps.is_recorded(4));
    CHECK(steps.state() == plain.state);
    CHECK_THROWS_AS(steps.rollback(5), value_error);
  }
}

TEST_CASE("cuda/decoding: a state is forked between recorded steps and goes on either way",
          "[cuda][decoding]") {
  for (const std::string pattern : every_pattern) {
    INFO("pattern " << pattern);
    const auto model = model_of<float, cuda>(pattern);
    decoder<language_model<float, cuda>> steps(model, 3, 2);
    (void)steps.read(prompts);
    for (std::uint64_t i = 0; i < 4; ++i)
      (void)steps.step(random_ids(3, 1, i));
    const model_state kept = steps.state();
    plain_steps<float> fork{model, kept};
    int different = 0;
    for (std::uint64_t i = 0; i < 4; ++i) {
      const auto ids = random_ids(3, 1, 50 + i);
      different += elements_of(steps.step(ids).logits) != fork(ids);
    }
    CHECK(different == 0);
    CHECK(steps.state() == fork.state);
    CHECK_FALSE(steps.state() == kept);
    steps.set_state(kept);
    fork.state = kept;
    for (std::uint64_t i = 0; i < 4; ++i) {
      const auto ids = random_ids(3, 1, 70 + i);
      different += elements_of(steps.step(ids).logits) != fork(ids);
    }
    CHECK(different == 0);
  }
}

TEST_CASE("cuda/decoding: steps allocate and record nothing after the second", "[cuda][decoding]") {
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  const auto model = model_of<bf16, cuda>("M-*-m-w-G-L-R-g");
  decoder<language_model<bf16, cuda>> steps(model, 3, 0, {.temperature = 0.9, .top_k = 5}, ctx);
  (void)steps.read(prompts);
  CHECK_FALSE(steps.is_recorded());
  (void)steps.step();
  CHECK_FALSE(steps.is_recorded());
  (void)steps.step();
  CHECK(steps.is_recorded());
  ctx.synchronize();
  ctx.reset_peak();
  const memory_stats before = ctx.memory();
  for (int i = 0; i < 100; ++i)
    (void)steps.step();
  ctx.synchronize();
  const memory_stats after = ctx.memory();
  CHECK(after.in_use == before.in_use);
  CHECK(after.peak == before.peak);
  CHECK(after.cached == before.cached);
  CHECK(steps.is_recorded());
}

TEST_CASE("cuda/decoding: a cache that grows is recorded anew and changes no bit",
          "[cuda][decoding]") {
  const auto model = model_of<float, cuda>("*");
  decoder<language_model<float, cuda>> steps(model, 1);
  plain_steps<float> plain{model, model.initial_state(1)};
  int different = 0;
  for (std::uint64_t i = 0; i < 600; ++i) {
    const auto ids = random_ids(1, 1, i);
    const auto logits = elements_of(steps.step(ids).logits);
    if (i % 7 == 0 || (i > 250 && i < 262)) {
      different += logits != plain(ids);
    } else {
      (void)model.advance({}, plain.state, ids);
    }
  }
  CHECK(different == 0);
  CHECK(steps.state() == plain.state);
}

// Both kernels of the step, by the sizes that each takes; a bf16 model rounds its activations to
// 2^-9, which norms and gates pass on.
TEMPLATE_TEST_CASE("cuda/decoding: Mamba-2 steps give what one pass on the CPU gives in double",
                   "[cuda][decoding]", float, bf16) {
  using T = TestType;
  for (const bool usual_sizes : {false, true}) {
    for (const bool norm_first : {false, true}) {
      INFO((usual_sizes ? "P 64, N 64" : "P 6, N 5") << (norm_first ? ", norm first" : ""));
      auto config = small_config("MM");
      config.tie_embeddings = false;
      config.mamba2.norm_before_gate = norm_first;
      if (usual_sizes) {
        config.width = 64;
        config.mamba2.head_dim = config.mamba2.state = 64;
      }
      const language_model<T, cuda> here(config, 3);
      const language_model<double> there(config, 3);
      const auto ids = random_ids(3, 40, 5);
      const auto wanted = there.head()({}, there.hidden({}, ids));
      for (const index_t max_rollback : {0, 3}) {
        decoder<language_model<T, cuda>> steps(here, 3, max_rollback);
        double difference = 0, size = 0;
        const index_t cycle[] = {1, 3, 16, 1, 1, 5, 3, 1, 9};
        index_t t = 0;
        for (const index_t n : cycle) {
          tensor<std::int32_t, 2> piece(3, n);
          piece.copy_from(ids.slice(1, t, t + n));
          const auto logits = cast<double>(to<cpu>(steps.step(piece).logits, cuda::current()));
          logits.zip_with(wanted.slice(1, t, t + n), [&](const double& x, const double& y) {
            difference += (x - y) * (x - y);
            size += y * y;
          });
          t += n;
        }
        CHECK(t == 40);
        CHECK(difference <= size * (std::same_as<T, float> ? 1e-10 : 4e-4));
      }
    }
  }
}

TEST_CASE("cuda/decoding: tokens are those that the CPU generates", "[cuda][decoding]") {
  for (const std::string pattern : every_pattern) {
    INFO("pattern " << pattern);
    const auto here = model_of<float, cuda>(pattern);
    const auto there = model_of<float, cpu>(pattern);
    const auto both = [&](const generate_options& o) {
      CHECK(generate(here, prompts, o) == generate(there, prompts, o));
    };
    both({.max_new_tokens = 25});
    both({.max_new_tokens = 1});
    both({.max_new_tokens = 0});
    both({.max_new_tokens = 25, .sampling = {.temperature = 0.8, .seed = 3}});
    both({.max_new_tokens = 25, .sampling = {.temperature = 1.3, .top_k = 6, .seed = 4}});
    both({.max_new_tokens = 25,
          .sampling = {.temperature = 1.0, .top_p = 0.8, .min_p = 0.05, .seed = 5}});
  }
}

TEST_CASE("cuda/decoding: stop tokens end a sequence, the others go on", "[cuda][decoding]") {
  const auto here = model_of<float, cuda>("M-*-");
  const auto there = model_of<float, cpu>("M-*-");
  const auto free_run = generate(there, prompts, {.max_new_tokens = 12});
  for (const std::int32_t stop : {free_run[0][3], free_run[1][0], free_run[2][11]}) {
    CHECK(generate(here, prompts, {.max_new_tokens = 12, .stop = stop}) ==
          generate(there, prompts, {.max_new_tokens = 12, .stop = stop}));
  }
  // Called in order as tokens come, and not for what a step behind the last one gave.
  std::vector<std::pair<index_t, std::int32_t>> heard, wanted;
  const auto listen = [](auto& to) {
    return [&to](index_t i, std::int32_t token) { to.emplace_back(i, token); };
  };
  const std::int32_t stop = free_run[2][4];
  (void)generate(here, {prompts[2]},
                 {.max_new_tokens = 12, .stop = stop, .on_token = listen(heard)});
  (void)generate(there, {prompts[2]},
                 {.max_new_tokens = 12, .stop = stop, .on_token = listen(wanted)});
  CHECK(heard == wanted);
  CHECK_THROWS_WITH((void)generate(here, {{}}), ssm_test::contains("prompt 0 is empty"));
  CHECK_THROWS_WITH((void)generate(here, {{77}}), ssm_test::contains("id 77"));
}

TEMPLATE_TEST_CASE("cuda/decoding: greedy speculation equals plain decoding", "[cuda][decoding]",
                   float, bf16) {
  // Longer prompts are rounded in another way where tokens can be rolled back.
  const token_rows asked = {prompts[0], prompts[1], {5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1}};
  for (const std::string pattern : {"*-", "M-", "M-*-", "m-G-", "w-L-R-g"}) {
    const auto target = model_of<TestType, cuda>(pattern);
    const auto draft = model_of<TestType, cuda>("M", 77);
    for (const index_t k : {1, 4, 15}) {
      INFO("pattern " << pattern << ", " << k << " draft tokens, " << sizeof(TestType) << " bytes");
      const auto plain = generate(target, asked, {.max_new_tokens = 24});
      CHECK(speculate(target, draft, asked, {.max_new_tokens = 24}, {.draft_tokens = k}).tokens ==
            plain);
      const auto own = speculate(target, target, {prompts[0]}, {.max_new_tokens = 1 + 4 * (k + 1)},
                                 {.draft_tokens = k});
      CHECK(own.statistics.acceptance() == 1.0);
      CHECK(own.statistics.tokens_per_step() == double(k + 1));
    }
    const std::int32_t stop = generate(target, asked, {.max_new_tokens = 12})[0][5];
    CHECK(speculate(target, draft, asked, {.max_new_tokens = 12, .stop = stop}).tokens ==
          generate(target, asked, {.max_new_tokens = 12, .stop = stop}));
  }
}

TEST_CASE("cuda/decoding: sampled speculation draws what the CPU's draws", "[cuda][decoding]") {
  const generate_options options{.max_new_tokens = 20,
                                 .sampling = {.temperature = 0.9, .top_k = 8, .seed = 11}};
  const auto here = speculate(model_of<float, cuda>("M-*-"), model_of<float, cuda>("M", 77),
                              prompts, options, {.draft_tokens = 3});
  const auto there = speculate(model_of<float, cpu>("M-*-"), model_of<float, cpu>("M", 77), prompts,
                               options, {.draft_tokens = 3});
  CHECK(here.tokens == there.tokens);
  CHECK(here.statistics.accepted == there.statistics.accepted);
}

TEST_CASE("cuda/decoding: two contexts on two threads generate what one does", "[cuda][decoding]") {
  const generate_options options{.max_new_tokens = 60, .sampling = {.temperature = 0.9, .seed = 2}};
  const auto run = [&](const std::string& pattern) {
    const cuda::context ctx;
    const cuda::scope scope(ctx);
    const auto model = model_of<bf16, cuda>(pattern);
    return generate(model, prompts, options, ctx);
  };
  const token_rows first = run("M-*-"), second = run("G-m-");
  token_rows both[2];
  std::exception_ptr failures[2];
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      try {
        both[i] = run(i == 0 ? "M-*-" : "G-m-");
      } catch (...) {
        failures[i] = std::current_exception();
      }
    });
  }
  for (std::thread& t : threads)
    t.join();
  for (const auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
  CHECK(both[0] == first);
  CHECK(both[1] == second);
}

TEST_CASE("cuda/decoding: a step that does not fit is refused", "[cuda][decoding]") {
  const auto model = model_of<float, cuda>("M");
  decoder<language_model<float, cuda>> steps(model, 2);
  CHECK_THROWS_AS((void)steps.step(), value_error);
  CHECK_THROWS_AS((void)steps.step(random_ids(3, 1, 1)), shape_error);
  CHECK_THROWS_AS((void)steps.step(random_ids(2, 17, 1)), shape_error);
  CHECK_THROWS_AS(steps.set_state(model.initial_state(3)), shape_error);
  tensor<std::int32_t, 2> ids(2, 1);
  ids(0, 0) = 1;
  ids(1, 0) = 19;
  CHECK_THROWS_WITH((void)steps.step(ids), ssm_test::contains("an id is 19"));
  CHECK(steps.state().position(0) == 0);
}

TEST_CASE("cuda/graph: work is queued, recorded and then repeated by one launch", "[cuda][graph]") {
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  const auto x = to<cuda>(tensor<float, 1>::full({1000}, 1.0f), ctx);
  tensor<float, 1, cuda> y;
  int calls = 0;
  cuda_graph graph(ctx);
  const auto work = [&] {
    ++calls;
    y = {};
    const auto twice = eval(x + x, ctx);
    y = eval(twice + x, ctx);
    x.copy_from(y);
  };
  CHECK(graph.run(work));
  CHECK(graph.run(work));
  const auto in_use = ctx.memory().in_use;
  const float* const place = y.data();
  for (int i = 0; i < 5; ++i)
    CHECK_FALSE(graph.run(work));
  CHECK(calls == 2);
  CHECK(y.data() == place);
  CHECK(elements_of(y) == std::vector<float>(1000, 2187.0f));  // 3^7
  CHECK(ctx.memory().in_use == in_use);
  // What the work made stays when the graph is gone.
  graph.reset();
  CHECK(elements_of(y) == std::vector<float>(1000, 2187.0f));
  CHECK(graph.run(work));
  CHECK(elements_of(y) == std::vector<float>(1000, 6561.0f));
}

TEST_CASE("cuda/graph: work that copies from or to the host is queued every time",
          "[cuda][graph]") {
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  for (const bool from_host : {false, true}) {
    const auto x = to<cuda>(tensor<float, 1>::full({8}, 1.0f), ctx);
    int calls = 0;
    cuda_graph graph(ctx);
    for (int i = 0; i < 4; ++i) {
      CHECK(graph.run([&] {
        ++calls;
        if (from_host) {
          x.copy_from(to<cuda>(tensor<float, 1>::full({8}, float(i)), ctx));
        } else {
          (void)elements_of(x);
        }
      }));
    }
    CHECK(calls == 4);
    CHECK_FALSE(graph.is_recorded());
    CHECK(elements_of(x)[0] == (from_host ? 3.0f : 1.0f));
  }
}

TEST_CASE("cuda/graph: work that fails is reported and can be run again", "[cuda][graph]") {
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  const auto x = to<cuda>(tensor<float, 1>::full({8}, 1.0f), ctx);
  cuda_graph graph(ctx);
  int calls = 0;
  const auto work = [&] {
    if (++calls == 2) throw value_error("ssm: not now");
    x.copy_from(eval(x + x, ctx));
  };
  CHECK(graph.run(work));
  CHECK_THROWS_AS(graph.run(work), value_error);
  CHECK(graph.run(work));
  CHECK(graph.run(work));
  CHECK_FALSE(graph.run(work));
  CHECK(elements_of(x)[0] == 16.0f);
  // More memory than the first time.
  cuda_graph other(ctx);
  index_t size = 10;
  const auto growing = [&] { (void)eval(x + x, ctx), (void)tensor<float, 1, cuda>(size *= 1000); };
  CHECK(other.run(growing));
  CHECK_THROWS_WITH(other.run(growing), ssm_test::contains("more than in its first run"));
  ctx.synchronize();
}
