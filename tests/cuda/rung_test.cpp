#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace ssm;

/// The default context takes kernels of at most this compute capability.
class arch_cap {
 public:
  explicit arch_cap(int arch) { default_context<cuda>().set_arch_cap(arch); }
  ~arch_cap() { default_context<cuda>().set_arch_cap(std::numeric_limits<int>::max()); }
  arch_cap(const arch_cap&) = delete;
  arch_cap& operator=(const arch_cap&) = delete;
};

/// One layer whose sizes the tensor cores' kernels take: heads of 64, 64 keys.
model_config config_of(const std::string& pattern) {
  model_config c{.vocabulary = 61, .width = 128, .pattern = pattern};
  c.attention.heads = 2;
  c.attention.kv_heads = 1;
  c.attention.rope = rope_options{};
  c.mamba2.heads = 4;
  c.mamba2.head_dim = 64;
  c.mamba2.state = 64;
  c.mamba2.groups = 2;
  return c;
}

struct outcome {
  tensor<double, 3> hidden;
  std::vector<tensor<double, 1>> gradients;
  std::vector<std::string> names;
};

template <class T, int R, class B>
tensor<double, R> exact(const tensor<T, R, B>& t) {
  return cast<double>(ssm::detail::on_host(t));
}

/// The hidden states and every parameter's gradient of sum(dy * hidden).
template <class T, class B>
outcome run(const std::string& pattern, const sequence_layout& layout) {
  const language_model<T, B> model(config_of(pattern), 5);
  tensor<std::int32_t, 2> ids(1, 300);
  philox random(11);
  for (index_t i = 0; i < ids.size(); ++i)
    ids.data()[i] = static_cast<std::int32_t>(random.below(61));
  tape<T, B> t;
  const auto parameters = model.parameters();
  for (const auto& p : parameters)
    t.watch(p.value);
  const auto hidden = model.hidden(pass<T, B>{.tape = &t}, ids, layout);
  const auto dy = normal<float, 3>(hidden.extents(), 1.0, 9);
  t.gradient(hidden).copy_from(ssm::detail::on_backend<B>(cast<T>(dy)));
  t.backward();
  outcome r{exact(hidden), {}, {}};
  for (const auto& parameter : parameters) {
    r.gradients.push_back(exact(t.gradient(parameter.value)));
    r.names.push_back(parameter.name);
  }
  return r;
}

template <int R>
double distance(const tensor<double, R>& a, const tensor<double, R>& wanted) {
  double difference = 0, size = 0;
  a.zip_with(wanted, [&](const double& x, const double& y) {
    difference += (x - y) * (x - y);
    size += y * y;
  });
  return std::sqrt(difference / std::max(size, 1e-300));
}

/// Bounds as in cuda/model: bf16 rounds each activation to 2^-9.
void compare(const outcome& here, const outcome& wanted, double bound, double gradient_bound) {
  CHECK(distance(here.hidden, wanted.hidden) < bound);
  REQUIRE(here.names == wanted.names);
  for (std::size_t i = 0; i < here.names.size(); ++i) {
    INFO("gradient of " << here.names[i]);
    CHECK(distance(here.gradients[i], wanted.gradients[i]) < gradient_bound);
  }
}

outcome capped(const std::string& pattern, const sequence_layout& layout) {
  const arch_cap cap(80);
  return run<bf16, cuda>(pattern, layout);
}

void check_capped(const std::string& pattern) {
  for (const bool packed : {false, true}) {
    INFO((packed ? "packed" : "rectangular"));
    const auto layout =
        packed ? sequence_layout::from_lengths({5, 170, 0, 1, 124}) : sequence_layout{};
    compare(capped(pattern, layout), run<double, cpu>(pattern, layout), 2e-2, 6e-2);
  }
}

}  // namespace

TEST_CASE("cuda/rung: a cap lowers a context's architecture", "[cuda][rung]") {
  const cuda::context ctx;
  const int own = ctx.arch();
  ctx.set_arch_cap(80);
  CHECK(ctx.arch() == 80);
  ctx.set_arch_cap(1000);
  CHECK(ctx.arch() == own);
}

TEST_CASE("cuda/rung: Mamba-2 capped to sm_80 has the CPU's results and gradients",
          "[cuda][rung]") {
  check_capped("M");
}

TEST_CASE("cuda/rung: attention capped to sm_80 has the CPU's results and gradients",
          "[cuda][rung]") {
  check_capped("*");
}

// Both rungs round at the same places; what is between them is below an activation's rounding of
// 2^-9. Attention's tiles differ, and with them the largest logits so far: not every bit is the
// same.
TEST_CASE("cuda/rung: the rungs agree, and the cap chooses between them", "[cuda][rung]") {
  for (const char* pattern : {"M", "*"}) {
    INFO("pattern " << pattern);
    const outcome low = capped(pattern, {}), high = run<bf16, cuda>(pattern, {});
    compare(low, high, 0x1p-8, 0x1p-6);
    if (pattern == std::string("*") && default_context<cuda>().arch() / 10 == 9)
      CHECK(distance(low.hidden, high.hidden) > 0);
  }
}
